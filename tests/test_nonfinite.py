"""--on_nonfinite: what a NaN in a step leaves of a run, on one process and on two."""

import math

import pytest

from tests.small_runs import STEPS, killed_after, load, poison, records, same
from tests.test_distributed import launch
from utils.amp import Amp

COMMON = ("--epochs", 2, "--warmup_epochs", 0, "--on_nonfinite", "skip")
FLAGS = {
    "pretrain": ("--vis_freq", 0),
    "finetune": ("--model_ema", "true", "--model_ema_decay", 0.5, "--clip_grad", 1),
    "probe": ("--linear_probe", "true", "--smoothing", 0),
}
FAULTS = [("pretrain", "loss"), ("pretrain", "gradient"), ("finetune", "gradient"), ("finetune", "images")]


def run(scripts, stage, *flags):
    return getattr(scripts, "pretrain" if stage == "pretrain" else "finetune")(*COMMON, *FLAGS[stage], *flags)


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


def test_without_a_fault_nothing_changes(scripts, tmp_path):
    for mode in ("stop", "skip"):
        assert run(scripts, "finetune", "--output_dir", tmp_path / mode, "--on_nonfinite", mode).code == 0
    a, b = (load(tmp_path / mode / "checkpoint-1.pth") for mode in ("stop", "skip"))
    assert same(a["model"], b["model"])
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
