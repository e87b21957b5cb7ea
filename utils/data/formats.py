"""What files hold: JPEGs by torchcodec or torchvision, TIFFs by tifffile, arrays by NumPy, the rest by Pillow."""

import io
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from operator import add
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

ARRAY_EXTENSIONS = (".npy", ".npz")
IMAGE_EXTENSIONS = tuple(
    f".{name}"
    for name in "jpg jpeg jpe jfif png tif tiff webp bmp gif ppm pgm pbm pnm jp2 j2k avif heic heif".split()  # noqa: SIM905
    if f".{name}" in Image.registered_extensions()
)
JPEG, PNG, TIFFS = b"\xff\xd8", b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how their files begin
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
GREY, RGB, PALETTE, CMYK = (0, 1), 2, 3, 5  # photometric interpretations of a TIFF
GDAL_NODATA = 42113  # a tag of a TIFF
WITHOUT_EXTRA = "is a TIFF beyond Pillow: pip install tifffile imagecodecs"

Image.MAX_IMAGE_PIXELS = None  # `check_size` it is
warnings.filterwarnings("ignore", module=r"PIL\.")  # a line on stderr for each odd file, otherwise
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


class Stored(NamedTuple):
    """Pixels (C, H, W) of any type as a file of some kind holds them, and what goes with them.

    alpha: whether the last channel is opacity. holes: where there is no data, (C, H, W); None: nowhere. pages: how many
    are alike and of one channel.
    """

    pixels: np.ndarray
    kind: str
    alpha: bool = False
    holes: np.ndarray | None = None
    pages: int = 1


def read_stored(content: bytes, path: str, in_chans: int, nodata: float | None, max_pixels: int) -> Stored:
    """Read a file whose name ends as that of `path`; in_chans: what to make of 8-bit colour, pages and axes.

    Raises whatever decoders run into; ValueError: a file that is no image, or one of more pixels.
    """
    suffix = Path(path).suffix.lower()
    if suffix in ARRAY_EXTENSIONS:
        pixels = channels_first(_read_array(content, suffix, max_pixels), in_chans)
        return Stored(pixels, suffix[1:], holes=without_data(pixels, nodata))
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:
        if content.startswith(TIFFS):
            return _read_tiff(content, in_chans, nodata, max_pixels)
        if isinstance(error, UnidentifiedImageError):
            raise ValueError("not an image file that Pillow knows") from None
        raise
    with image:
        if content.startswith(TIFFS) and not _plain_tiff(image):
            return _read_tiff(content, in_chans, nodata, max_pixels)
        check_size(*image.size, max_pixels)
        if image.format == "PPM" and image.mode == "RGB" and image.tile[0].args[-1] in range(256, 65536):
            stored = _read_ppm16(content, image)
        else:
            stored = pillow_pixels(image, in_chans)
    if content.startswith(PNG) and content[24] == 16 and stored.pixels.dtype == np.uint8:
        stored = _read_png16(content)
    return stored._replace(holes=without_data(stored.pixels, nodata))


def check_size(width: int, height: int, most: int) -> None:
    """Raises ValueError for too many pixels."""
    if width * height > most:
        raise ValueError(f"has {height:,} x {width:,} pixels, above --max_pixels {most}")


def without_data(pixels: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where pixels (C, H, W) are NaN or `nodata`, None: nowhere; in bytes, where a colour may have it, all channels."""
    if nodata is None and pixels.dtype.kind != "f":
        return None
    holes = np.isnan(pixels) if pixels.dtype.kind == "f" else np.zeros(pixels.shape, bool)
    if nodata is not None:
        holes |= pixels == nodata
        if pixels.dtype == np.uint8:
            holes[:] = holes.all(axis=0)
    return holes if holes.any() else None


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _read_array(content: bytes, suffix: str, max_pixels: int) -> np.ndarray:
    if suffix == ".npy":
        return _read_npy(io.BytesIO(content), max_pixels)
    with zipfile.ZipFile(io.BytesIO(content)) as arrays:
        names = [name.removesuffix(".npy") for name in arrays.namelist()]
        if len(names) != 1:
            raise ValueError(f"holds {len(names)} arrays ({', '.join(names)}); one a file is read")
        with arrays.open(arrays.namelist()[0]) as file:
            return _read_npy(file, max_pixels)


def _read_npy(file, max_pixels: int) -> np.ndarray:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
    check_size(*(1, *sorted(shape))[-2:], max_pixels)
    array = np.ndarray(shape, dtype, bytearray(file.read()), order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def channels_first(array: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W): channels are the axis that is in_chans long, else the shorter."""
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        shape = " x ".join(map(str, array.shape))
        raise ValueError(f"an array of {shape}; an image has two axes, or three with its channels")
    first, _, last = array.shape
    return np.moveaxis(array, -1, 0) if last == in_chans or (first != in_chans and last <= first) else array


# ---- Pillow ----------------------------------------------------------------------------------------------------------


def pillow_pixels(image: Image.Image, in_chans: int) -> Stored:
    """Pixels of a Pillow image; those of 8 bits converted to grey or RGB for one or three channels."""
    kind, mode = image.format or "image", image.mode
    if mode[0] in "IF":  # beyond 8 bits
        array = np.array(image)
        widened = mode == "I" and image.format in ("PNG", "PPM")  # whose 16 bits some Pillows give in 32
        return Stored((array.astype(np.uint16) if widened or array.dtype.kind == "u" else array)[None], kind)
    if in_chans in (1, 3):
        mode = "L" if in_chans == 1 else "RGB"
    elif "transparency" in image.info or mode == "PA":
        mode = "LA" if mode == "L" else "RGBA"
    else:
        mode = {"1": "L", "P": "RGB"}.get(mode, mode)
    array = np.array(image if mode == image.mode else image.convert(mode))
    return Stored(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), kind, mode in ("LA", "RGBA"))


