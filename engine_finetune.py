"""One epoch of fine-tuning, and evaluation."""

import copy
import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3

from utils.amp import Amp
from utils.distributed import accumulate, all_reduce_sum, broadcast, get_rank, get_world_size
from utils.lr_sched import Schedule
from utils.metrics import Averages, Progress
from utils.report import Answers, gathered
from utils.run import Run
from utils.seeding import seed_all

log = logging.getLogger("fcmae")


class WithLoss(torch.nn.Module):
    """A classifier and its loss as one module: they are compiled as one graph."""

    def __init__(self, classifier: torch.nn.Module, criterion: Callable):
        super().__init__()
        self.classifier, self.criterion = classifier, criterion

    def forward(self, imgs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, in float32, and the logits."""
        logits = self.classifier(imgs)
        with torch.autocast(imgs.device.type, enabled=False):
            return self.criterion(logits.float(), labels), logits


class MixedLabels:
    """Several labels an image, (N, classes), mixed by the shares of the images' Mixup or CutMix, if there is one."""

    def __init__(self, mixup: Mixup | None):
        self.mixup = mixup

    def __call__(self, imgs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixup:
            self.mixup.num_classes = len(imgs)  # each image as a class of its own
            imgs, shares = self.mixup(imgs, torch.arange(len(imgs), device=imgs.device))
            labels = shares @ labels
        return imgs, labels


def train_one_epoch(
    model: torch.nn.Module, loader, optimizer: torch.optim.Optimizer, schedule: Schedule, run: Run, epoch: int,
    mixup: Callable | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a `WithLoss` for one epoch on a `StepLoader` whose samples are (image, label).

    mixup: makes images and targets of a batch's images and labels; None: the labels are numbers of classes.
    The weights' moving average, where the run has one, is updated after each optimizer step.

    Returns:
        loss over all processes, class_acc (percent) without mixup, lr of the last step.

    Raises:
        NonFiniteLoss: at the first console line after the loss became NaN or infinite; see --on_nonfinite.
        SystemExit: a signal came; the state after the last step is on disk.
    """
    model.train()
    amp = run.amp
    names = ("loss",) if mixup else ("loss", "class_acc")
    tracker = run.tracker(names, epoch, len(loader))
    lr = schedule.apply(optimizer, epoch + max(tracker.start_step - 1, 0) / len(loader))  # if no step is left to do
    for step, batches in tracker(loader.steps(epoch, tracker.start_step)):
        lr = schedule.apply(optimizer, epoch + step / len(loader))
        for i, batch in enumerate(batches):
            seed_all(run.seed, epoch, step, get_rank(), i)  # here: without workers, to load a batch draws too
            imgs, labels = (x.to(amp.device, non_blocking=True) for x in batch.data)
            imgs = loader.batch_transform(imgs)
            if mixup:
                imgs, labels = mixup(imgs, labels)
            with accumulate(model, batch.last):
                with amp.autocast():
                    loss, logits = model(imgs, labels)
                amp.backward(loss * batch.loss_weight)
            values = {"loss": loss} if mixup else {"loss": loss, "class_acc": top_k(logits, labels, 1)}
            tracker.update(step, len(imgs) if batch.loss_weight else 0, **values)
            if not batch.last:
                run.step_done(tracker, step, part=True)
        grad_norm = amp.step(optimizer, with_norm=tracker.due(step), leave_out=tracker.leave_out)
        if run.ema and not tracker.left_out:
            run.ema.update(getattr(model, "module", model).classifier)
        tracker.shown = lr, grad_norm
        run.step_done(tracker, step)
    share_buffers(model)
    return tracker.stats() | {"lr": lr}


def share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the first one's buffers, batch norm's statistics, which the checkpoint has."""
    for buffer in model.buffers():
        broadcast(buffer)


def top_k(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Percentage of samples whose label is among the k highest logits: (N, classes), (N,) -> scalar."""
    highest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (highest == labels[:, None]).any(dim=1).float().mean() * 100


def classify(model: torch.nn.Module, imgs: torch.Tensor, amp: Amp) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features (N, D) and logits (N, classes) of a classifier, float32."""
    with amp.autocast():
        features = model.forward_features(imgs)
    return features.float(), model.head(features.float())  # bfloat16's would tie, and ties go by the order of classes


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, loader, amp: Amp, header: str = "eval", report: Callable | None = None
) -> dict[str, float]:
    """acc1, acc5 (percent) and cross entropy of a classifier over all readable images, each counted once.

    Of several labels an image, (N, classes): the binary cross entropy, and what `report` gives.
    The model is not wrapped for distribution here: processes have different numbers of batches. report: is given the
    `Answers` to all images and the statistics, in every process, and may give more of these.
    """
    was_training = model.training
    model.eval()
    averages, answers = Averages(("loss",), amp.device), []
    several = getattr(loader, "several", False)
    progress = Progress(header, len(loader), amp.device)
    counts = torch.zeros(2, dtype=torch.int64, device=amp.device)  # of images whose label is among the first 1 and 5
    seen = 0
    for step, batch in progress(loader):
        imgs, labels = (x.to(amp.device, non_blocking=True) for x in batch)
        _, logits = classify(model, imgs, amp)
        if several:
            averages.update(len(imgs), loss=F.binary_cross_entropy_with_logits(logits, labels))
            answers.append((labels > 0, logits > 0, logits.sigmoid()))
        else:
            highest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = highest == labels[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum()])
            averages.update(len(imgs), loss=F.cross_entropy(logits, labels))
            if report:
                top1 = highest[:, :1]
                answers.append((labels, top1[:, 0], logits.softmax(1).gather(1, top1)[:, 0]))
        progress.samples += len(imgs)
        seen += len(imgs)
        if progress.due(step) and step > 0:
            progress.line(step)
    model.train(was_training)
    # a sampler that steps over no image of another process gives every process all of them
    copies = get_world_size() // getattr(loader.sampler, "step", get_world_size())
    counted = torch.tensor([*counts.tolist(), seen, len(getattr(loader, "bad", ()))], device=amp.device)
    *correct, images, bad = (all_reduce_sum(counted) // copies).tolist()
    stats = averages.epoch()
    if not several:
        stats |= {f"acc{k}": 100 * count / max(images, 1) for k, count in zip((1, 5), correct, strict=True)}
    if report:
        indices = loader.read if hasattr(loader, "bad") else range(seen)  # of a stream
        columns = [torch.tensor(indices), *(torch.cat(x).cpu() for x in zip(*answers, strict=True))] if answers else []
        found = gathered(columns, spread=copies == 1)
        stats |= report(Answers(*found), stats | {"unreadable": bad}) or {} if found else {}
    told = f"({images} images)" + f", {bad} unreadable left out" * bool(bad)
    scores = "  ".join(f"{name} {value:.2f}" for name, value in stats.items() if name != "loss")
    log.info("%s: %s  loss %.4f  %s", header, scores, stats["loss"], told)
    return stats


def score(
    model: torch.nn.Module, ema: ModelEmaV3 | None, loader, amp: Amp, report: Callable | None = None
) -> dict[str, float]:
    """Statistics of the model, and, with "_ema" behind their names, of its moving average where given.

    report: see `evaluate`; of the average, it is given the suffix "-ema".
    """
    scores = evaluate(model, loader, amp, "eval", report)
    if ema:
        # an average that is kept on the CPU stays there: only a copy moves
        average = ema.module if ema.device is None else copy.deepcopy(ema.module).to(amp.device)
        of_average = average, loader, amp, "eval EMA", report and partial(report, suffix="-ema")
        scores |= {f"{name}_ema": value for name, value in evaluate(*of_average).items()}
    return scores
