"""Resuming, keeping and evaluating checkpoints through the entry scripts."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import datasets
import engine_finetune
import main_finetune
from models.convnextv2 import ConvNeXtV2
from tests.small_runs import STEPS, TINY, killed_after, load, records, same, snapshot
from utils import record
from utils.amp import Amp
from utils.interrupts import EXIT_CODE, Interrupts
from utils.run import Run

FLAGS = {
    "pretrain": ("--vis_freq", 0),
    "finetune": (
        *("--mixup", 0.8, "--cutmix", 1.0, "--drop_path", 0.3, "--layer_decay", 0.8, "--clip_grad", 1.0),
        *("--model_ema", "--model_ema_decay", 0.9, "--model_ema_eval", "true", "--weight_decay_end", 0.1),
    ),
}
STAGES = pytest.mark.parametrize("stage", ["pretrain", "finetune"])
LAST = "checkpoint-2.pth"


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    """Folders of uninterrupted runs of three epochs, by stage: to compare with, not to write to."""
    folders = {stage: tmp_path_factory.mktemp(stage) for stage in FLAGS}
    for stage, folder in folders.items():
        result = getattr(scripts, stage)("--output_dir", folder, *FLAGS[stage])
        assert result.code == 0, result.err
    return folders


def content(path):
    """A checkpoint without its arguments, which hold the folder's name, and its run's id."""
    return {key: value for key, value in load(path).items() if key not in ("args", "run")}


def accuracies(out):
    """What the lines of an evaluation say, by their header."""
    return {header: float(acc1) for header, acc1 in re.findall(r"^(eval.*): acc1 ([\d.]+)", out, re.M)}


# ---- bit for bit


@STAGES
@pytest.mark.parametrize("steps", [STEPS, 2 * STEPS, STEPS + 3], ids=["1+2", "2+1", "in epoch 1"])
def test_resume_is_bit_for_bit(stage, steps, scripts, whole, tmp_path):
    run = getattr(scripts, stage)
    with killed_after(steps):
        run("--output_dir", tmp_path, *FLAGS[stage])
    assert not (tmp_path / LAST).exists()
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"train_loss": 1.')  # what a kill while writing leaves
    result = run("--output_dir", tmp_path, *FLAGS[stage])
    assert f"resumed from {tmp_path}/checkpoint-{steps // STEPS - 1}.pth" in result.out
    assert same(content(tmp_path / LAST), content(whole[stage] / LAST))
    assert (tmp_path / "log.txt").read_text() == (whole[stage] / "log.txt").read_text()
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1, 2]
    if stage == "finetune":
        for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth"):
            assert same(content(tmp_path / name), content(whole[stage] / name))


@STAGES
def test_training_moves_the_weights(stage, whole):
    """So that the comparisons above compare something."""
    first, last = (load(whole[stage] / f"checkpoint-{epoch}.pth") for epoch in (0, 2))
    assert not same(first["model"], last["model"])
    assert not same(first["optimizer"]["state"], last["optimizer"]["state"])
    assert stage == "pretrain" or not same(last["model_ema"], last["model"])


@pytest.mark.slow
@STAGES
def test_a_truncated_newest_checkpoint_is_reported_and_skipped(stage, scripts, whole, tmp_path):
    run = getattr(scripts, stage)
    with killed_after(2 * STEPS):
        run("--output_dir", tmp_path, *FLAGS[stage])
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    result = run("--output_dir", tmp_path, *FLAGS[stage])
    assert re.search(rf"skipping {newest}: .*(truncated|damaged)", result.out)
    assert f"resumed from {tmp_path}/checkpoint-0.pth, going on with epoch 1" in result.out
    assert same(content(tmp_path / LAST), content(whole[stage] / LAST))
    assert (tmp_path / "log.txt").read_text() == (whole[stage] / "log.txt").read_text()


@pytest.mark.slow
@STAGES
def test_resume_of_a_named_file_into_another_folder(stage, scripts, whole, tmp_path):
    flags = ("--resume", whole[stage] / "checkpoint-0.pth", "--output_dir", tmp_path)
    result = getattr(scripts, stage)(*flags, *FLAGS[stage])
    assert result.code == 0, result.err
    assert same(content(tmp_path / LAST), content(whole[stage] / LAST))
    assert records(tmp_path) == records(whole[stage])[1:]


@pytest.mark.slow
@STAGES
def test_resume_of_an_epoch_whose_steps_are_done(stage, scripts, whole, tmp_path):
    """A signal in its last step; what is left is the line of log.txt, and the evaluation."""
    run, step, taken = getattr(scripts, stage), Amp.step, []

    def signalled(*args, **kwargs):
        taken.append(1)
        if len(taken) == 3 * STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Amp, "step", signalled)
        assert run("--output_dir", tmp_path, *FLAGS[stage]).code == EXIT_CODE
    assert (tmp_path / f"checkpoint-2-step{STEPS}.pth").exists()
    run("--output_dir", tmp_path, *FLAGS[stage])
    assert same(content(tmp_path / LAST), content(whole[stage] / LAST))
    assert (tmp_path / "log.txt").read_text() == (whole[stage] / "log.txt").read_text()


@pytest.mark.slow
def test_resume_of_the_best_checkpoint(scripts, whole, tmp_path, monkeypatch):
    """Its weights and average are gone on from, without the optimizer; older ones, which have that, to the last bit."""
    scores = iter([60.0, 50.0, 40.0])
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: {"acc1": next(scores)})
    flags = ("--drop_path", 0.2, "--model_ema", "true")
    assert scripts.finetune("--output_dir", tmp_path / "a", *flags).code == 0
    best, last = load(tmp_path / "a" / "checkpoint-best.pth"), load(tmp_path / "a" / LAST)
    assert set(best) == {"model", "model_ema", "epoch", "args", "run", "classes", "best", "order"}
    assert best["epoch"] == 0
    first = load(tmp_path / "a" / "checkpoint-0.pth")
    assert same(best, {key: first[key] for key in best})
    torch.save(first, tmp_path / "older.pth")
    for name, file in (("slim", tmp_path / "a" / "checkpoint-best.pth"), ("older", tmp_path / "older.pth")):
        scores = iter([50.0, 40.0])
        result = scripts.finetune("--output_dir", tmp_path / name, "--resume", file, *flags)
        assert result.code == 0, result.err
        assert "going on with epoch 1" in result.out
        assert (f"{file}: has no state of the optimizer" in result.out) == (name == "slim")
        assert same(content(tmp_path / name / LAST), content(tmp_path / "a" / LAST)) == (name == "older")
        assert "going on with epoch 1, best acc1 60.00 in epoch 0 of that run\n" in result.out
    scores = iter([50.0, 40.0])
    still = ("--lr", 0, "--min_lr", 0, "--resume", tmp_path / "a" / "checkpoint-best.pth")
    assert scripts.finetune("--output_dir", tmp_path / "still", *flags, *still).code == 0
    assert same(load(tmp_path / "still" / LAST)["model"], best["model"])
    assert not same(best["model"], last["model"])


@pytest.mark.slow
def test_best_accuracies_survive_a_resume(scripts, tmp_path, monkeypatch):
    """Epochs 1 and 2 are worse than epoch 0, the average best in epoch 1; the run dies in epoch 1 and in epoch 2."""
    table = {"eval": (50.0, 40.0, 30.0), "eval EMA": (20.0, 45.0, 45.0)}
    calls = dict.fromkeys(table, 0)

    def evaluate(model, loader, amp, header="eval", report=None):
        calls[header] += 1
        return {"acc1": table[header][calls[header] - 1]}

    monkeypatch.setattr(engine_finetune, "evaluate", evaluate)
    flags = ("--output_dir", tmp_path, "--model_ema", "--model_ema_eval")
    for steps in (STEPS + 1, STEPS + 1):
        with killed_after(steps):
            scripts.finetune(*flags)
    kept = (tmp_path / "checkpoint-best.pth").read_bytes()
    result = scripts.finetune(*flags)
    assert (tmp_path / "checkpoint-best.pth").read_bytes() == kept
    best = {"acc1": 50.0, "epoch": 0, "acc1_ema": 45.0, "epoch_ema": 1}
    assert load(tmp_path / LAST)["best"] == best
    assert load(tmp_path / "checkpoint-best-ema.pth")["epoch"] == 1
    assert "best acc1 50.00 in epoch 0, best acc1_ema 45.00 in epoch 1" in result.out.splitlines()[-1]


def test_a_best_checkpoint_is_kept_even_at_zero_accuracy(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: {"acc1": 0.0})
    scripts.finetune("--output_dir", tmp_path, "--epochs", 2)
    assert load(tmp_path / "checkpoint-best.pth")["epoch"] == 0


# ---- what is resumed, and what is not


@STAGES
def test_without_an_output_dir_nothing_is_resumed(stage, scripts, whole, tmp_path, monkeypatch):
    shutil.copy(whole[stage] / "checkpoint-0.pth", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    result = getattr(scripts, stage)(*FLAGS[stage], "--epochs", 2)
    assert result.code == 0
    assert "resumed" not in result.out
    assert "epoch 0 [1/5]" in result.out
    assert "nothing saved" in result.out.splitlines()[-1]
    assert snapshot(tmp_path) == before


@STAGES
def test_a_finished_run_has_nothing_to_do(stage, scripts, whole):
    before = snapshot(whole[stage])
    result = getattr(scripts, stage)("--output_dir", whole[stage], *FLAGS[stage])
    assert result.code == 0
    assert "nothing to do" in result.out.splitlines()[-1]
    assert snapshot(whole[stage]) == before


@pytest.mark.parametrize(("flag", "before", "can", "chosen"), [
    ("auto", None, True, "library"), ("auto", "library", True, "library"), ("auto", "triton", True, "triton"),
    ("auto", "triton", False, "library"), ("library", "triton", True, "library"), ("triton", "library", True, "triton"),
])  # fmt: skip
def test_one_choice_of_kernels_for_all_processes_and_resumes(flag, before, can, chosen, tmp_path):
    if before:
        torch.save({"args": {"kernels": before}, "epoch": 0}, tmp_path / "checkpoint-0.pth")
    args = main_finetune.get_args_parser().parse_args(["--kernels", flag, "--output_dir", str(tmp_path)])
    run = Run(vars(args), Amp(torch.device("cpu"), True, torch.bfloat16), Interrupts())
    asked = []
    assert run.triton(lambda *of: asked.append(of) or can) == (chosen == "triton")
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    assert args.kernels == chosen  # which checkpoints and run.json hold


def test_kernels_are_recorded_and_refused_where_they_cannot_run(scripts, tmp_path):
    assert scripts.finetune("--output_dir", tmp_path, "--epochs", 2).code == 0
    start = record.read(tmp_path)[-1]
    assert start["args"]["kernels"] == load(tmp_path / "checkpoint-1.pth")["args"]["kernels"] == "library"
    assert record.same_command(start, start["args"] | {"kernels": "auto"})
    result = scripts.finetune("--kernels", "triton")
    assert result.code == 2
    assert result.err.startswith("error: --kernels triton: needs a GPU")


def test_a_longer_run_goes_on_where_a_finished_one_ended(scripts, tmp_path):
    scripts.pretrain("--output_dir", tmp_path, "--epochs", 2)
    result = scripts.pretrain("--output_dir", tmp_path, "--epochs", 4)
    assert "going on with epoch 2" in result.out
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1, 2, 3]


def test_resume_after_finetune_does_not_read_the_pretrained_weights_again(scripts, whole, tmp_path):
    start = shutil.copy(whole["pretrain"] / LAST, tmp_path / "start.pth")
    flags = ("--finetune", start, "--output_dir", tmp_path / "out")
    with killed_after(STEPS):
        scripts.finetune(*flags)
    result = scripts.finetune(*flags)
    assert "resumed from" in result.out
    assert "loaded:" not in result.out


def test_resume_refuses_what_does_not_fit(scripts, whole, tmp_path):
    before = snapshot(whole["finetune"])
    checkpoint = whole["finetune"] / "checkpoint-0.pth"
    for flags, message in (
        (("--opt", "sgd"), "--opt sgd: .* trained with adamw"),
        ((), "its optimizer does not fit"),  # it had layer-wise decay
        (("--layer_decay", 0.8, "--stem_stride", 2), "checkpoint of another model"),
    ):
        result = scripts.finetune("--resume", checkpoint, "--output_dir", tmp_path, *flags)
        assert result.code == 2
        assert re.match(f"error: .*{message}", result.err)
    for stage, other, flag in (("finetune", "pretrain", "finetune"), ("pretrain", "finetune", "initial_checkpoint")):
        folder = shutil.copytree(whole[other], tmp_path / other)
        for flags in (("--resume", folder / LAST), ("--output_dir", folder)):
            result = getattr(scripts, stage)(*flags)
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f"{LAST}: was written by main_{other}.py; give it to --{flag}, and this run" in result.err
        assert snapshot(folder) == snapshot(whole[other])
    no_average = tmp_path / "no_average.pth"
    torch.save({**load(checkpoint), "model_ema": None}, no_average)
    result = scripts.finetune("--resume", no_average, *FLAGS["finetune"])
    assert result.err.startswith("error: --model_ema true")
    assert snapshot(whole["finetune"]) == before


@STAGES
def test_another_size_of_images_is_told(stage, scripts, whole, tmp_path):
    flags = ("--resume", whole[stage] / "checkpoint-1.pth", *FLAGS[stage])
    told = f"--input_size 32: {flags[1]} was trained with 16"
    assert getattr(scripts, stage)(*flags, "--input_size", 32).out.count(told) == 1
    assert "was trained with" not in getattr(scripts, stage)(*flags).out


# ---- whose checkpoint is it


def run_ids(folder):
    return {path.name: load(path).get("run") for path in sorted(folder.glob("*.pth"))}


@pytest.mark.slow
@STAGES
def test_started_over_and_killed_it_goes_on_from_its_own_checkpoints(stage, scripts, tmp_path):
    run, used = getattr(scripts, stage), tmp_path / "used"
    flags = ("--output_dir", used, *FLAGS[stage])
    assert run(*flags).code == 0
    before = snapshot(used)
    earlier = load(used / LAST)["run"]
    with killed_after(STEPS + 2):  # epoch 0 is saved
        run(*flags, "--seed", 5, "--auto_resume", "false")
    assert (used / f"checkpoint-0.{earlier}.pth").read_bytes() == before["checkpoint-0.pth"][1]
    result = run(*flags, "--seed", 5)
    assert f"resumed from {used}/checkpoint-0.pth, going on with epoch 1" in result.out
    assert getattr(scripts, stage)("--output_dir", tmp_path / "clean", *FLAGS[stage], "--seed", 5).code == 0
    assert same(content(used / LAST), content(tmp_path / "clean" / LAST))
    assert records(used) == records(tmp_path / "clean")
    after = snapshot(used)  # nothing of the earlier run is gone
    kept = {content for _, content in after.values()}
    assert {name for name, (_, old) in before.items() if old not in kept} <= {"run.json"}


@pytest.mark.slow
def test_started_over_and_killed_before_a_checkpoint_it_begins_again(scripts, tmp_path):
    scripts.pretrain("--output_dir", tmp_path, "--epochs", 2)
    with killed_after(2):
        scripts.pretrain("--output_dir", tmp_path, "--epochs", 2, "--auto_resume", "false")
    result = scripts.pretrain("--output_dir", tmp_path, "--epochs", 2)
    assert "resumed" not in result.out
    assert "epoch 0 [1/5]" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("saves", [0, 1], ids=["before its first checkpoint", "after it"])
@pytest.mark.parametrize("how", ["the same command", "torchrun", "slurm"])
def test_a_branch_goes_on_from_its_own_newest_or_from_the_file_again(how, saves, scripts, tmp_path, monkeypatch):
    """From epoch 0 of a run that went to epoch 2, with another learning rate, stopped and started again."""
    out, flags = tmp_path / "out", ["--output_dir", tmp_path / "out"]
    assert scripts.pretrain(*flags).code == 0
    branch = [*flags, "--lr", 1e-3, "--resume", out / "checkpoint-0.pth"]
    with killed_after(2 + saves * STEPS):
        scripts.pretrain(*branch)
    if how == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        branch += ["--auto_resume", "false"]
    if how == "slurm":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        branch += ["--auto_resume", "false"]
    result = scripts.pretrain(*branch)
    assert f"resumed from {out}/checkpoint-{saves}.pth, going on with epoch {1 + saves}" in result.out
    alone = scripts.pretrain("--output_dir", tmp_path / "b", "--lr", 1e-3, "--resume", out / "checkpoint-0.pth")
    assert alone.code == 0, alone.err
    assert same(content(out / LAST), content(tmp_path / "b" / LAST))
    first, second = load(out / "checkpoint-0.pth")["run"], load(out / LAST)["run"]
    assert first != second
    assert run_ids(out).items() >= {f"checkpoint-2.{first}.pth": first, "checkpoint-1.pth": second}.items()


def test_a_run_whose_start_is_gone_does_not_begin_with_random_weights(scripts, whole, tmp_path):
    start = shutil.copy(whole["pretrain"] / "checkpoint-0.pth", tmp_path / "start.pth")
    with killed_after(2):
        scripts.pretrain("--output_dir", tmp_path / "out", "--resume", start)
    start.unlink()
    result = scripts.pretrain("--output_dir", tmp_path / "out")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "this run went on from it; it is gone, or another now; --auto_resume false" in result.err
    assert scripts.pretrain("--output_dir", tmp_path / "out", "--auto_resume", "false", "--epochs", 2).code == 0


def test_a_run_does_not_begin_again_with_the_best_that_it_wrote_over_its_start(scripts, tmp_path, monkeypatch):
    """That has no state of the optimizer, and other weights."""
    scores = iter([10.0, 0.0, 20.0, 0.0])
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: {"acc1": next(scores)})
    assert scripts.finetune("--output_dir", tmp_path, "--epochs", 2).code == 0
    best = tmp_path / "checkpoint-best.pth"
    flags = ("--output_dir", tmp_path, "--resume", best, "--epochs", 9, "--save_ckpt_freq", 9)
    with killed_after(2 * STEPS + 1):
        scripts.finetune(*flags)
    assert load(best)["epoch"] == 1
    result = scripts.finetune(*flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{best}: this run went on from it; it is gone, or another now; " in result.err


def test_a_new_run_renames_what_an_earlier_one_left_and_no_more(scripts, tmp_path):
    scripts.pretrain("--output_dir", tmp_path, "--epochs", 2)
    (tmp_path / "my-plot-3.png").write_bytes(b"mine")
    earlier, before = load(tmp_path / "checkpoint-1.pth")["run"], snapshot(tmp_path)
    result = scripts.pretrain("--output_dir", tmp_path, "--epochs", 2, "--auto_resume", "false")
    assert "resumed" not in result.out
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1]
    after = snapshot(tmp_path)
    for name in ("my-plot-3.png", "log.txt", "reconstruction-1.png", "checkpoint-1.pth"):
        kept = name if name.startswith("my") else name.replace(".", f".{earlier}.")
        assert after[kept][1] == before[name][1]


@pytest.mark.slow
def test_a_launcher_that_starts_something_else_again_starts_over(scripts, tmp_path, monkeypatch):
    """The first attempt died before it had recorded itself: what run.json tells of is another run."""
    scripts.pretrain("--output_dir", tmp_path, "--epochs", 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    result = scripts.pretrain("--output_dir", tmp_path, "--epochs", 2, "--auto_resume", "false")
    assert "resumed" not in result.out


@pytest.mark.slow
def test_a_folder_of_older_checkpoints_goes_on(scripts, whole, tmp_path):
    """From before runs had ids: with the run.json of then, or none."""
    for name, told in (("a", {"starts": [{"args": {}, "started": "then"}]}), ("b", None)):
        folder = tmp_path / name
        folder.mkdir()
        for epoch in (0, 1):
            state = load(whole["pretrain"] / f"checkpoint-{epoch}.pth")
            torch.save({k: v for k, v in state.items() if k != "run"}, folder / f"checkpoint-{epoch}.pth")
        if told:
            (folder / "run.json").write_text(json.dumps(told))
        result = scripts.pretrain("--output_dir", folder, *FLAGS["pretrain"])
        assert f"resumed from {folder}/checkpoint-1.pth" in result.out
        assert same(content(folder / LAST), content(whole["pretrain"] / LAST))


@pytest.mark.slow
def test_evaluation_does_not_take_another_runs_best(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: {"acc1": 60.0})
    scripts.finetune("--output_dir", tmp_path)
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: {"acc1": 10.0})
    scripts.finetune("--output_dir", tmp_path, "--resume", tmp_path / "checkpoint-0.pth", "--lr", 1e-3)
    assert load(tmp_path / "checkpoint-best.pth")["run"] != load(tmp_path / LAST)["run"]
    monkeypatch.undo()
    result = scripts.finetune("--output_dir", tmp_path, "--eval", "true")
    assert f"eval {tmp_path / LAST}: acc1" in result.out


@pytest.mark.slow
def test_flags_of_the_first_weights_that_a_resume_does_not_read_are_told(scripts, whole, tmp_path):
    shutil.copytree(whole["finetune"], tmp_path / "a")
    flags = "--output_dir", tmp_path / "a", *FLAGS["finetune"], "--epochs", 4
    assert "no effect on" not in scripts.finetune(*flags).out
    other = "--finetune", whole["pretrain"] / LAST, "--head_init_scale", 0.5
    result = scripts.finetune(*flags, *other)
    for flag, value in (other[:2], other[2:]):
        assert f"{flag} {value}: no effect on what goes on from {tmp_path}/a/checkpoint-3.pth; another" in result.out
    flags = *flags[:-1], 5, "--crop_pct", 0.5, "--best_metric", "loss"
    told = f"--crop_pct: the best so far, of {tmp_path}/a/checkpoint-3.pth, was scored with the default, now with 0.5"
    assert told in scripts.finetune(*flags).out


@pytest.mark.parametrize(
    ("then", "now", "state", "told"),
    [
        ({"warmup_epochs": 1}, {"warmup_epochs": 20}, {"epoch": 9}, True),  # --epochs 10, then 30, no --warmup_epochs
        ({"warmup_epochs": 20}, {"warmup_epochs": 1}, {"epoch": 9}, True),
        ({"warmup_epochs": 1}, {"warmup_epochs": 20}, {"epoch": 19, "step": 2}, True),
        ({"warmup_epochs": 1}, {"warmup_epochs": 20}, {"epoch": 19}, False),  # the peak, in both
        ({"warmup_epochs": 20}, {"warmup_epochs": 20}, {"epoch": 9}, False),
        ({}, {"warmup_epochs": 20}, {"epoch": 9}, False),
        ({"warmup_epochs": 1}, {"warmup_epochs": 20, "warmup_steps": 5}, {"epoch": 9}, False),
    ],
)
def test_a_warm_up_of_another_length_is_told_by_a_resume_in_it(then, now, state, told, caplog):
    flags = {"input_size": (32, 32), **now}
    with caplog.at_level("INFO", logger="fcmae"):
        record.tell_begun(Path("a.pth"), {"args": then, **state}, flags)
    line = f"--warmup_epochs {now['warmup_epochs']}: a.pth was trained with {then.get('warmup_epochs')}, so"
    assert caplog.text.count(line) == told


@pytest.mark.parametrize(("goes_on", "told"), [(True, 0), (False, 1)])
def test_a_moving_average_that_a_resume_does_not_continue_is_told(goes_on, told, caplog):
    flags = {"input_size": (32, 32), "warmup_epochs": 0, "model_ema": goes_on}
    with caplog.at_level("INFO", logger="fcmae"):
        record.tell_begun(Path("a.pth"), {"epoch": 1, "model_ema": {"head.bias": torch.zeros(1)}}, flags)
    assert caplog.text.count("without --model_ema true: the moving average of a.pth ends here") == told


# ---- what decides the sums


def test_other_classes_or_another_order_of_them_are_refused(scripts, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(scripts.train, data)
    flags = ("--data_path", data, "--eval_data_path", data, "--output_dir", out)
    assert scripts.finetune(*flags, "--epochs", 2).code == 0
    before = snapshot(out)
    (data / "c1").rename(data / "d")
    result = scripts.finetune(*flags, "--epochs", 3)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "class 1 was 'c1', in the training data it is 'c2'" in result.err
    shutil.copytree(data / "d", data / "e")
    result = scripts.finetune(*flags, "--epochs", 3)
    assert result.code == 2
    assert "(4 and 5 classes)" in result.err
    assert snapshot(out) == before


@pytest.mark.slow
def test_inside_an_epoch_what_decides_its_order_cannot_change(scripts, tmp_path):
    flags = ("--output_dir", tmp_path, "--save_ckpt_steps", 1)
    with killed_after(2):
        scripts.finetune(*flags)
    for more, said in (
        (("--seed", 1), "--seed 1: .* begun with 0"),
        (("--mixup", 0.8), "Mixup or CutMix True: .* begun with False"),
        (("--images_per_class", 9), "number of images 36: .* begun with 40"),
    ):
        result = scripts.finetune(*flags, *more)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert re.search(said, result.err)
    assert "resumed from" in scripts.finetune(*flags).out
    assert "resumed from" in scripts.finetune(*flags, "--seed", 1, "--epochs", 4).out  # at an epoch's end


# ---- NaN


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--save_ckpt_steps", 1), ()], ids=["steps", "epochs"])
def test_nan_is_never_saved(flags, scripts, tmp_path):
    """The message names what is good, and what it advises helps."""
    common = ("--output_dir", tmp_path, "--epochs", 2, "--save_ckpt_num", 1, "--warmup_epochs", 0, *flags)
    assert scripts.finetune(*common, "--epochs", 1).code == 0
    result = scripts.finetune(*common, "--lr", 1e9)
    assert result.code == 1
    assert "became NaN or infinite" in result.err
    assert f"; {tmp_path}/checkpoint-0.pth is good, the same command goes on from it" in result.err
    assert result.err.endswith("Try a lower --lr or a longer --warmup_epochs or --clip_grad\n")
    for path in tmp_path.glob("*.pth"):
        assert all(v.isfinite().all() for v in load(path)["model"].values()), path
    result = scripts.finetune(*common, "--lr", 1e-6)
    assert result.code == 0, result.err
    assert f"resumed from {tmp_path}/checkpoint-0.pth" in result.out


def test_weights_that_are_nan_after_a_good_loss_are_not_saved(scripts, tmp_path, monkeypatch):
    step = Amp.step

    def poisoned(self, optimizer, **kwargs):
        norm = step(self, optimizer, **kwargs)
        optimizer.param_groups[0]["params"][0].data.view(-1)[0] = torch.nan
        return norm

    scripts.pretrain("--output_dir", tmp_path, "--epochs", 1, "--warmup_epochs", 0)
    monkeypatch.setattr(Amp, "step", poisoned)
    result = scripts.pretrain("--output_dir", tmp_path, "--epochs", 2, "--batch_size", 40, "--vis_freq", 1)
    assert result.code == 1
    assert "the weights became NaN or infinite in epoch 1" in result.err
    assert len(records(tmp_path)) == 1
    assert not (tmp_path / "reconstruction-1.png").exists()
    assert f"{tmp_path}/checkpoint-0.pth is good" in result.err
    assert result.err.endswith("Try a lower --lr or a longer --warmup_epochs\n")  # what this script has
    assert list(run_ids(tmp_path)) == ["checkpoint-0.pth"]


# ---- what is kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ((), [2, 3, 4]),
        (("--save_ckpt_num", 1), [4]),
        (("--save_ckpt_freq", 2), [1, 3, 4]),
        (("--save_ckpt_freq", 10, "--save_ckpt_num", 2), [4]),
        (("--save_ckpt", "false"), []),
    ],
)
@STAGES
def test_which_checkpoints_are_kept(stage, flags, kept, scripts, tmp_path):
    result = getattr(scripts, stage)("--output_dir", tmp_path, "--epochs", 5, "--batch_size", 20, *flags)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.glob("checkpoint-?.pth")) == [f"checkpoint-{i}.pth" for i in kept]
    assert len(records(tmp_path)) == 5
    assert (tmp_path / "checkpoint-best.pth").exists() == (stage == "finetune" and bool(kept))
    assert not list(tmp_path.glob(".*")), "left-over files"


# ---- evaluation alone


def test_evaluation_alone_agrees_with_training(scripts, whole, tmp_path):
    """Without the training folder; the best of output_dir, a named file, a dense state dict."""
    out, val = whole["finetune"], tmp_path / "val"
    shutil.copytree(scripts.val, val)
    by_epoch = records(out)
    best = load(out / "checkpoint-best.pth")["epoch"]
    before = {name: found for name, found in snapshot(out).items() if not name.startswith(("report", "confusion"))}
    where = ("--data_path", tmp_path / "nowhere", "--eval_data_path", val, "--eval", "true")

    result = scripts.finetune(*where, "--output_dir", out, "--model_ema_eval", "true")
    assert result.code == 0, result.err
    name = out / "checkpoint-best.pth"
    assert accuracies(result.out) == {
        f"eval {name}": pytest.approx(by_epoch[best]["test_acc1"], abs=0.006),
        f"eval {name} (EMA)": pytest.approx(by_epoch[best]["test_acc1_ema"], abs=0.006),
    }
    torch.save(load(out / LAST)["model"], tmp_path / "weights.pth")
    for flags in (("--resume", out / LAST), ("--finetune", out / LAST), ("--resume", tmp_path / "weights.pth")):
        result = scripts.finetune(*where, *flags)
        assert list(accuracies(result.out).values()) == [pytest.approx(by_epoch[2]["test_acc1"], abs=0.006)]
        assert f"loss {by_epoch[2]['test_loss']:.4f}" in result.out
        assert "(22 images)" in result.out
    result = scripts.finetune(*where, "--resume", out / LAST, "--model_key", "model_ema")
    assert list(accuracies(result.out).values()) == [pytest.approx(by_epoch[2]["test_acc1_ema"], abs=0.006)]
    assert snapshot(out).items() >= before.items()


def test_evaluation_takes_the_class_order_from_the_checkpoint(scripts, whole, tmp_path):
    """The validation folder lacks class c1, so its own numbering would be wrong; and no training folder tells it."""
    state = load(whole["finetune"] / LAST)
    assert state["classes"] == ["c0", "c1", "c2", "c3"]
    state["model"]["head.weight"] = torch.randn(4, TINY["dims"][-1], generator=torch.Generator().manual_seed(1))
    torch.save(state, tmp_path / "varied.pth")
    model = ConvNeXtV2(num_classes=4, **TINY, stem_stride=1).eval()
    model.load_state_dict(state["model"])
    shutil.copytree(scripts.val, tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "c1")

    args = main_finetune.get_args_parser().parse_args(["--input_size", "16"])
    transform, hits, renumbered = datasets.build_transform(False, args), [], []
    for path in sorted((tmp_path / "val").rglob("*.png")):
        predicted = model(transform(Image.open(path))[None]).argmax().item()
        hits.append(predicted == int(path.parent.name[1]))
        renumbered.append(predicted == {"c0": 0, "c2": 1, "c3": 2}[path.parent.name])
    assert sum(hits) != sum(renumbered)
    result = scripts.finetune(
        *("--eval", "--resume", tmp_path / "varied.pth", "--eval_data_path", tmp_path / "val"),
        *("--data_path", tmp_path / "nowhere"),
    )
    assert list(accuracies(result.out).values()) == [pytest.approx(100 * sum(hits) / len(hits), abs=0.006)]


def test_evaluation_needs_a_checkpoint(scripts, whole, tmp_path):
    for flags, message in (
        ((), "--eval true"),
        (("--output_dir", tmp_path), "--eval true"),
        (("--output_dir", whole["finetune"], "--auto_resume", "false"), "--eval true"),
        (("--resume", whole["pretrain"] / LAST), "without a classifier's head"),
        (("--resume", whole["finetune"] / LAST, "--stem_stride", 2), "another model"),
    ):
        result = scripts.finetune("--eval", "true", *flags)
        assert result.code == 2
        assert result.err.startswith("error: ")
        assert message in result.err
