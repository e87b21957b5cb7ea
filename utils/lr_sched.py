"""Schedules as pure functions of the fractional epoch, and their application to an optimizer."""

import math

import torch


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch: linear from 0 to lr over the warm-up, then a half cosine down to min_lr."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return cosine((epoch - warmup_epochs) / (epochs - warmup_epochs), lr, min_lr)


class Schedule:
    """Sets an optimizer's learning rates, and its weight decay where that has an end value, for a fractional epoch.

    Args:
        lr, min_lr: peak and final learning rate; each group's is multiplied by its `lr_scale`.
        warmup_epochs, epochs: lengths in epochs; warmup_epochs may be fractional.
        weight_decay, weight_decay_end: groups that decay go from one to the other along half a cosine over the whole
            run; None keeps what the groups have.
    """

    def __init__(
        self, lr: float, min_lr: float, warmup_epochs: float, epochs: int, weight_decay: float = 0.0,
        weight_decay_end: float | None = None,
    ):  # fmt: skip
        self.lr, self.min_lr, self.warmup_epochs, self.epochs = lr, min_lr, warmup_epochs, epochs
        self.weight_decay, self.weight_decay_end = weight_decay, weight_decay_end

    def apply(self, optimizer: torch.optim.Optimizer, epoch: float) -> float:
        """Set every group for this fractional epoch and return the learning rate of a group whose lr_scale is 1."""
        lr = warmup_cosine(epoch, self.lr, self.min_lr, self.warmup_epochs, self.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if self.weight_decay_end is not None and group["decays"]:
                group["weight_decay"] = cosine(epoch / self.epochs, self.weight_decay, self.weight_decay_end)
        return lr
