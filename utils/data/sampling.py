"""Which samples make up each step, how each is seeded, and what takes the place of an unreadable one.

Every sample is augmented under a seed of (seed, epoch, index), so a run does not depend on the number of loader
processes, nor, for the data, of training processes. Streams (wds/, tfds/) have an order and augmentations of their own.
"""

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate

from ..errors import UsageError, refuse
from ..seeding import seed_cpu, seed_words
from .images import BadImage

log = logging.getLogger("fcmae")


def with_transform(dataset: Dataset, transform: Callable) -> Dataset:
    """The same samples under another transform; the data set that is given keeps its own."""
    dataset = copy.copy(dataset)
    dataset.transform = transform
    return dataset


def readable(dataset: Dataset, indices: Sequence[int]) -> Iterator[tuple]:
    """The samples of those images that can be read."""
    for index in indices:
        with contextlib.suppress(BadImage):
            yield dataset[index]


def random_subset(dataset: Dataset, count: int | None) -> Dataset:
    """At most `count` images, the same ones in every run, so that runs can be compared."""
    return Subset(dataset, sorted(shuffled_indices(dataset)[:count].tolist()))


def shuffled_indices(samples: Sized) -> torch.Tensor:
    """All indices, in an order that is the same in every run: int64 (len(samples),)."""
    return torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))


def path_of(dataset: Dataset, index: int) -> str:
    """Where a sample of a loader's data set comes from: the path of its file, or its number where there is none."""
    dataset = getattr(dataset, "dataset", dataset)  # of `EvalSamples`
    if paths := getattr(dataset, "paths", None):
        return paths[index]
    files = getattr(dataset, "samples", None)  # of torchvision's folders
    return files[index][0] if files else str(index)


# ---- samples, and what is wrong with unreadable images, by index -----------------------------------------------------


