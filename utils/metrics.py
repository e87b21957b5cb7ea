"""Running averages that stay on the device, console lines, log.txt and curves."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image

from .checkpoint import replace
from .distributed import all_reduce_sum, gather, get_rank, get_world_size
from .errors import NonFiniteLoss, UsageError, surviving_disk_errors
from .report import as_csv

log = logging.getLogger("fcmae")


class Averages:
    """Sample-weighted averages over an epoch and over the steps since the last line.

    Values are added up on the device; only `window` and `epoch`, which all processes must call together, wait for it.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.names = names
        self._sums = torch.zeros(2, len(names) + 1, dtype=dtype, device=device)  # weighted sums, then the weight
        self._window, self._epoch = self._sums  # views; the epoch's lacks the open window

    def update(self, weight: int, **values: torch.Tensor) -> None:
        """Add one batch: its number of samples and the batch mean of every name."""
        row = torch.stack([values[name].detach() for name in self.names]).to(self._window.dtype)
        self._window[:-1].add_(row, alpha=weight)
        self._window[-1] += weight

    def mark(self) -> None:
        """Remember the sums, so that `back` can take away what is added from now on."""
        self._marked = self._window.clone()

    def back(self) -> None:
        self._window.copy_(self._marked)

    def forget(self) -> None:
        """Take away what is in no window yet."""
        self._window.zero_()

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
        return gather(self._sums.cpu())

    def load_state(self, state: list[torch.Tensor]) -> None:
        """Take up this process's sums; after a change of the number of processes, the first one takes them all."""
        same = len(state) == get_world_size()
        if same or get_rank() == 0:
            self._sums.copy_(state[get_rank()] if same else sum(state))

    def _mean(self, sums: torch.Tensor) -> dict[str, float]:
        *sums, weight = sums.tolist()
        return {name: value / weight if weight else math.nan for name, value in zip(self.names, sums, strict=True)}


class Progress:
    """Times the steps of an epoch and writes a console line every 20 of them.

    for step, item in progress(items): ...;  if progress.due(step): progress.line(step, loss=..., lr=...)

    samples: of this process since the last line; the caller adds to it.
    """

    def __init__(self, header: str, steps: int, device: torch.device, start_step: int = 0):
        self.header, self.steps, self.device, self.start_step = header, steps, device, start_step
        self._begun = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._since, self._waited, self._taken, self.samples = time.perf_counter(), 0.0, 0, 0

    def __call__(self, items: Iterable) -> Iterator[tuple[int, object]]:
        for step, item in enumerate(self.waited(items), self.start_step):
            self._taken += 1
            yield step, item

    def waited(self, items: Iterable) -> Iterator:
        """The items; the time until each is there counts as the step's `data`."""
        asked = time.perf_counter()
        for item in items:
            self._waited += time.perf_counter() - asked
            yield item
            asked = time.perf_counter()

    def due(self, step: int) -> bool:
        return step % 20 == 0 or step == self.steps - 1

    def line(self, step: int, **values: float) -> float:
        """Print the line of this step and return the images per second, over all processes, since the last one."""
        now, taken = time.perf_counter(), max(self._taken, 1)
        elapsed = max(now - self._since, 1e-9)
        rate = self.samples * get_world_size() / elapsed
        left = (now - self._begun) / (step + 1 - self.start_step) * (self.steps - step - 1)
        parts = [f"{self.header} [{step + 1:>{len(str(self.steps))}}/{self.steps}]", f"eta {duration(left)}"]
        forms = {"lr": ".4g", "skipped": "d"}
        parts += [f"{name} {value:{forms.get(name, '.4f')}}" for name, value in values.items()]
        parts += [f"time {elapsed / taken:.3f}", f"data {self._waited / taken:.3f}", f"img/s {rate:.0f}"]
        if self.device.type == "cuda":
            parts.append(f"max mem {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MiB")
        log.info("  ".join(parts))
        self._reset()
        return rate


