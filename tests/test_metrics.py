"""utils: averages, the loss guard, console lines, log.txt and TensorBoard, mixed precision, command line, errors."""

import json
import math
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import nn

import main_finetune
import main_pretrain
from utils import distributed, metrics
from utils.amp import Amp
from utils.args import (
    ArgumentParser,
    add_bool,
    check_shared_arguments,
    effective_lr,
    prepared_output_dir,
)
from utils.distributed import pick_device
from utils.errors import NonFiniteLoss, UsageError, run_cli, suggest
from utils.flags import add_shared_arguments, add_training_arguments
from utils.metrics import Averages, EpochTracker, Progress, RunLog, duration

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture
def clock(monkeypatch):
    """A clock for utils.metrics that stands still until it is told to advance."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# ---- averages and the loss guard


def test_averages_are_weighted_by_samples():
    averages = Averages(("loss", "acc"), CPU)
    assert all(map(math.isnan, averages.window().values()))  # nothing yet
    averages.update(3, loss=torch.tensor(1.0), acc=torch.tensor(10.0))
    averages.update(1, acc=torch.tensor(30.0), loss=torch.tensor(5.0))
    assert averages.window() == {"loss": 2.0, "acc": 15.0}
    averages.update(4, loss=torch.tensor(4.0), acc=torch.tensor(25.0))
    assert averages.window() == {"loss": 4.0, "acc": 25.0}  # since the last line
    averages.update(2, loss=torch.tensor(8.0), acc=torch.tensor(0.0))
    assert averages.epoch() == {"loss": 4.0, "acc": 16.0}  # of all ten, in windows or not
    assert averages.epoch() == {"loss": 4.0, "acc": 16.0}
    assert averages.window() == {"loss": 8.0, "acc": 0.0}


def test_averages_lose_no_precision_and_no_graph():
    averages = Averages(("loss",), CPU)
    loss = torch.tensor(1e-4, requires_grad=True) * 1
    for _ in range(2000):
        averages.update(4096, loss=loss)
    assert averages.epoch()["loss"] == pytest.approx(loss.item(), rel=1e-12)
    averages.update(8, loss=torch.tensor(1.0, dtype=torch.bfloat16))
    assert averages.epoch()["loss"] > 1e-4


def tracker_of(losses, epoch=7, run_log=None):
    tracker = EpochTracker(("loss",), epoch, 100, CPU, run_log or RunLog())
    for step, loss in enumerate(losses):
        tracker.update(step, 1, loss=torch.tensor(loss))
    return tracker


@pytest.mark.parametrize(
    ("losses", "step"),
    [([1.0, 2.0], None), ([1.0, NAN, 1.0, math.inf], 1), ([math.inf], 0), ([2.0, 1.0, -math.inf], 2)],
)
def test_the_first_bad_loss_is_named(losses, step):
    tracker = tracker_of(losses)
    if step is None:
        return tracker.check()
    with pytest.raises(NonFiniteLoss, match=rf"^the loss became NaN or infinite in step {step} of epoch 7$"):
        tracker.check()


def test_a_bad_loss_of_another_process(monkeypatch):
    monkeypatch.setattr(metrics, "all_reduce_sum", lambda tensor: tensor + 1)
    with pytest.raises(NonFiniteLoss, match="infinite in epoch 7"):
        tracker_of([1.0]).check()


# ---- console


def test_progress_line(logs, clock):
    progress = Progress("epoch 3", 41, CPU)
    due = []

    def loader():
        for _ in range(41):
            clock.now += 0.5  # waiting for data
            yield "batch"

    for step, item in progress(loader()):
        assert item == "batch"
        clock.now += 1.5
        progress.samples += 64
        if progress.due(step):
            due.append(step)
            assert progress.line(step, lr=0.00123456, loss=1.23456) == pytest.approx(32)
    assert due == [0, 20, 40]
    lines = [record.getMessage() for record in logs.records]
    tail = "  lr 0.001235  loss 1.2346  time 2.000  data 0.500  img/s 32"
    assert lines == [
        "epoch 3 [ 1/41]  eta 0:01:20" + tail,
        "epoch 3 [21/41]  eta 0:00:40" + tail,
        "epoch 3 [41/41]  eta 0:00:00" + tail,
    ]


def test_waiting_for_batches_inside_a_step_counts_as_data(logs, clock):
    def batches():
        for _ in range(2):
            clock.now += 0.5
            yield "batch"

    tracker = EpochTracker(("loss",), 0, 1, CPU, RunLog())
    for step, batches_of_step in tracker([batches()]):
        for _ in batches_of_step:
            clock.now += 1
            tracker.update(step, 3, loss=torch.tensor(1.0))
        tracker.report(step, 0.1, torch.tensor(0.0))
    assert "time 3.000  data 1.000  img/s 2" in logs.text


def test_a_batch_without_weight_is_not_counted_but_watched(clock):
    tracker = EpochTracker(("loss",), 0, 1, CPU, RunLog())
    for step, _ in tracker([None]):
        clock.now += 1
        tracker.update(step, 4, loss=torch.tensor(2.0))
        tracker.update(step, 0, loss=torch.tensor(NAN))
    assert (tracker.averages.epoch(), tracker.samples) == ({"loss": 2.0}, 4)
    with pytest.raises(NonFiniteLoss, match="in step 0"):
        tracker.check()


def test_progress_counts_the_images_of_all_processes(logs, clock, monkeypatch):
    monkeypatch.setattr(metrics, "get_world_size", lambda: 4)
    progress = Progress("epoch 0", 1, CPU)
    for step, _ in progress([None]):
        clock.now += 2
        progress.samples += 10
        assert progress.line(step) == 20
    assert "img/s 20" in logs.text


def test_a_resumed_epoch_counts_its_own_steps(logs, clock):
    progress = Progress("epoch 0", 10, CPU, start_step=8)
    steps = []
    for step, _ in progress([None, None]):
        clock.now += 3
        steps.append(step)
        progress.line(step)
    assert steps == [8, 9]
    assert ["eta 0:00:03" in logs.messages[0], "eta 0:00:00" in logs.messages[1]] == [True, True]


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3600, 2 * 86400 + 3)] == ["0:00:00", "0:01:00", "1:00:00", "2 days, 0:00:03"]


# ---- log.txt and TensorBoard


def board(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, name):
    return [(event.step, event.value) for event in board(folder).Scalars(name)]


def written(run_log, *xs, value=1.0):
    """Points of a curve at these epochs, and the end."""
    for x in xs:
        run_log.scalars(x, loss=value)
    run_log.close()


def test_log_txt_is_json_lines(tmp_path):
    run_log = RunLog(str(tmp_path))
    for epoch, loss in enumerate((NAN, math.inf, 0.5)):
        run_log.epoch({"train_loss": loss, "epoch": epoch, "n_parameters": 7})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    expected = [{"train_loss": loss, "epoch": i, "n_parameters": 7} for i, loss in enumerate((None, None, 0.5))]
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == expected


@pytest.mark.parametrize(("start_epoch", "kept"), [(0, []), (1, [0]), (2, [0, 1]), (9, [0, 1, 2])])
@pytest.mark.parametrize("torn", ['{"train_loss": 3.0, "epo', '{"epoch": 99}', "\n[1]\n{}\na word", "\udcff"])
def test_a_resume_drops_what_it_does_again(tmp_path, start_epoch, kept, torn):
    """And what a kill has torn, or is no record; a line whose end alone is missing gets it."""
    log = tmp_path / "log.txt"
    whole = "".join(f'{{"epoch": {epoch}}}\n' for epoch in range(3))
    log.write_text(f"a heading\n{whole}{torn}", errors="surrogateescape")
    run_log = RunLog(str(tmp_path))
    for epoch in (start_epoch, start_epoch + 1):
        run_log.epoch({"epoch": epoch})
    found = [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
    assert found == [*kept, start_epoch, start_epoch + 1]
    log.write_text('{"epoch": 0}')
    run_log.epoch({"epoch": 1})
    assert log.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "summary.csv"}
    run_log.epoch({"epoch": 2, "test_loss": math.nan, "test_acc1": 50.0, "test_acc1_ema": 25.0, "train_lr": 1e-3})
    names = "epoch,eval_loss,eval_top1,eval_top1_ema,train_lr"
    assert (tmp_path / "summary.csv").read_text() == f"{names}\n0,,,,\n1,,,,\n2,,50.0,25.0,0.001\n"


def test_tensorboard_holds_the_curves(tmp_path):
    run_log = RunLog("", str(tmp_path))
    run_log.image("reconstruction", torch.rand(3, 8, 8), 4)
    run_log.scalars(0.25, lr=0.5)
    written(run_log, 0.25, 3.0004)
    assert scalars(tmp_path, "loss") == [(250, 1.0), (3000, 1.0)]
    assert scalars(tmp_path, "lr") == [(250, 0.5)]
    assert [event.step for event in board(tmp_path).Images("reconstruction")] == [4000]


@pytest.mark.parametrize(
    ("before", "done", "after", "shown"),
    [
        ((0.5, 1.0, 1.5), 1, (1.5, 2.0), [(500, 1), (1000, 1), (1500, 2), (2000, 2)]),  # at an epoch's end
        ((0.0001,), 0, (0.0001,), [(0, 2)]),  # a start over
        ((3.125, 3.25, 3.375), 3.25, (3.375, 4.0), [(3125, 1), (3250, 1), (3375, 2), (4000, 2)]),  # inside an epoch
    ],
)
def test_a_resume_hides_the_curves_beyond(tmp_path, before, done, after, shown, monkeypatch):
    # files of one second are read in the order of the process's counter, as text: 10 before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    written(RunLog("", str(tmp_path)), *before)
    written(RunLog("", str(tmp_path), done), *after, value=2.0)
    assert scalars(tmp_path, "loss") == shown


@pytest.mark.parametrize("output_dir", ["", "out"])
@pytest.mark.parametrize("log_dir", ["", "board"])
def test_log_dir_and_output_dir_apart(tmp_path, monkeypatch, output_dir, log_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    run_log = RunLog(output_dir, log_dir)
    run_log.epoch({"epoch": 0})
    written(run_log, 1.0)
    found = {str(path.relative_to(tmp_path))[:20] for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        *(["out/log.txt", "out/summary.csv"] if output_dir else []),
        *(["board/events.out.tfe"] if log_dir else []),
    }


def test_a_place_that_takes_no_curves_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file: no place for curves .*; give another --log_dir"):
        RunLog("", str(tmp_path / "file"))


def test_epoch_tracker(tmp_path, logs, clock):
    run_log = RunLog("", str(tmp_path))
    tracker = EpochTracker(("loss", "acc"), 2, 21, CPU, run_log)
    for step, _ in tracker([None] * 21):
        clock.now += 2
        tracker.update(step, 6, loss=torch.tensor(float(step)), acc=torch.tensor(50.0))
        tracker.update(step, 2, loss=torch.tensor(float(step) + 4), acc=torch.tensor(50.0))
        tracker.report(step, 0.5, torch.tensor(3.0) if tracker.due(step) else None)
    run_log.close()
    assert tracker.averages.epoch() == pytest.approx({"loss": 11.0, "acc": 50.0})
    assert len(logs.messages) == 2
    assert re.search(r"epoch 2 \[21/21\] .* lr 0.5 .*loss 11.5000 .*acc 50.0000 .*grad_norm 3.0000", logs.messages[1])
    start, end = round(2000 + 1000 / 21), 3000
    assert scalars(tmp_path, "train/loss") == [(start, 1.0), (end, 11.5)]
    for name, value in (("lr", 0.5), ("grad_norm", 3.0), ("acc", 50.0), ("images_per_second", 4.0)):
        assert scalars(tmp_path, f"train/{name}") == [(start, value), (end, value)]


def test_epoch_tracker_stops_at_a_bad_loss(logs):
    tracker = EpochTracker(("loss",), 1, 100, CPU, RunLog())
    reported = []

    def train():
        for step, _ in tracker([None] * 100):
            tracker.update(step, 4, loss=torch.tensor(NAN if step == 7 else 1.0))
            reported.append(step)
            tracker.report(step, 0.1, torch.tensor(0.0))

    with pytest.raises(NonFiniteLoss, match="in step 7 of epoch 1"):
        train()
    assert reported[-1] == 20  # at the first line that was due; no earlier, the device is not waited for


# ---- mixed precision


def linear(gradient=(3.0, 4.0), lr=1.0):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=lr), torch.tensor([gradient])


def test_amp_disabled_is_plain_training():
    model, optimizer, x = linear()
    amp = Amp(CPU, False, torch.float16)
    assert not amp.scaler.is_enabled()
    with amp.autocast():
        y = model(x)
    assert y.dtype == torch.float32
    amp.backward(y.sum())
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert amp.step(optimizer, with_norm=False) is None
    assert model.weight.tolist() == [[-3.0, -4.0]]
    assert model.weight.grad is None


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [-0.6, -0.8]), (2.5, [-1.5, -2.0]), (50.0, [-3.0, -4.0])])
def test_clipping(clip, expected):
    model, optimizer, x = linear()
    amp = Amp(CPU, False, torch.bfloat16, clip_grad=clip)
    amp.backward(model(x).sum())
    assert amp.step(optimizer, with_norm=False).item() == pytest.approx(5)  # as it was before
    assert model.weight[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_norm_is_of_all_groups_together_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    groups = [{"params": list(part.parameters())} for part in model]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    amp = Amp(CPU, False, torch.bfloat16)
    amp.backward(model(torch.randn(5, 4)).square().sum())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = amp.step(optimizer, with_norm=True)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients.values()]).norm())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] - gradients.get(name, 0))


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.bfloat16, False), (torch.float16, True)])
def test_only_float16_scales_the_loss(dtype, scaled):
    model, optimizer, x = linear()
    amp = Amp(CPU, True, dtype, clip_grad=0.0625)
    assert amp.scaler.is_enabled() == scaled
    with amp.autocast():
        y = model(x)
    assert y.dtype == dtype
    amp.backward(y.float().sum() / 8)  # 65536, the first scale, itself is beyond float16
    assert (model.weight.grad.norm() > 1000) == scaled
    assert amp.step(optimizer, with_norm=True).item() == pytest.approx(0.625)  # of the unscaled gradient
    assert model.weight[0].tolist() == pytest.approx([-0.0375, -0.05], rel=1e-4)


def test_float16_skips_an_overflow():
    model, optimizer, x = linear()
    amp = Amp(CPU, True, torch.float16)
    amp.backward(model(x).sum() * 1e38)
    scale = amp.scaler.get_scale()
    assert not torch.isfinite(amp.step(optimizer, with_norm=True))
    assert model.weight.tolist() == [[0.0, 0.0]]
    assert amp.scaler.get_scale() < scale


# ---- the command line


def small_parser():
    parser = ArgumentParser("A test.")
    group = parser.add_argument_group("things")
    add_bool(group, "--flag", False, "a boolean")
    add_bool(group, "--maybe", None, "another")
    group.add_argument("--name", default="x", help="a name")
    group.add_argument("--betas", type=float, nargs="+", help="numbers")
    group.add_argument("--size", type=int, default=3, choices=(3, 4), help="a size")
    return parser


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["--flag"], True),
        (["--flag", "--name", "y"], True),
        *[(["--flag", word], True) for word in ("true", "True", "1", "yes", "YES", "on", "y", "t")],
        *[(["--flag", word], False) for word in ("false", "False", "0", "no", "NO", "off", "n", "f")],
        (["--flag=false"], False),
    ],
)
def test_booleans(words, value):
    args = small_parser().parse_args(words)
    assert args.flag is value
    assert args.maybe is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flag", "perhaps"], "--flag perhaps: must be true or false"),
        (["--flag", ""], "--flag '': must be true or false"),
        (["--nam", "y"], r"unknown argument --nam \(did you mean --name\?\); see --help"),
        (["--naem=y"], r"unknown argument --naem \(did you mean --name\?\)"),
        (["stray"], "unknown argument stray; see --help"),
        (["--size", "5"], "--size: invalid choice: .*5.* 3, 4"),
        (["--size", "big"], "--size: invalid int value: 'big'"),
        (["--name"], "--name: expected one argument"),
        (["@missing.args"], "missing.args"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        small_parser().parse_args(words)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", captured.err)


def test_argument_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.args").write_text("--size 4\n")
    (tmp_path / "x.args").write_text(
        "# a comment\n"
        "\n"
        "--betas 0.9 0.95   # two words, then a comment\n"
        "--name 'two words'\n"
        "  --flag   yes\n"
        "@inner.args\n"
    )
    args = small_parser().parse_args(["@x.args"])
    assert args == Namespace(flag=True, maybe=None, name="two words", betas=[0.9, 0.95], size=4)
    args = small_parser().parse_args(["@x.args", "--name", "", "--flag", "no"])  # what comes later wins
    assert (args.name, args.flag, args.size) == ("", False, 4)
    (tmp_path / "x.args").write_text("--name ''\n")
    assert small_parser().parse_args(["@x.args"]).name == ""
    (tmp_path / "x.args").write_text("--name 'open\n")
    with pytest.raises(SystemExit) as stopped:
        small_parser().parse_args(["@x.args"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: argument file x.args: No closing quotation in the line --name 'open\n"


def test_a_home_is_one_where_no_shell_expands_it(tmp_path, monkeypatch):
    """Behind =, and in files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "x.args").write_text("--name ~/runs/a=~b\n")
    assert small_parser().parse_args(["@x.args"]).name == "/home/me/runs/a=~b"
    assert small_parser().parse_args(["--name=~/runs"]).name == "/home/me/runs"


