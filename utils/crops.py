"""Random crops of images in memory: where they lie, cut on the host one by one, or on the device all at once."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import crop as crop_and_pad

ASPECT = (3 / 4, 4 / 3)
TRIES = 10


class Box(NamedTuple):
    """A part of an image, in pixels, and whether it is to be mirrored; black where it reaches over the edge."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_box(height: int, width: int, min_crop: float) -> Box:
    """A box of at least the share `min_crop` of an image's area, mirrored or not, from torch's global generator.

    Distributed as in torchvision's RandomResizedCrop and RandomHorizontalFlip, but all numbers come from one call:
    between the decoding of two images, each call of a torch operator finds the processor's caches cold.
    """
    *tries, row, column, mirror = torch.rand(2 * TRIES + 3).tolist()
    for share, aspect in zip(tries[::2], tries[1::2], strict=True):
        area = (min_crop + (1 - min_crop) * share) * height * width
        ratio = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(row * (height - h + 1)), int(column * (width - w + 1)), h, w, mirror < 0.5)
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))  # the largest there is, centred
    return Box((height - h) // 2, (width - w) // 2, h, w, mirror < 0.5)


def draw_shift(height: int, width: int, size: int, padding: int = 4) -> Box:
    """A square box of an image padded on all sides, as RandomCrop(size, padding) and RandomHorizontalFlip give it."""
    row, column, mirror = torch.rand(3).tolist()
    top, left = (int(x * (side + 2 * padding - size + 1)) - padding for x, side in ((row, height), (column, width)))
    return Box(top, left, size, size, mirror < 0.5)


def crop(image: torch.Tensor, box: Box, size: int) -> torch.Tensor:
    """The box of an image, resized (bicubic, antialiased): (C, H, W) -> (C, size, size) of the same type."""
    top, left, height, width, mirrored = box
    if 0 <= top <= image.shape[1] - height and 0 <= left <= image.shape[2] - width:
        image = image[:, top : top + height, left : left + width]  # before resizing: its filter must not see beyond
    else:
        image = crop_and_pad(image, top, left, height, width)
    if height != size or width != size:
        image = F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]
    return image.flip(-1) if mirrored else image


def crop_batch(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """As `crop`, of many images of one shape: (N, C, H, W), (B, 6) -> (B, C, size, size) on their device.

    boxes: rows of the image's number and its Box. A resampled row is a weighted sum of rows, so the two passes are
    products with a matrix per image: more arithmetic than a filter needs, of the kind accelerators do best.
    """
    number, top, left, height, width, mirrored = boxes.unbind(1)
    rows = _resampling(top, height, images.shape[2], size)  # (B, size, H)
    columns = _resampling(left, width, images.shape[3], size)  # (B, size, W)
    columns = torch.where(mirrored.view(-1, 1, 1) > 0, columns.flip(1), columns)
    x = torch.einsum("bchw,bvw->bchv", images[number].to(rows.dtype), columns)
    x = torch.einsum("buh,bchv->bcuv", rows, x)
    return x if images.is_floating_point() else x.round_().clamp_(0, 255).to(images.dtype)


def _resampling(start: torch.Tensor, length: torch.Tensor, total: int, size: int) -> torch.Tensor:
    """Matrices (B, size, total) that resample the positions start .. start + length of `total` ones to `size`."""
    start, length = start.view(-1, 1, 1).float(), length.view(-1, 1, 1).float()
    source = torch.arange(total, device=start.device) + 0.5
    target = torch.arange(size, device=start.device).view(-1, 1) + 0.5
    scale = length / size
    distance = ((source - start - target * scale) / scale.clamp(min=1)).abs()
    near, far = ((1.5 * distance - 2.5) * distance**2 + 1, ((-0.5 * distance + 2.5) * distance - 4) * distance + 2)
    weight = torch.where(distance < 1, near, far.where(distance < 2, 0))  # Keys' cubic convolution, a = -0.5
    weight = weight.where((source > start) & (source < start + length), 0)
    return weight / weight.sum(-1, keepdim=True).where(weight.any(-1, keepdim=True), 1)  # over the edge: black
