"""How many images of each class are trained on, how often each is shown, and what its loss weighs."""

import contextlib
import re
from collections import Counter

import torch
from torch.utils.data import Dataset, Subset

from ..errors import refuse
from .files import number_labels, text_lines


def labels_of(dataset: Dataset, what: str) -> list:
    """The labels of all samples. Raises UsageError, which names `what` asks for them, where they are not listed."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset, what)
        return [labels[i] for i in dataset.indices]
    refuse(not hasattr(dataset, "targets"), f"{what} does not list its labels; leave it out")
    targets = dataset.targets
    return targets.tolist() if isinstance(targets, torch.Tensor) else targets  # torchvision's MNIST has a tensor


def first_of_each_class(dataset: Dataset, count: int, name: str) -> Subset:
    """At most `count` images of each class, the first in the data set's order: the same ones under every seed.

    Raises UsageError for a data set, called `name`, that does not list its labels.
    """
    seen, indices = Counter(), []
    for index, label in enumerate(labels_of(dataset, f"--images_per_class {count}: {name}")):
        seen[label] += 1
        if seen[label] <= count:
            indices.append(index)
    return Subset(dataset, indices)


def balanced_weights(counts: torch.Tensor) -> torch.Tensor:
    """Images / (classes * images of the class), over the classes that have any, as scikit-learn's "balanced"; else 1.

    counts: images of each class, (classes,). Returns float64 (classes,).
    """
    weights = counts.sum() / ((counts > 0).sum() * counts.double())
    return torch.where(counts > 0, weights, 1.0)


def read_weights(file: str, flag: str, classes: list[str]) -> torch.Tensor:
    """The weight of each class, float64 (classes,), from a file with a class, by name or number, and a number a line.

    Raises UsageError for a file that cannot be read, a line that is something else, or a class without or with two.
    """
    source, names, where, weights = f"{flag} {file}", [], [], []
    for number, line in enumerate(text_lines(file, source), 1):
        found = re.fullmatch(r'\s*"?(.+?)"?[\t,; ]+([^\t,; ]+)\s*', line)
        if not line.strip() or (found and not names and found[2].lower() in ("weight", "weights")):
            continue
        weight = 0.0
        with contextlib.suppress(TypeError, ValueError):
            weight = float(found[2])
        wanted = "a line is a class and, after a comma, its weight, a number from 1e-9 to 1e9"
        refuse(not 1e-9 <= weight <= 1e9, f"{source}: line {number}, {line[:200]!r}: {wanted}")
        names.append(found[1])
        where.append(f"line {number}")
        weights.append(weight)
    refuse(not names, f"{source}: is empty; a line is a class and, after a comma, its weight")
    numbers = number_labels(names, where, source, classes, None)[1]
    given = Counter(numbers)
    for i, name in enumerate(classes):
        refuse(given[i] != 1, f"{source}: has {given[i]} weights for class {name!r}; give each one")
    return torch.tensor(weights, dtype=torch.float64)[torch.tensor(numbers).argsort()]


def balanced_order(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many samples as there are labels (N,), in rounds of one of each class that has any: int64 (N,).

    A class's images are all shown before one is again. The k-th time, the number of an image is i + k * N, so that
    each has random augmentations of its own.
    """
    columns, counts = [], labels.unique(return_counts=True)[1]
    rounds = -(-len(labels) // len(counts))
    for images in labels.argsort(stable=True).split(counts.tolist()):
        passes = [images[torch.randperm(len(images), generator=generator)] for _ in range(0, rounds, len(images))]
        columns.append(torch.cat([x + k * len(labels) for k, x in enumerate(passes)])[:rounds])
    places = torch.rand(rounds, len(counts), generator=generator).argsort(dim=1)
    return torch.stack(columns, dim=1).gather(1, places).flatten()[: len(labels)]
