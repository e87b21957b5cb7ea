"""Transforms, data sets by name, samplers and loaders; files are read in utils/data/.

Randomness: every sample is augmented under a seed of (seed, epoch, index), so a run does not depend on --num_workers,
nor, for the data, on the number of processes. Streams (wds/, tfds/) have an order and augmentations of their own.
"""

import importlib
import itertools
import logging
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
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
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize, to_pil_image

from utils.args import check_image_arguments, given
from utils.crops import Box, crop, crop_batch, draw_box, draw_shift
from utils.data.files import ClassFolders, ImageFiles, ImageList, ImageTree, TimmFiles, class_names, open_tar
from utils.data.images import BadImage, load_image, to_tensor
from utils.data.shapes import Shapes
from utils.data.tars import tar_shards
from utils.distributed import check_same, get_rank, get_world_size, main_process_first
from utils.errors import UsageError, suggest
from utils.interrupts import ignore_signals
from utils.memory import CropsInMemory, InMemory, with_transform
from utils.seeding import seed_cpu, seed_words

log = logging.getLogger("fcmae")

DATA_SETS = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "shapes")
MEAN_STD_HINT = "--mean and --std, which python tools/mean_std.py --data_path FOLDER --in_chans {} computes"
AS_LOADED = torch.nn.Identity()
AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
TOLD = {  # what a checkpoint tells of its training, and in which types
    "input_size": int, "crop_pct": (float, int, type(None)), "mean": (list, type(None)), "std": (list, type(None)),
    "imagenet_default_mean_and_std": bool, "norm_pix_loss": bool,
}  # fmt: skip
NORMALISATION = {"mean", "std", "imagenet_default_mean_and_std"}
SMALL = 32  # at this input size and below, a random resized crop of fine-tuning would leave nothing to see
TIMM_SCHEMES = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")
DATA_SETS_HELP = (
    "IMNET (data_path/train and /val as 1000 class folders), image_folder (or .tar shards), CIFAR (CIFAR-100), "
    "CIFAR10, shapes (drawn, nothing to download), or a name with a scheme that timm's create_dataset knows: hfds/, "
    "torch/, or a stream, whose order depends on --num_workers and is not kept in a resume inside an epoch: wds/, tfds/"
)


# ---- transforms ------------------------------------------------------------------------------------------------------


def mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the normalisation, a number for each of the --in_chans channels.

    Raises:
        UsageError: neither flags nor a convention give them.
    """
    in_chans, flags = getattr(args, "in_chans", 3), [getattr(args, "mean", None), getattr(args, "std", None)]
    if all(flags):
        return tuple(flags[0]), tuple(flags[1])
    if in_chans not in (1, 3):
        raise UsageError(f"--in_chans {in_chans}: needs {MEAN_STD_HINT.format(in_chans)}")
    of_imagenet = getattr(args, "imagenet_default_mean_and_std", True)
    mean = IMAGENET_DEFAULT_MEAN if of_imagenet else IMAGENET_INCEPTION_MEAN
    std = IMAGENET_DEFAULT_STD if of_imagenet else IMAGENET_INCEPTION_STD
    return (mean, std) if in_chans == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


def eval_crop(args) -> float | None:
    """Side of the evaluation crop, as a share of the resized short side; None: the whole image, warped to a square."""
    if args.crop_pct or args.input_size >= 384:
        return args.crop_pct
    return 1.0 if args.input_size <= SMALL else 224 / 256


def as_trained(args, path: str | Path, content: dict, size, **shapes) -> None:
    """Let a checkpoint tell of model and images what no flag gives; a flag that differs from it stays, with a warning.

    content: of the file `path`, whose "args", of any trainer, count where they make sense. size: what the shapes of its
    weights tell, see `weights.infer_size`. shapes: what else they tell, by the names of flags; None: nothing.

    Raises:
        UsageError: a flag that contradicts the shapes, or what flags and checkpoint together say of the images.
    """
    shapes |= {"in_chans": size.in_chans, "stem_stride": size.stem_stride}
    shapes = {name: value for name, value in shapes.items() if value is not None}
    for name in shapes.keys() & given(args):
        if getattr(args, name) != shapes[name]:
            model = f"a checkpoint of another model, with --{name} {shapes[name]}"
            raise UsageError(f"{path}: {model}, not {getattr(args, name)}")
    trained = content.get("args")
    trained = vars(trained) if isinstance(trained, Namespace) else trained if isinstance(trained, dict) else {}
    told = {name: trained[name] for name, kind in TOLD.items() if isinstance(trained.get(name, ...), kind)}
    was = Namespace(**({"input_size": 224, "crop_pct": None, "mean": None, "std": None} | shapes | told))
    try:
        check_image_arguments(was)
        torch.tensor(mean_std(was))
    except (TypeError, UsageError, ValueError):  # of a trainer that means something else by these names
        told = {}
    kept = given(args) | (NORMALISATION if NORMALISATION & given(args) else set())
    vars(args).update(shapes | {name: value for name, value in told.items() if name not in kept})
    check_image_arguments(args)
    effect = {"crop_pct": eval_crop} | dict.fromkeys(NORMALISATION, mean_std)
    for name in sorted(told.keys() & given(args)):
        now, then = (effect.get(name, attrgetter(name))(x) for x in (args, was))
        if now != then:
            log.warning("--%s %s: %s was trained with %s", name, getattr(args, name), path, then)


def picture_mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What brings normalised images into 0..1 for pictures: with --mean and --std, two deviations to either side."""
    return ((0.5,) * args.in_chans, (0.25,) * args.in_chans) if args.mean else mean_std(args)


def build_pretrain_transform(args) -> Callable:
    """Random resized crop and flip: an image, PIL or (C, H, W) -> (C, input_size, input_size) of the same type.

    Bytes go through workers and pinned memory as they are, `build_prepare` normalises them on the device.
    """
    return partial(_random_crop, in_chans=args.in_chans, draw=pretrain_draw(args), size=args.input_size)


def pretrain_draw(args) -> Callable[[int, int], Box]:
    """What draws the box of a pre-training crop from an image's height and width."""
    return partial(draw_box, min_crop=args.min_crop)


def build_transform(is_train: bool, args, eight_bit: bool = True) -> Callable:
    """The fine-tuning or evaluation transform: an image, PIL or (C, H, W) -> normalised (C, input_size, input_size).

    eight_bit: whether the images are. Training images that are not 8-bit RGB are cropped, flipped and erased alone.

    Raises:
        UsageError: an auto-augment policy that timm does not know, or that is not for such images.
    """
    if is_train:
        return _build_augmentation(args) if args.in_chans == 3 and eight_bit else _build_plain_augmentation(args)
    size = args.input_size
    crop_pct = eval_crop(args)
    resized = [int(size / crop_pct)] if crop_pct else [size, size]
    in_chans = getattr(args, "in_chans", 3)
    return partial(_centre_crop, in_chans=in_chans, resized=resized, size=size, normalise=_build_normalise(args))


def _build_augmentation(args) -> Callable:
    """timm's, for 8-bit RGB."""
    mean, std = mean_std(args)
    size = args.input_size
    try:
        transform = timm.data.create_transform(
            input_size=size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation=args.train_interpolation,
            re_prob=_erased_share(args),
            re_mode=args.remode,
            re_count=args.recount,
            scale=(args.min_crop, 1.0),
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--aa {args.aa}: no policy of timm's; one is {AUTO_AUGMENT}") from error
    _guard_posterize(transform)
    if size <= SMALL:
        bicubic = transforms.Resize(size, InterpolationMode.BICUBIC)  # does nothing to images of that size
        transform.transforms[0] = transforms.Compose([bicubic, transforms.RandomCrop(size, padding=4)])
    transform.transforms.insert(0, _to_rgb)
    return transform


def _build_plain_augmentation(args) -> Callable:
    for name in ("aa", "color_jitter", "train_interpolation"):
        value = getattr(args, name)
        if value and value not in (AUTO_AUGMENT, "bicubic"):
            raise UsageError(f"--{name} {value}: is for 8-bit RGB images, which these are not; leave it out")
    if args.aa:
        log.info("--aa %s: is made for 8-bit RGB images, so it is off", args.aa)
    erase = RandomErasing(_erased_share(args), mode=args.remode, max_count=args.recount, device="cpu")
    size = args.input_size
    resized = [size] if size <= SMALL else None
    cut = partial(_random_crop, in_chans=args.in_chans, draw=finetune_draw(args), size=size, resized=resized)
    return partial(_cut_and_erase, cut=cut, normalise=_build_normalise(args), erase=erase)


def finetune_draw(args) -> Callable[[int, int], Box]:
    """What draws the box of a fine-tuning crop from an image's height and width."""
    return partial(draw_shift, size=args.input_size) if args.input_size <= SMALL else pretrain_draw(args)


def _random_crop(image, in_chans: int, draw: Callable, size: int, resized: list[int] | None = None) -> torch.Tensor:
    """resized: the short side, if another than the image's, that the crop is taken from."""
    image = to_tensor(image, in_chans)
    if resized:
        image = resize(image, resized, InterpolationMode.BICUBIC, antialias=True)
    return crop(image, draw(*image.shape[1:]), size)


def _cut_and_erase(image, cut: Callable, normalise: Callable, erase: Callable) -> torch.Tensor:
    return erase(normalise(cut(image)))


def _centre_crop(image: Image.Image | torch.Tensor, in_chans: int, resized: list[int], size: int, normalise: Callable):
    """resized: the short side, or height and width, that the centre is taken from."""
    image = resize(to_tensor(image, in_chans), resized, InterpolationMode.BICUBIC, antialias=True)
    return normalise(center_crop(image, [size, size]))


def _erased_share(args) -> float:
    """A clean half of the images, drawn anew each epoch, is half the chance of being erased."""
    return args.reprob / 2 if args.resplit else args.reprob


def _to_rgb(image: Image.Image | torch.Tensor) -> Image.Image:
    """Tensors are uint8 RGB; some of torchvision's data sets are gray."""
    if isinstance(image, torch.Tensor):
        return to_pil_image(image)
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


def build_prepare(dataset: Dataset, args, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns a pre-training batch on the device into the model's input, float32 (N, C, input_size, input_size).

    The batch is uint8 or float32 (N, C, input_size, input_size), to be normalised, or, with --in_memory device, what is
    to be cut out of the data set's images, which this puts on the device.

    Raises:
        UsageError: the device has not enough memory for them.
    """
    normalise = _build_normalise(args, device)
    if not isinstance(dataset, CropsInMemory):
        return normalise
    return partial(_cut, images=dataset.on(device), size=args.input_size, normalise=normalise)


def _cut(boxes: torch.Tensor, images: torch.Tensor, size: int, normalise: Callable) -> torch.Tensor:
    return normalise(crop_batch(images, boxes, size))


def _build_normalise(args, device: torch.device | str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in mean_std(args))
    return partial(_normalise, mean=mean, std=std)


def _normalise(imgs: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 or float32 (..., C, H, W) -> float32."""
    imgs = imgs.contiguous()  # without workers, batches keep the strides of decoded images: results must not change
    values = imgs.float().div_(255) if imgs.dtype == torch.uint8 else imgs.clone()
    return values.sub_(mean).div_(std)


# ---- data sets by name -----------------------------------------------------------------------------------------------


def build_pretrain_dataset(args) -> Dataset:
    """The images of --data_set and --data_path for pre-training; folders are read with or without class folders."""
    if args.data_set not in ("IMNET", "image_folder"):
        dataset = _named_dataset(True, args)
    elif args.train_list:
        dataset = ImageList(args.train_list, "--train_list", args.data_path, in_chans=args.in_chans)
    else:
        root = _data_path(args)
        if args.data_set == "IMNET":
            root = os.path.join(root, "train")
            if not os.path.isdir(root):
                raise UsageError(
                    f"--data_path {args.data_path}: has no folder 'train'; "
                    "for any folder of images give --data_set image_folder"
                )
        if tar_shards(root):
            dataset = open_tar(root, "--data_path", args.in_chans, labelled=False)
        else:
            dataset = ImageTree(root, "--data_path", None, args.in_chans, args.index_cache)
    settle_depth(dataset, args)
    dataset.transform = build_pretrain_transform(args)
    return dataset


def build_dataset(is_train: bool, args, classes: list[str] | None = None) -> tuple[Dataset, int]:
    """The labelled data set of --data_set with its transform, and its number of classes.

    Args:
        classes: class names in the order of their labels, where known (from training, or from a checkpoint): those of
            validation files are numbered by them.

    Raises:
        UsageError: data that is missing, or that contradicts --nb_classes.
    """
    if args.data_set in ("IMNET", "image_folder"):
        dataset = labelled_files(is_train, args, classes)
        nb_classes = len(dataset.classes)
        if args.data_set == "IMNET" and nb_classes != 1000 and not isinstance(dataset, ImageList):
            path = args.data_path if is_train else args.eval_data_path or args.data_path
            raise UsageError(
                f"{path}: {nb_classes} class folders, --data_set IMNET has 1000; for other data give "
                "--data_set image_folder"
            )
    else:
        dataset = _named_dataset(is_train, args)
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
    dataset.transform = build_transform(is_train, args, settle_depth(dataset, args))
    return dataset, nb_classes


def labelled_files(is_train: bool, args, classes: list[str] | None = None) -> ImageFiles:
    """The files of --data_set IMNET or image_folder, without a transform; `classes` as for `build_dataset`."""
    file, flag = (args.train_list, "--train_list") if is_train else (args.eval_list, "--eval_list")
    if not is_train and classes is None and args.data_path:
        if args.train_list or tar_shards(_class_root(True, args)[0]):
            classes = labelled_files(True, args).classes
        elif os.path.isdir(_class_root(True, args)[0]):
            classes = class_names(*_class_root(True, args))
    if file:
        root = args.data_path if is_train else args.eval_data_path or args.data_path
        return ImageList(file, flag, root, classes or [], args.in_chans, args.nb_classes)
    root, flag = _class_root(is_train, args)
    if tar_shards(root):
        return open_tar(root, flag, args.in_chans, classes, nb_classes=args.nb_classes)
    return ClassFolders(root, flag, None, classes, args.in_chans, args.index_cache)


def settle_depth(dataset: Dataset, args) -> bool:
    """Whether a data set's images are 8-bit, as its first readable one is; files are then all loaded alike.

    Raises:
        UsageError: an image that does not fit --in_chans; images that are not 8-bit without --mean and --std.
    """
    if isinstance(dataset, IterableDataset):
        return True  # what cannot be read twice comes as Pillow images of 8 bits
    plain, count = with_transform(dataset, partial(to_tensor, in_chans=args.in_chans)), min(len(dataset), 100)
    for i in range(count):
        try:
            eight_bit = plain[i][0].dtype == torch.uint8
            break
        except BadImage as error:
            reason = error
        except UsageError as error:
            name = "" if isinstance(dataset, (ImageFiles, TimmFiles)) else f"--data_set {args.data_set}: "
            raise UsageError(f"{name}{error}") from error
    else:
        source = f"--data_path {args.data_path}" if args.data_path else f"--data_set {args.data_set}"
        raise UsageError(f"{source}: its first {count} images are unreadable: {reason}")
    if not eight_bit and not args.mean:
        name = dataset.paths[i] if isinstance(dataset, ImageFiles) else f"--data_set {args.data_set}"
        raise UsageError(f"{name}: not of 8 bits, which needs {MEAN_STD_HINT.format(args.in_chans)}")
    if isinstance(dataset, (ImageFiles, TimmFiles)):
        dataset.eight_bit = eight_bit
    return eight_bit


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


def _named_dataset(is_train: bool, args) -> Dataset:
    for name in ("train_list", "eval_list"):
        if getattr(args, name):
            raise UsageError(f"--{name}: is for --data_set image_folder, not {args.data_set}")
    if args.data_set == "shapes":
        return Shapes("train" if is_train else "val", size=args.input_size)
    if args.data_set in ("CIFAR", "CIFAR10"):
        build = CIFAR10 if args.data_set == "CIFAR10" else CIFAR100
        try:
            with main_process_first():
                return build(_data_path(args), train=is_train, download=True)
        except (OSError, RuntimeError) as error:
            reason = f"{args.data_set} is not there and cannot be downloaded ({error})"
            raise UsageError(f"--data_path {args.data_path}: {reason}") from error
    if not args.data_set.startswith(TIMM_SCHEMES):
        raise UsageError(
            f"--data_set {args.data_set}: unknown{suggest(args.data_set, DATA_SETS)}; "
            f"one of {', '.join(DATA_SETS)}, or a timm name with a scheme ({' '.join(TIMM_SCHEMES)})"
        )
    root = None if is_train else getattr(args, "eval_data_path", None)
    if args.data_set.startswith(("hfds/", "hfids/")):
        _give_way(args.data_set)
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
    if isinstance(dataset, timm.data.ImageDataset):
        return TimmFiles(dataset, f"--data_set {args.data_set}", args.in_chans)
    return dataset


def _give_way(data_set: str) -> None:
    """Let `import datasets` mean Hugging Face's package from now on: this module bears its name, and came first."""
    own, path = sys.modules.pop("datasets"), sys.path
    if hasattr(own, "load_dataset"):  # it does already
        sys.modules["datasets"] = own
        return
    sys.path = [entry for entry in path if Path(entry).resolve() != Path(__file__).resolve().parent]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = own
        raise UsageError(f"--data_set {data_set}: needs Hugging Face's package: pip install datasets") from error
    finally:
        sys.path = path


def _count_classes(dataset: Dataset) -> int | None:
    reader = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    return len(classes) if classes else None


# ---- data sets in memory ---------------------------------------------------------------------------------------------


def in_memory(dataset: Dataset, args, draw: Callable[[int, int], Box] | None = None) -> Dataset:
    """The data set as --in_memory has it: itself, its decoded images, or the boxes that the device is to cut of them.

    draw: what draws a box for the device from an image's height and width; without, images stay on the host.

    Raises:
        UsageError: a stream, more images than fit, or, for the device, of several sizes.
    """
    if args.in_memory == "no":
        return dataset
    if isinstance(dataset, IterableDataset):
        raise UsageError(f"--in_memory {args.in_memory}: --data_set {args.data_set} is a stream; give --in_memory no")
    held = InMemory(dataset, args.in_chans, args.num_workers)
    return held if draw is None or args.in_memory == "host" else CropsInMemory(held, draw)


def finetune_in_memory(dataset: Dataset, args, device: torch.device) -> tuple[Dataset, Callable]:
    """`in_memory` for fine-tuning, and the loader's `prepare` for it.

    Raises:
        UsageError: as `in_memory`; augmentations that the device does not do.
    """
    if args.in_memory != "device":
        return in_memory(dataset, args), AS_LOADED
    for name, off in (("aa", "''"), ("color_jitter", 0), ("reprob", 0)):
        if getattr(args, name):
            raise UsageError(
                f"--in_memory device: crops and flips alone, which --{name} {getattr(args, name)} is not; "
                f"give --{name} {off}, or --in_memory host"
            )
    if args.train_interpolation != "bicubic":
        raise UsageError("--in_memory device: resizes bicubically; give --train_interpolation bicubic")
    dataset = in_memory(dataset, args, finetune_draw(args))
    side = min(dataset.shape[1:])
    if args.input_size <= SMALL and side != args.input_size:
        raise UsageError(
            f"--input_size {args.input_size}: with --in_memory device, either above {SMALL} or the images' short side, "
            f"which is {side}; or give --in_memory host"
        )
    return dataset, build_prepare(dataset, args, device)


def labelled_splits(args) -> tuple[Dataset, Dataset]:
    """Training and test images with their labels, not augmented, whatever the first are otherwise trained on.

    Of class folders without --eval_data_path, every fifth image of a class is a test image and no training image.

    Raises:
        UsageError: images without labels, one class alone, no test images, or a data set that is only streamed.
    """
    if args.data_set not in ("IMNET", "image_folder"):
        train = build_pretrain_dataset(args)
        if isinstance(train, IterableDataset):
            raise UsageError(f"--data_set {args.data_set}: is streamed; a data set whose images have indices is needed")
        train.transform = build_transform(False, args)
        return train, build_dataset(False, args)[0]
    train = labelled_files(True, args)
    train.transform = build_transform(False, args, settle_depth(train, args))
    source = args.train_list or args.data_path
    if len(train.classes) < 2:
        raise UsageError(f"{source}: has one class folder, {train.classes[0]}; at least two are needed")
    if args.data_set == "IMNET" or args.eval_data_path or args.eval_list:
        return train, build_dataset(False, args, train.classes)[0]
    count, parts = Counter(), ([], [])
    for i, label in enumerate(train.targets):
        count[label] += 1
        parts[count[label] % 5 == 0].append(i)
    if not parts[1]:
        raise UsageError(f"{source}: fewer than five images in each class; give --eval_data_path")
    return Subset(train, parts[0]), Subset(train, parts[1])


def random_subset(dataset: Dataset, count: int | None) -> Dataset:
    """At most `count` images, the same ones in every run, so that runs can be compared."""
    return Subset(dataset, shuffled_indices(dataset)[:count].sort().values.tolist())


def shuffled_indices(samples: Sized) -> torch.Tensor:
    """All indices, in an order that is the same in every run: int64 (len(samples),)."""
    return torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))


class TransformedSubset(Subset):
    """A Subset under its data set's transform; to set another leaves the data set alone."""

    @property
    def transform(self) -> Callable:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable) -> None:
        self.dataset = with_transform(self.dataset, transform)


def first_of_each_class(dataset: Dataset, count: int, name: str) -> TransformedSubset:
    """At most `count` images of each class, the first in the data set's order: the same ones under every seed.

    Raises:
        UsageError: a data set, called `name`, that does not list its labels.
    """
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise UsageError(f"--images_per_class {count}: {name} does not list its labels; leave it out")
    seen, indices = Counter(), []
    for index, label in enumerate(targets):
        seen[label] += 1
        if seen[label] <= count:
            indices.append(index)
    return TransformedSubset(dataset, indices)


# ---- samples and steps -----------------------------------------------------------------------------------------------


class TrainSamples(Dataset):
    """A data set read by (epoch, index), each sample under its own seed; unreadable images are reported and replaced.

    Args:
        draw: called under a seed of the sample's own; what it returns (a mask, in pre-training) is appended to it.
    """

    RETRIES = 100

    def __init__(self, dataset: Dataset, seed: int, draw: Callable[[], torch.Tensor] | None = None):
        self.dataset, self.seed, self.draw = dataset, seed, draw

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple]:
        """What a DataLoader asks for: the samples of a batch.

        Seeds and masks come first, together: one by one, between images, they find the processor's caches cold, and
        cost several times as much.
        """
        words = [seed_words(self.seed, *key) for key in keys]
        drawn = [self._drawn(seed) for *_, seed in words]
        samples = []
        for (_, index), seeds in zip(keys, words, strict=True):
            seed_cpu(seeds)
            samples.append(self._readable(index))
        return [(*sample, *more) for sample, more in zip(samples, drawn, strict=True)]

    def _drawn(self, seed: int) -> tuple:
        if not self.draw:
            return ()
        torch.default_generator.manual_seed(seed)
        return (self.draw(),)

    def _readable(self, index: int) -> tuple:
        for attempt in range(self.RETRIES):
            try:
                return self.dataset[(index + attempt) % len(self.dataset)]
            except BadImage as error:
                log.warning("unreadable image, the next one takes its place: %s", error)
        raise UsageError(f"{self.RETRIES} unreadable images in a row from index {index} on; see the warnings above")


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

    Every optimizer step takes the next batch_size * update_freq * world_size samples of the epoch's permutation, the
    global batch; its batches, and within each batch the processes, take even shares of them. The rest at the end is a
    smaller step if it is at least a quarter of the global batch, else it is left out of this epoch.

    Args:
        multiple: every batch's size is a multiple of it (2 for Mixup): the last step leaves up to multiple - 1 out.
    """

    def __init__(self, num_samples, batch_size, update_freq=1, rank=0, world_size=1, seed=0, multiple=1):
        self.num_samples, self.batch_size, self.update_freq = num_samples, batch_size, update_freq
        self.rank, self.world_size, self.seed, self.multiple = rank, world_size, seed, multiple
        self.epoch = self.start_step = 0

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        full, rest = divmod(self.num_samples, self.global_batch)
        return full + (4 * (rest - rest % self.multiple) >= self.global_batch)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.update_freq * self.world_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def step(self, step: int) -> list[tuple[int, int, float]]:
        """(start, end) in the permutation, and `Batch.share`, of each of this process's batches.

        Where a batch does not go round the processes, those left over take a group of another's, with the share 0.
        """
        first = step * self.global_batch
        groups = min(self.global_batch, self.num_samples - first) // self.multiple
        batches = -(-groups * self.multiple // (self.batch_size * self.world_size))
        parts = []
        for i in range(batches):
            start, end = i * groups // batches, (i + 1) * groups // batches
            start, end = [start + (end - start) * r // self.world_size for r in (self.rank, self.rank + 1)]
            share = (end - start) * self.world_size / groups
            parts.append((first + start * self.multiple, first + max(end, start + 1) * self.multiple, share))
        return parts

    def __len__(self) -> int:
        return sum(len(self.step(step)) for step in range(self.start_step, self.steps))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(int(seed))).tolist()
        for step in range(self.start_step, self.steps):
            for start, end, _ in self.step(step):
                yield [(self.epoch, index) for index in order[start:end]]


@dataclass
class Batch:
    """One forward pass of an optimizer step.

    data: what the loader collated. share: factor on the batch's mean loss, such that the gradients averaged over
    processes and added up over a step's batches are those of the mean over the step's samples; 0 where the samples are
    another process's and must not be counted. last: in its step.
    """

    data: list
    share: float
    last: bool


class StepLoader:
    """A training loader by optimizer steps.

    An iterable data set gives its own order, of which the sampler counts the steps alone: each is a full one.

    prepare: what turns a batch's images, once on the device, into the model's input (N, C, H, W).
    """

    def __init__(self, loader: DataLoader, sampler: StepSampler, prepare: Callable):
        self.loader, self.sampler, self.prepare = loader, sampler, prepare

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
        streamed, full = isinstance(self.loader.dataset, IterableDataset), self.sampler.update_freq
        loader = itertools.islice(self._stream(epoch), start_step * full, None) if streamed else iter(self.loader)
        for step in range(start_step, len(self)):
            shares = [1 / full] * full if streamed else [share for *_, share in self.sampler.step(step)]
            yield self._batches(loader, shares)

    def _batches(self, loader: Iterator, shares: list[float]) -> Iterator[Batch]:
        for i, share in enumerate(shares, 1):
            yield Batch(next(loader), share, i == len(shares))

    def _stream(self, epoch: int) -> Iterator:
        """Without end: a stream's length may be an estimate, and every process needs as many batches."""
        self.loader.dataset.set_epoch(epoch)
        data = True
        while data:
            data = None
            for data in self.loader:
                yield data
        raise UsageError(f"--batch_size {self.loader.batch_size}: no loader process has as many images of the stream")


def build_train_loader(
    dataset: Dataset, args, draw: Callable | None = None, multiple: int = 1, prepare: Callable = AS_LOADED
) -> StepLoader:
    """The loader of this process's share of every optimizer step; see `TrainSamples`, `StepSampler`, `StepLoader`.

    Raises:
        UsageError: fewer images than one optimizer step takes, fewer shards than processes, or processes that do not
            see the same number of images.
    """
    streamed = isinstance(dataset, IterableDataset)
    num_samples = dataset.reader.num_samples if streamed else len(dataset)
    num_workers = _stream_workers(dataset, args) if streamed else args.num_workers
    check_same(num_samples, "training images")
    sampler = StepSampler(
        num_samples, args.batch_size, args.update_freq, get_rank(), get_world_size(), args.seed, multiple
    )
    if num_samples < sampler.global_batch:
        raise UsageError(
            f"--batch_size {args.batch_size}: a step takes {sampler.global_batch} images (batch_size * update_freq * "
            f"processes), the training set has {num_samples}; give a smaller --batch_size"
        )
    common = {
        "num_workers": num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": ignore_signals,
    }
    if streamed:
        loader = DataLoader(dataset, args.batch_size, drop_last=True, **common)
    else:
        loader = DataLoader(TrainSamples(dataset, args.seed, draw), batch_sampler=sampler, **common)
    return StepLoader(loader, sampler, prepare)