@pytest.mark.parametrize("module", [main_pretrain, main_finetune])
def test_help_has_titled_groups_and_defaults(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.get_args_parser().parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for title in ("training:", "model:", "learning rate and weight decay:", "data:", "checkpoints and logs:"):
        assert f"\n{title}\n" in text
    assert re.search(r"--batch_size BATCH_SIZE\s+images per process and forward pass\s+\(default: 64\)", text)
    assert all(group.title not in ("optional arguments",) for group in module.get_args_parser()._action_groups)


def shared(**flags):
    parser = ArgumentParser("")
    add_shared_arguments(parser, "any")
    add_training_arguments(parser)
    parser.set_defaults(epochs=100, warmup_epochs=20, blr=1e-3, min_lr=0.0, min_crop=0.2)
    return parser.parse_args([f"--{name}={value}" for name, value in flags.items()])


def test_the_defaults_are_fine():
    check_shared_arguments(shared(), ["convnextv2_base"])
    check_shared_arguments(shared(lr=0.1, warmup_epochs=0, epochs=1, crop_pct=1, min_crop=1), ["convnextv2_base"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "convnextv2_bas"}, r"--model convnextv2_bas: unknown \(did you mean convnextv2_base\?\)"),
        ({"model": "zebra"}, "--model zebra: unknown; one of convnextv2_base, convnextv2_tiny"),
        ({"epochs": 10, "warmup_epochs": 20}, "--warmup_epochs 20: must be less than --epochs 10"),
        ({"epochs": 20, "warmup_epochs": 20}, "--warmup_epochs 20: must be less than --epochs 20"),
        ({"resume": "nowhere.pth"}, "--resume nowhere.pth: no such file"),
        ({"resume": "."}, "--resume .: is a folder"),
    ],
)  # fmt: skip
def test_shared_arguments_are_checked(flags, message):
    with pytest.raises(UsageError, match=message) as refused:
        check_shared_arguments(shared(**flags), ["convnextv2_base", "convnextv2_tiny"])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 0), (9, 0), (10, 1), (20, 2), (21, 20), (100, 20)])
