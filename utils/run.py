"""What the epochs of a run share beside model and data, and what happens between two of its optimizer steps."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .interrupts import Interrupts
from .metrics import EpochTracker, RunLog

log = logging.getLogger("fcmae")


@dataclass
class Run:
    """A training run as the engines see it.

    Args:
        log: where curves and records go.
        seed: what everything random follows from.
        partial: of an epoch that a checkpoint had begun, to go on inside it.
        save: writes a checkpoint of (epoch, what `EpochTracker.partial` returned, or None); None: saves nothing.
        save_steps: optimizer steps between such checkpoints; 0: only where a signal asks for one.
        interrupts: to look at between steps.
    """

    log: RunLog
    seed: int = 0
    partial: dict | None = None
    save: Callable[[int, dict | None], None] | None = None
    save_steps: int = 0
    interrupts: Interrupts | None = None

    def tracker(self, names: tuple[str, ...], epoch: int, steps: int, device: torch.device) -> EpochTracker:
        """The tracker of an epoch; of the first one after a resume, it knows where that goes on."""
        partial, self.partial = self.partial, None
        return EpochTracker(names, epoch, steps, device, self.log, partial)

    def step_done(self, tracker: EpochTracker, step: int) -> None:
        """Save if it is time or a signal came, and leave if one came. All processes call it after every step."""
        stop = self.interrupts is not None and self.interrupts.agreed()
        due = self.save_steps and (step + 1) % self.save_steps == 0 and step + 1 < tracker.steps
        if self.save and (stop or due):
            self.save(tracker.epoch, tracker.partial(step + 1))
        if stop:
            log.warning("stopped after step %d of epoch %d; run the same command to go on", step + 1, tracker.epoch)
            self.interrupts.leave()

    def epoch_done(self, epoch: int, saved: bool) -> None:
        """After an epoch: leave if a signal came meanwhile, in an evaluation say, with the epoch on disk."""
        if self.interrupts is not None and self.interrupts.agreed(now=True):
            if self.save and not saved:
                self.save(epoch, None)
            log.warning("stopped after epoch %d; run the same command to go on", epoch)
            self.interrupts.leave()