class EpochTracker(Progress):
    """What a training epoch is watched by: averages, the first loss that is not finite, console lines and curves.

    for step, batches in tracker(loader.steps(epoch, tracker.start_step)):
        ...; tracker.update(step, samples, loss=loss)
        tracker.shown = lr, grad_norm
        run.step_done(tracker, step)

    state: what `state` gave inside the same epoch, to go on from there.
    buffers: of the model, where steps that are not finite are left out; None: such a loss ends the run.

    Attributes:
        leave_out: what `Amp.step` asks whether to leave the step out, or None.
        left_out: whether the last step was.
        shown: learning rate and gradient norm of the last step, which `report` takes.
    """

    shown: tuple = ()

    def __init__(
        self, names: tuple[str, ...], epoch: int, steps: int, device: torch.device, run_log: "RunLog",
        state: dict | None = None, buffers: list[torch.Tensor] | None = None,
    ):  # fmt: skip
        super().__init__(f"epoch {epoch}", steps, device, state["step"] if state else 0)
        self.epoch, self.run_log, self.averages = epoch, run_log, Averages(names, device)
        self._bad_step = torch.full((), -1, dtype=torch.int32, device=device)
        self.leave_out = None if buffers is None else self._leaves_out
        self.left_out, self.skipped, self._buffers = False, (state or {}).get("skipped", 0), buffers or []
        if state:
            self.averages.load_state(state["averages"])

    def state(self, step: int) -> dict:
        """What goes on after `step` steps; all processes call it together."""
        return {"step": step, "averages": self.averages.state()} | self._counted()

    def _counted(self) -> dict[str, int]:
        return {"skipped": self.skipped} if self.leave_out else {}

    def stats(self) -> dict[str, float]:
        """The epoch's averages over all processes and, where steps are left out, how many were `skipped`.

        Raises NonFiniteLoss if all were.
        """
        if self.skipped >= self.steps:
            raise NonFiniteLoss(f"the loss or the gradient became NaN or infinite in all steps of epoch {self.epoch}")
        return self.averages.epoch() | self._counted()

    def __call__(self, items: Iterable) -> Iterator[tuple[int, object]]:
        for step, batches in super().__call__(items):
            self.averages.mark()
            self._before = [buffer.clone() for buffer in self._buffers]
            yield step, self.waited(batches)

    def update(self, step: int, samples: int, **values: torch.Tensor) -> None:
        """Add one batch of this process; `loss` is among the values. 0 samples: a batch without weight."""
        # without weight too: 0 times NaN is NaN in the gradient
        bad = ~torch.isfinite(values["loss"].detach()) & (self._bad_step < 0)
        self._bad_step = torch.where(bad, step, self._bad_step)
        if samples:
            self.averages.update(samples, **values)
            self.samples += samples

    def check(self) -> None:
        """Raise NonFiniteLoss on every process if the loss of any was not finite; waits for the device."""
        if not self.leave_out and all_reduce_sum((self._bad_step >= 0).int()).item():
            where = f"step {self._bad_step.item()} of " if self._bad_step >= 0 else ""
            raise NonFiniteLoss(f"the loss became NaN or infinite in {where}epoch {self.epoch}")

    def forget(self) -> None:
        """The steps since the last line, which led to weights that are not finite."""
        self._bad_step.fill_(-1)
        self.averages.forget()

    def _leaves_out(self, grad_norm: torch.Tensor | None) -> bool:
        """Whether a loss or gradient of any process was not finite in this step; waits for the device.

        Averages and buffers are then as before the step.
        """
        bad = self._bad_step >= 0
        if grad_norm is not None:
            bad |= ~grad_norm.isfinite()
        self.left_out = all_reduce_sum(bad.int()).item() > 0
        if self.left_out:
            self.skipped += 1
            self._bad_step.fill_(-1)
            self.averages.back()
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)
        return self.left_out

    def report(self, step: int, lr: float, grad_norm: torch.Tensor | None) -> None:
        """Every few steps: wait for the device, check the loss, print a line and draw the curves."""
        if not self.due(step):
            return
        self.check()
        values = self.averages.window() | {"grad_norm": float(grad_norm)} | self._counted()
        rate = self.line(step, lr=lr, **values)
        curves = {f"train/{name}": value for name, value in (values | {"lr": lr, "images_per_second": rate}).items()}
        self.run_log.scalars(self.epoch + (step + 1) / self.steps, **curves)


def duration(seconds: float) -> str:
    """A length of time as people write it: 0:01:30, or 2 days, 3:00:00."""
    return str(timedelta(seconds=round(seconds)))


class RunLog:
    """What a run leaves beside its checkpoints: log.txt (a JSON object per epoch), the same as summary.csv, and curves.

    A full disk is reported, and training goes on.

    Args:
        output_dir, log_dir: where records and curves go; "": nowhere. Raises UsageError where TensorBoard cannot write.
        done: epochs that are done already, with the begun part of one; curves that were drawn beyond are hidden.
        wandb_run: what wandb.init returned: it gets the same curves and pictures.
    """

    def __init__(self, output_dir: str = "", log_dir: str = "", done: float = 0.0, wandb_run=None):
        self.path = Path(output_dir) / "log.txt" if output_dir else None
        self.wandb_run, self.board = wandb_run, None
        if log_dir:
            try:
                Path(log_dir).mkdir(parents=True, exist_ok=True)  # where TensorFlow is, its errors are no OSErrors
                earlier = [*Path(log_dir).glob("events.out.tfevents.*")]
                # TensorBoard reads files in the order of their names, in which the clock is; that was set back
                if any(path.name > f"events.out.tfevents.{time.time():010.0f}" for path in earlier):
                    for path in earlier:
                        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0", 1)))
                self.board = SummaryWriter(log_dir, purge_step=round(done * 1000) + (done > 0))
            except (OSError, ValueError, ImportError) as error:  # a path that is no UTF-8, or an address
                raise UsageError(f"{log_dir}: no place for curves ({error}); give another --log_dir") from error

    def _draw(self, draw: Callable[[SummaryWriter], object]) -> None:
        if self.board:
            with surviving_disk_errors(f"{self.board.log_dir}: no more curves"):
                draw(self.board)
                return
            self.board = None  # its thread is gone

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
        """Add an epoch's record to log.txt, in place of what an interrupted run left of this epoch and later ones."""
        if self.path:
            with surviving_disk_errors(f"{self.path} lacks epoch {record['epoch']}"):
                text = self.path.read_text(errors="replace") if self.path.exists() else ""
                kept = "".join(f"{line}\n" for line in text.splitlines() if _is_before(line, record["epoch"]))
                if kept != text:
                    replace(self.path, lambda file: file.write(kept.encode()))
                with open(self.path, "a") as file:
                    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
                    file.write(json.dumps(finite) + "\n")
                records = [*map(json.loads, kept.splitlines()), finite]
                # timm's names of what evaluation gives
                names = {k: k.replace("test_acc", "eval_top").replace("test_", "eval_") for row in records for k in row}
                summary = as_csv([names.values(), *(map(row.get, names) for row in records)])
                replace(self.path.with_name("summary.csv"), lambda file: file.write(summary))
        self._draw(lambda board: board.flush())

    def close(self) -> None:
        if self.board:
            with contextlib.suppress(OSError):
                self.board.close()


def _is_before(line: str, epoch: int) -> bool:
    try:
        return json.loads(line)["epoch"] < epoch
    except (ValueError, KeyError, TypeError):  # half the line of a killed run, or none of ours
        return False
