"""How an encoder fares in pre-training, told without labels: the rank of its features, and its dead channels."""

import contextlib
import logging
import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

from .amp import Amp
from .distributed import gather
from .knn import extract, pooled_features

log = logging.getLogger("fcmae")

DEAD = 0.01  # of the mean deviation of a layer's channels


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the normalised singular values, (N, D) -> 1 to min(N, D).

    NaN where a feature is not finite, as those of float16 may be, or all are 0.
    """
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features)
    return torch.special.entr(values / values.sum()).sum().exp().item()


def dead_channels(moments: Iterable[torch.Tensor]) -> float:
    """Percentage of channels that hardly differ between images and positions; (3, C) each: count, sum, squares."""
    dead = []
    for count, total, squares in moments:
        deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        dead.append(deviation <= DEAD * deviation.mean())
    return 100 * torch.cat(dead).double().mean().item()


def health(encoder: nn.Module, layers: list[nn.Module], loader: DataLoader, amp: Amp) -> dict[str, float]:
    """effective_rank of the pooled features, and dead_channels of what `layers` give (..., C), over all processes.

    The random generators are left as they were. {}: no image can be read.
    """
    moments: dict[nn.Module, torch.Tensor] = {}

    def add(layer: nn.Module, _inputs, output: torch.Tensor) -> None:
        values = output.flatten(0, -2).float()
        variance, mean = (x.cpu().double() for x in torch.var_mean(values, dim=0, correction=0))
        rows = torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
        moments[layer] = moments.get(layer, 0) + len(values) * rows

    encoder.eval()
    with contextlib.ExitStack() as hooks, torch.random.fork_rng(devices=[]):
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add))
        features, _ = extract(partial(pooled_features, encoder), loader, encoder.dims[-1], amp)
    rows, parts = zip(*gather((features.cpu(), list(moments.values()))), strict=True)
    features = torch.cat(rows).to(amp.device)
    if not len(features):
        return {}
    rank, dead = effective_rank(features), dead_channels(map(sum, zip(*filter(None, parts), strict=True)))
    log.info("effective rank %.1f of %d, %.1f %% of the channels dead", rank, min(features.shape), dead)
    if dead > 50:
        log.warning("most channels after GRN are dead: the features collapse; try a lower --blr or a longer warm-up")
    return {"effective_rank": rank, "dead_channels": dead}
