"""One training run: what it goes on from, its epochs, its records and checkpoints, and how it ends."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.utils import save_image

from . import checkpoint, record
from .amp import Amp
from .args import prepared_output_dir
from .best import Best
from .distributed import all_reduce_sum, check_same, from_main_process, gather, is_main_process
from .errors import NonFiniteLoss, UsageError, refuse, surviving_disk_errors
from .interrupts import Interrupts
from .lock import OutputLock
from .metrics import EpochTracker, RunLog, duration
from .settings import check_fields

log = logging.getLogger("fcmae")

ROLLBACKS = 3  # of a run, at most


@contextlib.contextmanager
def open_run(flags: dict, amp: Amp) -> Iterator["Run"]:
    """A `Run` that owns its --output_dir and hears signals.

    Raises:
        UsageError: the folder cannot be written or is in use, or --resume cannot be read.
        NonFiniteLoss: of the run, with the checkpoint that is good added to it.
    """
    with prepared_output_dir(flags["output_dir"]), Interrupts() as interrupts, OutputLock(flags["output_dir"]):
        run = Run(flags, amp, interrupts)
        try:
            yield run
        except NonFiniteLoss as error:
            if not is_main_process():
                raise
            advice = ["a lower --blr" if flags["lr"] is None else "a lower --lr", "a longer --warmup_epochs"]
            advice += ["--clip_grad"] * ("clip_grad" in flags) + ["--amp_dtype bfloat16"] * amp.scaler.is_enabled()
            raise NonFiniteLoss(f"{error}; {run.after_nan()}. Try {' or '.join(advice)}") from error
        finally:
            run.log.close()


class Run:
    """A training run. `begin` gives it what to train, `epochs` is its loop, `record` ends each epoch.

    A run has an id, which its checkpoints and run.json carry. It goes on by itself from checkpoints of this id alone;
    files of other runs in its folder stay, under another name where theirs is needed.

    Attributes:
        resume_from: the checkpoint that it goes on from, or None.
        start_epoch: the first epoch still to be done, once `begin` was called.
        kept: the newest checkpoint that is known to be good, a finite loss having followed it, or None.
        rollbacks: how often it went back to that, see --on_nonfinite.
    """

    def __init__(self, flags: dict, amp: Amp, interrupts: Interrupts):
        self.flags, self.amp, self.interrupts = flags, amp, interrupts
        self.seed, self.output_dir, self.start_epoch = flags["seed"], flags["output_dir"], flags["start_epoch"]
        self.saves = bool(self.output_dir and flags["save_ckpt"])
        self.log, self.ema, self.rollbacks = RunLog(), None, 0
        self.best = Best(flags.get("best_metric", "acc1"), flags.get("patience", 0))
        self.epoch_progress: dict | None = None
        self._content: dict | None = None
        self.id, self.new, self.resume_from, depth = from_main_process(self._choose)
        flags["depth"] = flags.get("depth") or depth
        self.kept = self._newest = None  # the latter: saved or resumed, and not yet known to be good

    def _choose(self) -> tuple:
        """As `record.choose`, but for the content, which stays in the first process: its --depth."""
        *chosen, self._content = record.choose(self.flags)
        depth = (self._content or {}).get("args", {}).get("depth")
        return *chosen, depth if depth in (8, 16, 32) else None

    def triton(self, available: Callable[[torch.device, torch.dtype], bool]) -> bool:
        """Whether Triton's kernels are to compute: the first process's choice for all, which the run's records tell.

        Raises:
            UsageError: --kernels asks for them, and they are not `available`.
        """

        def choose() -> str:
            can = available(self.amp.device, self.amp.dtype if self.amp.enabled else torch.float32)
            if self.flags["kernels"] == "triton" and not can:
                raise UsageError("--kernels triton: needs a GPU, for bfloat16 of 2020 or newer, and Triton 3.3")
            if self.flags["kernels"] != "auto":
                return self.flags["kernels"]
            return "triton" if can and (self._content or {}).get("args", {}).get("kernels") == "triton" else "library"

        self.flags["kernels"] = from_main_process(choose)
        return self.flags["kernels"] == "triton"

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loader, *, ema: ModelEmaV3 | None = None,
        classes: list[str] | None = None, order: dict | None = None,
    ) -> None:  # fmt: skip
        """Take what is to be trained, and restore it where the run goes on.

        Args:
            loader: a `StepLoader`.
            ema: the moving average of the model's weights.
            classes: names of the classes by their number.
            order: what the samples, their order and the sums of an epoch follow from, by what a user calls it.

        Raises:
            UsageError: a checkpoint of another model, optimizer, or data.
        """
        self.model, self.optimizer, self.loader, self.ema, self.classes = model, optimizer, loader, ema, classes
        self.order = order or {}
        path = self._newest = self.resume_from
        if path is None:
            return
        state, self._content = self._content or checkpoint.awaited(path), None
        check_fields(path, state)
        checkpoint.check_same_run(path, state, self.flags, classes, self.order)
        refuse(ema and not state.get("model_ema"), f"--model_ema true: {path} holds no moving average to continue")
        self.start_epoch, self.epoch_progress = self._take_up(path, state)
        for what, number in (("epoch", self.start_epoch), ("step", (self.epoch_progress or {}).get("step", 0))):
            check_same(number, f"{path}, its {what}")
        self.rollbacks = 0 if self.new else state.get("rollbacks", 0)
        record.tell_begun(path, state, self.flags)
        self.best.load(state.get("best", {}), path)
        if self.epoch_progress and is_main_process():
            loader.bad.add(self.epoch_progress.get("bad", {}))
        theirs = f"{self.best} of that run" if self.new and str(self.best) else ""  # whose file stays where it is
        log.info("resumed from %s, going on with epoch %d%s", path, self.start_epoch, theirs)

    def _take_up(self, path: Path, state: dict) -> tuple[int, dict | None]:
        parts = self.model, self.optimizer, self.amp.scaler, self.loader.global_batch, self.ema and self.ema.module
        return checkpoint.load_training(path, state, *parts)

    def epochs(self) -> Iterator[int]:
        """The epochs still to be done. After each it saves where that is due, obeys a signal and tells an eta."""
        total, begun = self.flags["epochs"], time.perf_counter()
        done = f"all {total} epochs are done; a larger --epochs goes on" if self.start_epoch >= total else ""
        if done := done or self.best.out_of_patience():
            log.info("nothing to do: %s", done)
            return
        self._open_records()
        for epoch in range(self.start_epoch, total):
            yield epoch
            too_many_bad = self._tell_bad(epoch)
            saved = too_many_bad or self.due(epoch, self.flags["save_ckpt_freq"])
            if self.saves and saved:
                self.save(epoch)
            refuse(too_many_bad, too_many_bad)
            if self.interrupts.should_stop(now=True):
                if self.saves and not saved:
                    self.save(epoch)
                self._leave(f"epoch {epoch}")
            so_far = time.perf_counter() - begun
            left = so_far / (epoch + 1 - self.start_epoch) * (total - epoch - 1)
            log.info("epoch %d: loss %.4f%s, run eta %s", epoch, self._loss, self.best, duration(left))
            self._newest_is_good(self.ends(epoch))
            if early := self.best.out_of_patience():
                log.info("the run ends early, after epoch %d: %s", epoch, early)
                break
        self.log.close()
        lost = self.saves and is_main_process() and (not self.kept or self.kept.name != f"checkpoint-{epoch}.pth")
        again = f"the last checkpoint, of epoch {epoch}, was NOT saved; make room, and start the same command again"
        refuse(lost, f"{self.output_dir}: {again}")
        what = f"{epoch + 1 - self.start_epoch} epochs in {duration(so_far)}, loss {self._loss:.4f}{self.best}"
        log.info("done: %s; %s", what, f"results in {self.output_dir}" if self.output_dir else "nothing saved")

    def _open_records(self) -> None:
        if not is_main_process():
            return
        folder, wandb_run = self.output_dir, None
        done = self.start_epoch + (self.epoch_progress["step"] / len(self.loader) if self.epoch_progress else 0.0)
        if self.flags["wandb"]:
            wandb_run = record.start_wandb(self.flags["wandb"], self.id, folder, record.plain(self.flags))
        self.log = RunLog(folder, self.flags["log_dir"] or folder, done, wandb_run)
        if folder and self.new:
            record.set_earlier_aside(folder, self.start_epoch)
        if folder:
            record.add_start(folder, self.flags, self.amp.device, run=self.id, resumed_from=self.resume_from)

    def _bad_images(self) -> dict[int, str]:
        """Of all processes, in this epoch; all call it together."""
        return {index: message for bad in gather(dict(self.loader.bad)) for index, message in bad.items()}

    def _tell_bad(self, epoch: int) -> str:
        """Tell and list the unreadable images of an epoch; what to stop with where they are too many, else ''."""
        bad, count = self._bad_images(), self.loader.sampler.num_samples
        self.loader.bad.told.update(bad.values())  # by another process
        record.list_bad_images(self.output_dir, bad.values())
        listed = f", see {self.output_dir}/bad_images.txt" if self.output_dir else ""
        found = f"{len(bad)} of {count} images were unreadable in epoch {epoch}{listed}"
        if len(bad) > self.loader.max_bad:
            enough = math.ceil(1000 * len(bad) / count) / 1000
            return f"--max_bad_images {self.flags['max_bad_images']}: {found}; mend them, or give {enough}"
        if bad:
            log.info("%s", found)
        return ""

    def ends(self, epoch: int) -> bool:
        """Whether the run ends after this epoch, once its evaluation is recorded."""
        return epoch + 1 == self.flags["epochs"] or bool(self.best.out_of_patience())

    def due(self, epoch: int, freq: int) -> bool:
        """Whether something is to be done after this epoch that is done every `freq` of them, and after the last."""
        return (epoch + 1) % freq == 0 or self.ends(epoch)

    def record(self, epoch: int, stats: dict[str, float], scores: dict[str, float]) -> None:
        """Write an epoch's figures to log.txt and the curves, and save the weights if no epoch's scored as high.

        stats: of training. scores: of an evaluation, where there was one.
        """
        # with --dist_eval false, where each evaluates all, rounding may let processes disagree on what is best
        self._loss, scores = stats["loss"], from_main_process(lambda: scores)
        self.log.scalars(epoch + 1, **{f"test/{k}": v for k, v in scores.items()})
        for suffix in self.best.update(epoch, scores):
            if self.saves:
                self.save(epoch, name=checkpoint.BEST_NAMES[suffix])
        line = {f"train_{k}": v for k, v in stats.items()} | {f"test_{k}": v for k, v in scores.items()}
        self.log.epoch(line | {"epoch": epoch, "n_parameters": sum(p.numel() for p in self.model.parameters())})

    def picture(self, name: str, image: torch.Tensor, epoch: int) -> None:
        """Show a picture (C, H, W) in 0..1 beside the curves, and keep it in output_dir."""
        self.log.image(name, image, epoch + 1)
        if self.output_dir:
            path = Path(self.output_dir) / f"{name}-{epoch}.png"
            with surviving_disk_errors(f"{path} was NOT written"):
                save_image(image, path)

    def tracker(self, names: tuple[str, ...], epoch: int, steps: int) -> EpochTracker:
        """The tracker of an epoch; of the first one after a resume, it knows where that goes on."""
        progress, self.epoch_progress = self.epoch_progress, None
        buffers = list(self.model.buffers()) if self.flags["on_nonfinite"] == "skip" else None
        return EpochTracker(names, epoch, steps, self.amp.device, self.log, progress, buffers)

    def step_done(self, tracker: EpochTracker, step: int, part: bool = False) -> None:
        """Report, save if it is time or a signal came, and leave if one came. All processes call it after every batch.

        part: of the step, which is done again then. Batch norm has no way back: a model with buffers finishes it.
        """
        if part and (any(True for _ in self.model.buffers()) or not self.interrupts.should_stop()):
            return
        stop, freq = part or self.interrupts.should_stop(), self.flags["save_ckpt_steps"]
        done, last = step + (not part), step + 1 == tracker.steps
        due = self.saves and (stop or (freq and done % freq == 0 and not last))
        try:
            if part:
                tracker.averages.back()
            else:
                tracker.report(step, *tracker.shown)
            if due:
                tracker.check()
            # where a line is due, the loss was checked for it
            self._newest_is_good((due or tracker.due(step)) and not tracker.left_out)
            if due:
                self.save(tracker.epoch, tracker.state(done) | {"bad": self._bad_images()})
            elif last:
                self._check_weights(tracker.epoch)  # before they are evaluated, or drawn by
        except NonFiniteLoss as error:
            self._go_back(error)
            tracker.forget()
        if stop:
            self._leave(f"step {done} of epoch {tracker.epoch}")

    def _check_weights(self, epoch: int) -> None:
        models = [self.model, self.ema.module] if self.ema else [self.model]
        bad = not all(checkpoint.finite(m.state_dict()) for m in models)
        if all_reduce_sum(torch.tensor(float(bad), device=self.amp.device)).item():
            raise NonFiniteLoss(f"the weights became NaN or infinite in epoch {epoch}")

    def save(self, epoch: int, progress: dict | None = None, name: str = "") -> None:
        """Write a checkpoint, called checkpoint-{epoch}[-step{step}].pth without a name. All processes call it.

        Raises:
            NonFiniteLoss: the weights or their average are not finite; nothing is written then.
        """
        self._check_weights(epoch)
        if not is_main_process():
            return
        more: dict = {"classes": self.classes, "best": self.best.found, "rollbacks": self.rollbacks}
        more |= {"model_ema": self.ema and self.ema.module.state_dict(), "order": self.order}
        if name == checkpoint.BEST_AVERAGE:  # what to evaluate, export and fine-tune, under whatever name
            more["scored"] = "model_ema"
        if progress:
            more |= {"step": progress["step"], "partial": progress, "global_batch": self.loader.global_batch}
        state = {"model": self.model.state_dict(), "epoch": epoch, "args": record.plain(self.flags), "run": self.id}
        if not name:  # the best ones are to be used, and training goes on from the numbered ones
            state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.amp.scaler.state_dict()}
        state |= {key: value for key, value in more.items() if value or key == "step"}
        saved = checkpoint.save_numbered(state, self.output_dir, name)
        if saved and not name:
            self._newest = saved

    def _newest_is_good(self, checked: bool) -> None:
        """Once a loss that followed the newest checkpoint was finite, those before it may go."""
        if not checked or self._newest is None:
            return
        self.kept, self._newest = self._newest, None
        if self.saves and is_main_process():
            checkpoint.prune(self.kept, self.flags["save_ckpt_num"], self.id)

    def _last_good(self) -> Path | None:
        """A finite checkpoint that led to NaN at once is set aside for it, so that none goes on from that.

        One that this run was resumed from stays: what has changed since may be to blame.
        """
        if self._newest and self._newest != self.resume_from:
            checkpoint.set_aside(self._newest, "diverged")
            self._newest = None
        return self._newest or self.kept

    def _go_back(self, error: NonFiniteLoss) -> None:
        """Put the last good checkpoint's training in place of what is not finite; the data go on where they are.

        Raises the error unless --on_nonfinite is rollback, there is such a checkpoint, and it was not done too often.
        """
        if self.flags["on_nonfinite"] != "rollback":
            raise error
        if self.rollbacks == ROLLBACKS:
            raise NonFiniteLoss(f"{error} after {ROLLBACKS} rollbacks") from error
        path = from_main_process(self._last_good)
        if not path:
            raise error
        self._take_up(path, checkpoint.awaited(path))
        self.rollbacks += 1
        log.info("%s; back to %s, rollback %d of %d, and on from here", error, path, self.rollbacks, ROLLBACKS)

    def after_nan(self) -> str:
        """What is good still."""
        path = self._last_good()
        if self._newest:
            return f"it followed from {path} at once; --resume takes an earlier one"
        return f"{path} is good, the same command goes on from it" if path else "no good checkpoint was saved"

    def _leave(self, where: str) -> None:
        goes_on = self.saves and (self._newest or self.kept) is not None
        more = "" if self.flags["auto_resume"] else " without --auto_resume false"
        if "SUBMITIT_EXECUTOR" in os.environ:  # with %j in --job_dir it would begin anew in another folder
            more += f" with --output_dir {self.output_dir}"
        then = f"run the same command{more} to go on" if goes_on else "nothing was saved, the same command begins anew"
        log.info("stopped after %s; %s", where, then)
        self.interrupts.leave(goes_on)
