"""Loader workers outlive the signals of a process group, and not their parent's word."""

import os
import signal
import time

import pytest
from torch.utils.data import DataLoader

from utils.interrupts import SIGNALS, Interrupts, ignore_signals


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
