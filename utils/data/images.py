"""Image and array files as tensors (C, H, W): JPEGs by torchvision's decoder, arrays by NumPy, the rest by Pillow.

8-bit files stay uint8. Other files become float32: unsigned 16-bit values as shares of 65535, so that nothing is cut
off, and all other numbers as they are.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UsageError

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # announced for a later torchvision: Pillow then reads JPEGs too, a little slower
    decode_jpeg = None

ARRAY_EXTENSIONS = (".npy", ".npz")
EXTENSIONS = (*IMG_EXTENSIONS, *ARRAY_EXTENSIONS)
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # of Pillow, those beyond 8 bits
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow has it


def hidden(name: str) -> bool:
    """Whether a file or folder is one of those that notebooks, macOS and version control leave beside images."""
    return name.startswith((".", "__MACOSX"))


class BadImage(Exception):
    """An image file that cannot be decoded; the message names the file."""


def load_image(path: str) -> Image.Image:
    """Decode an image file as RGB. Raises BadImage for one that is truncated, damaged or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise whatever they run into
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


def load_tensor(path: str, in_chans: int = 3, eight_bit: bool | None = None) -> torch.Tensor:
    """Decode an image file, an .npy or an .npz: (in_chans, H, W), uint8 or float32.

    Grey is repeated for three channels, RGB becomes luminance for one, and alpha is dropped there. The pages of a TIFF
    are channels if there are in_chans of them. The channels of an array are its last axis or its first, whichever is
    in_chans long.

    Args:
        eight_bit: what the other images are. True: uint8, and 16-bit files are rounded to it. False: float32, and 8-bit
            files become shares of 255. None: as the file is.

    Raises:
        BadImage: no such file, or one that is truncated, damaged, no image, or holds NaN or infinite values.
        UsageError: another number of channels, or values beyond 16 bits where the others are 8-bit.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from error
    return decode(content, path, in_chans, eight_bit)


def decode(content: bytes, path: str, in_chans: int = 3, eight_bit: bool | None = None) -> torch.Tensor:
    """As `load_tensor`, of a file that is in memory; the path tells arrays from images, and is for messages."""
    try:
        if decode_jpeg and in_chans in (1, 3) and content.startswith(b"\xff\xd8"):
            try:
                mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
                pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode)
                return pixels / 255 if eight_bit is False else pixels
            except RuntimeError:
                pass  # Pillow may read it; if not, it says why
        suffix = Path(path).suffix.lower()
        pixels = _read_array(content) if suffix in ARRAY_EXTENSIONS else _read_pillow(content, in_chans)
        return _to_depth(fit_channels(pixels, in_chans), eight_bit)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # on damaged files, decoders raise whatever they run into
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


def to_tensor(image: Image.Image | torch.Tensor, in_chans: int = 3) -> torch.Tensor:
    """A Pillow image as `load_tensor` gives it; a tensor stays as it is. Raises UsageError as that does."""
    if isinstance(image, torch.Tensor):
        return image
    return _to_depth(fit_channels(pillow_pixels(image, in_chans), in_chans), None)


def fit_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (in_chans, H, W); see `load_tensor`."""
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
    is_tiff = content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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
        if content.startswith(b"\x89PNG") and content[24] == 16 and pixels.dtype == np.uint8 and decode_jpeg:
            # of colours, Pillow keeps 8 bits; torchvision's decoder crashes on damaged files, which this one is not
            modes = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_png(data, modes.get(in_chans, ImageReadMode.UNCHANGED)).numpy()
    return pixels


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
