"""k-nearest-neighbour classification on frozen features: a look at an encoder that needs no training.

The protocol of instance discrimination (arXiv 1805.01978, section 3.4), which DINO and others report: cosine
similarity, the k nearest training images vote, each with the weight exp(similarity / temperature).
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from .amp import Amp
from .distributed import all_reduce_sum, gather
from .errors import UsageError
from .report import average_precision

log = logging.getLogger("fcmae")

SIMILARITIES = 2**26  # computed at once: 256 MiB


@torch.no_grad()
def extract(encode: Callable, loader: DataLoader, dim: int, amp: Amp) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, dim), float32, and labels, (N,) or (N, classes), of this process's readable images, on the device.

    encode: (B, C, H, W) -> (B, dim).
    """
    features = [torch.empty(0, dim, device=amp.device)]  # a process may have no image
    labels = [torch.empty(0, dtype=torch.int64, device=amp.device)]  # which fits rows of any length
    for batch in loader:
        imgs, target = (x.to(amp.device, non_blocking=True) for x in batch)
        with amp.autocast():
            features.append(encode(imgs).float())
        labels.append(target)
    return torch.cat(features), torch.cat(labels)


def knn_votes(
    features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, num_classes: int, k: int = 20,
    temperature: float = 0.07, similarities: int = SIMILARITIES,
) -> torch.Tensor:  # fmt: skip
    """Votes for each class: labelled features (N, D), (N,) and queries (Q, D) -> (Q, num_classes).

    The weights are relative to the nearest image's, so that no temperature overflows. With fewer than k images all
    of them vote; of several labels an image, (N, num_classes), each class gets the share of the votes that have it.
    similarities: computed at a time, which bounds the memory.
    """
    queries, features = F.normalize(queries, dim=1), F.normalize(features, dim=1)
    votes = []
    for chunk in queries.split(max(1, similarities // len(features))):
        similarity, nearest = (chunk @ features.T).topk(min(k, len(features)), dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        if labels.dim() == 2:
            shares = weight.new_zeros(len(chunk), len(labels)).scatter_(
                1, nearest, weight / weight.sum(1, keepdim=True)
            )
            votes.append(shares @ labels.to(shares.dtype))
        else:
            votes.append(weight.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[nearest], weight))
    return torch.cat(votes)


def knn_accuracy(encode: Callable, dim: int, train_loader: DataLoader, test_loader: DataLoader, amp: Amp) -> float:
    """Percentage of test images whose class the training images' features vote for, each image counted once.

    Of several labels an image: the mean average precision of the votes. Every process encodes its share of both; the
    training features are gathered, the test images stay where they are.

    Raises:
        UsageError: no training or no test image can be read.
    """
    of_all = (torch.cat(gather(rows.cpu())) for rows in extract(encode, train_loader, dim, amp))
    features, labels = (rows.to(amp.device) for rows in of_all)
    queries, truth = extract(encode, test_loader, dim, amp)
    seen = all_reduce_sum(torch.tensor(len(truth), device=amp.device)).item()
    if not len(labels) or not seen:
        raise UsageError("k-NN accuracy: none of the labelled images can be read; see the warnings above")
    bad = sum(len(getattr(loader, "bad", ())) for loader in (train_loader, test_loader))
    if bad := all_reduce_sum(torch.tensor(bad, device=amp.device)).item():
        log.info("k-NN: %d unreadable images left out", bad)
    votes = knn_votes(features, labels, queries, int(labels.max()) + 1)
    if labels.dim() == 2:
        votes, truth = (torch.cat(gather(rows.cpu())) for rows in (votes, truth))
        return 100 * average_precision(truth > 0, votes).mean().item()
    return 100 * all_reduce_sum((votes.argmax(dim=1) == truth).sum()).item() / seen


def pooled_features(encoder: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    """The last stage on whole images, averaged over its positions: (N, C, H, W) -> (N, dims[-1]), float32."""
    return encoder.forward_stages(imgs)[-1].mean(dim=(2, 3), dtype=torch.float32)


def knn_score(encoder: nn.Module, loaders: tuple[DataLoader, DataLoader], amp: Amp) -> float:
    """`knn_accuracy` of the encoder as it is now; the random generators are left as they were."""
    encoder.eval()
    with torch.random.fork_rng(devices=[]):
        return knn_accuracy(partial(pooled_features, encoder), encoder.dims[-1], *loaders, amp)
