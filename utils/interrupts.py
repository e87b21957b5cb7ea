"""Stopping on a signal so that all processes stop after the same batch."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from .distributed import get_rank

log = logging.getLogger("fcmae")

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has the first two
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Interrupts:
    """Turns signals into a decision that all processes take at the same boundary of batches. A context manager.

    At each boundary the signals are counted over the processes, in the background and on the CPU: all read the sum at
    the next, so nobody waits and the device is not touched. It costs a batch of delay and some 50 microseconds a batch.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}
        self._sum = torch.zeros(1)
        self._pending = None
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        limit = "; torchrun kills its workers 30 s after it, or after its --shutdown-timeout, where it has that"
        limit *= "TORCHELASTIC_RUN_ID" in os.environ
        log.warning("%s: stopping after the batch%s", signal.Signals(number).name, limit)

    def should_stop(self, now: bool = False) -> bool:
        """Whether any process had received a signal by the last boundary; all processes call it at each.

        now: count what came since the last boundary too, at the price of waiting for all processes.
        """
        if self._group is None:
            return self.received is not None
        if self._pending is not None:
            self._pending.wait()
        if self._sum.item() == 0:
            self._sum.fill_(self.received is not None)
            self._pending = dist.all_reduce(self._sum, group=self._group, async_op=True)
            if not now:
                return False
            self._pending.wait()
        return self._sum.item() > 0

    def leave(self, goes_on: bool) -> None:
        """Hand the signal to submitit where that runs this, and exit, in all processes together.

        goes_on: whether, in the first process, the same command would go on from a checkpoint. Then the exit code is
        EXIT_CODE, else that of a process which the signal has ended, 128 + its number.
        """
        code = torch.tensor(EXIT_CODE if goes_on else 128 + (self.received or signal.SIGTERM))
        if self._group is not None:
            dist.broadcast(code, 0, group=self._group)  # comes once the first process has written the checkpoint
        number = self.received or SIGNALS[-1]
        handler = self._previous.get(number)
        if "SUBMITIT_EXECUTOR" in os.environ and callable(handler):
            try:
                handler(number, None)
            except Exception as error:  # requeued as often as it may be, or SLURM has another mind
                log.warning("not requeued: %s", error)
            if get_rank() > 0:  # requeues nothing; its exit could take rank 0 down before that has
                time.sleep(60)
        sys.exit(code.item())


def ignore_signals(_worker_id: int = 0) -> None:
    """For loader workers: a signal to the whole process group must not take them away from under the running step.

    SIGTERM still ends a worker when it comes from its parent, which has no other way to end one at exit.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a worker then dies of any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
