"""One epoch of FCMAE pre-training."""

import torch

from utils.amp import Amp
from utils.distributed import accumulate, get_rank
from utils.lr_sched import Schedule
from utils.metrics import EpochTracker, RunLog
from utils.seeding import seed_all


def train_one_epoch(
    model: torch.nn.Module, loader, optimizer: torch.optim.Optimizer, amp: Amp, schedule: Schedule, run_log: RunLog,
    epoch: int, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Train for one epoch on a `datasets.StepLoader` whose samples are (image, label) or (image, label, mask).

    The device is read only where a console line is due.

    Returns:
        loss over all processes, lr of the last step, images_per_second.

    Raises:
        NonFiniteLoss: at the first console line after the loss became NaN or infinite.
    """
    model.train()
    tracker = EpochTracker(("loss",), epoch, len(loader), amp.device, run_log)
    for step, batches in tracker(loader.steps(epoch)):
        lr = schedule.apply(optimizer, epoch + step / len(loader))
        seed_all(seed, epoch, step, get_rank())
        for batch in batches:
            imgs, _, *mask = batch.data
            imgs = imgs.to(amp.device, non_blocking=True)
            with accumulate(model, batch.last):
                with amp.autocast():
                    loss, _, _ = model(imgs, mask=mask[0] if mask else None)  # the mask stays on the CPU, see FCMAE
                amp.backward(loss * batch.share)
            tracker.update(step, len(imgs), loss=loss)
        grad_norm = amp.step(optimizer, with_norm=tracker.due(step))
        tracker.report(step, lr, grad_norm)
    return tracker.summary() | {"lr": lr}
