"""What files hold: JPEGs by torchcodec or torchvision, TIFFs by tifffile, arrays by NumPy, the rest by Pillow."""

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

ARRAY_EXTENSIONS = (".npy", ".npz")
_NAMES = "jpg jpeg jpe jfif png tif tiff webp bmp gif ppm pgm pbm pnm jp2 j2k avif heic heif"
IMAGE_EXTENSIONS = tuple(f".{name}" for name in _NAMES.split() if f".{name}" in Image.registered_extensions())
JPEG, PNG, TIFFS = b"\xff\xd8", b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how their files begin
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG
GREY, RGB, PALETTE, MASK, CMYK = (0, 1), 2, 3, 4, 5  # photometric interpretations of a TIFF
GDAL_NODATA, IMAGE_DEPTH = 42113, 32997  # tags of a TIFF
PACKBITS = 32773
WITHOUT_EXTRA = "is a TIFF beyond Pillow: pip install tifffile imagecodecs"
JP2_SIZE = b"\xff\x4f\xff\x51"  # the markers that a JPEG 2000 codestream begins with

Image.MAX_IMAGE_PIXELS = None  # `check_size` it is
Image.ID = [name for name in Image.ID if name != "EPS"]  # a program, which Ghostscript would run
warnings.filterwarnings("ignore", module=r"PIL\.")  # a line on stderr for each odd file, otherwise
warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor written to
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


class Stored(NamedTuple):
    """What a file holds."""

    pixels: np.ndarray  # (C, H, W), of any type
    kind: str
    alpha: bool = False  # the last channel is opacity
    holes: np.ndarray | None = None  # where there is no data, (C, H, W); None: nowhere
    pages: int = 1  # alike and of one channel


@np.errstate(all="ignore")
def read_stored(content: bytes, path: str, in_chans: int, nodata: float | None, max_pixels: int) -> Stored:
    """Read a file whose name ends as that of `path`; in_chans: what to make of 8-bit colour, pages and axes.

    Raises whatever decoders run into; ValueError: a file of another kind, or of more pixels.
    """
    is_tiff, suffix = content.startswith(TIFFS), os.path.splitext(path)[1].lower()
    try:
        if suffix in ARRAY_EXTENSIONS:
            stored = Stored(_read_array(content, in_chans, max_pixels), suffix[1:])
        else:
            with Image.open(io.BytesIO(content)) as image:
                if is_tiff and not _plain_tiff(image, nodata):
                    return _read_tiff(content, in_chans, nodata, max_pixels)
                check_size(image.width, image.height, max_pixels)
                check_png(content)
                has_key = image.format == "PNG" and image.mode != "P" and in_chans in (2, 4)
                key = image.info.pop("transparency", None) if has_key else None
                deep = deep_colour(content, image)
                colours = 3 if in_chans == 1 and nodata is not None else in_chans  # many have the grey of no data
                stored = _read_deep(content, image) if deep else pillow_pixels(image, colours)
                if key is not None:
                    stored = _with_key(stored, key, content[24])
                if image.format == "JPEG2000" and image.mode != "P" and (bits := _jp2_bits(content)) < 8:
                    full = stored.pixels * np.float32(255 / (256 - 2 ** (8 - bits)))  # Pillow has only shifted them
                    stored = stored._replace(pixels=full.round().astype(np.uint8))
    except Exception:
        if not is_tiff:
            raise
        return _read_tiff(content, in_chans, nodata, max_pixels)
    return stored._replace(holes=without_data(stored.pixels, nodata, stored.alpha))


def check_size(width: int, height: int, most: int) -> None:
    """Raises ValueError for too many pixels."""
    if width * height > most:
        raise ValueError(f"has {height:,} x {width:,} pixels, above --max_pixels {most}")


def check_png(content: bytes) -> None:
    """Raises ValueError for wrong bytes in a PNG's pixels: Pillow reads whatever comes of them."""
    place = 8 if content.startswith(PNG) else len(content)
    while (end := place + 12 + int.from_bytes(content[place : place + 4], "big")) <= len(content):
        chunk = memoryview(content)[place + 4 : end - 4]
        if chunk[:4] == b"IDAT" and zlib.crc32(chunk) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError("is damaged: a wrong checksum")
        place = end


