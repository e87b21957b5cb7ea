"""Data sets, transforms and loaders by the names and values in `args`, which utils/data/, below, does not see."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import timm.data
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from utils.args import given
from utils.data import balance, sampling, transforms
from utils.data.files import ImageFiles, ImageList, describe, each_label
from utils.data.images import Reading, Survey, load_image, survey, to_tensor
from utils.data.sampling import StepLoader, StepSampler, TrainSamples
from utils.data.shapes import Shapes
from utils.data.splits import parts
from utils.data.transforms import MEAN_STD_HINT, Normalise
from utils.distributed import check_same, get_rank, get_world_size, main_process_first
from utils.errors import UsageError, refuse, suggest
from utils.interrupts import ignore_signals
from utils.named_files import FOLDERS, data_path, labelled_files, unlabelled_files, validation
from utils.settings import eval_crop, mean_std

log = logging.getLogger("fcmae")

DATA_SETS = (*FOLDERS, "CIFAR", "CIFAR10", "shapes")
TIMM_SCHEMES = ("wds/", "tfds/", "torch/")
DATA_SETS_HELP = (
    "IMNET (data_path/train and /val as 1000 class folders), image_folder (or .tar shards), CIFAR (CIFAR-100), "
    "CIFAR10, shapes (drawn, nothing to download), or a name with a scheme that timm's create_dataset knows: torch/, "
    "or a stream, whose order depends on --num_workers and is not kept in a resume inside an epoch: wds/, tfds/"
)


def picture_mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What brings normalised images into 0..1 for pictures: with --mean and --std, two deviations to either side."""
    return ((0.5,) * args.in_chans, (0.25,) * args.in_chans) if args.mean else mean_std(args)


