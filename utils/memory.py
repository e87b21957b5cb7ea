"""Data sets whose images are all decoded once and held in memory, on the host or on the device."""

import copy
import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from .crops import Box
from .data.images import BadImage, to_tensor
from .errors import UsageError
from .interrupts import ignore_signals

log = logging.getLogger("fcmae")


class InMemory(Dataset):
    """A data set's images, decoded once, and their labels. Loader processes share them where they are forked.

    Raises:
        UsageError: they do not fit into memory.
    """

    def __init__(self, dataset: Dataset, in_chans: int = 3, num_workers: int = 0):
        self.transform, self.images, self.targets, self.errors = dataset.transform, [], [], {}
        outcomes = Outcomes(with_transform(dataset, partial(to_tensor, in_chans=in_chans)))
        loader = DataLoader(outcomes, 64, num_workers=num_workers, collate_fn=list, worker_init_fn=ignore_signals)
        limit, taken = 0.9 * free_memory(torch.device("cpu")), 0
        for image, target, error in itertools.chain.from_iterable(loader):
            if error:
                self.errors[len(self.images)] = error
            else:
                image = image.clone()  # out of the memory shared with a worker, of which there are limited pieces
                taken += image.nbytes
            self.images.append(image)
            self.targets.append(target)
            if taken > limit:
                raise UsageError(
                    f"--in_memory: {len(self.images)} of {len(dataset)} images take {taken / 2**30:.1f} GiB, which is "
                    "what is free; give --in_memory no"
                )
        log.info("%d images in memory: %.0f MiB", len(self.images) - len(self.errors), taken / 2**20)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> torch.Tensor:
        """(C, H, W) as decoded. Raises BadImage."""
        if index in self.errors:
            raise BadImage(self.errors[index])
        return self.images[index]

    def __getitem__(self, index: int):
        return self.transform(self.image(index)), self.targets[index]


def with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    """The whole images of a data set, one that a device crops too, under another transform."""
    dataset = copy.copy(dataset.held if isinstance(dataset, CropsInMemory) else dataset)
    dataset.transform = transform
    return dataset


class Outcomes(Dataset):
    """A data set's (image, label, ""), or (None, 0, what was wrong with it)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            return *self.dataset[index], ""
        except BadImage as error:
            return None, 0, str(error)


class CropsInMemory(Dataset):
    """What a device that holds the images is to cut: (index, *Box) as (6,) integers, and the label."""

    def __init__(self, held: InMemory, draw: Callable[[int, int], Box]):
        self.held, self.draw = held, draw
        shapes = {tuple(x.shape): None for x in held.images if x is not None}
        self.shape, *others = shapes
        if others:
            sizes = " and ".join(f"{width} x {height}" for _, height, width in (self.shape, others[0]))
            raise UsageError(f"--in_memory device: images differ in size ({sizes}); --in_memory host takes any")

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int):
        self.held.image(index)  # raises where there is none
        return torch.tensor((index, *self.draw(*self.shape[1:]))), self.held.targets[index]

    def on(self, device: torch.device) -> torch.Tensor:
        """All images on a device: (N, C, H, W). Raises UsageError where they do not fit."""
        dtype = next(image.dtype for image in self.held.images if image is not None)
        needed, free = len(self) * math.prod(self.shape) * dtype.itemsize, free_memory(device)
        if needed > 0.9 * free:
            raise UsageError(
                f"--in_memory device: the images take {needed / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB "
                "free; give --in_memory host"
            )
        images = torch.zeros(len(self), *self.shape, dtype=dtype, device=device)
        for i, image in enumerate(self.held.images):
            if image is not None:
                images[i] = image
        return images


def free_memory(device: torch.device) -> float:
    """Bytes; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return math.inf
