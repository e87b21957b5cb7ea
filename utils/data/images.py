"""Image and array files as tensors (C, H, W): JPEGs by torchcodec or torchvision, arrays by NumPy, the rest by Pillow.

8-bit files stay uint8. Other files become float32: unsigned 16-bit values as shares of 65535, so that nothing is cut
off, and all other numbers as they are. The orientation in EXIF data is ignored, as torchvision's ImageFolder does.
"""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UsageError

ARRAY_EXTENSIONS = (".npy", ".npz")
IMAGE_EXTENSIONS = IMG_EXTENSIONS
EXTENSIONS = (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS)
JPEG, PNG, TIFFS = b"\xff\xd8", b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how their files begin
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # of Pillow, those beyond 8 bits
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow has it


def hidden(name: str) -> bool:
    """Whether a file or folder is one of those that notebooks, macOS and version control leave beside images."""
    return name.startswith((".", "__MACOSX"))


class BadImage(Exception):
    """A file that cannot be read rightly, and why; the message is one line that names it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path if self.path.isprintable() else repr(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """How all files of a data set become tensors; `survey` finds depth and alpha.

    depth: 8: uint8. 16: float32, as shares of what 8 or 16 bits can hold. 32: float32, numbers as they are. None: as
    each file is. alpha: whether the last channel is opacity, so that files without are opaque. nodata: the value of
    pixels without data where a file does not say. max_pixels: height times width beyond which a file is refused.
    """

    in_chans: int = 3
    depth: int | None = None
    alpha: bool = False
    nodata: float | None = None
    max_pixels: int = 178_956_970


@dataclass(frozen=True)
class Survey:
    """What a sample of a data set's files holds.

    reading: how all are to be read. kinds: files of each, such as "TIFF, uint16 x 1". sizes: (height, width) of each
    file. no_data: share of pixels without data. bad: those that cannot be read.
    """

    reading: Reading
    kinds: Counter[str]
    sizes: list[tuple[int, int]]
    no_data: float
    bad: list[BadImage]


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


def _without_exif(jpeg: bytes) -> bytearray:
    """Its EXIF segments under another marker, as torchcodec turns images by the orientation in them."""
    changed, place = bytearray(jpeg), len(JPEG)
    while changed[place : place + 1] == b"\xff" and place + 4 <= len(changed):  # segments: marker, length, content
        if changed[place + 1] == 0xE1:
            changed[place + 1] = 0xEF
        place += 2 + int.from_bytes(changed[place + 2 : place + 4], "big")
    return changed


FAST_DECODERS = _fast_decoders()


def load_image(path: str) -> Image.Image:
    """Decode an image file as RGB. Raises BadImage for one that is truncated, damaged or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise whatever they run into
        raise BadImage(path, _reason(error)) from error


def read_file(path: str) -> bytes:
    """The content of a file. Raises BadImage where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error


def decode(content: bytes, path: str, reading: Reading) -> torch.Tensor:
    """Decode an image file, an .npy or an .npz: (in_chans, H, W), uint8 or float32, NaN where there is no data.

    Grey is repeated for three channels, RGB becomes luminance for one, and alpha is dropped there. The pages of a TIFF
    are channels if there are in_chans of them. The channels of an array are its last axis or its first, whichever is
    in_chans long.

    Args:
        path: tells arrays from images, and is for messages.

    Raises:
        BadImage: a file that is damaged, no image, or another kind of image than `reading` tells.
    """
    try:
        if reading.in_chans in (1, 3) and content.startswith(JPEG) and (decode_jpeg := FAST_DECODERS.get(JPEG)):
            try:
                pixels = decode_jpeg(content, "RGB" if reading.in_chans == 3 else "GRAY")
                return pixels / 255 if reading.depth == 16 else pixels
            except Exception:
                pass  # Pillow may read it; if not, it says why
        return _to_depth(fit_channels(_read(content, path, reading), reading.in_chans), reading.depth)
    except Exception as error:  # on damaged files, decoders raise whatever they run into
        raise BadImage(path, _reason(error)) from error


def survey(dataset, reading: Reading, source: str) -> Survey:
    """What at most 64 files hold, spread over the `paths` of a data set that can `read` them: the same in every run.

    source: what the data set is called in messages.

    Raises:
        UsageError: more than two thirds cannot be read, as with another number of channels.
    """
    kinds, depths, sizes, bad, no_data = Counter(), Counter(), [], [], []
    for i in sorted({k * len(dataset.paths) // 64 for k in range(64)}):
        path = dataset.paths[i]
        try:
            pixels = decode(dataset.read(i), path, reading)
        except BadImage as error:
            bad.append(error)
            continue
        kinds[Path(path).suffix] += 1
        depths[8 if pixels.dtype == torch.uint8 else 16] += 1
        sizes.append(tuple(pixels.shape[1:]))
        no_data.append(0.0)
    if len(bad) > 2 * len(sizes):
        raise UsageError(f"{source}: of a sample of {len(bad) + len(sizes)} files {len(bad)} are unreadable: {bad[0]}")
    reading = replace(reading, depth=max(depths, key=lambda depth: (depths[depth], depth)))
    return Survey(reading, kinds, sizes, sum(no_data) / len(sizes), bad)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_tensor(image: Image.Image | torch.Tensor, in_chans: int = 3) -> torch.Tensor:
    """A Pillow image as `decode` gives it; a tensor stays as it is. Raises UsageError for another kind of image."""
    if isinstance(image, torch.Tensor):
        return image
    try:
        return _to_depth(fit_channels(pillow_pixels(image, in_chans), in_chans), None)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read(content: bytes, path: str, reading: Reading) -> np.ndarray:
    if Path(path).suffix.lower() in ARRAY_EXTENSIONS:
        return _read_array(content)
    return _read_pillow(content, reading.in_chans)


def fit_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (in_chans, H, W); see `decode`."""
    shape = " x ".join(map(str, pixels.shape))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"an array of {shape}; an image has two axes, or three with its channels")
    elif pixels.shape[-1] == in_chans or (pixels.shape[0] != in_chans and pixels.shape[-1] <= pixels.shape[0]):
        pixels = np.moveaxis(pixels, -1, 0)
    if len(pixels) == in_chans:
        return pixels
    if len(pixels) == 1 and in_chans == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 3 and in_chans == 1:
        grey = np.tensordot(LUMINANCE, pixels.astype(np.float32), axes=1)[None]
        return grey if pixels.dtype.kind == "f" else grey.round().astype(pixels.dtype)
    found = f"{len(pixels)} channel{'s' * (len(pixels) > 1)} ({shape})"
    raise ValueError(f"has {found}, not --in_chans {in_chans}; give --in_chans {len(pixels)}")