def build_transform(is_train: bool, args, eight_bit: bool = True) -> Callable:
    """The fine-tuning or evaluation transform: an image, PIL or (C, H, W) -> normalised (C, height, width).

    eight_bit: whether the images are. Training images that are not 8-bit RGB are cropped, flipped and erased alone.

    Raises:
        UsageError: an auto-augment policy that timm does not know, or that is not for such images.
    """
    mean, std = mean_std(args)
    if not is_train:
        return transforms.eval_transform(args.input_size, args.in_chans, eval_crop(args), mean, std, args.resize_mode)
    augmentation = {
        "scale": (args.min_crop, 1.0),
        "auto_augment": args.aa or None,
        "color_jitter": args.color_jitter,
        "interpolation": args.train_interpolation,
        "re_prob": args.reprob / 2 if args.resplit else args.reprob,  # of images, a half drawn anew each epoch is clean
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    size, mode = args.input_size, args.resize_mode
    return transforms.train_transform(size, args.in_chans, augmentation, mean, std, eight_bit, mode)


def build_batch_transform(args, device: torch.device) -> Normalise:
    """What normalises a pre-training batch on the device, see `utils.data`."""
    return Normalise(*mean_std(args), device)


def build_pretrain_dataset(args) -> Dataset:
    """The images of --data_set and --data_path for pre-training; folders are read with or without class folders."""
    dataset = unlabelled_files(args) if args.data_set in FOLDERS else _named_dataset(True, args)
    detect_bit_depth(dataset, args, tell=True)
    dataset.transform = transforms.pretrain_transform(args.input_size, args.in_chans, args.min_crop)
    return dataset


def build_dataset(is_train: bool, args, classes: list[str] | None = None) -> tuple[Dataset, int]:
    """The labelled data set of --data_set with its transform, and its number of classes.

    classes: names in the order of their labels, where known (from training, or from a checkpoint). Raises UsageError
    for data that are missing, or that contradict --nb_classes.
    """
    if args.data_set in FOLDERS:
        dataset = labelled_files(is_train, args, classes)
        nb_classes = len(dataset.classes)
        if args.data_set == "IMNET" and nb_classes != 1000 and not isinstance(dataset, ImageList):
            path = args.data_path if is_train else args.eval_data_path or args.data_path
            instead = "for other data give --data_set image_folder"
            raise UsageError(f"{path}: {nb_classes} class folders, --data_set IMNET has 1000; {instead}")
    else:
        dataset = _named_dataset(is_train, args)
        names = _class_names(dataset)
        nb_classes = len(names) or args.nb_classes
        if nb_classes is None:
            raise UsageError(f"--data_set {args.data_set}: does not tell its number of classes; give --nb_classes")
        if classes is not None and len(classes) != nb_classes:  # its labels would then mean something else
            split = f"{nb_classes} classes in its {'training' if is_train else 'validation'} split"
            raise UsageError(f"--data_set {args.data_set}: {split}, {len(classes)} were trained on")
        for i, (name, trained) in enumerate(zip(names, classes or (), strict=False)):
            other = f"its class {i} is {name!r}, {trained!r} was trained on; give images of the same classes"
            known = isinstance(name, str) and not (trained.isdecimal() and int(trained) == i)
            refuse(known and name != trained, f"--data_set {args.data_set}: {other}")
    if args.nb_classes is not None and args.nb_classes != nb_classes:
        wanted = f"{args.nb_classes}{'' if 'nb_classes' in given(args) else ' (of the checkpoint)'}"
        raise UsageError(f"--nb_classes {wanted}: the data set {args.data_set} has {nb_classes} classes")
    dataset.transform = build_transform(is_train, args, detect_bit_depth(dataset, args, tell=is_train))
    return dataset, nb_classes


def read_alike(dataset: ImageFiles, args) -> Survey:
    """What a sample of the files holds; all are then read at --depth, or, where not given, at that of most of these.

    Raises UsageError where most files of the sample cannot be read, or do not fit --in_chans.
    """
    nodata, max_pixels = getattr(args, "nodata", None), getattr(args, "max_pixels", Reading.max_pixels)
    found = survey(dataset, Reading(args.in_chans, nodata=nodata, max_pixels=max_pixels), dataset.source)
    depth = getattr(args, "depth", None) or found.reading.depth
    if (depth == 32) != (found.reading.depth == 32):  # none of its files could be read
        raise UsageError(f"--depth {depth}: most of {dataset.source} need --depth {found.reading.depth}")
    dataset.reading = replace(found.reading, depth=depth)
    return found


def detect_bit_depth(dataset: Dataset, args, tell: bool = False) -> bool:
    """Whether a data set's images are 8-bit; for what is read after it, and for checkpoints, args.depth keeps that.

    tell: log what the data set holds. Raises UsageError for images that do not fit --in_chans, or that are not 8-bit
    without --mean and --std.
    """
    if isinstance(dataset, IterableDataset):
        return True  # what cannot be read twice comes as Pillow images of 8 bits
    source = f"--data_set {args.data_set}"
    if isinstance(dataset, ImageFiles):
        found, source = read_alike(dataset, args), dataset.source
        if tell:
            describe(dataset, found, args.input_size)
        eight_bit = dataset.reading.depth == 8
        known = eight_bit or found.eight_bit
    else:
        plain = sampling.with_transform(dataset, partial(to_tensor, in_chans=args.in_chans))
        try:
            sample = next(sampling.readable(plain, range(min(len(dataset), 100))), None)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        if sample is None:
            raise UsageError(f"{source}: its first images are unreadable")
        eight_bit = known = sample[0].dtype == torch.uint8
    if not known and not args.mean:
        raise UsageError(f"{source}: not of 8 bits, which needs {MEAN_STD_HINT.format(args.in_chans)}")
    if isinstance(dataset, ImageFiles):
        args.depth = dataset.reading.depth
    return eight_bit


def _named_dataset(is_train: bool, args) -> Dataset:
    for name in ("train_list", "eval_list", "multi_label", *({"val_split"} & given(args))):
        if getattr(args, name, False):
            whose = "" if name in given(args) else " (of the checkpoint)"
            raise UsageError(f"--{name}{whose}: is for --data_set image_folder, not {args.data_set}")
    if args.data_set == "shapes":
        return Shapes("train" if is_train else "val", size=max(args.input_size))
    if args.data_set in ("CIFAR", "CIFAR10"):
        build = CIFAR10 if args.data_set == "CIFAR10" else CIFAR100
        try:
            with main_process_first():
                return build(data_path(args), train=is_train, download=True)
        except (OSError, RuntimeError) as error:
            missing = f"{args.data_set} is not there and cannot be downloaded"
            raise UsageError(f"--data_path {args.data_path}: {missing} ({error})") from error
    if not args.data_set.startswith(TIMM_SCHEMES):
        known = f"one of {', '.join(DATA_SETS)}, or a timm name with a scheme ({' '.join(TIMM_SCHEMES)})"
        if args.data_set.startswith(("hfds/", "hfids/")):
            known = "write Hugging Face's data sets to .tar shards, which image_folder and wds/ read"
        raise UsageError(f"--data_set {args.data_set}: unknown{suggest(args.data_set, DATA_SETS)}; {known}")
    root = None if is_train else getattr(args, "eval_data_path", None)
    root = root or (data_path(args) if args.data_set.startswith("torch/") else args.data_path)
    try:
        dataset = timm.data.create_dataset(
            args.data_set,
            root=root,
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except Exception as error:  # each scheme has libraries, and exceptions, of its own
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--data_set {args.data_set}: timm could not open it: {reason}") from error
    if isinstance(dataset, ImageFolder):
        dataset.loader = load_image
    return dataset


def _class_names(dataset: Dataset) -> list:
    """By their numbers; [] where the data set does not tell."""
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return list(getattr(dataset, "classes", None) or sorted(numbers, key=numbers.get))


def labelled_splits(args) -> tuple[Dataset, Dataset]:
    """Training and test images with their labels, not augmented, whatever the first are otherwise trained on.

    Where nothing tells the test images, nor --val_split, every fifth image of a class is one, and no training image.

    Raises:
        UsageError: images without labels, one class alone, no test images, or a data set that is only streamed.
    """
    train = labelled_files(True, args) if args.data_set in FOLDERS else _named_dataset(True, args)
    if isinstance(train, IterableDataset):
        raise UsageError(f"--data_set {args.data_set}: is streamed; a data set whose images have indices is needed")
    train.transform = build_transform(False, args, detect_bit_depth(train, args))
    if validation(args) or getattr(args, "val_split", None):
        return train, build_dataset(False, args, getattr(train, "classes", None))[0]
    split = parts(train, None)
    if not len(split[1]):
        raise UsageError(f"{train.source}: fewer than five images in each class; give --eval_data_path")
    return split


def class_weights(dataset: Dataset, args, classes: list[str]) -> torch.Tensor | None:
    """--class_weights as float64 (classes,), with a mean of 1 over images of one label each; None where not given."""
    if not args.class_weights:
        return None
    labels = balance.labels_of(dataset, f"--class_weights {args.class_weights}: --data_set {args.data_set}")
    counts = torch.tensor([*each_label(labels)]).bincount(minlength=len(classes))
    weights = balance.balanced_weights(counts)
    if args.class_weights != "balanced":
        weights = balance.read_weights(args.class_weights, "--class_weights", classes)
        weights *= 1 if args.multi_label else counts.sum() / (counts * weights).sum()
    least, most = weights.argmin(), weights.argmax()
    log.info("class weights: %.3g (%s) to %.3g (%s)", weights[least], classes[least], weights[most], classes[most])
    return weights


# ---- loaders ---------------------------------------------------------------------------------------------------------


def build_train_loader(
    dataset: Dataset, args, sample_mask: Callable | None = None, batch_divisor: int = 1,
    batch_transform: Callable | None = None, class_weights: torch.Tensor | None = None,
) -> StepLoader:  # fmt: skip
    """The loader of this process's share of every optimizer step; see `TrainSamples`, `StepSampler`, `StepLoader`.

    Raises:
        UsageError: fewer images than one optimizer step takes, fewer shards than processes, or processes that do not
            see the same number of images.
    """
    streamed = isinstance(dataset, IterableDataset)
    num_samples = dataset.reader.num_samples if streamed else len(dataset)
    rank, world_size, num_workers = get_rank(), get_world_size(), args.num_workers
    if streamed:
        num_workers = sampling.stream_workers(dataset, args.data_set, num_workers, world_size)
    check_same(num_samples, "training images")
    sampler = StepSampler(num_samples, args.batch_size, args.update_freq, rank, world_size, args.seed, batch_divisor)
    if getattr(args, "balanced_sampling", False):
        labels = balance.labels_of(dataset, f"--balanced_sampling true: --data_set {args.data_set}")
        sampler.draw = partial(balance.balanced_order, torch.tensor(labels))
    if num_samples < sampler.global_batch:
        takes = f"a step takes {sampler.global_batch} images (batch_size * update_freq * processes), the training set"
        smaller = f"has {num_samples}; give a smaller --batch_size{' or --update_freq' * (args.update_freq > 1)}"
        raise UsageError(f"--batch_size {args.batch_size}: {takes} {smaller}")
    common = _loader_options(args, num_workers) | {"persistent_workers": num_workers > 0}
    if streamed:
        loader = DataLoader(dataset, args.batch_size, drop_last=True, **common)
    else:
        samples = TrainSamples(dataset, args.seed, sample_mask)
        loader = DataLoader(samples, batch_sampler=sampler, collate_fn=sampling.collate, **common)
    max_bad = getattr(args, "max_bad_images", 0.01) * num_samples
    if "max_bad_images" not in given(args):  # of a small folder, a few are more than 1 %
        max_bad = max(max_bad, 4)
    sample_weights = None
    if class_weights is not None and not args.multi_label:
        sample_weights = class_weights[torch.tensor(balance.labels_of(dataset, ""))]
    steps = StepLoader(loader, sampler, batch_transform, max_bad, sample_weights)
    log.info("%d images, %d per optimizer step, %d steps per epoch", num_samples, steps.global_batch, len(steps))
    return steps


def build_eval_loader(dataset: Dataset, args, spread: bool) -> DataLoader:
    """A loader that gives every image once: over all processes if `spread`, or of a stream, else in each of them.

    Raises:
        UsageError: processes do not see the same number of images.
    """
    options = _loader_options(args, args.num_workers)
    if isinstance(dataset, IterableDataset):
        mine = sampling.own_shards(dataset, args.data_set, get_rank(), get_world_size())
        return DataLoader(mine, args.batch_size, **options)
    check_same(len(dataset), "evaluation images")
    indices = range(get_rank(), len(dataset), get_world_size()) if spread else range(len(dataset))
    return sampling.EvalLoader(dataset, batch_size=args.batch_size, sampler=indices, **options)


def _loader_options(args, num_workers: int) -> dict:
    pin_memory = args.pin_mem and torch.cuda.is_available()
    return {"num_workers": num_workers, "pin_memory": pin_memory, "worker_init_fn": ignore_signals}