def test_a_short_run_warms_up_for_a_tenth_of_it_unless_told_otherwise(epochs, warmup_epochs):
    args = shared(epochs=epochs)
    check_shared_arguments(args, ["convnextv2_base"])
    assert args.warmup_epochs == warmup_epochs
    args = shared(epochs=epochs, warmup_epochs=0)
    check_shared_arguments(args, ["convnextv2_base"])
    assert args.warmup_epochs == 0


def test_effective_lr(caplog):
    args = shared(batch_size=64, update_freq=2, blr=1.5e-4)
    assert effective_lr(args, 1) == pytest.approx(1.5e-4 * 128 / 256)
    assert effective_lr(args, 8) == pytest.approx(1.5e-4 * 1024 / 256)
    args.lr = 0.25
    assert effective_lr(args, 8) == 0.25
    args.lr = 0.0
    assert effective_lr(args, 8) == 0.0
    with caplog.at_level("INFO", "fcmae"):
        effective_lr(Namespace(min_lr=0.0, lr=0.0), 1)
        assert not caplog.text
        effective_lr(Namespace(min_lr=1e-6, lr=5e-7), 1)
    assert "--min_lr 1e-06: is above the peak rate 5e-07, so the rate climbs to it" in caplog.text


def test_prepared_output_dir(tmp_path):
    """What becomes of a folder that stays empty is in test_record.py."""
    for _ in range(2):
        with prepared_output_dir(str(tmp_path / "a/b")):
            (tmp_path / "a/b/log.txt").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["log.txt"]
    (tmp_path / "file").touch()
    for name, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        refused = rf"--output_dir .*{name}: cannot be written \({reason}\)"
        with pytest.raises(UsageError, match=refused), prepared_output_dir(str(tmp_path / name)):
            pass


