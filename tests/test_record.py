"""run.json and the trackers: what a run writes down about itself, also when it is resumed, refused or cut short."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import types
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import create_optimizer_v2

import engine_finetune
import main_finetune
from models.convnextv2 import ConvNeXtV2
from tests.small_runs import STEPS, TINY, killed_after, load, records, same
from tests.test_distributed import launch
from utils import checkpoint, errors, metrics, record, run
from utils.amp import Amp
from utils.args import prepared_output_dir
from utils.metrics import RunLog

CPU = torch.device("cpu")
BARE = ("--vis_freq", 0)


def starts(folder: Path) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["starts"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def age(text: str) -> float:
    """Seconds since a moment of run.json."""
    moment = datetime.fromisoformat(text)
    assert moment.utcoffset().total_seconds() == 0
    return (datetime.now(timezone.utc) - moment).total_seconds()


# ---- run.json


def test_a_run_records_itself(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "main_finetune.py", "--data_path", "my images"])
    result = scripts.finetune("--output_dir", tmp_path, "--clip_grad", 5, "--opt_betas", 0.9, 0.95)
    assert result.code == 0, result.err
    (start,) = starts(tmp_path)
    assert start["command"] == "python -u main_finetune.py --data_path 'my images'"
    assert start["args"].keys() == vars(main_finetune.get_args_parser().parse_args([])).keys()
    assert start["args"]["opt_betas"] == [0.9, 0.95]
    assert start["args"]["clip_grad"] == 5.0
    assert start["args"]["output_dir"] == str(tmp_path)
    assert (start["resumed_from"], start["processes"], start["device"]) == (None, 1, "cpu")
    assert start["run"] == load(tmp_path / "checkpoint-2.pth")["run"]
    assert 0 <= age(start["started"]) < 300
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"].keys() == {"python", "torch", "torchvision", "timm", "numpy"}
    assert not list(tmp_path.glob(".*"))


def test_a_resume_appends(scripts, tmp_path):
    with killed_after(STEPS + 3):
        scripts.pretrain("--output_dir", tmp_path, *BARE)
    (first,) = starts(tmp_path)
    assert scripts.pretrain("--output_dir", tmp_path, "--weight_decay", 0.1, *BARE).code == 0
    assert starts(tmp_path)[0] == first
    second = starts(tmp_path)[1]
    assert second["resumed_from"] == str(tmp_path / "checkpoint-0.pth")
    assert (first["args"]["weight_decay"], second["args"]["weight_decay"]) == (0.05, 0.1)
    assert scripts.pretrain("--output_dir", tmp_path, "--auto_resume", "false", "--epochs", 2, *BARE).code == 0
    assert starts(tmp_path)[:2] == [first, second]
    assert len({start["run"] for start in starts(tmp_path)}) == 2


@pytest.mark.parametrize("text", [
    "", '{"starts": [', "[]", "{}", '{"starts": 3}', '{"starts": ["a"]}', "\x00", "[" * 100_000,
    '{"starts": [{"args": 3}]}', '{"starts": [{"resumed_from": 3}]}',
])  # fmt: skip
def test_a_damaged_record_is_put_aside(tmp_path, text, caplog, monkeypatch):
    monkeypatch.setattr(record.log, "propagate", True)
    (tmp_path / "run.json").write_text(text)
    assert record.read(str(tmp_path)) == []
    assert (tmp_path / "run.damaged.json").read_text() == text
    assert not (tmp_path / "run.json").exists()
    assert "run.json: not the record of a run" in caplog.text


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(errors.log, "propagate", True)
    record.add_start(str(tmp_path), {"lr": 1}, CPU)
    before = starts(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    record.add_start(str(tmp_path), {"lr": 2}, CPU)
    assert starts(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert "run.json was NOT written (No space left on device)" in caplog.text


def test_arguments_are_recorded_plain():
    """In run.json and checkpoints alike: without a class, and with the bytes of a path that is no text."""
    flags = {"output_dir": Path("a"), "pair": (1, 2), "lr": None, "eval": True, "blr": 0.5, "name": "\udcff"}
    expected = flags | {"output_dir": "a", "pair": [1, 2]}
    assert record.plain(flags) == expected
    assert json.loads(json.dumps(record.plain(flags))) == expected


@pytest.mark.parametrize(("given", "kept"), [
    ("https://me:s3cret@host/x.pth", "https://***@host/x.pth"),
    ("https://host/x.pth?sig=s3cret&X-Amz-Signature=s3cret", "https://host/x.pth?***"),
    ("https://host/x.pth?a='1'&sig=s3cret\"&b=s3cret", "https://host/x.pth?***"),
    ("https://me:a's3cret@host/x's.pth?sig=s3cret", "https://***@host/x's.pth?***"),
    ("export HF_TOKEN=s3cret; module load cuda", "export HF_TOKEN=***; module load cuda"),
    ("export MY_SECRET='it is s3cret' A='1'", "export MY_SECRET='***' A='1'"),
    ("export WANDB_API_KEY=\"s3cret\" A='1'", "export WANDB_API_KEY=\"***\" A='1'"),
])  # fmt: skip
def test_secrets_are_not_recorded(given, kept, tmp_path, monkeypatch):
    """Neither of flags, --setup of a job among them, nor of the environment."""
    flags = {"finetune": given, "data_path": "a@b?c", "model_key": "model|module", "depth": 8}
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", "--finetune", given])
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    record.add_start(str(tmp_path), flags, torch.device("cpu"))
    assert "s3cret" not in (tmp_path / "run.json").read_text()
    (start,) = record.read(str(tmp_path))
    assert start["args"] == flags | {"finetune": kept}
    assert shlex.split(start["command"])[-1] == kept
    assert record.same_command(start, flags)


def test_a_flag_that_came_with_an_update_makes_no_other_command():
    start = {"args": {"lr": 1, "depth": 8, "output_dir": "a", "removed": 1}}
    assert record.same_command(start, {"lr": 1, "depth": None, "output_dir": "b", "newer": 1})
    assert not record.same_command(start, {"lr": 2, "depth": None, "output_dir": "a"})
    assert not record.same_command({}, {"lr": 1})


def test_a_picture_on_a_full_disk_does_not_end_a_run(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(errors.log, "propagate", True)
    shown = types.SimpleNamespace(log=RunLog(), output_dir=str(tmp_path / "gone"))
    run.Run.picture(shown, "reconstruction", torch.rand(3, 4, 4), 2)
    assert "reconstruction-2.png was NOT written (No such file or directory)" in caplog.text


def test_what_an_earlier_run_wrote_is_renamed(tmp_path):
    for name in (
        "log.txt",
        "summary.csv",
        "bad_images.txt",
        "reconstruction-1.png",
        "reconstruction-2.png",
        "my-3.png",
    ):
        (tmp_path / name).touch()
    record.set_earlier_aside(str(tmp_path), 2)
    expected = {"log.earlier.txt", "bad_images.earlier.txt", "reconstruction-1.png", "reconstruction-2.earlier.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"my-3.png", "summary.earlier.csv"}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_revision_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        settings = ("user.name=a", "user.email=a@b", "commit.gpgsign=false", "tag.gpgsign=false")
        command = ["git", "-C", tmp_path, *(word for setting in settings for word in ("-c", setting)), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True)

    assert record.git_revision(tmp_path) is None
    git("init", "-q")
    assert record.git_revision(tmp_path) is None  # nothing is committed
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "one")
    git("tag", "-a", "v1", "-m", "a tag")
    revision = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "data.txt").write_text("not part of the code")
    assert record.git_revision(tmp_path) == revision
    (tmp_path / "a.py").write_text("2")
    assert record.git_revision(tmp_path) == f"{revision}-dirty"
    (tmp_path / "below").mkdir()
    assert record.git_revision(tmp_path / "below") is None  # a copy of the code inside something else
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git_revision(tmp_path) is None  # no git


@pytest.mark.slow
def test_two_processes(scripts, tmp_path):
    """One record of both; and without --dist_eval both look at all images, which count once."""
    flags = ["--epochs", 2, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0, "--batch_size", 4, "--eval_freq", 2]
    done = launch(scripts, "main_finetune", 2, tmp_path / "two", *flags, "--dist_eval", "false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"\((\d+) images\)", done.stdout) == ["22"]
    assert scripts.finetune("--output_dir", tmp_path / "one", *flags).code == 0
    for key in ("test_acc1", "test_acc5", "test_loss"):
        assert records(tmp_path / "two")[1][key] == pytest.approx(records(tmp_path / "one")[1][key], rel=1e-6)
    (start,) = starts(tmp_path / "two")
    assert start["processes"] == 2


@pytest.mark.parametrize(("sampler", "counted"), [(range(8), 8), (range(0, 8, 2), 8), (None, 16)])
def test_images_that_every_process_sees_count_once(sampler, counted, monkeypatch, caplog):
    """Two processes with the same images each; with every other one; with streams, which are split elsewhere."""
    monkeypatch.setattr(engine_finetune, "get_world_size", lambda: 2)
    monkeypatch.setattr(engine_finetune, "all_reduce_sum", lambda tensor: tensor * 2)
    monkeypatch.setattr(engine_finetune.log, "propagate", True)
    caplog.set_level("INFO", "fcmae")
    model = ConvNeXtV2(num_classes=3, **TINY, stem_stride=1)
    images = [(torch.ones(3, 16, 16), 0)] * 8
    loader = torch.utils.data.DataLoader(images, sampler=sampler, batch_size=4)
    engine_finetune.evaluate(model, loader, Amp(CPU, False, torch.bfloat16))
    assert f"({counted} images)" in caplog.text


# ---- Weights & Biases


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged = options, []

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.fixture
def wandb(monkeypatch):
    """A module of this name that keeps what it is given in `runs`."""
    module = types.ModuleType("wandb")
    module.runs, module.Image = [], lambda picture: picture
    module.Error = type("Error", (Exception,), {})

    def init(**options):
        module.runs.append(FakeRun(**options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_what_tensorboard_gets(scripts, wandb, tmp_path):
    flags = ("--output_dir", tmp_path / "tiny", "--wandb", "shapes", "--epochs", 2, "--vis_freq", 2)
    assert scripts.pretrain(*flags).code == 0
    (run,) = wandb.runs
    assert {k: run.options[k] for k in ("project", "resume", "name", "dir")} == {
        "project": "shapes", "resume": "allow", "name": "tiny", "dir": str(tmp_path / "tiny"),
    }  # fmt: skip
    assert run.options["config"]["mask_ratio"] == 0.6
    assert starts(tmp_path / "tiny")[0]["run"] == run.options["id"]
    steps = [step for step, _ in run.logged]
    assert steps == sorted(steps)  # it drops what comes out of order
    assert all(values["epoch"] == pytest.approx(step / 1000, abs=5e-4) for step, values in run.logged)
    for tag, points in curves(tmp_path / "tiny").items():
        sent = [(step, values[tag]) for step, values in run.logged if tag in values]
        assert sent == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    pictures = [(step, values["reconstruction"]) for step, values in run.logged if "reconstruction" in values]
    assert [step for step, _ in pictures] == [2000]
    assert pictures[0][1].size == (6 * 132 + 4, 4 * 132 + 4)


def test_wandb_without_any_folder(scripts, wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scripts.finetune("--wandb", "shapes", "--epochs", 2).code == 0
    (run,) = wandb.runs
    assert run.options["dir"] is None
    assert [step for step, values in run.logged if "test/acc1" in values] == [1000, 2000]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_resume_goes_on_in_the_same_wandb_run(scripts, wandb, tmp_path):
    flags = ("--output_dir", tmp_path, *BARE)
    with killed_after(2):
        scripts.pretrain(*flags, "--wandb", "a")
    with killed_after(STEPS + 2):
        scripts.pretrain(*flags, "--wandb", "a")  # from the beginning, so in a run of its own
    with killed_after(STEPS + 2):
        scripts.pretrain(*flags)  # without; it gets to epoch 1
    for project in ("b", "a"):
        scripts.pretrain(*flags, "--wandb", project, "--epochs", 3 if project == "b" else 4)
    first, second, other, last = [(run.options["project"], run.options["id"]) for run in wandb.runs]
    assert [first[0], second[0], other[0], last[0]] == ["a", "a", "b", "a"]
    ids = [start["run"] for start in starts(tmp_path)]
    assert [first[1], second[1], other[1], last[1]] == [ids[0], ids[1], ids[3], ids[4]]
    assert ids[0] != ids[1]
    assert len({*ids[2:]}) == 1
    assert wandb.runs[-1].options["allow_val_change"] is True


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_wandb_that_is_not_installed(stage, scripts, tmp_path, monkeypatch):
    for module in (None, types.ModuleType("wandb")):  # the second: a mere folder of this name
        monkeypatch.setitem(sys.modules, "wandb", module)
        result = getattr(scripts, stage)("--wandb", "x", "--data_path", "/nowhere", "--output_dir", tmp_path / "out")
        assert (result.code, result.err) == (2, "error: --wandb x: needs a package more: pip install wandb\n")
        assert result.out == ""
    assert not list(tmp_path.iterdir())


def test_wandb_that_refuses(scripts, wandb, tmp_path):
    def init(**_):
        raise wandb.Error("No API key configured.")

    wandb.init = init
    result = scripts.pretrain("--wandb", "x", "--output_dir", tmp_path / "out", *BARE)
    expected = "error: --wandb x: No API key configured; WANDB_MODE=offline needs no account\n"
    assert (result.code, result.err) == (2, expected)
    assert not list(tmp_path.iterdir())


# ---- TensorBoard


@pytest.mark.slow
def test_curves_of_a_run_that_was_stopped_are_whole(scripts, tmp_path, monkeypatch):
    """Killed ten times, a step after a save, and moved each time: no point is missing, and none there twice."""
    monkeypatch.setattr(metrics.Progress, "due", lambda self, step: True)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 0.0)
    flags = (*BARE, "--save_ckpt_steps", 2, "--epochs", 6)
    assert scripts.pretrain("--output_dir", tmp_path / "whole", *flags).code == 0
    folder = tmp_path / "0"
    for i in range(1, 11):
        with killed_after(3):
            scripts.pretrain("--output_dir", folder, *flags)
        folder = folder.rename(tmp_path / f"{i}")
    stopped = [step for step, _ in curves(folder)["train/loss"]]
    assert stopped == list(range(200, 5200, 200))
    assert f"resumed from {folder}/checkpoint-4.pth" in scripts.pretrain("--output_dir", folder, *flags).out
    assert curves(folder) == curves(tmp_path / "whole")
    assert records(folder) == records(tmp_path / "whole")


def test_curves_of_a_run_that_a_clock_set_back_are_whole(tmp_path, monkeypatch):
    for done, now in ((0, 2e9), (2, 1.9e9), (3, 1.95e9), (4, 1.8e9)):
        monkeypatch.setattr(metrics.time, "time", lambda now=now: now)
        run_log = RunLog("", str(tmp_path), done)
        run_log.scalars(done + 1, **{"train/loss": now})
        run_log.scalars(done + 2, **{"train/loss": now})  # of all but the last, what the next one does again
        run_log.close()
    monkeypatch.undo()
    steps, values = zip(*curves(tmp_path)["train/loss"], strict=True)
    assert steps == (1000, 2000, 3000, 4000, 5000, 6000)
    assert values == pytest.approx((2e9, 2e9, 1.9e9, 1.95e9, 1.8e9, 1.8e9))


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)  # TensorBoard's thread ends with the exception
    monkeypatch.setattr(errors.log, "error", lambda text, *words: messages.append(text % words))
    run_log = RunLog(str(tmp_path), str(tmp_path))
    run_log.epoch({"epoch": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file of this process grows beyond that
    try:
        for epoch in range(1, 60):
            run_log.scalars(epoch, loss=1.0, acc1=2.0)
            run_log.epoch({"epoch": epoch, "x" * 100: 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run_log.scalars(60, loss=1.0)
    run_log.epoch({"epoch": 60})
    run_log.close()
    *before, last = [line["epoch"] for line in records(tmp_path)]  # each is whole
    assert before == list(range(len(before)))
    assert 10 < len(before) < 50
    assert last == 60
    assert [text for text in messages if "curves" in text] == [
        f"{tmp_path}: no more curves (File too large); training goes on"
    ]
    lost = [text for text in messages if "log.txt" in text]
    assert lost[0] == f"{tmp_path}/log.txt lacks epoch {len(before)} (File too large); training goes on"
    assert len(lost) == 60 - len(before)


# ---- --eval_freq


@pytest.mark.slow
def test_evaluation_every_few_epochs(scripts, tmp_path):
    flags = ("--epochs", 5, "--batch_size", 20, "--model_ema", "--model_ema_eval")
    assert scripts.finetune("--output_dir", tmp_path / "all", *flags).code == 0
    result = scripts.finetune("--output_dir", tmp_path / "some", *flags, "--eval_freq", 2)
    assert result.code == 0
    assert len(re.findall("^eval:", result.out, re.MULTILINE)) == 3
    every, some = records(tmp_path / "all"), records(tmp_path / "some")
    evaluated = [line["epoch"] for line in some if "test_acc1" in line]
    assert evaluated == [1, 3, 4]
    for line, full in zip(some, every, strict=True):
        tested = line["epoch"] in evaluated
        assert line == {k: v for k, v in full.items() if tested or not k.startswith("test_")}
    assert [step for step, _ in curves(tmp_path / "some")["test/acc1_ema"]] == [2000, 4000, 5000]
    a, b = (load(tmp_path / name / "checkpoint-4.pth") for name in ("all", "some"))
    assert same(a["model"], b["model"])
    assert b["best"]["acc1"] == max(line["test_acc1"] for line in some if "test_acc1" in line)
    assert b["best"]["epoch"] in evaluated


@pytest.mark.slow
def test_evaluations_are_the_same_after_a_resume(scripts, tmp_path):
    flags = ("--epochs", 4, "--eval_freq", 3)
    assert scripts.finetune("--output_dir", tmp_path / "whole", *flags).code == 0
    for steps in (2 * STEPS, STEPS + 1):  # killed once before and once after the evaluation
        with killed_after(steps):
            scripts.finetune("--output_dir", tmp_path / "killed", *flags)
    assert scripts.finetune("--output_dir", tmp_path / "killed", *flags).code == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert [line["epoch"] for line in records(tmp_path / "killed") if "test_acc1" in line] == [2, 3]
    for name in ("checkpoint-3.pth", "checkpoint-best.pth"):
        a, b = (load(tmp_path / run / name) for run in ("whole", "killed"))
        assert all(same(a[key], b[key]) for key in a.keys() - {"args", "run"})


def test_no_epoch_between_evaluations(scripts, tmp_path):
    result = scripts.finetune("--eval_freq", 0)
    assert result.code == 2
    assert scripts.finetune("--output_dir", tmp_path, "--eval_freq", 9, "--disable_eval", "true").code == 0
    assert not any("test_acc1" in line for line in records(tmp_path))
    assert "best" not in load(tmp_path / "checkpoint-2.pth")


# ---- output_dir


def test_a_folder_nothing_came_of_goes_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "a/b/c", "mine/below"):
        with prepared_output_dir(str(tmp_path / name)):
            assert not list((tmp_path / name).iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with prepared_output_dir(str(tmp_path / "a/b/c")):
        (tmp_path / "a" / "notes.txt").touch()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["notes.txt"]
    with prepared_output_dir(""):
        pass


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_fails_at_once_leaves_no_folder(stage, scripts, tmp_path):
    run = getattr(scripts, stage)
    for flags in (("--data_path", "/nowhere"), ("--batch_size", 41), ("--update_freq", 6)):
        assert run("--output_dir", tmp_path / "runs" / "new", *flags).code == 2
        assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    assert run("--output_dir", tmp_path / "made", "--data_path", "/nowhere").code == 2
    assert not list((tmp_path / "made").iterdir())


# ---- flags that change at a resume


def optimizer_of(name, model, weight_decay, scale, **options):
    groups = [
        {"params": [model.weight], "weight_decay": weight_decay, "lr_scale": scale, "decays": True},
        {"params": [model.bias], "weight_decay": 0.0, "lr_scale": 1.0, "decays": False},
    ]
    optimizer = create_optimizer_v2(groups, opt=name, lr=0.1, **options)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8}, {"betas": (0.8, 0.95), "eps": 1e-6}),
        ("lookahead_adamw", {"betas": (0.9, 0.999)}, {"betas": (0.8, 0.95)}),
        ("sgd", {"momentum": 0.9}, {"momentum": 0.5}),
        ("lamb", {}, {}),
    ],
)
def test_a_resumed_optimizer_has_the_settings_of_the_command_line(name, before, after):
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    old = optimizer_of(name, model, 0.05, 0.25, **before)
    state = {"model": model.state_dict(), "optimizer": old.state_dict(), "epoch": 3}
    new = optimizer_of(name, other, 0.2, 0.5, **after)
    assert checkpoint.load_training(Path("x.pth"), state, other, new, scaler, 16) == (4, None)
    assert [(group["weight_decay"], group["lr_scale"]) for group in new.param_groups] == [(0.2, 0.5), (0.0, 1.0)]
    for key, value in after.items():
        assert new.param_groups[0][key] == value
    assert same(new.state_dict()["state"], old.state_dict()["state"])
    inner = getattr(new, "base_optimizer", new)
    assert inner.param_groups[0]["weight_decay"] == 0.2  # not on a copy that takes no step


def test_weight_decay_and_layer_decay_can_change_at_a_resume(scripts, tmp_path):
    flags = ("--layer_decay", 0.8, "--epochs", 2, "--disable_eval", "true")
    assert scripts.finetune("--output_dir", tmp_path, *flags).code == 0
    changed = ("--layer_decay", 0.5, "--weight_decay", 0.2, "--epochs", 3, "--disable_eval", "true")
    result = scripts.finetune("--output_dir", tmp_path, *changed)
    assert "going on with epoch 2" in result.out
    before, after = (load(tmp_path / f"checkpoint-{epoch}.pth")["optimizer"]["param_groups"] for epoch in (1, 2))
    assert {g["weight_decay"] for g in before} == {0.0, 0.05}
    assert {g["weight_decay"] for g in after} == {0.0, 0.2}
    for old, new in zip(before, after, strict=True):
        assert math.log(new["lr_scale"], 0.5) == pytest.approx(math.log(old["lr_scale"], 0.8))
        assert new["lr"] == pytest.approx(after[-1]["lr"] * new["lr_scale"] / after[-1]["lr_scale"])


def test_a_layer_decay_that_groups_otherwise_is_refused(scripts, tmp_path):
    assert scripts.finetune("--output_dir", tmp_path, "--layer_decay", 0.8, "--epochs", 2).code == 0
    result = scripts.finetune("--output_dir", tmp_path, "--layer_decay", 1, "--epochs", 3)
    assert result.code == 2
    assert "does not fit --opt or --layer_decay" in result.err