def _read_ppm16(content: bytes, image: Image.Image) -> Stored:
    """A PPM beyond 8 bits, which Pillow keeps in grey alone: as a grey one, its three colours side by side."""
    (width, height), tile = image.size, image.tile[0]
    header = f"P{2 if tile.codec_name == 'ppm_plain' else 5} {3 * width} {height} {tile.args[-1]}\n"
    with Image.open(io.BytesIO(header.encode() + content[tile.offset :])) as grey:
        return Stored(np.array(grey).astype(np.uint16).reshape(height, width, 3).transpose(2, 0, 1), "PPM")


def _read_png16(content: bytes) -> Stored:
    """A PNG in colour, of which Pillow keeps 8 bits; torchvision crashes on damaged ones, which it has read before."""
    if not FAST_DECODERS:
        raise ValueError("a PNG in colour of 16 bits, of which Pillow reads 8; pip install torchcodec")
    if (place := content.find(b"eXIf")) > 0:  # torchcodec would turn it
        place -= 4
        content = content[:place] + content[place + 12 + int.from_bytes(content[place : place + 4], "big") :]
    return Stored(FAST_DECODERS[PNG](content, "UNCHANGED").numpy(), "PNG", alpha=content[25] in (4, 6))


# ---- TIFF ------------------------------------------------------------------------------------------------------------


def _plain_tiff(image: Image.Image) -> bool:
    """Whether a TIFF is grey, a palette or colour of 8 bits, or grey of 16, in one page: Pillow reads it faster."""
    tag, channels = image.tag_v2.get, len(image.getbands())
    modes = ("1", "L", "P", "RGB", "CMYK", "YCbCr") if max(tag(258, (1,))) <= 8 else ("I;16",) * (tag(258) == (16,))
    with suppress(Exception):  # from pages that Pillow has no mode for
        return (
            image.mode in modes
            and (channels > 1 or (image.n_frames == 1 and (image.mode != "I;16" or tag(262) == 1)))
            and (tag(277, 1), tag(284, 1), set(tag(339, (1,))), tag(254, 0) & 5) == (channels, 1, {1}, 0)
            and GDAL_NODATA not in image.tag_v2
        )
    return False


def _read_tiff(content: bytes, in_chans: int, nodata: float | None, max_pixels: int) -> Stored:
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError as error:
        raise ValueError(WITHOUT_EXTRA) from error
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        images = (page for page in tiff.pages if not (page.subfiletype & 5 or page.photometric == 4))  # overview, mask
        pages = list(islice(images, max(100, in_chans + 1)))
        if not pages:
            raise ValueError("has no page that is an image, but overviews or masks")
        first = pages[0]
        same = len({(page.shape, page.dtype, page.photometric) for page in pages}) == 1
        count = len(pages) if same and first.samplesperpixel == 1 and first.photometric in GREY else 1
        if count > 1 and in_chans not in (1, 3, count):
            raise ValueError(f"has {count} pages of a channel, not --in_chans {in_chans}; give --in_chans {count}")
        chosen = pages if count == in_chans else pages[:1]
        for page in chosen:
            check_size(page.imagewidth, page.imagelength, max_pixels)
            if max(map(add, page.dataoffsets, page.databytecounts), default=0) > len(content):
                raise ValueError("is cut short")
        pixels, holes = map(np.concatenate, zip(*(_read_page(page, in_chans, nodata) for page in chosen), strict=True))
    return Stored(pixels, "TIFF", first.extrasamples in ((1,), (2,)), holes if holes.any() else None, count)


