"""Loader workers outlive the signals of a process group, and not their parent's word."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

from tests.small_runs import load, records, same
from utils.amp import Amp
from utils.interrupts import EXIT_CODE, SIGNALS, Interrupts, ignore_signals


@pytest.fixture
def worker():
    """A worker process that has started to serve."""
    loader = iter(DataLoader(range(100), num_workers=1, worker_init_fn=ignore_signals))
    next(loader)
    yield loader._workers[0]
    loader._shutdown_workers()


def gone(process, seconds: float) -> bool:
    process.join(seconds)
    return not process.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_workers_outlive_a_signal_from_elsewhere(worker, number):
    stranger = os.fork()
    if stranger == 0:
        os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(stranger, 0)
    assert not gone(worker, 0.5)


def test_workers_end_when_their_parent_says_so(worker):
    """At exit multiprocessing terminates its children and waits for them: a deaf one would hang the run."""
    worker.terminate()
    assert gone(worker, 5)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts() as interrupts:
        assert not interrupts.should_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert interrupts.should_stop()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("before", "heard"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_hangup_stops_unless_nohup_is_there(before, heard):
    earlier = signal.signal(signal.SIGHUP, before)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert interrupts.should_stop() == heard
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_job_that_is_not_requeued_ends_as_without_submitit(monkeypatch, logs):
    """Timed out too often, or `scontrol requeue` was refused."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR2, lambda *_: 1 / 0)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            with pytest.raises(SystemExit) as end:
                interrupts.leave(goes_on=True)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert end.value.code == EXIT_CODE
    assert "not requeued: division by zero" in logs.text


@pytest.mark.parametrize("torchrun", [True, False])
def test_the_limit_of_torchrun_is_told(torchrun, monkeypatch, logs):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert logs.text.count("SIGTERM: stopping") == 1
    assert ("--shutdown-timeout" in logs.text) == torchrun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "batch", "name"),
    [
        ("pretrain", (), 1, "checkpoint-0-step0.pth"),
        ("pretrain", (), 3, "checkpoint-0-step1.pth"),
        ("finetune", ("--mixup", 0.8, "--model_ema", "true"), 3, "checkpoint-0-step1.pth"),
        ("finetune", ("--linear_probe", "true"), 3, "checkpoint-0-step2.pth"),  # its batch norm has no way back
    ],
)
def test_a_signal_inside_a_step_ends_it_there(script, flags, batch, name, scripts, tmp_path, monkeypatch):
    """Two batches a step; the begun step is done again, and the end is as if nothing had been."""
    run, backward, passed = getattr(scripts, script), Amp.backward, []

    def signalled(*args):
        backward(*args)
        passed.append(1)
        if len(passed) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def go(folder):
        return run("--output_dir", tmp_path / folder, "--update_freq", 2, "--epochs", 2, *flags)

    assert go("calm").code == 0
    monkeypatch.setattr(Amp, "backward", signalled)
    assert go("stopped").code == EXIT_CODE
    assert [path.name for path in (tmp_path / "stopped").glob("*.pth")] == [name]
    assert not (tmp_path / "stopped/.lock").exists()
    monkeypatch.undo()
    torch.manual_seed(7)
    assert go("stopped").code == 0
    calm, stopped = (load(tmp_path / folder / "checkpoint-1.pth") for folder in ("calm", "stopped"))
    for key in ("model", "optimizer", *(["model_ema"] if "model_ema" in calm else [])):
        assert same(calm[key], stopped[key])
    assert records(tmp_path / "calm") == records(tmp_path / "stopped")