def _with_key(stored: Stored, key: int | tuple[int, ...], bits: int) -> Stored:
    """With opacity as last channel, of a PNG in which a colour, of so many bits, is transparent."""
    most = stored.pixels.dtype.type(255 if bits < 16 else 65535)
    colour = np.minimum(np.reshape(key, (-1, 1, 1)) * max(1, 255 // (2**bits - 1)), most)  # Pillow widens few bits
    opaque = (stored.pixels != colour).any(axis=0, keepdims=True) * most
    return stored._replace(pixels=np.concatenate([stored.pixels, opaque]), alpha=True)


def without_data(pixels: np.ndarray, nodata: float | None, alpha: bool) -> np.ndarray | None:
    """Where pixels (C, H, W) are NaN or `nodata`, None: nowhere; in bytes, where one colour may have it, all colours.

    alpha: whether the last channel is none.
    """
    if nodata is None and pixels.dtype.kind != "f":
        return None
    holes = np.isnan(pixels) if pixels.dtype.kind == "f" else np.zeros(pixels.shape, bool)
    if nodata is not None:
        holes |= pixels == nodata
        if pixels.dtype == np.uint8:
            holes[:] = holes[: -1 if alpha else None].all(axis=0)
    return holes if holes.any() else None


def _read_array(content: bytes, in_chans: int, max_pixels: int) -> np.ndarray:
    """(C, H, W), the channels being the axis that is in_chans long, else the shorter one of first and last."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        if len(array.files) != 1:
            raise ValueError(f"holds {len(array.files)} arrays ({', '.join(array.files)}); one a file is read")
        check_size(array.zip.infolist()[0].file_size, 1, 8 * max(in_chans, 4) * max_pixels)  # bytes, unpacked
        array = array[array.files[0]]
    if array.ndim not in (2, 3):
        shape = " x ".join(map(str, array.shape)) or "no axes"
        raise ValueError(f"an array of {shape}; an image has two axes, or three with its channels")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[None]
    elif array.shape[-1] == in_chans or (array.shape[0] != in_chans and array.shape[-1] <= array.shape[0]):
        array = np.moveaxis(array, -1, 0)
    check_size(array.shape[2], array.shape[1], max_pixels)
    return array


def pillow_pixels(image: Image.Image, in_chans: int) -> Stored:
    """Pixels of a Pillow image; those of 8 bits converted to grey or RGB for one or three channels."""
    kind, mode = (image.format or "image") + " CMYK" * (image.mode == "CMYK"), image.mode
    if mode[0] in "IF":  # beyond 8 bits
        array = np.array(image)
        widened = mode == "I" and kind in ("PNG", "PPM")  # whose 16 bits some Pillows give in 32
        return Stored((array.astype(np.uint16) if widened or array.dtype.kind == "u" else array)[None], kind)
    if in_chans in (1, 3):
        mode = "L" if in_chans == 1 else "RGB"
    elif "transparency" in image.info or mode == "PA":
        mode = "LA" if mode == "L" else "RGBA"
    else:
        mode = {"1": "L", "P": "RGB", "YCbCr": "RGB"}.get(mode, mode)
    array = np.array(image if mode == image.mode else image.convert(mode))
    return Stored(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), kind, mode in ("LA", "RGBA"))


def deep_colour(content: bytes, image: Image.Image) -> bool:
    """Whether a file is a PNG, PPM or JPEG 2000 in colour beyond 8 bits, of which Pillow keeps 8; or signed."""
    if image.format == "JPEG2000":
        return (image.mode != "I;16" and _jp2_bits(content) > 8) or content[content.find(JP2_SIZE) + 42] > 127
    if image.format == "PPM":
        return image.mode == "RGB" and image.tile[0][3][-1] in range(256, 65536)  # a mode, or the largest value
    return content.startswith(PNG) and content[24] == 16 and image.mode[0] != "I"


def _jp2_bits(content: bytes) -> int:
    return (content[content.find(JP2_SIZE) + 42] & 127) + 1  # of the first channel


def _read_deep(content: bytes, image: Image.Image) -> Stored:
    if image.format == "JPEG2000":
        try:
            from imagecodecs import jpeg2k_decode
        except ImportError as error:
            raise ValueError("is a JPEG 2000 beyond Pillow: pip install imagecodecs") from error
        pixels = np.atleast_3d(jpeg2k_decode(content)).transpose(2, 0, 1)
        if pixels.dtype == np.uint16:
            pixels = pixels << 16 - _jp2_bits(content)  # as Pillow has its grey
        return Stored(pixels, "JPEG2000", alpha=image.mode in ("LA", "RGBA"))
    if image.format == "PPM":
        (codec, _, start, options), (width, height) = image.tile[0], image.size
        # in grey Pillow keeps all, so: three colours side by side
        header = f"P{2 if codec == 'ppm_plain' else 5} {3 * width} {height} {options[-1]}\n"
        with Image.open(io.BytesIO(header.encode() + content[start:])) as grey:
            return Stored(np.array(grey).astype(np.uint16).reshape(height, width, 3).transpose(2, 0, 1), "PPM")
    if not FAST_DECODERS:
        raise ValueError("a PNG in colour of 16 bits, of which Pillow reads 8; pip install torchcodec")
    image.load()  # damaged ones crash torchvision
    if (place := content.find(b"eXIf") - 4) > 0:  # torchcodec would turn it
        content = content[:place] + content[place + 12 + int.from_bytes(content[place : place + 4], "big") :]
    return Stored(FAST_DECODERS[PNG](content, "UNCHANGED").numpy(), "PNG", alpha=content[25] in (4, 6))


def _plain_tiff(image: Image.Image, nodata: float | None) -> bool:
    """Whether a TIFF is grey, a palette or colour of 8 bits, or grey of 16, in one page: Pillow reads it faster."""
    tag, channels, bits = image.tag_v2.get, len(image.getbands()), max(image.tag_v2.get(258, (1,)))
    eight_bit = bits <= 8 and image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")
    plain = eight_bit or (image.mode, bits, tag(262)) == ("I;16", 16, 1)
    plain &= (tag(277, channels), set(tag(339, (1,))), tag(254, 0) & 5, tag(255, 1)) == (channels, {1}, 0, 1)
    plain &= 262 in image.tag_v2 and not (tag(259) == PACKBITS and tag(317, 1) > 1)  # differences, to tifffile alone
    if image.mode == "P":  # no data is an index; colours of 8 bits are black to Pillow
        plain &= nodata is None and max(tag(320)) > 255
    plain &= 0 not in tag(324 if 322 in image.tag_v2 else 273)  # tiles or strips left out: Pillow reads the header
    plain &= image.tag_v2.next != image.tag_v2._offset and tag(322, 0) * tag(323, 0) <= 2**24  # cut short, or a bomb
    return plain and not {GDAL_NODATA, IMAGE_DEPTH} & {*image.tag_v2} and (channels > 1 or image.n_frames == 1)


def _read_tiff(content: bytes, in_chans: int, nodata: float | None, max_pixels: int) -> Stored:
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError as error:
        raise ValueError(WITHOUT_EXTRA) from error
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        images = (page for page in tiff.pages if not (page.subfiletype & 5 or page.photometric == MASK))  # 1: overview
        pages = list(islice(images, max(100, in_chans + 1))) or list(islice(tiff.pages, 1))
        if not pages:
            raise ValueError("has no page")
        first = pages[0]
        alike = len({(page.shape, page.dtype, page.photometric) for page in pages}) == 1 == first.samplesperpixel
        count = len(pages) if alike and first.photometric in GREY and first.bitspersample > 1 else 1  # a fax is none
        if count > 1 and in_chans not in (1, 3, count):
            hint = f"give --in_chans {count} in training"
            raise ValueError(f"has {count} pages of a channel, not --in_chans {in_chans}; {hint}")
        chosen = pages[:count] if count == in_chans else pages[:1]
        for page in chosen:
            check_size(page.imagewidth * page.imagedepth, page.imagelength, max_pixels)
            check_size(page.tilewidth, page.tilelength, max_pixels)
            if page.samplesperpixel > max(in_chans, 5):  # the memory of which nothing limits
                raise ValueError(f"has {page.samplesperpixel} channels, not --in_chans {in_chans}")
            ends = map(add, page.dataoffsets, page.databytecounts)
            form, start = tiff.tiff, page.offset + tiff.tiff.tagnosize
            (tags,) = struct.unpack_from(form.tagnoformat, content, page.offset)
            codes = (
                struct.unpack_from(f"{form.byteorder}H", content, start + i * form.tagsize)[0] for i in range(tags)
            )
            lost = {code for code in codes if code < 350 or code == GDAL_NODATA} - {*page.tags.keys()}
            if lost or (page.compression > 1 and max(ends, default=0) > len(content)):
                raise ValueError("is cut short")  # what is missing would be read as something else
        pixels, holes = map(np.concatenate, zip(*(_read_page(page, in_chans, nodata) for page in chosen), strict=True))
    kind = "TIFF CMYK" if first.photometric == CMYK and len(pixels) > 3 else "TIFF"
    return Stored(pixels, kind, first.extrasamples in ((1,), (2,)), holes if holes.any() else None, count)


def _read_page(page, in_chans: int, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, colours as RGB, and holes of a page, both (C, H, W)."""
    pixels = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # (planes, H, W, samples)
    pixels = np.moveaxis(pixels, -1, 1).reshape(-1, *pixels.shape[1:3])
    turn = page.tags.valueof(274, 1)  # as Pillow has it
    pixels = pixels.transpose(0, 2, 1) if turn > 4 else pixels
    pixels = pixels[:, :: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    pixels = pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False)
    unsigned, extra = pixels.dtype.kind == "u", page.extrasamples
    kind = page.photometric if 262 in page.tags else 1  # to tifffile, white is 0 in one that does not say
    with suppress(ValueError):  # none, or no number
        nodata = float(str(page.tags.valueof(GDAL_NODATA)).strip("\0 "))
    holes = without_data(pixels, nodata, extra in ((1,), (2,)))
    holes = np.zeros(pixels.shape, bool) if holes is None else holes
    if kind == PALETTE:
        colours = page.colormap[:, pixels[0]] >> (8 if page.colormap.max() > 255 else 0)
        pixels = np.concatenate([colours, pixels[1:] >> 8 * (pixels.itemsize - 1)]).astype(np.uint8)
        return pixels, holes[:1].repeat(len(pixels), axis=0)
    if kind not in (*GREY, RGB, CMYK) and (kind, page.compression) != (6, 7):  # JPEG's YCbCr comes as RGB
        raise ValueError(f"holds colours of the kind {kind!r}, which are not read")
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    most = 2**bits - 1 if unsigned else 1
    if kind == 0 and pixels.dtype.kind in "ui":  # white
        colours = pixels[:-1] if extra in ((1,), (2,)) else pixels  # the last is no colour, but opacity
        pixels = np.concatenate([pixels.dtype.type(most) - colours if unsigned else ~colours, pixels[len(colours) :]])
    if bits < 8:
        pixels, most = (pixels * np.float32(255 / most)).round().astype(np.uint8), 255
    if extra == (1,):  # colours times alpha
        *colours, alpha = pixels.astype(np.float64)
        colours = np.where(alpha > 0, colours * (most / alpha), colours).clip(max=most)
        pixels = np.concatenate([colours.round() if unsigned else colours, alpha[None]]).astype(pixels.dtype)
    if kind == CMYK and unsigned and in_chans in (1, 3):
        light, white = 1 - pixels[:3] / most, 1 - pixels[3] / most
        colours = (light * white * most).round().astype(pixels.dtype)
        pixels, holes = np.concatenate([colours, pixels[4:]]), np.delete(holes, 3, axis=0)
    if kind in (RGB, CMYK) and extra in ((), (0,)) and in_chans in (1, 3) and len(pixels) == 4:  # maybe an alpha
        pixels, holes = pixels[:3], holes[:3]
    return pixels, holes


def _fast_decoders() -> dict[bytes, Callable[[bytes, str], torch.Tensor]]:
    """The decoder for each kind of file: torchcodec's, else torchvision's, which will be removed, else none.

    Without one Pillow reads the file. The pixels are the same; a core loads a fifth fewer JPEGs.
    """
    with suppress(Exception):  # not there, too old, or not for this torch, which it tells in many ways
        from torchcodec.decoders import decode_jpeg, decode_png  # from torchcodec 0.16 and torch 2.11 on

        return {
            JPEG: lambda content, mode: decode_jpeg(_as_tensor(_without_exif(content)), mode=mode),
            PNG: lambda content, mode: decode_png(content, mode=mode, output_dtype="auto"),
        }
    with suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg, decode_png

        return {
            JPEG: lambda content, mode: decode_jpeg(_as_tensor(content), ImageReadMode[mode]),
            PNG: lambda content, mode: decode_png(_as_tensor(content), ImageReadMode[mode]),
        }
    return {}


def _as_tensor(content: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(content, dtype=torch.uint8)  # which is only read: no copy


FAST_DECODERS = _fast_decoders()


def _without_exif(jpeg: bytes) -> bytearray:
    """Its EXIF segments under another marker, as torchcodec turns images by the orientation in them."""
    changed, place = bytearray(jpeg), len(JPEG)
    while changed[place : place + 1] == b"\xff" and place + 4 <= len(changed):  # segments: marker, length, content
        if changed[place + 1] == 0xE1:
            changed[place + 1] = 0xEF
        place += 2 + int.from_bytes(changed[place + 2 : place + 4], "big")
    return changed


def fast_jpeg(content: bytes, in_chans: int, max_pixels: int) -> torch.Tensor | None:
    """Pixels of a JPEG, uint8 (1 or 3, H, W); None: another file, or one that Pillow may read or say what it is."""
    if not content.startswith(JPEG) or in_chans not in (1, 3) or JPEG not in FAST_DECODERS:
        return None
    try:
        place = len(JPEG)
        while content[place] == 0xFF and content[place + 1] not in START_OF_FRAME:
            place += 2 + (content[place + 2] << 8 | content[place + 3])
        height, width = struct.unpack_from(">HH", content, place + 5)
        check_size(width, height, max_pixels)
        return FAST_DECODERS[JPEG](content, "RGB" if in_chans == 3 else "GRAY") if content[place] == 0xFF else None
    except Exception:
        return None
