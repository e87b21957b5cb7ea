"""One epoch of FCMAE pre-training."""

import torch

from utils.distributed import accumulate, get_rank
from utils.lr_sched import Schedule
from utils.run import Run
from utils.seeding import seed_all


def train_one_epoch(
    model: torch.nn.Module, loader, optimizer: torch.optim.Optimizer, schedule: Schedule, run: Run, epoch: int
) -> dict[str, float]:
    """Train for one epoch on a `StepLoader` whose samples are (image, label) or (image, label, mask).

    Returns:
        loss over all processes, lr of the last step.

    Raises:
        NonFiniteLoss: at the first console line after the loss became NaN or infinite; see --on_nonfinite.
        SystemExit: a signal came; the state after the last step is on disk.
    """
    model.train()
    mask_ratio = getattr(model, "module", model).mask_ratio
    amp = run.amp
    tracker = run.tracker(("loss",), epoch, len(loader))
    lr = schedule.apply(optimizer, epoch + max(tracker.start_step - 1, 0) / len(loader))  # if no step is left to do
    for step, batches in tracker(loader.steps(epoch, tracker.start_step)):
        lr = schedule.apply(optimizer, epoch + step / len(loader))
        for i, batch in enumerate(batches):
            seed_all(run.seed, epoch, step, get_rank(), i)  # here: without workers, to load a batch draws too
            imgs, _, *mask = (x.to(amp.device, non_blocking=True) for x in batch.data)
            imgs = loader.batch_transform(imgs)
            given = {"mask": mask[0], "mask_ratio": mask_ratio} if mask else {}
            with accumulate(model, batch.last):
                with amp.autocast():
                    loss, _, _ = model(imgs, **given)
                amp.backward(loss * batch.loss_weight)
            tracker.update(step, len(imgs) if batch.loss_weight else 0, loss=loss)
            if not batch.last:
                run.step_done(tracker, step, part=True)
        grad_norm = amp.step(optimizer, with_norm=tracker.due(step), leave_out=tracker.leave_out)
        tracker.shown = lr, grad_norm
        run.step_done(tracker, step)
    return tracker.stats() | {"lr": lr}
