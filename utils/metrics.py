"""Running averages that stay on the device, console lines, log.txt, TensorBoard and its like."""

import contextlib
import json
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torchvision.transforms.functional import to_pil_image

from .distributed import all_gather, all_reduce_sum, get_rank, get_world_size
from .errors import NonFiniteLoss, UsageError

log = logging.getLogger("fcmae")


class Averages:
    """Sample-weighted averages over an epoch and over the steps since the last line, without reading the device.

    Values are added up on the device; only `window` and `epoch`, which all processes must call together, wait for it.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.names = names
        self._window = torch.zeros(len(names) + 1, dtype=dtype, device=device)  # weighted sums, then the weight
        self._epoch = torch.zeros_like(self._window)

    def update(self, weight: int, **values: torch.Tensor) -> None:
        """Add one batch: its number of samples and the batch mean of every name."""
        row = torch.stack([values[name].detach() for name in self.names]).to(self._window.dtype)
        self._window[:-1].add_(row, alpha=weight)
        self._window[-1] += weight

    def window(self) -> dict[str, float]:
        """Averages over all processes since the last call; opens the next window."""
        sums = all_reduce_sum(self._window.clone())
        self._epoch += self._window
        self._window.zero_()
        return self._mean(sums)

    def epoch(self) -> dict[str, float]:
        """Averages over all processes since the beginning."""
        return self._mean(all_reduce_sum(self._epoch + self._window))

    def state(self) -> list[torch.Tensor]:
        """Every process's sums, so that each goes on with its own and the last bit of the averages is the same."""
        return [sums.cpu() for sums in all_gather(torch.stack([self._window, self._epoch]))]

    def load_state(self, state: list[torch.Tensor]) -> None:
        """Take up this process's sums; after a change of the number of processes, the first one takes them all."""
        if len(state) == get_world_size():
            mine = state[get_rank()]
        else:
            mine = sum(state) if get_rank() == 0 else torch.zeros_like(state[0])
        self._window.copy_(mine[0])
        self._epoch.copy_(mine[1])

    def _mean(self, sums: torch.Tensor) -> dict[str, float]:
        *sums, weight = sums.tolist()
        return {name: value / max(weight, 1) for name, value in zip(self.names, sums, strict=True)}


class LossGuard:
    """Remembers, on the device, the first step whose loss was not finite."""

    def __init__(self, device: torch.device):
        self.first = torch.full((), -1, dtype=torch.int32, device=device)

    def watch(self, loss: torch.Tensor, step: int) -> None:
        bad = ~torch.isfinite(loss.detach()) & (self.first < 0)
        self.first = torch.where(bad, step, self.first)

    def check(self, epoch: int) -> None:
        """Raise NonFiniteLoss on every process if any has seen one; waits for the device."""
        bad = all_reduce_sum((self.first >= 0).int())
        if bad.item() > 0:
            where = f"in step {self.first.item()} of epoch {epoch}" if self.first >= 0 else f"in epoch {epoch}"
            raise NonFiniteLoss(f"the loss became NaN or infinite {where}")


