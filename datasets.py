"""Transforms, data sets, samplers and loaders.

Randomness: every sample is augmented under a seed of (seed, epoch, index), so a run does not depend on --num_workers,
nor, for the data, on the number of processes.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode

from utils.distributed import get_rank, get_world_size, main_process_first
from utils.errors import UsageError, suggest
from utils.interrupts import ignore_signals
from utils.seeding import seed_all
from utils.shapes import Shapes

log = logging.getLogger("fcmae")

DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "shapes")
TIMM_SCHEMES = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")
DATA_SETS_HELP = (
    "IMNET (data_path/train and /val as 1000 class folders), image_folder, CIFAR (CIFAR-100), CIFAR10, shapes (drawn, "
    "nothing to download), or a name with a scheme that timm's create_dataset knows: wds/, hfds/, tfds/, torch/"
)


# ---- transforms ------------------------------------------------------------------------------------------------------


def mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of the normalisation."""
    if getattr(args, "imagenet_default_mean_and_std", True):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def build_pretrain_transform(args) -> Callable:
    """Random resized crop, flip, normalisation: a PIL image -> (3, input_size, input_size)."""
    return transforms.Compose(
        [
            _to_rgb,
            transforms.RandomResizedCrop(
                args.input_size, scale=(args.min_crop, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*mean_std(args)),
        ]
    )


def build_transform(is_train: bool, args) -> Callable:
    """The fine-tuning transform, or the evaluation transform: a PIL image -> (3, input_size, input_size).

    Raises:
        UsageError: an auto-augment policy that timm does not know.
    """
    mean, std = mean_std(args)
    size = args.input_size
    if is_train:
        try:
            transform = timm.data.create_transform(
                input_size=size,
                is_training=True,
                color_jitter=args.color_jitter,
                auto_augment=args.aa or None,
                interpolation=args.train_interpolation,
                # a clean half of the images, drawn anew each epoch, is half the chance of being erased
                re_prob=args.reprob / 2 if args.resplit else args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
                scale=(args.min_crop, 1.0),
                mean=mean,
                std=std,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UsageError(f"--aa {args.aa}: no policy of timm's; one is rand-m9-mstd0.5-inc1") from error
        _guard_posterize(transform)
        if size <= 32:  # so small that a random resized crop would leave nothing to see
            bicubic = transforms.Resize(size, InterpolationMode.BICUBIC)  # does nothing to images of that size
            transform.transforms[0] = transforms.Compose([bicubic, transforms.RandomCrop(size, padding=4)])
        transform.transforms.insert(0, _to_rgb)
        return transform
    if size >= 384:
        resize = [transforms.Resize((size, size), InterpolationMode.BICUBIC)]
    else:
        crop_pct = args.crop_pct or (1.0 if size <= 32 else 224 / 256)
        resize = [transforms.Resize(int(size / crop_pct), InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    return transforms.Compose([_to_rgb, *resize, transforms.ToTensor(), transforms.Normalize(mean, std)])


def _to_rgb(image: Image.Image) -> Image.Image:
    """Some of torchvision's data sets are gray."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _guard_posterize(transform: Callable) -> None:
    """Let auto-augment policies ask for 0 bits, as timm's do now and then and Pillow 13 refuses: a black image."""
    for stage in transform.transforms:
        policies = [getattr(stage, "ops", []), *getattr(stage, "policy", [])]  # RandAugment, AutoAugment
        for op in (op for policy in policies for op in policy):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


# ---- images on disk --------------------------------------------------------------------------------------------------


class BadImage(Exception):
    """An image file that cannot be decoded; the message names the file."""


def load_image(path: str) -> Image.Image:
    """Decode an image file as RGB. Raises BadImage for one that is truncated, damaged or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise whatever they run into
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


class ClassFolders(ImageFolder):
    """Images in one folder per class; labels follow the sorted folder names, or `classes` where given.

    Raises:
        UsageError: no such folder, no class folders, a class that has no images or is not among `classes`.
    """

    def __init__(self, root: str, flag: str, transform: Callable | None = None, classes: list[str] | None = None):
        self.flag, self.given_classes = flag, classes
        if not os.path.isdir(root):
            raise UsageError(f"{flag} {root}: no such folder")
        try:
            super().__init__(root, transform, loader=load_image, allow_empty=classes is not None)
        except FileNotFoundError as error:  # a class folder without images
            raise UsageError(f"{flag} {root}: {str(error).splitlines()[0]}") from error
        if not self.samples:
            raise UsageError(f"{flag} {root}: its class folders hold no images ({', '.join(IMG_EXTENSIONS)})")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = class_names(directory, self.flag)
        classes = found if self.given_classes is None else self.given_classes
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise UsageError(
                f"{self.flag} {directory}: class folder {unknown[0]!r} is not among the {len(classes)} training classes"
                f"{suggest(unknown[0], classes)}"
            )
        return classes, {name: i for i, name in enumerate(classes)}


def class_names(folder: str | Path, flag: str) -> list[str]:
    """Sorted names of the class folders in a folder. Raises UsageError where there are none."""
    if not os.path.isdir(folder):
        raise UsageError(f"{flag} {folder}: no such folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise UsageError(f"{flag} {folder}: holds no class folders; labelled images go to {folder}/CLASS/IMAGE")
    return names


class ImageTree(Dataset):
    """All images below a folder, however nested, without labels: (image, 0). Raises UsageError where there are none."""

    def __init__(self, root: str, flag: str, transform: Callable | None = None):
        if not os.path.isdir(root):
            raise UsageError(f"{flag} {root}: no such folder")
        self.transform = transform
        self.paths = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS)
        )
        if not self.paths:
            raise UsageError(f"{flag} {root}: holds no images ({', '.join(IMG_EXTENSIONS)})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = load_image(self.paths[index])
        return image if self.transform is None else self.transform(image), 0


# ---- data sets by name -----------------------------------------------------------------------------------------------


def build_pretrain_dataset(args) -> Dataset:
    """The images of --data_set and --data_path for pre-training; folders are read with or without class folders."""
    transform = build_pretrain_transform(args)
    if args.data_set == "IMNET":
        root = os.path.join(_data_path(args), "train")
        if not os.path.isdir(root):
            raise UsageError(
                f"--data_path {args.data_path}: has no folder 'train'; "
                "for any folder of images give --data_set image_folder"
            )
        return ImageTree(root, "--data_path", transform)
    if args.data_set == "image_folder":
        return ImageTree(_data_path(args), "--data_path", transform)
    return _named_dataset(True, args, transform)


def build_dataset(is_train: bool, args, classes: list[str] | None = None) -> tuple[Dataset, int]:
    """The labelled data set of --data_set with its transform, and its number of classes.

    Args:
        classes: class names in the order of their labels, where known (from training, or from a checkpoint): class
            folders of a validation set are numbered by them.

    Raises:
        UsageError: data that is missing, or that contradicts --nb_classes.
    """
    transform = build_transform(is_train, args)
    if args.data_set in ("IMNET", "image_folder"):
        root, flag = _class_root(is_train, args)
        if not is_train and classes is None and args.data_path:
            train_root, train_flag = _class_root(True, args)
            if os.path.isdir(train_root):
                classes = class_names(train_root, train_flag)
        dataset = ClassFolders(root, flag, transform, classes)
        nb_classes = len(dataset.classes)
        if args.data_set == "IMNET" and nb_classes != 1000:
            raise UsageError(
                f"{flag} {root}: {nb_classes} class folders, --data_set IMNET has 1000; "
                "for other data give --data_set image_folder"
            )
    else:
        dataset = _named_dataset(is_train, args, transform)
        nb_classes = _count_classes(dataset) or args.nb_classes
        if nb_classes is None:
            raise UsageError(f"--data_set {args.data_set}: does not tell its number of classes; give --nb_classes")
        if classes is not None and len(classes) != nb_classes:  # its labels would then mean something else
            split = "training" if is_train else "validation"
            raise UsageError(
                f"--data_set {args.data_set}: {nb_classes} classes in its {split} split, {len(classes)} were trained on"
            )
    if args.nb_classes is not None and args.nb_classes != nb_classes:
        raise UsageError(f"--nb_classes {args.nb_classes}: the data set {args.data_set} has {nb_classes} classes")
    return dataset, nb_classes


def _data_path(args) -> str:
    if not args.data_path:
        raise UsageError(f"--data_set {args.data_set} needs --data_path; --data_set shapes needs no data")
    return args.data_path


def _class_root(is_train: bool, args) -> tuple[str, str]:
    """The folder of class folders, and the flag that names it."""
    if not is_train and args.eval_data_path:
        return args.eval_data_path, "--eval_data_path"
    if args.data_set == "IMNET":
        return os.path.join(_data_path(args), "train" if is_train else "val"), "--data_path"
    if not is_train:
        raise UsageError("--data_set image_folder evaluates on --eval_data_path: give it, or --disable_eval true")
    return _data_path(args), "--data_path"


def _named_dataset(is_train: bool, args, transform: Callable) -> Dataset:
    if args.data_set == "shapes":
        return Shapes("train" if is_train else "val", size=args.input_size, transform=transform)
    if args.data_set in ("CIFAR", "CIFAR10"):
        build = CIFAR10 if args.data_set == "CIFAR10" else CIFAR100
        try:
            with main_process_first():
                return build(_data_path(args), train=is_train, transform=transform, download=True)
        except (OSError, RuntimeError) as error:
            reason = f"{args.data_set} is not there and cannot be downloaded ({error})"
            raise UsageError(f"--data_path {args.data_path}: {reason}") from error
    if not args.data_set.startswith(TIMM_SCHEMES):
        raise UsageError(
            f"--data_set {args.data_set}: unknown{suggest(args.data_set, DATA_SETS)}; "
            f"one of {', '.join(DATA_SETS)}, or a timm name with a scheme ({' '.join(TIMM_SCHEMES)})"
        )
    root = None if is_train else getattr(args, "eval_data_path", None)
    try:
        dataset = timm.data.create_dataset(
            args.data_set,
            root=root or (_data_path(args) if args.data_set.startswith("torch/") else args.data_path),
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except UsageError:
        raise
    except Exception as error:  # each scheme has libraries, and exceptions, of its own
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--data_set {args.data_set}: timm could not open it: {reason}") from error
    if isinstance(dataset, ImageFolder):
        dataset.loader = load_image
    dataset.transform = transform
    return dataset


def _count_classes(dataset: Dataset) -> int | None:
    reader = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    return len(classes) if classes else None


# ---- samples and steps -----------------------------------------------------------------------------------------------


class TrainSamples(Dataset):
    """A data set read by (epoch, index), each sample under its own seed; unreadable images are reported and replaced.

    Args:
        draw: called under the sample's seed; what it returns (a mask, in pre-training) is appended to the sample.
    """

    RETRIES = 100

    def __init__(self, dataset: Dataset, seed: int, draw: Callable[[], torch.Tensor] | None = None):
        self.dataset, self.seed, self.draw = dataset, seed, draw

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        seed_all(self.seed, epoch, index)
        for attempt in range(self.RETRIES):
            try:
                sample = self.dataset[(index + attempt) % len(self.dataset)]
                break
            except BadImage as error:
                log.warning("unreadable image, the next one takes its place: %s", error)
        else:
            raise UsageError(f"{self.RETRIES} unreadable images in a row from index {index} on; see the warnings above")
        return (*sample, self.draw()) if self.draw else sample


class EvalSamples(Dataset):
    """A data set in which an unreadable image is reported and None, for `collate_readable` to leave out."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            return self.dataset[index]
        except BadImage as error:
            log.warning("unreadable image, not evaluated: %s", error)
            return None


def collate_readable(samples: list):
    """A batch of the samples that are not None; None where that leaves none."""
    samples = [sample for sample in samples if sample is not None]
    return default_collate(samples) if samples else None


class StepSampler(Sampler):
    """One process's batches of an epoch, as lists of (epoch, index); steps do not depend on how work is spread.

    Every optimizer step takes the next batch_size * update_freq * world_size samples of the epoch's permutation; its
    batches, and within each batch the processes, take even shares of them. The last step takes what is left.

    Args:
        multiple: every batch's size is a multiple of it (2 for Mixup). What the last step then leaves over, and what
            does not go round all processes, is skipped this epoch: fewer than multiple * world_size samples.
    """

    def __init__(self, num_samples, batch_size, update_freq=1, rank=0, world_size=1, seed=0, multiple=1):
        self.num_samples, self.batch_size, self.update_freq = num_samples, batch_size, update_freq
        self.rank, self.world_size, self.seed, self.multiple = rank, world_size, seed, multiple
        self.epoch = self.start_step = 0

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        full, rest = divmod(self.num_samples, self.global_batch)
        return full + (self._usable(rest)[0] > 0)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.update_freq * self.world_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def _usable(self, samples: int) -> tuple[int, int]:
        """Of a step's samples, how many groups of `multiple` are used, and in how many batches."""
        groups = samples // self.multiple
        batches = -(-samples // (self.batch_size * self.world_size))
        if batches and groups // batches < self.world_size:  # a process would be left without a sample
            groups -= groups % self.world_size
            batches = -(-groups * self.multiple // (self.batch_size * self.world_size))
        return groups, batches

    def step(self, step: int) -> tuple[int, list[tuple[int, int]]]:
        """Samples of a step over all processes, and (start, end) in the permutation of each batch of this one."""
        first = step * self.global_batch
        groups, batches = self._usable(min(self.global_batch, self.num_samples - first))
        bounds = []
        for i in range(batches):
            start, end = i * groups // batches, (i + 1) * groups // batches
            share = [start + (end - start) * r // self.world_size for r in (self.rank, self.rank + 1)]
            bounds.append((first + share[0] * self.multiple, first + share[1] * self.multiple))
        return groups * self.multiple, bounds

    def __len__(self) -> int:
        return sum(len(self.step(step)[1]) for step in range(self.start_step, self.steps))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(int(seed))).tolist()
        for step in range(self.start_step, self.steps):
            for start, end in self.step(step)[1]:
                yield [(self.epoch, index) for index in order[start:end]]


@dataclass
class Batch:
    """One forward pass of an optimizer step.

    data: what the loader collated. share: factor on the batch's mean loss, such that the gradients averaged over
    processes and added up over a step's batches are those of the mean over the step's samples. last: in its step.
    """

    data: list
    share: float
    last: bool


class StepLoader:
    """A training loader by optimizer steps."""

    def __init__(self, loader: DataLoader, sampler: StepSampler | None, update_freq: int):
        self.loader, self.sampler, self.update_freq = loader, sampler, update_freq

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        return self.sampler.steps if self.sampler is not None else -(-len(self.loader) // self.update_freq)

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, over all processes."""
        if self.sampler is not None:
            return self.sampler.global_batch
        return self.loader.batch_size * self.update_freq * get_world_size()

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The batches of each optimizer step from start_step on; held in host memory for the length of their step."""
        if self.sampler is None:
            yield from itertools.islice(self._streamed_steps(epoch), start_step, None)  # a stream is read to there
            return
        self.sampler.set_epoch(epoch, start_step)
        loader = iter(self.loader)
        for step in range(start_step, len(self)):
            samples, bounds = self.sampler.step(step)
            shares = [(end - start) * self.sampler.world_size / samples for start, end in bounds]
            yield [Batch(next(loader), share, i == len(shares) - 1) for i, share in enumerate(shares)]

    def _streamed_steps(self, epoch: int) -> Iterator[list[Batch]]:
        """An iterable data set gives its own order, in full batches; its length may be an estimate."""
        self.loader.dataset.set_epoch(epoch)
        loader = itertools.islice(self.loader, len(self.loader))
        while window := list(itertools.islice(loader, self.update_freq)):
            yield [Batch(data, 1 / len(window), i == len(window) - 1) for i, data in enumerate(window)]


def build_train_loader(dataset: Dataset, args, draw: Callable | None = None, multiple: int = 1) -> StepLoader:
    """The loader of this process's share of every optimizer step.

    Raises:
        UsageError: fewer images than one optimizer step takes.
    """
    common = {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": ignore_signals,
    }
    if isinstance(dataset, IterableDataset):
        _tell_workers(dataset, args)
        loader = DataLoader(dataset, batch_size=args.batch_size, drop_last=True, **common)
        if len(loader) == 0:
            raise UsageError(
                f"--batch_size {args.batch_size}: the training set has {len(dataset)} images per process, or does not "
                "tell how many it has"
            )
        return StepLoader(loader, None, args.update_freq)
    sampler = StepSampler(
        len(dataset), args.batch_size, args.update_freq, get_rank(), get_world_size(), args.seed, multiple
    )
    if len(dataset) < sampler.global_batch:
        raise UsageError(
            f"--batch_size {args.batch_size}: a step takes {sampler.global_batch} images (batch_size * update_freq * "
            f"processes), the training set has {len(dataset)}; give a smaller --batch_size"
        )
    loader = DataLoader(TrainSamples(dataset, args.seed, draw), batch_sampler=sampler, **common)
    return StepLoader(loader, sampler, args.update_freq)


def _tell_workers(dataset: IterableDataset, args) -> None:
    """timm's streams estimate their length, and spread their shards, by the number of loader processes."""
    if args.num_workers and hasattr(dataset, "set_loader_cfg"):
        dataset.set_loader_cfg(args.num_workers)


def build_eval_loader(dataset: Dataset, args, spread: bool) -> DataLoader:
    """A loader that gives every image once: over all processes together if `spread`, else in each of them."""
    common = {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "worker_init_fn": ignore_signals,
    }
    if isinstance(dataset, IterableDataset):
        _tell_workers(dataset, args)
        return DataLoader(dataset, **common)
    indices = range(get_rank(), len(dataset), get_world_size()) if spread else range(len(dataset))
    return DataLoader(EvalSamples(dataset), sampler=indices, collate_fn=collate_readable, **common)
