"""Image and array files as tensors (C, H, W): JPEGs by torchcodec or torchvision, arrays by NumPy, the rest by Pillow.

8-bit files stay uint8. Other files become float32: unsigned 16-bit values as shares of 65535, so that nothing is cut
off, and all other numbers as they are. The orientation in EXIF data is ignored, as torchvision's ImageFolder does.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UsageError

ARRAY_EXTENSIONS = (".npy", ".npz")
EXTENSIONS = (*IMG_EXTENSIONS, *ARRAY_EXTENSIONS)
JPEG, PNG, TIFFS = b"\xff\xd8", b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how their files begin
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # of Pillow, those beyond 8 bits
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow has it


def hidden(name: str) -> bool:
    """Whether a file or folder is one of those that notebooks, macOS and version control leave beside images."""
    return name.startswith((".", "__MACOSX"))


class BadImage(Exception):
    """An image file that cannot be decoded; the message names the file."""


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
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


def read_file(path: str) -> bytes:
    """The content of a file. Raises BadImage where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error


def decode(content: bytes, path: str, in_chans: int = 3, eight_bit: bool | None = None) -> torch.Tensor:
    """Decode an image file, an .npy or an .npz: (in_chans, H, W), uint8 or float32.

    Grey is repeated for three channels, RGB becomes luminance for one, and alpha is dropped there. The pages of a TIFF
    are channels if there are in_chans of them. The channels of an array are its last axis or its first, whichever is
    in_chans long.

    Args:
        path: tells arrays from images, and is for messages.
        eight_bit: what the other images are. True: uint8, and 16-bit files are rounded to it. False: float32, and 8-bit
            files become shares of 255. None: as the file is.

    Raises:
        BadImage: a file that is truncated, damaged, no image, or holds NaN or infinite values.
        UsageError: another number of channels, or values beyond 16 bits where the others are 8-bit.
    """
    try:
        if in_chans in (1, 3) and content.startswith(JPEG) and (decode_jpeg := FAST_DECODERS.get(JPEG)):
            try:
                pixels = decode_jpeg(content, "RGB" if in_chans == 3 else "GRAY")
                return pixels / 255 if eight_bit is False else pixels
            except Exception:
                pass  # Pillow may read it; if not, it says why
        suffix = Path(path).suffix.lower()
        pixels = _read_array(content) if suffix in ARRAY_EXTENSIONS else _read_pillow(content, in_chans)
        return _to_depth(fit_channels(pixels, in_chans), eight_bit)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # on damaged files, decoders raise whatever they run into
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


def to_tensor(image: Image.Image | torch.Tensor, in_chans: int = 3) -> torch.Tensor:
    """A Pillow image as `decode` gives it; a tensor stays as it is. Raises UsageError as that does."""
    if isinstance(image, torch.Tensor):
        return image
    return _to_depth(fit_channels(pillow_pixels(image, in_chans), in_chans), None)


def fit_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (in_chans, H, W); see `decode`."""
    shape = " x ".join(map(str, pixels.shape))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise UsageError(f"an array of {shape}; an image has two axes, or three with its channels")
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
    raise UsageError(f"has {found}, not --in_chans {in_chans}; give --in_chans {len(pixels)}")


def _to_depth(pixels: np.ndarray, eight_bit: bool | None) -> torch.Tensor:
    if pixels.dtype.kind not in "buif":
        raise UsageError(f"holds values of type {pixels.dtype}, which are no numbers")
    if pixels.dtype == np.uint8:
        tensor = torch.from_numpy(pixels)
        return tensor / 255 if eight_bit is False else tensor
    tensor = torch.from_numpy(pixels.astype(np.float32))
    if pixels.dtype == np.uint16:
        tensor = tensor / 65535
        return (tensor * 255).round().to(torch.uint8) if eight_bit else tensor
    if eight_bit:
        raise UsageError(f"holds {pixels.dtype} values, where the first images are 8-bit; give folders of one kind")
    if not tensor.isfinite().all():
        raise BadImage("holds NaN or infinite values")
    return tensor


def _read_array(content: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(array, np.ndarray):
        return array
    if len(array.files) != 1:
        raise UsageError(f"holds {len(array.files)} arrays ({', '.join(array.files)}); one a file is read")
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
                raise UsageError(f"has {pages} pages of a channel, not --in_chans {in_chans}; give --in_chans {pages}")
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
        raise BadImage("a PNG in colour of 16 bits, of which Pillow reads 8; pip install torchcodec")
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
        raise BadImage("a TIFF that Pillow cannot read, or not in full; pip install tifffile") from error
    return tifffile.imread(io.BytesIO(content))
