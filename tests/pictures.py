"""Small pictures, whole and broken, and the arguments that they are loaded by."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import main_finetune
import main_pretrain

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def finetune_args(**flags):
    return main_finetune.get_args_parser().parse_args([f"--{k}={v}" for k, v in flags.items()])


def pretrain_args(**flags):
    return main_pretrain.get_args_parser().parse_args([f"--{k}={v}" for k, v in flags.items()])


def picture(width=60, height=40, seed=0):
    """Smooth enough to survive JPEG, without symmetry."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def levels(tensor, mean=MEAN, std=STD):
    """The 8-bit values (H, W, 3) behind a normalised image."""
    values = (tensor * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8).permute(1, 2, 0).numpy()


def broken_files():
    """Name -> content of files that look like images."""
    files = {}
    for extension, image_format in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("ppm", "PPM"), ("bmp", "BMP")):
        buffer = io.BytesIO()
        picture().save(buffer, image_format)
        files[f"half.{extension}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    flipped = bytearray(buffer.getvalue())
    flipped[len(flipped) // 2] ^= 64
    return files | {
        "text.png": b"<html>404 not found</html>",
        "zeros.jpg": bytes(1000),
        "nothing.jpg": b"",
        "flipped.png": bytes(flipped),
    }


def pixels(image):
    """(C, H, W) of a Pillow image."""
    array = np.asarray(image)
    return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())


def png(array, *chunks, bits=None):
    """A PNG of (H, W, C) pixels in 8 or 16 bits, of (H, W, 1) in fewer, too, with chunks before the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    bits = bits or 8 * array.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    if bits < 8:
        array = np.packbits(np.unpackbits(array, axis=2)[..., -bits:].reshape(height, -1), axis=1)
    rows = b"".join(b"\0" + row.astype(f">u{array.dtype.itemsize}").tobytes() for row in array)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