def _to_depth(pixels: np.ndarray, depth: int | None) -> torch.Tensor:
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"holds values of type {pixels.dtype}, which are no numbers")
    if pixels.dtype == np.uint8:
        tensor = torch.from_numpy(pixels)
        return tensor / 255 if depth == 16 else tensor
    tensor = torch.from_numpy(pixels.astype(np.float32))
    if pixels.dtype == np.uint16:
        tensor = tensor / 65535
        return (tensor * 255).round().to(torch.uint8) if depth == 8 else tensor
    if depth == 8:
        raise ValueError(f"holds {pixels.dtype} values, where most files are 8-bit")
    if not tensor.isfinite().all():
        raise ValueError("holds NaN or infinite values")
    return tensor


def _read_array(content: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(array, np.ndarray):
        return array
    if len(array.files) != 1:
        raise ValueError(f"holds {len(array.files)} arrays ({', '.join(array.files)}); one a file is read")
    return array[array.files[0]]


def _read_pillow(content: bytes, in_chans: int) -> np.ndarray:
    is_tiff = content.startswith(TIFFS)
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if is_tiff:  # of many bands, or of floats in several
            return _read_tiff(content)
        raise UnidentifiedImageError("not an image file that Pillow knows") from None
    with image:
        if is_tiff and in_chans > 1 and image.n_frames > 1 and len(image.getbands()) == 1:
            pages = image.n_frames
            if pages != in_chans:
                raise ValueError(f"has {pages} pages of a channel, not --in_chans {in_chans}; give --in_chans {pages}")
            return np.stack([_page(image, i) for i in range(pages)])
        if is_tiff and _pillow_loses(image, in_chans):
            return _read_tiff(content)
        pixels = pillow_pixels(image, in_chans)
        if content.startswith(PNG) and content[24] == 16 and pixels.dtype == np.uint8:
            return _read_png16(content, in_chans)
    return pixels


def _read_png16(content: bytes, in_chans: int) -> np.ndarray:
    """A PNG in colour, of which Pillow keeps 8 bits; torchvision crashes on damaged ones, which it has read before."""
    if not FAST_DECODERS:
        raise ValueError("a PNG in colour of 16 bits, of which Pillow reads 8; pip install torchcodec")
    if (place := content.find(b"eXIf")) > 0:  # torchcodec would turn it
        place -= 4
        content = content[:place] + content[place + 12 + int.from_bytes(content[place : place + 4], "big") :]
    return FAST_DECODERS[PNG](content, {1: "GRAY", 3: "RGB"}.get(in_chans, "UNCHANGED")).numpy()


def pillow_pixels(image: Image.Image, in_chans: int) -> np.ndarray:
    """Pixels of a Pillow image, writable: (H, W) or (H, W, C), converted to grey or RGB where they are 8-bit."""
    if image.mode in WIDE_MODES:
        pixels = np.array(image)
        widened = image.mode == "I" and image.format in ("PNG", "PPM")  # whose 16 bits some Pillows give in 32
        return pixels.astype(np.uint16) if widened or pixels.dtype.kind == "u" else pixels
    if in_chans in (1, 3):
        return np.array(image.convert("RGB" if in_chans == 3 else "L"))
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.array(image)


def _page(image: Image.Image, number: int) -> np.ndarray:
    image.seek(number)
    return pillow_pixels(image, in_chans=1)


def _pillow_loses(image: Image.Image, in_chans: int) -> bool:
    """Whether a TIFF has channels, or bits of them, that Pillow leaves out."""
    bits = image.tag_v2.get(258, (1,))  # BitsPerSample
    if max(bits) > 8 and image.mode not in WIDE_MODES:
        return True
    return in_chans not in (1, 3) and len(bits) > len(image.getbands())


def _read_tiff(content: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a TIFF that Pillow cannot read, or not in full; pip install tifffile") from error
    return tifffile.imread(io.BytesIO(content))