def test_devices(monkeypatch):
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(UsageError, match=r"--device cuda: .*--device cpu or auto"):
        pick_device("cuda")
    with pytest.raises(UsageError, match=r"--device mps: .*--device cpu or auto"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (2, 0, 1), (1, 1, 2)])
def test_a_failing_first_process_does_not_hold_up_the_others(monkeypatch, rank, local_rank, turn):
    events = []
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "_local_rank", local_rank)
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))

    def download():
        with distributed.main_process_first():
            events.append("work")
            raise OSError("no route to host")

    with pytest.raises(OSError, match="no route"):
        download()
    assert events == ["barrier"] * turn + ["work"] + ["barrier"] * (2 - turn)


# ---- errors


def test_suggest():
    assert suggest("adamv", ["sgd", "adamw", "lamb"]) == " (did you mean adamw?)"
    assert suggest("zzz", ["sgd", "adamw"]) == ""
    assert suggest("x", []) == ""


def run_raising(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    return stopped.value.code, capsys.readouterr().err


def test_run(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    done = []
    run_cli(lambda: done.append(1))
    assert done == [1]
    assert run_raising(UsageError("--lr -1: too low"), capsys) == (2, "error: --lr -1: too low\n")
    worker = (
        "Caught UsageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise UsageError\nutils.errors.UsageError: 100 unreadable images\n'
    )
    assert run_raising(UsageError(worker), capsys) == (2, "error: 100 unreadable images\n")
    several = "--data_set tfds/x: timm could not open it: no such set\n\n  tried: a\n  and: b\n"
    expected = "error: --data_set tfds/x: timm could not open it: no such set tried: a and: b\n"
    assert run_raising(UsageError(several), capsys) == (2, expected)
    monkeypatch.setenv("RANK", "3")
    assert run_raising(UsageError("no"), capsys) == (2, "[rank 3] error: no\n")


def test_run_tells_a_bad_loss_from_a_mistake(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_raising(NonFiniteLoss("the loss became NaN"), capsys) == (1, "error: the loss became NaN\n")


def test_run_hides_no_other_error():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)