class EvalSamples(Dataset):
    """A data set by batches for `collate`, without unreadable images."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> tuple[list[tuple], dict[int, str]]:
        samples, bad = [], {}
        for index in indices:
            try:
                samples.append(self.dataset[index])
            except BadImage as error:
                bad[index] = str(error)
        return samples, bad


class TrainSamples(EvalSamples):
    """A data set by batches of (epoch, index), each sample under its own seed.

    The place of an unreadable image is taken by one that is drawn by (seed, epoch, index). sample_mask: called under
    the sample's seed; the mask that it returns is appended to the sample.
    """

    RETRIES = 100

    def __init__(self, dataset: Dataset, seed: int, sample_mask: Callable[[], torch.Tensor] | None = None):
        super().__init__(dataset)
        self.seed, self.sample_mask = seed, sample_mask

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[list[tuple], dict[int, str]]:
        # seeds and masks first, together: between images, they find the processor's caches cold and cost a multiple
        words, masks, bad = [seed_words(self.seed, *key) for key in keys], [], {}
        if self.sample_mask:
            for *_, seed in words:
                torch.default_generator.manual_seed(seed)
                masks.append(self.sample_mask())
        samples = [self._readable(key, seeds, bad) for key, seeds in zip(keys, words, strict=True)]
        return [(*sample, mask) for sample, mask in zip(samples, masks, strict=True)] if masks else samples, bad

    def _readable(self, key: tuple[int, int], seeds: list[int], bad: dict[int, str]) -> tuple:
        first = index = key[1] % len(self.dataset)  # see `balanced_order`
        for attempt in range(self.RETRIES):
            seed_cpu(seeds)
            try:
                return self.dataset[index]
            except BadImage as error:
                bad.setdefault(first, str(error))  # of the others, their own turn tells
            index = seed_words(self.seed, *key, attempt)[0] % len(self.dataset)
        raise UsageError(f"{self.RETRIES} unreadable images in a row, the first: {bad[first]}")


def collate(found: tuple[list[tuple], dict[int, str]]) -> tuple[list | None, dict[int, str]]:
    """A batch of samples, None where there are none; and the unreadable images as they are."""
    samples, bad = found
    return default_collate(samples) if samples else None, bad


class BadImages(dict):
    """What is wrong with unreadable images, by index; each is reported once, however often it is met."""

    def __init__(self, fate: str):
        self.fate, self.told = fate, set()

    def add(self, bad: dict[int, str]) -> None:
        self.update(bad)
        for message in bad.values():
            if message not in self.told:
                self.told.add(message)
                log.warning("unreadable image, %s: %s", self.fate, message)


class EvalLoader(DataLoader):
    """Batches of the readable images of a data set. bad: the others, in the last pass. several: labels an image."""

    def __init__(self, dataset: Dataset, **options):
        super().__init__(EvalSamples(dataset), collate_fn=collate, **options)
        self.bad, self.several = BadImages("not evaluated"), getattr(dataset, "several", False)

    @property
    def read(self) -> list[int]:
        """The indices of the samples that a whole pass gave, in its order."""
        return [index for index in self.sampler if index not in self.bad]

    def __iter__(self) -> Iterator[list]:
        self.bad.clear()
        for batch, bad in super().__iter__():
            self.bad.add(bad)
            if batch is not None:
                yield batch


# ---- steps -----------------------------------------------------------------------------------------------------------


class StepSampler(Sampler):
    """One process's batches of an epoch, as lists of (epoch, index); steps do not depend on how work is spread.

    Every optimizer step takes the next batch_size * update_freq * world_size samples of the epoch's order, the
    global batch; its batches, and within each batch the processes, take even shares of them. The rest at the end is a
    smaller step if it is at least a quarter of the global batch, else it is left out of this epoch. batch_divisor
    divides every batch's size (2 for Mixup): the last step leaves up to batch_divisor - 1 out. draw: makes an epoch's
    order of a generator.
    """

    def __init__(self, num_samples, batch_size, update_freq=1, rank=0, world_size=1, seed=0, batch_divisor=1):
        self.draw: Callable[..., torch.Tensor] = partial(torch.randperm, num_samples)
        self.num_samples, self.batch_size, self.update_freq = num_samples, batch_size, update_freq
        self.rank, self.world_size, self.seed, self.batch_divisor = rank, world_size, seed, batch_divisor
        self.epoch = self.start_step = 0

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        full, rest = divmod(self.num_samples, self.global_batch)
        return full + (4 * (rest - rest % self.batch_divisor) >= self.global_batch)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.update_freq * self.world_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def order(self) -> torch.Tensor:
        """The epoch's samples, int64 (num_samples,)."""
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        return self.draw(generator=torch.Generator().manual_seed(int(seed)))

    def span(self, step: int) -> slice:
        """Where a step's samples, those of all processes, are in the order."""
        first = step * self.global_batch
        count = min(self.global_batch, self.num_samples - first)
        return slice(first, first + count - count % self.batch_divisor)

    def step(self, step: int) -> list[tuple[int, int, float]]:
        """(start, end) in the order, and `Batch.loss_weight`, of each of this process's batches.

        Where a batch does not go round the processes, those left over take a group of another's, with the weight 0.
        """
        first, size = self.span(step).start, self.batch_divisor
        groups = (self.span(step).stop - first) // size
        batches = -(-groups * size // (self.batch_size * self.world_size))
        parts = []
        for i in range(batches):
            start, end = i * groups // batches, (i + 1) * groups // batches
            start, end = [start + (end - start) * r // self.world_size for r in (self.rank, self.rank + 1)]
            loss_weight = (end - start) * self.world_size / groups
            parts.append((first + start * size, first + max(end, start + 1) * size, loss_weight))
        return parts

    def __len__(self) -> int:
        return sum(len(self.step(step)) for step in range(self.start_step, self.steps))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order().tolist()
        for step in range(self.start_step, self.steps):
            for start, end, _ in self.step(step):
                yield [(self.epoch, index) for index in order[start:end]]


@dataclass
class Batch:
    """One forward pass of an optimizer step.

    loss_weight: factor on the batch's mean loss, such that the gradients averaged over processes and added up over a
    step's batches are those of the mean over the step's samples; 0: they are another process's, and do not count. With
    sample weights it is divided by their mean over the step: the sum of weighted losses is then over the sum of the
    weights, as in torch's CrossEntropyLoss, however the step is spread.
    """

    data: list
    loss_weight: float
    last: bool  # of its step


class StepLoader:
    """A training loader by optimizer steps; of an iterable data set, which has its own order, each is a full one.

    batch_transform: makes the model's input (N, C, H, W) of a batch's images, once they are on the device, see
    `utils.data`; None: they are it. bad: images of this epoch and process that are unreadable; max_bad: so many may be.
    sample_weights: of the losses, (samples,), see `Batch`.
    """

    def __init__(
        self, loader: DataLoader, sampler: StepSampler, batch_transform: Callable | None = None, max_bad: float = 0,
        sample_weights: torch.Tensor | None = None,
    ):  # fmt: skip
        self.sample_weights = sample_weights
        self.loader, self.sampler, self.batch_transform = loader, sampler, batch_transform or torch.nn.Identity()
        self.max_bad, self.bad = max_bad, BadImages("another takes its place")

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        return self.sampler.steps

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, over all processes."""
        return self.sampler.global_batch

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[Iterator[Batch]]:
        """The batches of each optimizer step from start_step on, each loaded as it is asked for, in this order."""
        self.sampler.set_epoch(epoch, start_step)
        if not start_step:
            self.bad.clear()
        streamed, full = isinstance(self.loader.dataset, IterableDataset), self.sampler.update_freq
        loader = itertools.islice(self._stream(epoch), start_step * full, None) if streamed else iter(self.loader)
        ordered = None if self.sample_weights is None else self.sample_weights[self.sampler.order()]
        for step in range(start_step, len(self)):
            weights = [1 / full] * full if streamed else [weight for *_, weight in self.sampler.step(step)]
            if ordered is not None:
                mean = ordered[self.sampler.span(step)].mean().item()
                weights = [weight / mean for weight in weights]
            yield self._batches(loader, weights)

    def _batches(self, loader: Iterator, weights: list[float]) -> Iterator[Batch]:
        for i, weight in enumerate(weights, 1):
            data, bad = next(loader)
            if weight:  # else they are another process's
                self.bad.add(bad)
            yield Batch(data, weight, i == len(weights))

    def _stream(self, epoch: int) -> Iterator:
        """Without end: a stream's length may be an estimate, and every process needs as many batches."""
        self.loader.dataset.set_epoch(epoch)
        data = True
        while data:
            data = None
            for data in self.loader:
                yield data, {}
        raise UsageError(f"--batch_size {self.loader.batch_size}: no loader process has as many images of the stream")


# ---- streams of timm -------------------------------------------------------------------------------------------------


def stream_workers(dataset: IterableDataset, name: str, num_workers: int, world_size: int) -> int:
    """num_workers, or fewer, so that each gets a shard of wds/; timm's streams estimate their length by it.

    Raises UsageError where there are fewer shards than processes.
    """
    if name.startswith("wds/"):
        shards = len(dataset.reader.split_info.filenames)
        few = f"--data_set {name}: {shards} shards for {world_size} processes; start {shards}, or write more"
        refuse(shards < world_size, few)
        if num_workers * world_size > shards:
            log.info("--num_workers %d: lowered to %d, for %d shards in all", num_workers, shards // world_size, shards)
            num_workers = shards // world_size
    if num_workers:
        dataset.set_loader_cfg(num_workers)
    return num_workers


def own_shards(dataset: IterableDataset, name: str, rank: int, world_size: int) -> Dataset:
    """A stream for evaluation, each process with shards of its own: timm would cut or repeat them to one length."""
    if world_size == 1:
        return dataset
    if not name.startswith("wds/"):
        log.info("--data_set %s: on several processes, images may count twice or not at all", name)
        return dataset
    reader, mine = dataset.reader, slice(rank, None, world_size)
    files, lengths = reader.split_info.filenames[mine], reader.split_info.shard_lengths[mine]
    if not files:
        return Subset(dataset, [])
    reader.split_info = replace(reader.split_info, filenames=files, shard_lengths=lengths)
    reader.num_samples = sum(lengths) or reader.num_samples
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset
