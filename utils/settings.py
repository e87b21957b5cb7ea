"""What a checkpoint tells of its training, for whoever evaluates, exports or shows it."""

import logging
import reprlib
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import torch

from .args import (
    Size,
    boolean,
    check_image_arguments,
    finite,
    given,
    matching,
    part,
    positive,
    seed,
    share,
    whole,
)
from .data import transforms
from .errors import UsageError, refuse

log = logging.getLogger("fcmae")

TOLD = {  # what a checkpoint tells of its training, in which types, and what the flag takes
    "input_size": (Size, whole(1, 16384)), "crop_pct": (float | int | None, share), "mean": (list | None, finite),
    "std": (list | None, positive), "imagenet_default_mean_and_std": (bool, boolean), "resize_mode": (str, str),
    "depth": (int | None, matching("8|16|32", "")), "nodata": (float | int | None, finite),
    "max_pixels": (int, whole(1, 10**12)), "norm_pix_loss": (bool, boolean), "val_split": (float | None, part),
    "split_seed": (int, seed),
}  # fmt: skip
FIELDS: dict[str, Callable[..., object]] = {  # what a run writes of itself, beside its weights
    **dict.fromkeys(("epoch", "step", "rollbacks"), lambda x: isinstance(x, int) and 0 <= x <= 10**12),
    "global_batch": lambda x: isinstance(x, int) and 0 < x <= 10**12,
    "classes": lambda x: isinstance(x, list | None),
    **dict.fromkeys(("scaler", "model_ema"), lambda x: isinstance(x, dict | None)),
    "order": lambda x: isinstance(x, dict) and not any(isinstance(value, torch.Tensor) for value in x.values()),
    "best": lambda x: isinstance(x, dict) and all(isinstance(number, int | float) for number in x.values()),
    "partial": lambda x: isinstance(x, dict) and {"step", "averages"} <= x.keys()
    and all(fits(x[name]) for name, fits in PROGRESS.items() if name in x),
}  # fmt: skip
PROGRESS: dict[str, Callable[..., object]] = {  # in an epoch
    **dict.fromkeys(("step", "skipped"), FIELDS["step"]),
    "bad": lambda x: isinstance(x, dict) and all(isinstance(message, str) for message in x.values()),
    "averages": lambda x: x and isinstance(x, list) and all(isinstance(y, torch.Tensor) and y.ndim == 2 for y in x),
}
NORMALISATION = {"mean", "std", "imagenet_default_mean_and_std"}


def mean_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the normalisation, see `transforms.mean_std`, whose UsageError it raises."""
    of_imagenet = getattr(args, "imagenet_default_mean_and_std", True)
    return transforms.mean_std(args.in_chans, args.mean, args.std, of_imagenet)


def eval_crop(args: Namespace) -> float | None:
    """See `transforms.eval_crop`; what is squashed or padded is whole, unless --crop_pct is given."""
    return transforms.eval_crop(args.input_size, args.crop_pct or (None if args.resize_mode == "crop" else 1.0))


def trained_size(value) -> Size | None:
    """--input_size of a checkpoint, in older ones the side of a square; None: what no --input_size is."""
    match value:
        case int(side):
            return Size(side, side)
        case [int(height), int(width)]:
            return Size(height, width)
    return None


def check_fields(path: str | Path, content: dict) -> None:
    """Refuse to go on from a checkpoint that tells of its run what no run writes. Raises UsageError."""
    inside = {"partial", "global_batch"} if "step" in content else set()
    for name in sorted(FIELDS.keys() & (content.keys() | inside)):
        unlike = f"its {name} is {reprlib.repr(content.get(name))}, as no run writes it; give another checkpoint"
        refuse(not FIELDS[name](content.get(name)), f"{path}: {unlike}")


def as_trained(args: Namespace, path: str | Path, content: dict, size, **shapes) -> None:
    """Let a checkpoint tell of model and images what no flag gives; a flag that differs from it stays, with a warning.

    content: of the file `path`, whose "args", of any trainer, count where they make sense. size: what the shapes of its
    weights tell, see `weights.infer_config`. shapes: what else they tell, by the names of flags; None: nothing.

    Raises UsageError: a flag that contradicts the shapes, or what flags and checkpoint together say of the images.
    """
    several = content.get("args", {}).get("multi_label") if "multi_label" in args else None
    shapes = {"multi_label": several if isinstance(several, bool) else None} | shapes
    shapes |= {"in_chans": size.in_chans, "stem_stride": size.stem_stride}
    shapes = {name: value for name, value in shapes.items() if value is not None}
    for name in shapes.keys() & given(args):
        other = f"{path}: a checkpoint of another model, with --{name} {shapes[name]}, not {getattr(args, name)}"
        refuse(getattr(args, name) != shapes[name], other)
    trained = content.get("args", {})
    trained = trained | {"input_size": trained_size(trained.get("input_size"))}
    told = {name: trained[name] for name, (kind, _) in TOLD.items() if isinstance(trained.get(name, ...), kind)}
    unset = dict.fromkeys(("crop_pct", "eval_resize", "mean", "std"))
    was = Namespace(**({"input_size": Size(224, 224), "resize_mode": "crop"} | unset | shapes | told))
    try:
        for name, value in told.items():
            [TOLD[name][1](str(x)) for x in (value if isinstance(value, (list, Size)) else [value]) if x is not None]
        check_image_arguments(was)
    except (ArgumentTypeError, UsageError):  # of a trainer that means something else by these names
        told = {}
    kept = given(args) | (NORMALISATION if NORMALISATION & given(args) else set())
    order = content.get("order") if not trained.get("images_per_class") else None
    args.trained_images = order.get("number of images") if isinstance(order, dict) else None
    vars(args).update(shapes | {name: value for name, value in told.items() if name not in kept})
    check_image_arguments(args)
    effect = {"crop_pct": eval_crop} | dict.fromkeys(NORMALISATION, mean_std)
    for name in sorted(told.keys() & (given(args) | ({"crop_pct"} if args.eval_resize else set()))):
        now, then = (effect.get(name, attrgetter(name))(x) for x in (args, was))
        if now != then:
            resized = name == "crop_pct" and args.eval_resize
            name, then = ("eval_resize", f"--crop_pct {then}") if resized else (name, then)
            log.warning("--%s %s: %s was trained with %s", name, getattr(args, name), path, then)
