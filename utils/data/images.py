"""Files as tensors (C, H, W): how all files of a data set are read alike; formats.py reads a single one.

8-bit values stay bytes where most files hold such, 8-bit and 16-bit ones become shares of 255 and 65535, all other
numbers stay as they are. The orientation in EXIF data is ignored, as torchvision's ImageFolder does.
"""

import logging
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from ..errors import UsageError
from . import formats
from .formats import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, Stored, check_size

log = logging.getLogger("fcmae")

EXTENSIONS = (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS)
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow has it
SAMPLE = 64  # files that tell of a data set
DISK_FOLDERS = ("lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", "#snapshot", "@Recycle")
SCALES = {"uint8": 255, "uint16": 65535}

try:
    os.fstat(2)
except OSError:  # closed by whoever began the run: `StderrKept` needs it, and the next file would become it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def shown(path: str) -> str:
    """A path in a message: with quotes and escapes where characters of it cannot be seen."""
    return path if path.isprintable() else repr(path)


class BadImage(Exception):
    """A file that cannot be read rightly, and why; the message is one line that names it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


class Unreadable(UsageError):
    """Most files of a data set cannot be read."""


@dataclass(frozen=True)
class Reading:
    """How all files of a data set become tensors; `survey` finds depth and alpha.

    depth: 8: uint8. 16: float32, as shares of what 8 or 16 bits can hold. 32: float32, numbers as they are. None: as
    each file is.
    """

    in_chans: int = 3
    depth: int | None = None
    alpha: bool = False  # the last channel is opacity: files without are opaque
    nodata: float | None = None  # of pixels without data, where a file does not say
    max_pixels: int = 178_956_970  # height times width of the largest; as Pillow's


@dataclass(frozen=True)
class Survey:
    """What a sample of a data set's files holds."""

    reading: Reading  # of all files
    eight_bit: bool  # most are
    kinds: Counter[str]  # such as "TIFF, uint16 x 1"
    sizes: list[tuple[int, int]]  # height and width of each
    no_data: float  # share of the pixels
    bad: list[BadImage]  # those that cannot be read


def hidden(name: str) -> bool:
    """Whether a file or folder is one of those that systems, notebooks and version control leave beside images."""
    return name.startswith((".", "__MACOSX", "@eaDir")) or name in DISK_FOLDERS


def visible(folder: str) -> list[os.DirEntry]:
    """The entries of a folder, without the hidden ones and the pictures of a run that has its records there."""
    entries = [entry for entry in os.scandir(folder) if not hidden(entry.name)]
    own = r"(reconstruction-\d+|confusion(-ema)?)(\.\w+(-\d+)?)?\.png"
    is_run = any(entry.name == "run.json" for entry in entries)
    return [entry for entry in entries if not (is_run and re.fullmatch(own, entry.name))]


def load_image(path: str) -> Image.Image:
    """Decode an image file as RGB. Raises BadImage for one that is truncated, damaged or no image."""
    try:
        with Image.open(path) as image:
            check_size(image.width, image.height, Reading.max_pixels)
            return image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise whatever they run into
        raise BadImage(path, reason_of(error)) from error


def read_file(path: str) -> bytes:
    """The content of a file. Raises BadImage where there is none."""
    try:
        if not (os.path.isfile(path) or os.path.isdir(path)) and os.path.exists(path):
            raise BadImage(path, "is no file")  # of a pipe or a device there may be no end
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error


def decode(content: bytes, path: str, reading: Reading) -> torch.Tensor:
    """Decode an image file, an .npy or an .npz: (in_chans, H, W), uint8 or float32, NaN where there is no data.

    Grey is repeated for three channels, RGB becomes luminance for one, and alpha is dropped there. Of several pages the
    first is read, unless there are in_chans, which are then the channels. The channels of an array are its last axis or
    its first, whichever is in_chans long. `path` tells arrays from images. Raises BadImage for a file that is damaged,
    no image, or another kind of image than `reading` tells.
    """
    return _decode(content, path, reading)[0]


