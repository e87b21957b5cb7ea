"""utils/checkpoint.py: whole files or the previous ones, damage found, no code run, the newest good one first."""

import contextlib
import errno
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.small_runs import same
from utils import checkpoint
from utils.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def state_of(epoch=3, size=8):
    generator = torch.Generator().manual_seed(epoch)
    return {
        "model": {"weight": torch.randn(size, size, generator=generator), "bias": torch.randn(3, generator=generator)},
        "epoch": epoch,
        "args": {"lr": 0.1, "betas": [0.9, 0.95], "resume": "", "clip_grad": None, "eval": False},
    }


# ---- writing


def test_save_and_read(tmp_path):
    checkpoint.save(state_of(), tmp_path / "x.pth")
    assert same(checkpoint.read(tmp_path / "x.pth"), state_of())
    checkpoint.save(state_of(4), str(tmp_path / "x.pth"))
    assert same(checkpoint.read(str(tmp_path / "x.pth")), state_of(4))
    assert os.listdir(tmp_path) == ["x.pth"]


@contextlib.contextmanager
def no_file_beyond(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("failing_call", "error"),
    [
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("fsync", KeyboardInterrupt()),
        ("replace", OSError(errno.EIO, "input/output error")),
        ("", OSError("File too large")),  # for real
    ],
)
def test_a_failed_save_changes_nothing(tmp_path, monkeypatch, failing_call, error):
    checkpoint.save(state_of(), tmp_path / "x.pth")
    if failing_call:
        monkeypatch.setattr(os, failing_call, failing(error))
    with pytest.raises(type(error), match=str(error.args[-1]) if error.args else None), no_file_beyond(1 << 20):
        checkpoint.save(state_of(4, size=40 if failing_call else 1000), tmp_path / "x.pth")
    assert same(checkpoint.read(tmp_path / "x.pth"), state_of())
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_file_system_that_syncs_no_folders_is_one(tmp_path, monkeypatch):
    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(state_of(), tmp_path / "x.pth")
    assert same(checkpoint.read(tmp_path / "x.pth"), state_of())


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []

    def log_call(name, call):
        return lambda *args: (events.append(name), call(*args))[1]

    monkeypatch.setattr(os, "fsync", log_call("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", log_call("replace", os.replace))
    checkpoint.save(state_of(), tmp_path / "x.pth")
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    """kill -9 in the middle: the old file is whole, and the next save clears what was left."""
    checkpoint.save(state_of(), tmp_path / "checkpoint-3.pth")
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from utils import checkpoint
        def half(state, file):
            file.write(b"PK" + bytes(10_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
        checkpoint.save({{}}, {str(tmp_path / "checkpoint-3.pth")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    path, state = checkpoint.newest(tmp_path)
    assert path.name == "checkpoint-3.pth"
    assert same(state, state_of())
    checkpoint.save(state_of(4), path)
    assert os.listdir(tmp_path) == ["checkpoint-3.pth"]


# ---- reading


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"missing\.pth: no such checkpoint file"):
        checkpoint.read(tmp_path / "missing.pth")
    with pytest.raises(UsageError, match="no such checkpoint file"):
        checkpoint.read(tmp_path)
    for name, value in (("list", [torch.ones(1)]), ("Tensor", torch.ones(1))):
        torch.save(value, tmp_path / "x.pth")
        with pytest.raises(UsageError, match=f"holds a {name}, not a dictionary"):
            checkpoint.read(tmp_path / "x.pth")
    for content in (b"", b"P", b"PK\3\4", b"<html>not found</html>", bytes(1000)):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(UsageError, match=r"x\.pth: (cannot be read|not a checkpoint)"):
            checkpoint.read(tmp_path / "x.pth")
        (tmp_path / "x.pth").rename(tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match=r"x\.safetensors: cannot be read"):
            checkpoint.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_anywhere(tmp_path, zipped):
    path = tmp_path / "x.pth"
    torch.save(state_of(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert same(checkpoint.read(path), state_of())
    for length in [*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"x\.pth: "):
            checkpoint.read(path)


def test_a_flipped_bit_in_any_content_is_found(tmp_path):
    path = tmp_path / "x.pth"
    checkpoint.save(state_of(size=40), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    weight = whole.index(state_of(size=40)["model"]["weight"].numpy().tobytes())
    pickled = whole.index(b"weight")
    for place in [*range(weight, weight + 6400, 97), *range(pickled, pickled + 200, 7)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged"):
            checkpoint.read(path)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    path = tmp_path / "x.pth"
    for zipped in (True, False):
        torch.save(state_of(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        rng = random.Random(0)
        refused = 0
        for place in range(0, len(whole), 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                state = checkpoint.read(path)
            except UsageError:
                refused += 1
            else:  # padding; the old format has no checksums to tell by
                assert not zipped or same(state, state_of())
        assert refused > 50


class Runs:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_not_run(tmp_path, kind):
    path, touched = tmp_path / "x.pth", tmp_path / "touched"
    state = state_of() | {"args": Runs(f"touch {touched}")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"args": Runs(f"touch {touched}")}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UsageError, match=r"x\.pth: not a checkpoint of tensors and plain values, refused") as refused:
        checkpoint.read(path)
    assert len(str(refused.value).splitlines()) == 1
    assert not touched.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert touched.exists()  # so the file would have run it


def test_the_reference_keeps_its_arguments_in_a_namespace(tmp_path):
    args = Namespace(lr=0.1, betas=(0.9, 0.95), job_dir=Path("/some/where"))
    torch.save(state_of() | {"args": args}, tmp_path / "x.pth")
    state = checkpoint.read(tmp_path / "x.pth")
    assert state["args"] == vars(args)
    assert same(state["model"], state_of()["model"])
    with pytest.raises(pickle.UnpicklingError):  # allowed while reading, not for the rest of the program
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize("args", [None, [1], "lr=3", 5])
def test_odd_arguments_of_other_trainers_tell_nothing(tmp_path, args):
    torch.save(state_of() | {"args": args}, tmp_path / "x.pth")
    assert checkpoint.read(tmp_path / "x.pth")["args"] == {}


def test_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(state_of()["model"], path)
    assert same(checkpoint.read(path), state_of()["model"])
    whole = path.read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"x\.safetensors: cannot be read"):
            checkpoint.read(path)


# ---- which one


def test_newest_good_one(tmp_path, logs):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None
    for epoch in (8, 9, 10, 11):
        checkpoint.save(state_of(epoch), tmp_path / f"checkpoint-{epoch}.pth")
    for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-12.pth.bak", "my-checkpoint-13.pth"):
        checkpoint.save(state_of(50), tmp_path / name)
    (tmp_path / ".checkpoint-14.pth.tmp").write_bytes(b"PK")
    assert [epoch for epoch, *_ in checkpoint.numbered(tmp_path)] == [11, 10, 9, 8]
    for epoch in (11, 10):
        path = tmp_path / f"checkpoint-{epoch}.pth"
        path.write_bytes(path.read_bytes()[:-100])
    path, state = checkpoint.newest(tmp_path)
    assert (path.name, state["epoch"]) == ("checkpoint-9.pth", 9)
    messages = [record.getMessage() for record in logs.records]
    assert len(messages) == 2
    for epoch, message in zip((11, 10), messages, strict=True):
        assert message.startswith(f"skipping {tmp_path}/checkpoint-{epoch}.pth: cannot be read, truncated or damaged")
    assert (tmp_path / "checkpoint-11.pth").exists()


def training_state(model, optimizer, scaler, epoch, **more):
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    return {name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch, "args": {}} | more


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_prune_keeps_the_last_by_number(tmp_path):
    for name in ("8", "9", "10", "11", "100", "best", "best-ema", "9-copy"):
        (tmp_path / f"checkpoint-{name}.pth").touch()
    kept = ["checkpoint-9-copy.pth", "checkpoint-best-ema.pth", "checkpoint-best.pth"]
    checkpoint.prune(tmp_path / "checkpoint-100.pth", 3)
    assert files(tmp_path) == sorted([*kept, "checkpoint-10.pth", "checkpoint-100.pth", "checkpoint-11.pth"])
    checkpoint.prune(tmp_path / "checkpoint-100.pth", 3)
    assert len(files(tmp_path)) == 6
    checkpoint.prune(tmp_path / "checkpoint-100.pth", 0)  # never the newest
    assert files(tmp_path) == sorted([*kept, "checkpoint-100.pth"])


def test_a_run_prunes_its_own(tmp_path):
    """A run started anew below the epochs of an earlier one keeps its last files, and leaves the earlier one's."""
    for epoch in (20, 21, 22):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    for epoch in range(6):
        checkpoint.prune(checkpoint.save_numbered(state_of(epoch), tmp_path), 2)
        assert (tmp_path / f"checkpoint-{epoch}.pth").exists()
    assert [epoch for epoch, *_ in checkpoint.numbered(tmp_path)] == [22, 21, 20, 5, 4]


# ---- whose it is


def test_whose_a_file_is_is_read_once(tmp_path, monkeypatch):
    """Each save prunes; another file in its place is read again."""
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: (read.append(path.name), load(path, **how))[1])
    for epoch in range(4):
        checkpoint.prune(checkpoint.save_numbered(state_of(epoch) | {"run": "mine"}, tmp_path), 2, "mine")
    assert read == [f"checkpoint-{epoch}.pth" for epoch in range(4)]
    checkpoint.save(state_of(3) | {"run": "other"}, tmp_path / "checkpoint-3.pth")
    assert checkpoint.run_of(tmp_path / "checkpoint-3.pth") == "other"


def test_checkpoints_of_another_run_are_neither_taken_nor_touched(tmp_path, logs):
    for epoch, run in ((0, "mine"), (1, "mine"), (2, "other"), (3, None)):
        checkpoint.save(state_of(epoch) | ({"run": run} if run else {}), tmp_path / f"checkpoint-{epoch}.pth")
    (tmp_path / "checkpoint-9.pth").write_bytes(b"PK")  # tells nothing, so nobody's
    assert checkpoint.newest(tmp_path, "mine")[0].name == "checkpoint-1.pth"
    assert checkpoint.newest(tmp_path, "other")[0].name == "checkpoint-2.pth"
    assert checkpoint.newest(tmp_path, None)[0].name == "checkpoint-3.pth"
    assert checkpoint.newest(tmp_path, "third") is None
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-3.pth"
    theirs = {epoch: (tmp_path / f"checkpoint-{epoch}.pth").read_bytes() for epoch in (2, 3)}
    for epoch in (2, 3, 4):
        path = checkpoint.save_numbered(state_of(epoch) | {"run": "mine"}, tmp_path)
        assert path == tmp_path / f"checkpoint-{epoch}.pth"
        checkpoint.prune(path, 1, "mine")
    assert files(tmp_path) == sorted(
        ["checkpoint-2.other.pth", "checkpoint-3.earlier.pth", "checkpoint-4.pth", "checkpoint-9.pth"]
    )
    assert (tmp_path / "checkpoint-2.other.pth").read_bytes() == theirs[2]
    assert (tmp_path / "checkpoint-3.earlier.pth").read_bytes() == theirs[3]
    for epoch in (5, 5):  # a name that is taken is not taken again
        checkpoint.save(state_of(epoch) | {"run": "other"}, tmp_path / "checkpoint-best.pth")
        checkpoint.save_numbered(state_of(epoch) | {"run": "mine"}, tmp_path, "checkpoint-best.pth")
    assert {"checkpoint-best.pth", "checkpoint-best.other.pth", "checkpoint-best.other-2.pth"} < set(files(tmp_path))


def test_nan_is_passed_over(tmp_path, logs):
    checkpoint.save(state_of(1), tmp_path / "checkpoint-1.pth")
    bad = state_of(2)
    bad["model"]["bias"][1] = torch.nan
    checkpoint.save(bad, tmp_path / "checkpoint-2.pth")
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-1.pth"
    assert "checkpoint-2.pth: its weights are not finite" in logs.text
    for odd in (3, {"words": "no tensor"}):  # left to the loader, which refuses it in a line
        checkpoint.save({"model": odd, "epoch": 3}, tmp_path / "checkpoint-3.pth")
        assert checkpoint.newest(tmp_path)[0].name == "checkpoint-3.pth"
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"x\.pth: its weights are NaN"):
        checkpoint.load_weights(model, {"weight": torch.full((2, 2), torch.inf), "bias": torch.zeros(2)}, "x.pth")


# ---- what is in it


def trained(seed=0, lr=0.1, optimizer=torch.optim.AdamW, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
    optimizer = optimizer([{"params": list(model.parameters()), "name": "all", "decays": True}], lr=lr)
    for _ in range(2):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)


def test_training_goes_on_where_it_was(tmp_path):
    model, optimizer = trained()
    amp_scaler = scaler()
    amp_scaler.scale(torch.ones(1))
    amp_scaler.update(256.0)
    checkpoint.save_numbered(training_state(model, optimizer, amp_scaler, 7), tmp_path)
    other, other_optimizer = trained(seed=1, lr=0.5)
    other_scaler = scaler()
    found = checkpoint.newest(tmp_path)
    assert checkpoint.load_training(*found, other, other_optimizer, other_scaler, 16) == (8, None)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert other_optimizer.param_groups[0]["lr"] == 0.1
    assert other_scaler.get_scale() == 256.0
    checkpoint.load_training(*found, other, other_optimizer, scaler(enabled=False), 16)


def test_load_training_errors(tmp_path):
    model, optimizer = trained()
    state = training_state(model, optimizer, scaler(), 7)
    path = Path("some/checkpoint-7.pth")

    def load(state, model=model, optimizer=optimizer):
        checkpoint.load_training(path, state, model, optimizer, scaler(), 16)

    load(state)
    with pytest.raises(UsageError, match=r"checkpoint-7\.pth: has no optimizer and no epoch, so training cannot"):
        load({"model": state["model"]})
    with pytest.raises(UsageError, match="has no model"):
        load(state_of()["model"])
    with pytest.raises(UsageError, match=r"another model.*another shape"):
        load(state, *trained(width=5))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(UsageError, match=r"checkpoint-7\.pth: its optimizer does not fit --opt or --layer_decay"):
        load(state, optimizer=torch.optim.AdamW(groups))
    for key, odd, message in (
        ("optimizer", {"state": {}}, "its optimizer does not fit"),
        ("optimizer", {"state": {}, "param_groups": [None]}, "its optimizer does not fit"),
        ("optimizer", [1], "has no optimizer"),
        ("epoch", "7", "has no epoch"),
        ("scaler", {"scale": 1.0}, "its loss scaler"),
    ):
        with pytest.raises(UsageError, match=message):
            load(state | {key: odd})
    for kind, lost in ((torch.optim.SGD, "dampening, momentum"), (torch.optim.RMSprop, "alpha")):
        with pytest.raises(UsageError, match=f"does not fit --opt .*it has no {lost}"):
            load(state, *trained(optimizer=kind))


def test_load_weights_says_what_does_not_fit():
    model, _ = trained()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    other = dict(trained(seed=5)[0].state_dict())
    lacking = {k: v for k, v in other.items() if k != "0.bias"}
    extra = other | {"head.weight": torch.ones(1), "head.bias": torch.ones(1)}
    shape = other | {"0.weight": torch.ones(3, 5)}
    for state, message in (
        (lacking, r"x\.pth: .*it lacks 0\.bias \(1 in all\)"),
        (extra, r"x\.pth: .*it also has head\.bias, head\.weight \(2 in all\)"),
        (shape, r"x\.pth: .*another shape for 0\.weight \(1 in all\)"),
    ):
        with pytest.raises(UsageError, match=message):
            checkpoint.load_weights(model, state, "x.pth")
        assert same(dict(model.state_dict()), own)
    checkpoint.load_weights(model, other, "x.pth")
    assert same(dict(model.state_dict()), other)


def test_steps_of_an_epoch_are_numbered_and_pruned(tmp_path):
    for epoch, step in [(3, None), (4, 10), (4, 20), (4, 30), (4, 9)]:
        partial = step and {"step": step, "averages": []}
        inside = {"step": step, "partial": partial, "global_batch": 16} if step else {}
        state = training_state(*training_parts(), epoch, **inside)
        checkpoint.prune(checkpoint.save_numbered(state, tmp_path), 1)
        if step == 30:
            assert files(tmp_path) == ["checkpoint-3.pth", "checkpoint-4-step20.pth", "checkpoint-4-step30.pth"]
    # step 9 came from a run started again before the others, whose files are not its to delete
    assert "checkpoint-4-step30.pth" in files(tmp_path)
    path, state = checkpoint.newest(tmp_path)
    assert path.name == "checkpoint-4-step30.pth"
    assert checkpoint.load_training(path, state, *training_parts(), 16) == (4, {"step": 30, "averages": []})
    # on twice the global batch, half the steps have seen as much
    assert checkpoint.load_training(path, state, *training_parts(), 32) == (4, {"step": 15, "averages": []})
    checkpoint.prune(checkpoint.save_numbered(training_state(*training_parts(), 4), tmp_path), 1)
    assert files(tmp_path) == ["checkpoint-4.pth"]


def test_a_failed_save_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, logs):
    checkpoint.save_numbered(training_state(*training_parts(), 0), tmp_path)
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    assert checkpoint.save_numbered(training_state(*training_parts(), 1), tmp_path) is None
    assert "checkpoint-1.pth was NOT saved, earlier checkpoints are untouched (No space left" in logs.text
    assert files(tmp_path) == ["checkpoint-0.pth"]


def training_parts():
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