def _read_page(page, in_chans: int, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, colours as RGB, and holes of a page, both (C, H, W)."""
    pixels = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # (planes, H, W, samples)
    pixels = np.moveaxis(pixels, -1, 1).reshape(-1, *pixels.shape[1:3])
    pixels = pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False)
    unsigned, kind, extra = pixels.dtype.kind == "u", page.photometric, page.extrasamples
    with suppress(ValueError):  # none, or no number
        nodata = float(str(page.tags.valueof(GDAL_NODATA)).strip("\0 "))
    holes = without_data(pixels, nodata)
    holes = np.zeros(pixels.shape, bool) if holes is None else holes
    if kind == PALETTE:
        colours = page.colormap[:, pixels[0]]
        return (colours >> (8 if page.colormap.max() > 255 else 0)).astype(np.uint8), holes.repeat(3, axis=0)
    if kind not in (*GREY, RGB, CMYK) and (kind, page.compression) != (6, 7):  # JPEG's YCbCr comes as RGB
        raise ValueError(f"holds colours of the kind {kind!r}, which are not read")
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    most = 2**bits - 1 if unsigned else 1
    if kind == 0 and pixels.dtype.kind in "ui":  # white
        pixels = pixels.dtype.type(most) - pixels if unsigned else ~pixels
    if bits < 8:
        pixels, most = (pixels * np.float32(255 / most)).round().astype(np.uint8), 255
    if extra == (1,):  # colours times alpha
        *colours, alpha = pixels.astype(np.float64)
        colours = np.where(alpha > 0, colours * (most / alpha), colours).clip(max=most)
        pixels[:-1] = colours.round() if unsigned else colours
    if kind == CMYK and unsigned and in_chans in (1, 3):
        ink, black = pixels[:3] / most, pixels[3] / most
        pixels, holes = ((1 - ink) * (1 - black) * most).round().astype(pixels.dtype), holes[:3]
    if kind == RGB and extra in ((), (0,)) and in_chans in (1, 3) and len(pixels) == 4:  # which may well be alpha
        pixels, holes = pixels[:3], holes[:3]
    return pixels, holes


# ---- JPEG ------------------------------------------------------------------------------------------------------------


def _fast_decoders() -> dict[bytes, Callable[[bytes, str], torch.Tensor]]:
    """The decoder for each kind of file: torchcodec's, else torchvision's, which will be removed, else none.

    Without one Pillow reads the file. The pixels are the same; a core loads a fifth fewer JPEGs.
    """
    try:
        from torchcodec.decoders import decode_jpeg, decode_png  # from torchcodec 0.16 and torch 2.11 on

        return {
            JPEG: lambda content, mode: decode_jpeg(_as_tensor(_without_exif(content)), mode=mode),
            PNG: lambda content, mode: decode_png(content, mode=mode, output_dtype="auto"),
        }
    except Exception:  # not there, too old, or not for this torch, which it tells in many ways
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, decode_png
    except ImportError:
        return {}

    return {
        JPEG: lambda content, mode: decode_jpeg(_as_tensor(content), ImageReadMode[mode]),
        PNG: lambda content, mode: decode_png(_as_tensor(content), ImageReadMode[mode]),
    }


def _as_tensor(content: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


FAST_DECODERS = _fast_decoders()


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of what comes before the pixels."""
    place = len(JPEG)
    while jpeg[place : place + 1] == b"\xff" and place + 9 < len(jpeg):
        yield jpeg[place + 1], place
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")


def _without_exif(jpeg: bytes) -> bytearray:
    """Its EXIF segments under another marker, as torchcodec turns images by the orientation in them."""
    changed = bytearray(jpeg)
    for marker, place in _segments(jpeg):
        changed[place + 1] = 0xEF if marker == 0xE1 else marker
    return changed


def fast_jpeg(content: bytes, in_chans: int, max_pixels: int) -> torch.Tensor | None:
    """Pixels of a JPEG, uint8 (1 or 3, H, W); None: another file, or one that Pillow may read or say what it is."""
    if not content.startswith(JPEG) or in_chans not in (1, 3) or JPEG not in FAST_DECODERS:
        return None
    place = next((place for marker, place in _segments(content) if marker in START_OF_FRAME), None)
    if place is None:
        return None
    height, width = (int.from_bytes(content[place + k : place + k + 2], "big") for k in (5, 7))
    with suppress(Exception):
        check_size(width, height, max_pixels)
        return FAST_DECODERS[JPEG](content, "RGB" if in_chans == 3 else "GRAY")
    return None


# ---- what decoders say -----------------------------------------------------------------------------------------------


@contextmanager
def stderr_kept(said: list[str]) -> Iterator[None]:
    """Append to `said` what decoders written in C would write to stderr, without the name of a file."""
    spool, stderr = _spool(os.getpid()), os.dup(2)
    os.dup2(spool.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        if spool.seek(0, os.SEEK_END):
            spool.seek(0)
            said += spool.read().decode(errors="replace").splitlines()
            spool.seek(0)
            spool.truncate()


@lru_cache(1)
def _spool(_process: int):
    return tempfile.TemporaryFile()