class Progress:
    """Times the steps of an epoch and writes a console line every `print_freq` of them.

    for step, item in progress(items): ...;  if progress.due(step): progress.line(step, loss=..., lr=...)
    """

    def __init__(self, header: str, total: int, device: torch.device, start: int = 0, print_freq: int = 20):
        self.header, self.total, self.device, self.start, self.print_freq = header, total, device, start, print_freq
        self.samples = 0
        self.begun = time.perf_counter()
        self.seconds = 0.0  # of the whole epoch, once it is over
        self._reset_window()

    def _reset_window(self) -> None:
        self._since, self._data, self._steps, self._window_samples = time.perf_counter(), 0.0, 0, 0

    def __call__(self, items: Iterable) -> Iterator[tuple[int, object]]:
        for step, item in enumerate(self.waited(items), self.start):
            self._steps += 1
            yield step, item
        self.seconds = time.perf_counter() - self.begun

    def waited(self, items: Iterable) -> Iterator:
        """The items; the time until each is there counts as the step's `data`."""
        iterator = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._data += time.perf_counter() - asked
            yield item

    def count(self, samples: int) -> None:
        """A batch of this many samples is done in this process."""
        self._window_samples += samples
        self.samples += samples

    def due(self, step: int) -> bool:
        return step % self.print_freq == 0 or step == self.total - 1

    def line(self, step: int, **values: float) -> float:
        """Print the line of this step and return the images per second, over all processes, since the last one."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = self._window_samples * get_world_size() / elapsed
        per_step = (time.perf_counter() - self.begun) / (step + 1 - self.start)
        parts = [f"{self.header} [{step + 1:>{len(str(self.total))}}/{self.total}]"]
        parts.append(f"eta {duration(per_step * (self.total - step - 1))}")
        parts += [f"{name} {value:.4g}" if name == "lr" else f"{name} {value:.4f}" for name, value in values.items()]
        parts.append(f"time {elapsed / max(self._steps, 1):.3f}")
        parts.append(f"data {self._data / max(self._steps, 1):.3f}")
        parts.append(f"img/s {rate:.0f}")
        if self.device.type == "cuda":
            parts.append(f"max mem {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MiB")
        log.info("  ".join(parts))
        self._reset_window()
        return rate


class EpochTracker:
    """What a training epoch is watched by: averages, the loss guard, console lines and curves.

    for step, batches in tracker(loader.steps(epoch)):
        ...; tracker.update(step, samples, loss=loss)
        tracker.report(step, lr, grad_norm)
    """

    def __init__(
        self, names: tuple[str, ...], epoch: int, steps: int, device: torch.device, run_log: "RunLog",
        partial: dict | None = None,
    ):  # fmt: skip
        self.epoch, self.steps, self.run_log = epoch, steps, run_log
        self.start_step = partial["step"] if partial else 0
        self.averages, self.guard = Averages(names, device), LossGuard(device)
        if partial:
            self.averages.load_state(partial["averages"])
        self.progress = Progress(f"epoch {epoch}", steps, device, self.start_step)
        self.due = self.progress.due

    def partial(self, step: int) -> dict:
        """What an EpochTracker of the same epoch needs to go on after `step` steps; all processes call it together."""
        return {"step": step, "averages": self.averages.state()}

    def __call__(self, steps: Iterable) -> Iterator[tuple[int, object]]:
        for step, batches in self.progress(steps):
            yield step, self.progress.waited(batches)

    def update(self, step: int, samples: int, **values: torch.Tensor) -> None:
        """Add one batch of this process; `loss` is among the values. 0 samples: a batch without weight."""
        self.guard.watch(values["loss"], step)  # without weight too: 0 times NaN is NaN in the gradient
        if samples:
            self.averages.update(samples, **values)
            self.progress.count(samples)

    def report(self, step: int, lr: float, grad_norm: torch.Tensor | None) -> None:
        """Every few steps: wait for the device, check the loss, print a line and draw the curves."""
        if not self.due(step):
            return
        self.guard.check(self.epoch)
        values = self.averages.window() | {"grad_norm": float(grad_norm)}
        rate = self.progress.line(step, lr=lr, **values)
        curves = {f"train/{name}": value for name, value in values.items()}
        x = self.epoch + (step + 1) / self.steps
        self.run_log.scalars(x, **curves, **{"train/lr": lr, "train/images_per_second": rate})

    def summary(self) -> dict[str, float]:
        """The epoch's averages over all processes, and `images_per_second`."""
        rate = self.progress.samples * get_world_size() / max(self.progress.seconds, 1e-9)
        return self.averages.epoch() | {"images_per_second": rate}


def duration(seconds: float) -> str:
    """A length of time as people write it: 0:01:30, or 2 days, 3:00:00."""
    return str(timedelta(seconds=round(seconds)))


def speed(rates: list[float]) -> str:
    """', N img/s' over epochs; those count that took a step in this run, one resumed after its last step does not."""
    taken = [rate for rate in rates if rate]
    return f", {sum(taken) / len(taken):.0f} img/s" if taken else ""


