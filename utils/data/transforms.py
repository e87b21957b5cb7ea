"""What is done to an image, PIL or tensor (C, h, w), on its way to the model's input (C, *size), size = (H, W)."""

import logging
import math
import re
from collections.abc import Callable
from functools import partial

import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import to_pil_image

from ..errors import UsageError
from .images import to_tensor

log = logging.getLogger("fcmae")

BICUBIC = InterpolationMode.BICUBIC
ASPECT, TRIES = (3 / 4, 4 / 3), 10  # of random crops, as torchvision's
MEAN_STD_HINT = "--mean and --std, which python tools/mean_std.py --data_path FOLDER --in_chans {} computes"
AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
SMALL_INPUT_SIZE = 32  # up to here, a random resized crop of fine-tuning would leave nothing to see


class Normalise:
    """uint8 or float32 (..., C, H, W) -> float32: uint8 divided by 255, then (value - mean) / std; NaN stays NaN."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu"):
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, imgs: torch.Tensor) -> torch.Tensor:
        imgs = imgs.contiguous()  # without workers, batches keep the strides of decoded images: bits must not change
        values = imgs.float().div_(255) if imgs.dtype == torch.uint8 else imgs.clone()
        return values.sub_(self.mean).div_(self.std)


def mean_std(
    in_chans: int, mean: list[float] | None = None, std: list[float] | None = None, of_imagenet: bool = True
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the normalisation: those given, else ImageNet's, or, if not of_imagenet, Inception's.

    Raises:
        UsageError: neither flags nor a convention give them for so many channels.
    """
    if mean and std:
        return tuple(mean), tuple(std)
    if in_chans not in (1, 3):
        raise UsageError(f"--in_chans {in_chans}: needs {MEAN_STD_HINT.format(in_chans)}")
    name = "IMAGENET_DEFAULT" if of_imagenet else "IMAGENET_INCEPTION"
    means, stds = getattr(timm.data, f"{name}_MEAN"), getattr(timm.data, f"{name}_STD")
    return (means, stds) if in_chans == 3 else ((sum(means) / 3,), (sum(stds) / 3,))


def eval_crop(size: tuple[int, int], crop_pct: float | None = None) -> float | None:
    """Side of the evaluation crop, as a share of the resized side; None: the whole image, warped to `size`."""
    if crop_pct or min(size) >= 384:
        return crop_pct
    return 1.0 if max(size) <= SMALL_INPUT_SIZE else 224 / 256


def pretrain_transform(size: tuple[int, int], in_chans: int, min_crop: float) -> Callable:
    """Random resized crop and flip; the tensor is of the image's type, NaN where there is no data; see `utils.data`."""
    crop = partial(random_resized_crop, size=size, min_crop=min_crop)
    return v2.Compose([partial(to_tensor, in_chans=in_chans), crop])


def eval_transform(
    size: tuple[int, int], in_chans: int, crop_pct: float | None, mean, std, mode: str = "crop"
) -> Callable:
    """The normalised centre of a resized image; crop_pct as from `eval_crop`, mode as in `fitted`."""
    mode, resized = mode if crop_pct else "squash", tuple(int(side / (crop_pct or 1)) for side in size)
    steps = fitted(size, resized, mode, mean)
    return v2.Compose([partial(to_tensor, in_chans=in_chans), *steps, Normalise(mean, std), fill])