def _decode(content: bytes, path: str, reading: Reading) -> tuple[torch.Tensor, Stored | None]:
    """`decode`, and what it is made of; None: a JPEG, in which nothing is to be changed."""
    stderr = StderrKept()
    try:
        with stderr:
            fast = reading.nodata is None
            pixels = formats.fast_jpeg(content, reading.in_chans, reading.max_pixels) if fast else None
            if pixels is None:
                stored = formats.read_stored(content, path, reading.in_chans, reading.nodata, reading.max_pixels)
        if stderr.said and any("Corrupt JPEG" in line and "extraneous" not in line for line in stderr.said):
            raise ValueError("is damaged:")
        if pixels is not None:
            if reading.depth == 8:
                return pixels, None
            stored = Stored(pixels.numpy(), "JPEG")
        return _to_tensor(stored, reading), stored
    except Exception as error:  # on damaged files, decoders raise whatever they run into
        raise BadImage(path, " ".join([reason_of(error), *dict.fromkeys(stderr.said)][:4])) from error


def survey(dataset, reading: Reading, source: str) -> Survey:
    """What at most 64 files hold, spread over the `paths` of a data set that can `read` them: the same in every run.

    source: its name in messages. Raises Unreadable: more than two thirds are, as with another number of channels.
    """
    kinds, scales, pages, sizes, bad = Counter(), Counter(), Counter(), [], []
    alphas = pixels = without = 0
    draw, count = random.Random(0).random, len(dataset.paths)  # every second file may be of another kind
    for i in range(count) if count <= SAMPLE else [int((k + draw()) / SAMPLE * count) for k in range(SAMPLE)]:
        try:
            image, stored = _decode(dataset.read(i), dataset.paths[i], replace(reading, depth=None))
        except BadImage as error:
            bad.append(error)
            continue
        name, channels = stored.pixels.dtype.name, len(stored.pixels)
        kinds[f"{stored.kind}, {name} x {channels}"] += 1
        scales[SCALES.get(name, 0)] += 1
        pages[stored.pages] += 1
        sizes.append(tuple(image.shape[1:]))
        alphas += stored.alpha and channels == reading.in_chans
        pixels, without = pixels + image[0].numel(), without + int(image.isnan().all(dim=0).sum())
    count = len(sizes) + len(bad)
    extra = sum(error.reason == formats.WITHOUT_EXTRA for error in bad)
    if extra and not reading.alpha:  # else it is told already
        log.warning("%s: %d of a sample of %d files: %s", source, extra, count, formats.WITHOUT_EXTRA)
    if len(bad) > 2 * len(sizes):
        raise Unreadable(f"{source}: of a sample of {count} files {len(bad)} are unreadable: {bad[0]}")
    alpha = reading.alpha or 2 * alphas > len(sizes)
    if alpha and bad and not reading.alpha:  # which may be files without
        return survey(dataset, replace(reading, alpha=True), source)
    (most, times), *_ = pages.most_common(1)
    if most not in (1, reading.in_chans) and 2 * times > count:
        log.warning("%s: files of %d pages, of which the first is read; --in_chans %d takes all", source, most, most)
    scale = max(scales, key=lambda scale: (scales[scale], scale))
    depth = {0: 32, 255: 16 if without else 8}.get(scale, 16)  # bytes cannot hold that there is no data
    reading = replace(reading, depth=depth, alpha=alpha)
    return Survey(reading, scale == 255, kinds, sizes, without / pixels, bad)


def to_tensor(image: Image.Image | torch.Tensor, in_chans: int = 3) -> torch.Tensor:
    """A Pillow image as `decode` gives it; a tensor stays as it is. Raises UsageError for another kind of image."""
    if isinstance(image, torch.Tensor):
        return image
    try:
        return _to_tensor(formats.pillow_pixels(image, in_chans), Reading(in_chans))
    except ValueError as error:
        raise UsageError(str(error)) from error


@np.errstate(all="ignore")
def _to_tensor(stored: Stored, reading: Reading) -> torch.Tensor:
    pixels, holes, name, depth = stored.pixels, stored.holes, stored.pixels.dtype.name, reading.depth
    scale = SCALES.get(name, 1)
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"holds values of type {name}, which are no numbers")
    if not pixels.size:
        raise ValueError(f"has no pixels ({pixels.shape[1]} x {pixels.shape[2]})")
    if depth and (scale == 1) != (depth == 32):
        most = {8: "are 8-bit", 16: "are of 8 or 16 bits"}.get(depth, "hold other numbers")
        raise ValueError(f"holds {name} values, where most files {most}")
    if scale == 1 or holes is not None:
        pixels = pixels.astype(np.float32)
        if holes is not None:
            pixels[holes] = np.nan
        if np.isinf(pixels).any():
            raise ValueError("holds infinite values, or such as float32 cannot hold")
    if reading.alpha and stored.kind.endswith("CMYK"):
        raise ValueError("holds CMYK, where most files have alpha")
    if reading.alpha and (stored.alpha or len(pixels) != reading.in_chans):
        colours, last = (pixels[:-1], pixels[-1:]) if stored.alpha else (pixels, np.full_like(pixels[:1], scale))
        pixels = np.concatenate([_fit_channels(colours, reading.in_chans - 1, False), last])
    else:
        pixels = _fit_channels(pixels, reading.in_chans, stored.alpha)
    if depth == 8 and pixels.dtype != np.uint8:
        pixels = pixels * np.float32(255 / scale)
        if holes is not None:
            if np.isnan(pixels).all(axis=(1, 2)).any():
                raise ValueError("holds no data")
            pixels = np.where(np.isnan(pixels), np.nanmean(pixels, axis=(1, 2), keepdims=True), pixels)
        pixels = pixels.round().astype(np.uint8)
    if pixels.dtype == np.uint8 and depth != 16:
        return torch.from_numpy(pixels)
    return torch.from_numpy(pixels.astype(np.float32)).div_(scale)


def _fit_channels(pixels: np.ndarray, in_chans: int, alpha: bool) -> np.ndarray:
    """(C, H, W) -> (in_chans, H, W), without an alpha where that is no channel."""
    found = len(pixels)
    if found == in_chans:
        return pixels
    if alpha:
        pixels = pixels[:-1]
    if len(pixels) == 1 and in_chans == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 3 and in_chans == 1:
        grey = np.tensordot(LUMINANCE, pixels.astype(np.float32), axes=1)[None]
        return grey if pixels.dtype.kind == "f" else grey.round().astype(pixels.dtype)
    if len(pixels) == in_chans:
        return pixels
    shape, s = " x ".join(map(str, (found, *pixels.shape[1:]))), "s" * (found > 1)
    hint = f"give --in_chans {found} in training"  # elsewhere a checkpoint tells them
    raise ValueError(f"has {found} channel{s} ({shape}), not --in_chans {in_chans}; {hint}")


def reason_of(error: Exception) -> str:
    """What a decoder says, in a line."""
    return " ".join(str(error).split(" <_io")[0].split())[:300] or type(error).__name__


class StderrKept:
    """A context, of one thread, that keeps what decoders written in C would write to stderr, naming no file: `said`."""

    said: Sequence[str] = ()

    def __enter__(self) -> "StderrKept":
        self.stderr = os.dup(2)
        os.dup2(_spool(), 2)
        return self

    def __exit__(self, *_) -> None:
        os.dup2(self.stderr, 2)
        os.close(self.stderr)
        if size := os.lseek(_spool(), 0, os.SEEK_CUR):
            self.said = os.pread(_spool(), size, 0).decode(errors="replace").splitlines()
            os.lseek(_spool(), 0, os.SEEK_SET)


@lru_cache
def _spool() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


os.register_at_fork(after_in_child=_spool.cache_clear)  # which would share its position