def finite(record: dict) -> dict:
    """A record as JSON can hold it: NaN and infinities, which it has not, become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class RunLog:
    """What a run leaves beside its checkpoints: log.txt (a JSON object per epoch) and TensorBoard curves and pictures.

    Only the first process writes. Empty folders mean: write nothing. A full disk is reported, and training goes on.

    Args:
        output_dir: where log.txt goes.
        log_dir: where TensorBoard files go; output_dir by default.
        done: epochs that are done already, with the begun part of one. Curves beyond it, and lines of log.txt from its
            epoch on, were left by an interrupted run, and go once this is redone.
        hparams: arguments by name, for TensorBoard's table of runs.
        wandb_run: what wandb.init returned: it gets the same curves and pictures.
    """

    def __init__(
        self, output_dir: str, log_dir: str | None, done: float = 0.0, hparams: dict | None = None, wandb_run=None
    ):
        self.path = Path(output_dir) / "log.txt" if output_dir and get_rank() == 0 else None
        self.stale_from = int(done) if self.path and self.path.exists() else None
        self.wandb_run, self.board = wandb_run, None
        log_dir = log_dir or output_dir
        if log_dir and get_rank() == 0:
            step = round(done * 1000)
            # TensorBoard hides points from purge_step on: a resumed run draws them again
            try:
                self.board = SummaryWriter(log_dir, purge_step=step + 1 if step else 0)
            except UnicodeEncodeError as error:
                raise UsageError(f"{log_dir}: TensorBoard writes to UTF-8 paths alone; give a --log_dir") from error
            # an exception or a signal would take the last two minutes of the curves along
            self.close_board = weakref.finalize(self, _close, self.board)
            if hparams:
                self._draw(lambda board: _add_hparams(board, hparams))

    def _draw(self, draw: Callable[[SummaryWriter], None]) -> None:
        if self.board is None:
            return
        try:
            draw(self.board)
        except OSError as error:
            log.error("%s: no more curves (%s); training goes on", self.board.log_dir, error.strerror)
            self.board = None  # its thread is gone

    def _drop_from(self, epoch: int) -> None:
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the half line of a killed run, or none of ours
                if json.loads(line)["epoch"] < epoch:
                    kept.append(line + "\n")
        aside = self.path.with_name(".log.txt.tmp")
        aside.write_text("".join(kept))
        os.replace(aside, self.path)

    def scalars(self, epoch: float, **values: float) -> None:
        """Curves; the x axis is the epoch in thousandths, so that runs of any batch size overlay."""
        step = round(epoch * 1000)
        self._draw(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])
        if self.wandb_run:
            self.wandb_run.log({"epoch": epoch, **values}, step=step)

    def image(self, name: str, image: torch.Tensor, epoch: float) -> None:
        """A picture (C, H, W) in 0..1."""
        step = round(epoch * 1000)
        self._draw(lambda board: board.add_image(name, image, step))
        if self.wandb_run:
            import wandb

            self.wandb_run.log({"epoch": epoch, name: wandb.Image(to_pil_image(image))}, step=step)

    def epoch(self, record: dict) -> None:
        """Append one epoch's record to log.txt. NaN, which JSON has not, becomes null."""
        if self.path:
            try:
                self._append(json.dumps(finite(record)) + "\n")
            except OSError as error:
                log.error("%s lacks epoch %s (%s); training goes on", self.path, record["epoch"], error.strerror)
        self._draw(lambda board: board.flush())

    def _append(self, line: str) -> None:
        if self.stale_from is not None:  # not before: a run that fails at once then loses nothing
            self._drop_from(self.stale_from)
            self.stale_from = None
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(line)
        except OSError:
            os.truncate(self.path, whole)  # or the next line would be written behind half of this one
            raise

    def close(self) -> None:
        if self.board:
            self.close_board()
        if self.wandb_run:
            self.wandb_run.finish()


def _add_hparams(board: SummaryWriter, values: dict) -> None:
    """TensorBoard's table of runs, in the run's own folder; SummaryWriter.add_hparams would open one below it."""
    plain = {k: v if isinstance(v, (bool, int, float, str, type(None))) else str(v) for k, v in values.items()}
    for summary in hparams_summaries(plain, {"train/loss": None, "test/acc1": None}):
        board.file_writer.add_summary(summary)


def _close(board: SummaryWriter) -> None:
    with contextlib.suppress(OSError):
        board.close()
