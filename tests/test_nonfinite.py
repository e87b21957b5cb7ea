"""--on_nonfinite: what a NaN in a step leaves of a run, on one process and on two."""

import math
import re

import pytest
import torch

from tests.small_runs import STEPS, killed_after, load, poison, records, same
from tests.test_distributed import launch
from utils.amp import Amp
from utils.checkpoint import numbered

COMMON = ("--epochs", 2, "--warmup_epochs", 0, "--on_nonfinite", "skip")
FLAGS = {
    "pretrain": ("--vis_freq", 0),
    "finetune": ("--model_ema", "true", "--model_ema_decay", 0.5, "--clip_grad", 1),
    "probe": ("--linear_probe", "true", "--smoothing", 0),
}
FAULTS = [("pretrain", "loss"), ("pretrain", "gradient"), ("finetune", "gradient"), ("finetune", "images")]


def run(scripts, stage, *flags):
    return getattr(scripts, "pretrain" if stage == "pretrain" else "finetune")(*COMMON, *FLAGS[stage], *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), [*FAULTS, ("probe", "images")])
def test_a_step_is_left_out_whole(stage, what, scripts, tmp_path, monkeypatch):
    """Weights, batch norm, optimizer and average are as before it; a resume inside the epoch still counts it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch.setattr, what, range(2, 3))
        result = run(scripts, stage, "--output_dir", whole)
    assert result.code == 0, result.err
    assert "skipped 1  time" in result.out
    with killed_after(3):
        poison(monkeypatch.setattr, what, range(2, 3))
        run(scripts, stage, "--output_dir", parts, "--save_ckpt_steps", 1)
    monkeypatch.undo()
    before, after = (load(parts / f"checkpoint-0-step{step}.pth") for step in (2, 3))
    for key in {"model", "scaler", "model_ema"} & before.keys():
        assert same(before[key], after[key]), key
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])  # the groups have the schedule's lr
    assert (before["partial"]["skipped"], after["partial"]["skipped"]) == (0, 1)
    assert run(scripts, stage, "--output_dir", parts).code == 0
    a, b = (load(folder / "checkpoint-1.pth") for folder in (whole, parts))
    assert same(a["model"], b["model"])
    assert records(whole) == records(parts)
    assert [line["train_skipped"] for line in records(whole)] == [1, 0]
    assert all(math.isfinite(line["train_loss"]) for line in records(whole))
    assert not same(before["model"], a["model"])


def test_a_step_that_is_left_out_shows_no_checkpoint_to_be_good(scripts, tmp_path, monkeypatch):
    """So two that are known to be good stay beside the newest one before it."""
    poison(monkeypatch.setattr, "gradient", range(3, 4))
    with killed_after(4):
        run(scripts, "finetune", "--output_dir", tmp_path, "--save_ckpt_steps", 1)
    assert {path.name for path in tmp_path.glob("*.pth")} == {f"checkpoint-0-step{i}.pth" for i in (1, 2, 3, 4)}


@pytest.mark.slow
def test_without_a_fault_nothing_changes(scripts, tmp_path):
    for mode in ("stop", "skip", "rollback"):
        assert run(scripts, "finetune", "--output_dir", tmp_path / mode, "--on_nonfinite", mode).code == 0
    a, *others = (load(tmp_path / mode / "checkpoint-1.pth") for mode in ("stop", "skip", "rollback"))
    assert all(same(a["model"], other["model"]) for other in others)
    assert "train_skipped" not in records(tmp_path / "stop")[0]


def test_where_nothing_is_finite_the_run_ends(scripts, tmp_path, monkeypatch):
    poison(monkeypatch.setattr, "gradient", range(STEPS, 100))
    result = run(scripts, "pretrain", "--output_dir", tmp_path)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "the gradient became NaN or infinite in all steps of epoch 1; " in result.err
    assert len(records(tmp_path)) == 1


def test_float16_infinite_gradients_are_the_scalers_affair(scripts, tmp_path, monkeypatch):
    """They lower the scale, as ever; a loss that is not finite leaves it as it was."""
    states, step = [], Amp.step

    def told(self, *args, **kwargs):
        norm = step(self, *args, **kwargs)
        states.append(self.scaler.state_dict())
        return norm

    monkeypatch.setattr(Amp, "step", told)
    poison(monkeypatch.setattr, "gradient", range(1, 2))
    poison(monkeypatch.setattr, "loss", range(2, 3))
    flags = ("--use_amp", "true", "--amp_dtype", "float16", "--clip_grad", 1)
    assert run(scripts, "finetune", "--output_dir", tmp_path, *flags).code == 0
    assert states[1]["scale"] == states[0]["scale"] / 2
    assert states[2] == states[1] != states[3]
    assert records(tmp_path)[0]["train_skipped"] == 1


BACK = "--on_nonfinite", "rollback", "--epochs", 3


def trained(path):
    return {key: value for key, value in load(path).items() if key in ("model", "optimizer", "model_ema", "scaler")}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what", "at"), [
    *((*fault, STEPS + 2) for fault in FAULTS), ("pretrain", "gradient", 2 * STEPS - 1), ("probe", "images", STEPS + 2),
])  # fmt: skip
def test_weights_go_back_and_data_go_on(stage, what, at, scripts, tmp_path, monkeypatch):
    """Epoch 1 ends as epoch 0 did, the average and batch norm too, and is followed by the data of epoch 2."""
    folder, begun = tmp_path / "back", tmp_path / "begun.pth"
    poison(monkeypatch.setattr, what, range(at, at + 1))
    result = run(scripts, stage, "--output_dir", folder, *BACK)
    assert result.code == 0, result.err
    line = f"the (loss|weights) became .* epoch 1; back to {folder}/checkpoint-0.pth, rollback 1 of 3, and on from here"
    assert len(re.findall(line, result.out)) == 1
    assert same(trained(folder / "checkpoint-0.pth"), trained(folder / "checkpoint-1.pth"))
    monkeypatch.undo()
    torch.save(load(folder / "checkpoint-0.pth") | {"epoch": 1}, begun)
    assert run(scripts, stage, "--output_dir", tmp_path / "on", "--resume", begun, *BACK).code == 0
    assert same(trained(folder / "checkpoint-2.pth"), trained(tmp_path / "on" / "checkpoint-2.pth"))
    assert records(folder)[2]["train_loss"] == records(tmp_path / "on")[0]["train_loss"]
    assert all(math.isfinite(line["train_loss"]) for line in records(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("what", "good", "aside"), [("loss", 1, 2), ("gradient", 2, None)])
def test_inside_an_epoch(what, good, aside, scripts, tmp_path, monkeypatch):
    """Step 2 of epoch 1 is bad; the checkpoint before it is good if a finite loss followed. A kill changes nothing."""
    flags, back = ("--save_ckpt_steps", 1, *BACK), tmp_path / "back"
    with killed_after(STEPS + good):
        run(scripts, "finetune", "--output_dir", tmp_path / "first", *flags)
    state = load(tmp_path / "first" / f"checkpoint-1-step{good}.pth")
    torch.save(state | {"step": 3, "partial": state["partial"] | {"step": 3}}, tmp_path / "begun.pth")
    assert (
        run(scripts, "finetune", "--output_dir", tmp_path / "on", "--resume", tmp_path / "begun.pth", *flags).code == 0
    )
    with killed_after(STEPS + 4):
        poison(monkeypatch.setattr, what, range(STEPS + 2, STEPS + 3))
        run(scripts, "finetune", "--output_dir", back, *flags)
    monkeypatch.undo()
    assert (back / f"checkpoint-1-step{aside}.diverged.pth").exists() == bool(aside)
    assert run(scripts, "finetune", "--output_dir", back, *flags).code == 0
    assert same(trained(back / "checkpoint-2.pth"), trained(tmp_path / "on" / "checkpoint-2.pth"))
    assert load(back / "checkpoint-2.pth")["rollbacks"] == 1


@pytest.mark.slow
def test_three_rollbacks_end_the_run(scripts, tmp_path, monkeypatch):
    """Also where a resume lies between; the checkpoint that is resumed is one to go back to."""
    good = tmp_path / "checkpoint-0.pth"
    said = (
        f"error: the loss became NaN .* after 3 rollbacks; {good} is good, the same command goes on from it. Try .*\n"
    )
    with monkeypatch.context() as patch:
        poison(patch.setattr, "loss", range(STEPS + 1, 100))
        result = run(scripts, "pretrain", "--output_dir", tmp_path, *BACK, "--epochs", 9)
    assert result.code == 1
    assert re.fullmatch(said, result.err)
    assert result.out.count(f"; back to {good}") == 3
    assert [epoch for epoch, *_ in numbered(tmp_path)] == [0]
    torch.save(load(good) | {"rollbacks": 2}, good)
    poison(monkeypatch.setattr, "loss", range(100))
    result = run(scripts, "pretrain", "--output_dir", tmp_path, *BACK)
    assert (result.code, result.out.count(f"; back to {good}, rollback 3 of 3")) == (1, 1)
    assert f"after 3 rollbacks; it followed from {good} at once" in result.err


def test_what_there_is_no_way_back_to(scripts, tmp_path, monkeypatch):
    for flags in ((), ("--output_dir", tmp_path / "x", "--save_ckpt", "false")):
        result = run(scripts, "pretrain", *BACK, *flags)
        assert (result.code, result.err) == (
            2,
            "error: --on_nonfinite rollback: needs --output_dir and --save_ckpt true\n",
        )
    poison(monkeypatch.setattr, "loss", range(2, 3))
    result = run(scripts, "pretrain", *BACK, "--output_dir", tmp_path)
    assert result.code == 1
    assert "in step 2 of epoch 0; no good checkpoint was saved" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), [FAULTS[0], FAULTS[2]])
def test_all_processes_go_back(stage, what, scripts, tmp_path):
    flags = (*COMMON, *FLAGS[stage], *BACK, "--save_ckpt_steps", 2)
    for processes in (1, 2):
        fault = {"NAN_ON_RANK": str(processes - 1), "NAN_IN": what, "NAN_AT": str(STEPS + 2)}
        spread = processes, tmp_path / f"{processes}", "--batch_size", 8 // processes
        done = launch(scripts, f"main_{stage}", *spread, *flags, **fault)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("rollback 1 of 3") == 1
    for line, other in zip(records(tmp_path / "1"), records(tmp_path / "2"), strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), FAULTS)
def test_all_processes_leave_out_what_one_cannot_take(stage, what, scripts, tmp_path):
    """Two then train as one does."""
    for processes, batch_size, mode in ((1, 8, "skip"), (2, 4, "skip"), (2, 4, "stop")):
        folder = tmp_path / f"{mode}{processes}"
        flags = (*COMMON, *FLAGS[stage], "--batch_size", batch_size, "--on_nonfinite", mode)
        fault = {"NAN_ON_RANK": str(processes - 1), "NAN_IN": what, "NAN_AT": "2"}
        done = launch(scripts, f"main_{stage}", processes, folder, *flags, **fault)
        assert (done.returncode == 0) == (mode == "skip"), done.stderr[-2000:]
    assert "became NaN or infinite" in done.stderr
    one, two = (tmp_path / name for name in ("skip1", "skip2"))
    assert [line["train_skipped"] for line in records(two)] == [1, 0]
    for line, other in zip(records(one), records(two), strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-4)