def _stream_workers(dataset: IterableDataset, args) -> int:
    """--num_workers, or fewer, so that each gets a shard of wds/; timm's streams estimate their length by it."""
    workers = args.num_workers
    if args.data_set.startswith("wds/"):
        shards, processes = len(dataset.reader.split_info.filenames), get_world_size()
        if shards < processes:
            raise UsageError(
                f"--data_set {args.data_set}: {shards} shards for {processes} processes; start {shards}, or write more"
            )
        if workers * processes > shards:
            workers = shards // processes
            log.info("--num_workers %d: lowered to %d, for %d shards in all", args.num_workers, workers, shards)
    if workers:
        dataset.set_loader_cfg(workers)
    return workers


def _own_shards(dataset: IterableDataset, args) -> Dataset:
    """A stream for evaluation, each process with shards of its own: timm would cut or repeat them to one length."""
    if get_world_size() == 1 or not args.data_set.startswith("wds/"):
        if get_world_size() > 1:
            log.info("--data_set %s: on several processes, images may count twice or not at all", args.data_set)
        return dataset
    reader, mine = dataset.reader, slice(get_rank(), None, get_world_size())
    files, lengths = reader.split_info.filenames[mine], reader.split_info.shard_lengths[mine]
    if not files:
        return Subset(dataset, [])
    reader.split_info = replace(reader.split_info, filenames=files, shard_lengths=lengths)
    reader.num_samples = sum(lengths) or reader.num_samples
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset


def build_eval_loader(dataset: Dataset, args, spread: bool) -> DataLoader:
    """A loader that gives every image once: over all processes if `spread`, or of a stream, else in each of them.

    Raises:
        UsageError: processes do not see the same number of images.
    """
    common = {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "worker_init_fn": ignore_signals,
    }
    if isinstance(dataset, IterableDataset):
        return DataLoader(_own_shards(dataset, args), **common)
    check_same(len(dataset), "evaluation images")
    indices = range(get_rank(), len(dataset), get_world_size()) if spread else range(len(dataset))
    return DataLoader(EvalSamples(dataset), sampler=indices, collate_fn=collate_readable, **common)