def train_transform(
    size: tuple[int, int], in_chans: int, augmentation: dict, mean, std, eight_bit: bool = True, mode: str = "crop"
) -> Callable:
    """The augmented, normalised image of fine-tuning; what is not 8-bit RGB is cropped, flipped and erased alone.

    Args:
        augmentation: scale, auto_augment, color_jitter, interpolation, re_prob, re_mode and re_count, as timm's.
        mode: crop at random; or the whole image, squashed or padded as in `fitted`.

    Raises:
        UsageError: an auto-augment policy that timm does not know, or that is not for such images.
    """
    if in_chans == 3 and eight_bit:
        return _timm_transform(size, augmentation, mean, std, mode)
    for flag, name in (("aa", "auto_augment"), ("color_jitter",) * 2, ("train_interpolation", "interpolation")):
        value = augmentation[name]
        if value and value not in (AUTO_AUGMENT, "bicubic"):
            raise UsageError(f"--{flag} {value}: is for 8-bit RGB images, which these are not; leave it out")
    if augmentation["auto_augment"]:
        log.info("--aa %s: is made for 8-bit RGB images, so it is off", augmentation["auto_augment"])
    if mode != "crop":
        crop = [*fitted(size, size, mode, mean), v2.RandomHorizontalFlip()]
    elif max(size) <= SMALL_INPUT_SIZE:
        resize = partial(resize_data, resize=partial(cover, size=size))
        crop = [resize, v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
    else:
        crop = [partial(random_resized_crop, size=size, min_crop=augmentation["scale"][0])]
    erase = RandomErasing(
        augmentation["re_prob"], mode=augmentation["re_mode"], max_count=augmentation["re_count"], device="cpu"
    )
    return transforms.Compose([partial(to_tensor, in_chans=in_chans), *crop, Normalise(mean, std), fill, erase])


def random_resized_crop(image: torch.Tensor, size: tuple[int, int], min_crop: float) -> torch.Tensor:
    """A box from `sample_box`, resized (bicubic, antialiased): (C, h, w) -> (C, *size) of the same type."""
    top, left, height, width, mirrored = sample_box(image.shape[1], image.shape[2], min_crop, size[1] / size[0])
    image = image[:, top : top + height, left : left + width]  # before resizing: its filter must not see beyond
    if (height, width) != size:
        image = resize_data(image, lambda x: F.interpolate(x[None], size, mode="bicubic", antialias=True)[0])
    return image.flip(-1) if mirrored else image


def fitted(size: tuple[int, int], resized: tuple[int, int], mode: str, mean: tuple[float, ...]) -> list[Callable]:
    """What makes an image, PIL or tensor, one of `size`, by the middle of one that is `resized`.

    mode: crop, in its proportions, `resized` being covered; squash, warped to `resized`; pad, in its proportions within
    `resized`, with borders of the mean: timm's center, squash and border.
    """
    whole = {"crop": partial(cover, size=resized), "squash": v2.Resize(resized, BICUBIC)}
    resize = partial(resize_data, resize=whole.get(mode, partial(contain, size=resized)))
    return [resize, partial(centre, size=size, mean=mean)]


def contain(image: torch.Tensor | Image.Image, size: tuple[int, int]) -> torch.Tensor | Image.Image:
    """An image resized in its own proportions, so that one side is that of size, (h, w), and the other no larger."""
    sides = v2.functional.get_size(image)
    ratio = max(side / most for side, most in zip(sides, size, strict=True))
    return v2.functional.resize(image, [max(1, round(side / ratio)) for side in sides], BICUBIC)


def centre(image: torch.Tensor | Image.Image, size: tuple[int, int], mean: tuple[float, ...]):
    """The middle of an image, with borders of the mean where it is smaller: (C, h, w) or PIL -> (C, *size) or PIL."""
    (height, width), (h, w) = v2.functional.get_size(image), size
    top, left = max(0, h - height), max(0, w - width)
    if top or left:
        is_bytes = not isinstance(image, torch.Tensor) or image.dtype == torch.uint8
        colour = [round(255 * value) for value in mean] if is_bytes else list(mean)
        borders = [left // 2, top // 2, left - left // 2, top - top // 2]
        image = v2.functional.pad(image, borders, fill=colour)
    return v2.functional.center_crop(image, list(size))


def cover(image: torch.Tensor | Image.Image, size: tuple[int, int]) -> torch.Tensor | Image.Image:
    """An image resized in its own proportions, so that one side is that of size, (height, width), the other no smaller.

    That one is rounded as timm does, and for a square cut off as torchvision does. Where it would be beyond 8 times
    that of `size`, the middle of the image is taken: enlarging all of it may take gigabytes.
    """
    (height, width), (h, w) = v2.functional.get_size(image), size
    most = [max(1, 8 * width * h // w), max(1, 8 * height * w // h)]
    if height > most[0] or width > most[1]:
        height, width = min(height, most[0]), min(width, most[1])
        image = v2.functional.center_crop(image, [height, width])
    whole = int if h == w else round
    fitting = [h, whole(h * width / height)] if height * w <= width * h else [whole(w * height / width), w]
    return v2.functional.resize(image, fitting, BICUBIC)


def resize_data(image: torch.Tensor | Image.Image, resize: Callable) -> torch.Tensor | Image.Image:
    """An image, PIL or (C, h, w), resized: NaN, no data, counts for nothing, and is where most of a pixel has none."""
    resized = resize(image)
    has_nan = isinstance(image, torch.Tensor) and image.dtype != torch.uint8 and resized.sum().isnan()
    if not has_nan:  # any NaN makes the sum one
        return resized
    share = resize(1 - image.isnan().to(image.dtype))
    return torch.where(share > 0.5, resize(image.nan_to_num(0.0)) / share, torch.nan)


def fill(image: torch.Tensor) -> torch.Tensor:
    """The mean, 0, for no data in a normalised image."""
    return image.nan_to_num_(0.0)


def sample_box(height: int, width: int, min_crop: float, wide: float = 1.0) -> tuple[int, int, int, int, bool]:
    """Top, left, height and width of at least the share `min_crop` of an image's area, and whether to mirror it.

    wide: width / height of what it is resized to; a box differs from that by a factor in ASPECT, for a rectangle too.

    Distributed as in torchvision's RandomResizedCrop and RandomHorizontalFlip, but all numbers come from one call:
    between the decoding of two images, each call of a torch operator finds the processor's caches cold. With
    torchvision's modules, a core loads 6 % fewer ImageNet JPEGs, and 40 % fewer of 32 pixels.
    """
    *tries, row, column, mirror = torch.rand(2 * TRIES + 3).tolist()
    for share, aspect in zip(tries[::2], tries[1::2], strict=True):
        area = (min_crop + (1 - min_crop) * share) * height * width
        ratio = wide * ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(row * (height - h + 1)), int(column * (width - w + 1)), h, w, mirror < 0.5
    narrowest, widest = wide * ASPECT[0], wide * ASPECT[1]
    h, w = min(height, round(width / narrowest)), min(width, round(height * widest))  # the largest there is, centred
    return (height - h) // 2, (width - w) // 2, h, w, mirror < 0.5


def _timm_transform(size: tuple[int, int], augmentation: dict, mean, std, mode: str) -> Callable:
    _, *parts = (augmentation["auto_augment"] or "").split("-")
    try:
        if not all(re.search(r"\d|^t", part) for part in parts):
            raise ValueError("which timm passes over")
        ratio = tuple(size[1] / size[0] * aspect for aspect in ASPECT)
        transform = timm.data.create_transform(size, is_training=True, mean=mean, std=std, ratio=ratio, **augmentation)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--aa {augmentation['auto_augment']}: no policy of timm's; one is {AUTO_AUGMENT}") from error
    if mode != "crop":
        transform.transforms[0] = transforms.Compose(fitted(size, size, mode, mean))
    elif max(size) <= SMALL_INPUT_SIZE:
        small = transforms.RandomCrop(size, padding=4)
        transform.transforms[0] = transforms.Compose([partial(cover, size=size), small])
    transform.transforms.insert(0, _to_rgb)
    return transform


def _to_rgb(image: Image.Image | torch.Tensor) -> Image.Image:
    """Tensors are uint8 RGB; some of torchvision's data sets are gray."""
    image = to_pil_image(image) if isinstance(image, torch.Tensor) else image
    return image if image.mode == "RGB" else image.convert("RGB")


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    """Also to 0 bits, for which timm's policies ask now and then, and which Pillow 13 refuses: a black image."""
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


for _name, _operation in auto_augment.NAME_TO_OP.items():
    if _operation is auto_augment.posterize:
        auto_augment.NAME_TO_OP[_name] = _posterize
