"""utils/data/images.py: pixels against Pillow and NumPy, channels, depths, damaged files, with each decoder."""

import io
import os
import shlex
import struct
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.pictures import broken_files, picture, pixels, save
from utils.data import formats
from utils.data.images import BadImage, Reading, decode, load_image, read_file, to_tensor

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop
RANDOM = np.random.RandomState(0)


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png16(pixels):
    """A 16-bit PNG of (H, W, 1 to 4) pixels, which Pillow cannot write in colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write(path, content):
    path.write_bytes(content)
    return str(path)


def load_tensor(path, in_chans=3, **reading):
    return decode(read_file(path), path, Reading(in_chans, **reading))


def beyond_pillow():
    """Skip a test of TIFFs that optional packages read, where these are not installed."""
    for name in ("tifffile", "imagecodecs"):
        pytest.importorskip(name)


def turning(content, mode="RGB"):
    """Stands for torchcodec where it is not installed: it, too, applies the orientation."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content.numpy().tobytes())))
        return pixels(image.convert(mode if mode == "RGB" else "L"))
    except Exception as error:
        raise RuntimeError from error


@pytest.fixture(params=["torchcodec", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """Each of the decoders, those that are preferred to it being gone."""
    if request.param == "torchcodec" and "torchcodec" not in sys.modules:
        fake = types.SimpleNamespace(decode_jpeg=turning, decode_png=None)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake)
    elif request.param != "torchcodec":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    if request.param == "Pillow":
        monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setattr(formats, "FAST_DECODERS", formats._fast_decoders())


# ---- 8-bit images


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 97}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_of_pillow(tmp_path, mode, options, decoder):
    path = write(tmp_path / "x.jpg", encoded(picture().convert(mode), "JPEG", **options))
    assert torch.equal(load_tensor(path), pixels(load_image(path)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.bmp"])
def test_other_images_have_the_pixels_of_pillow(tmp_path, mode, name):
    if (name == "x.webp" and mode in ("P", "LA", "1")) or (name == "x.bmp" and mode == "LA"):
        pytest.skip("no such files")
    if name == "x.tif" and mode in ("RGBA", "LA"):
        beyond_pillow()
    path = tmp_path / name
    picture().convert(mode).save(path)
    assert torch.equal(load_tensor(str(path)), pixels(load_image(str(path))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_loads_as_rgb(tmp_path, mode):
    image = Image.new("I;16", (60, 40)) if mode == "I;16" else picture().convert(mode)
    path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    save(image, path)
    loaded = load_image(str(path))
    assert (loaded.mode, loaded.size) == ("RGB", (60, 40))
    if mode == "L":
        assert loaded.tobytes() == image.convert("RGB").tobytes()


def test_orientation_is_not_applied(tmp_path, decoder):
    exif = Image.Exif()
    for exif[0x0112] in (3, 6):  # a half and a quarter turn
        path = write(tmp_path / "x.jpg", encoded(picture(), "JPEG", exif=exif, icc_profile=b"\xff\xe1" * 9))
        assert torch.equal(load_tensor(path), pixels(load_image(path)))


def test_what_the_decoder_refuses_pillow_reads(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no")

    path = write(tmp_path / "x.jpg", encoded(picture(), "JPEG"))
    expected = load_tensor(path)
    monkeypatch.setattr(formats, "FAST_DECODERS", {formats.JPEG: refuse})
    assert torch.equal(load_tensor(path), expected)


def test_the_newest_decoder_that_is_there_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(decode_jpeg=0, decode_png=0))
    taken = [formats._fast_decoders()]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace())  # an older one
    taken.append(formats._fast_decoders())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    taken.append(formats._fast_decoders())
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    taken.append(formats._fast_decoders())
    codes = [decoders and decoders[formats.JPEG].__code__ for decoders in taken]
    assert codes[0] != codes[1] == codes[2]
    assert codes[3] == {}


# ---- damaged files


def test_broken_files_are_named(tmp_path, decoder):
    for name, content in broken_files().items():
        with pytest.raises(BadImage, match=name):
            load_tensor(write(tmp_path / name, content))
        with pytest.raises(BadImage, match=name):
            load_image(str(tmp_path / name))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    path = write(tmp_path / "x.png", program)
    for read in (load_tensor, load_image):
        with pytest.raises(BadImage, match="cannot identify"):  # in place of what Ghostscript says
            read(path)
    with pytest.raises(BadImage, match=r"missing\.png: No such file"):
        load_tensor(str(tmp_path / "missing.png"))
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(BadImage, match="is no file"):
            read_file(str(name))
    with pytest.raises(BadImage, match="Is a directory"):
        load_tensor(str(tmp_path))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_cut_anywhere_is_refused(tmp_path, mode, decoder):
    whole = encoded(picture().convert(mode), "JPEG")
    for length in range(0, len(whole) - 2, max(1, len(whole) // 60)):
        with pytest.raises(BadImage):
            load_tensor(write(tmp_path / "x.jpg", whole[:length]))


def test_jpegs_with_wrong_bytes_never_end_the_process(tmp_path, decoder):
    """They are refused, or read as Pillow reads them."""
    whole, random = encoded(picture(), "JPEG"), np.random.RandomState(1)
    readable = 0
    for _ in range(200):
        content = bytearray(whole)
        content[random.randint(2, len(content))] = random.randint(256)
        path = write(tmp_path / "x.jpg", bytes(content))
        try:
            found, expected = load_tensor(path), load_image(path)
        except BadImage:
            continue
        readable += 1
        assert torch.equal(found, pixels(expected))
    assert readable > 50


def test_a_png_ends_in_zeros(tmp_path):
    """As of a copy that was broken off: what zeros mean to its code is no image."""
    for size in (60, 200, 600):
        whole = encoded(picture(size, size), "PNG")
        for share in (0.3, 0.6, 0.9):
            content = whole[: int(share * len(whole))].ljust(len(whole), b"\0")
            with pytest.raises(BadImage):
                load_tensor(write(tmp_path / "x.png", content))
        assert torch.equal(load_tensor(write(tmp_path / "x.png", whole[:-12])), pixels(picture(size, size)))  # no IEND


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_damaged_arrays(tmp_path, name):
    path = tmp_path / name
    (np.savez if name == "x.npz" else np.save)(path, np.zeros((5, 8, 8), np.uint16))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadImage, match=name):
        load_tensor(str(path), 5)
    objects = np.empty((4, 4), object)
    (np.savez if name == "x.npz" else np.save)(path, objects)
    with pytest.raises(BadImage, match="Object arrays"):  # never unpickled
        load_tensor(str(path), 1)


def test_values_that_are_no_numbers(tmp_path):
    array = np.zeros((4, 4), np.float32)
    array[2, 1] = np.inf
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(BadImage, match=r"x\.npy: holds infinite values"):
        load_tensor(str(tmp_path / "x.npy"), 1)


@pytest.mark.slow
def test_without_stderr(tmp_path):
    """As where a run is begun with 2>&-: no file is unreadable for that."""
    path = write(tmp_path / "x.png", encoded(picture(), "PNG"))
    code = f"from tests.test_images import load_tensor; print(tuple(load_tensor({path!r}).shape))"
    done = subprocess.run(
        f"{sys.executable} -c {shlex.quote(code)} 2>&-", shell=True, stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout) == (0, "(3, 40, 60)\n")


# ---- channels


def test_grey_and_colour(tmp_path):
    colour, grey = picture(), picture().convert("L")
    for name in ("x.png", "x.jpg"):
        colour.save(tmp_path / name, quality=95)
        found = load_tensor(str(tmp_path / name), 1)
        expected = pixels(load_image(str(tmp_path / name)).convert("L"))
        assert found.dtype == torch.uint8
        assert found.shape == (1, 40, 60)
        assert (found.int() - expected.int()).abs().max() <= (0 if name == "x.png" else 4)
    grey.save(tmp_path / "grey.png")
    assert torch.equal(load_tensor(str(tmp_path / "grey.png"), 1), pixels(grey))
    assert torch.equal(load_tensor(str(tmp_path / "grey.png"), 3), pixels(grey).expand(3, 40, 60))
    assert torch.equal(to_tensor(grey, 3), pixels(grey).expand(3, 40, 60))
    assert torch.equal(to_tensor(colour, 1), pixels(grey))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "LA"])
def test_as_many_channels_as_the_file_has(tmp_path, mode):
    if mode != "CMYK":
        beyond_pillow()
    image = picture().convert(mode)
    image.save(tmp_path / "x.tif")
    assert torch.equal(load_tensor(str(tmp_path / "x.tif"), len(mode)), pixels(image))
    assert load_tensor(str(tmp_path / "x.tif"), 3).shape == (3, 40, 60)
    assert load_tensor(str(tmp_path / "x.tif"), 1).shape == (1, 40, 60)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64, np.float32])
def test_arrays(tmp_path, name, dtype):
    array = (RANDOM.rand(7, 20, 30) * 200).astype(dtype)
    scale = {np.uint8: 1, np.uint16: 65535}.get(dtype, 1)
    expected = torch.from_numpy(array if dtype == np.uint8 else (array / scale).astype(np.float32))
    for stored in (array, array.transpose(1, 2, 0), np.asfortranarray(array)):
        (np.savez if name == "x.npz" else np.save)(tmp_path / name, stored)
        torch.testing.assert_close(load_tensor(str(tmp_path / name), 7), expected)
    (np.savez if name == "x.npz" else np.save)(tmp_path / name, array[0])
    torch.testing.assert_close(load_tensor(str(tmp_path / name), 1), expected[:1])
    torch.testing.assert_close(load_tensor(str(tmp_path / name), 3), expected[:1].expand(3, 20, 30))


def test_luminance_of_arrays(tmp_path):
    array = RANDOM.rand(20, 30, 3).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    expected = torch.from_numpy(array @ np.array([0.299, 0.587, 0.114], np.float32))[None]
    torch.testing.assert_close(load_tensor(str(tmp_path / "x.npy"), 1), expected)


def test_pages_of_a_tiff_are_channels(tmp_path):
    beyond_pillow()
    for mode, dtype, scale in (("L", np.uint8, 1), ("I;16", np.uint16, 65535)):
        pages = [Image.fromarray(RANDOM.randint(0, np.iinfo(dtype).max, (20, 30)).astype(dtype)) for _ in range(5)]
        assert pages[0].mode == mode
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
        expected = torch.from_numpy(np.stack([np.asarray(page).astype(np.float32) / scale for page in pages]))
        torch.testing.assert_close(load_tensor(str(tmp_path / "x.tif"), 5).float(), expected)
        with pytest.raises(
            BadImage, match=r"x\.tif: has 5 pages of a channel, not --in_chans 4; give --in_chans 5 in training$"
        ):
            load_tensor(str(tmp_path / "x.tif"), 4)
        assert load_tensor(str(tmp_path / "x.tif"), 1).shape == (1, 20, 30)  # the first
    colours = [picture(seed=i) for i in range(3)]
    colours[0].save(tmp_path / "x.tif", save_all=True, append_images=colours[1:])
    assert torch.equal(load_tensor(str(tmp_path / "x.tif")), pixels(colours[0]))


@pytest.mark.parametrize(
    ("content", "in_chans", "message"),
    [
        (picture(), 4, r"has 3 channels \(3 x 40 x 60\), not --in_chans 4; give --in_chans 3 in training$"),
        (picture().convert("L"), 2, r"has 1 channel \(1 x 40 x 60\), .* give --in_chans 1"),
        (picture().convert("RGBA"), 5, r"has 4 channels"),
        (np.zeros((13, 20, 30)), 3, r"has 13 channels \(13 x 20 x 30\), not --in_chans 3; give --in_chans 13"),
        (np.zeros((20, 30, 13)), 1, r"has 13 channels \(13 x 20 x 30\)"),
        (np.zeros((2, 3, 20, 30)), 3, r"an array of 2 x 3 x 20 x 30; an image has two axes"),
        (np.zeros(20), 1, r"an array of 20; an image has two axes"),
        (np.zeros(()), 1, r"an array of no axes; an image has two axes"),
        (np.zeros((20, 30), np.complex64), 1, "holds values of type complex64, which are no numbers"),
        ({"a": np.zeros((20, 30)), "b": np.zeros((20, 30))}, 1, r"holds 2 arrays \(a, b\); one a file is read"),
    ],
)
def test_wrong_channels_name_the_file(tmp_path, content, in_chans, message):
    if isinstance(content, Image.Image):
        path = tmp_path / "x.png"
        content.save(path)
    elif isinstance(content, dict):
        path = tmp_path / "x.npz"
        np.savez(path, **content)
    else:
        path = tmp_path / "x.npy"
        np.save(path, content)
    with pytest.raises(BadImage, match=rf"{path.name}: {message}"):
        load_tensor(str(path), in_chans)


# ---- depths


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_are_kept(tmp_path, name):
    array = RANDOM.randint(0, 65536, (20, 30)).astype(np.uint16)
    Image.fromarray(array).save(tmp_path / name)
    expected = torch.from_numpy(array.astype(np.float32) / 65535)
    for in_chans in (1, 3):
        found = load_tensor(str(tmp_path / name), in_chans)
        torch.testing.assert_close(found, expected.expand(in_chans, 20, 30))
    rounded = load_tensor(str(tmp_path / name), 1, depth=8)
    assert rounded.dtype == torch.uint8
    assert torch.equal(rounded, (expected * 255).round().to(torch.uint8)[None])  # scaled, where Pillow cuts off


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_pngs(tmp_path, channels):
    array = RANDOM.randint(0, 65536, (20, 30, channels)).astype(np.uint16)
    path = write(tmp_path / "x.png", png16(array))
    expected = torch.from_numpy(array.astype(np.float32).transpose(2, 0, 1) / 65535)
    if channels > 1:
        torch.testing.assert_close(load_tensor(path, channels), expected)
    if channels > 2:
        torch.testing.assert_close(load_tensor(path, 3), expected[:3])  # without alpha
        turned = b"\0\0\0\x1aeXIf" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)
        turned += struct.pack(">I", zlib.crc32(turned[4:]))
        content = png16(array)
        path = write(tmp_path / "turned.png", content[:33] + turned + content[33:])
        assert Image.open(path).getexif()[0x0112] == 6
        torch.testing.assert_close(load_tensor(path, channels), expected)
    damaged = bytearray(png16(array))
    damaged[-30] ^= 64
    with pytest.raises(BadImage):  # before torchvision's decoder, which such files crash, sees it
        load_tensor(write(tmp_path / "x.png", bytes(damaged)), max(channels, 3))


def test_sixteen_bit_pngs_that_cannot_be_read_in_full(tmp_path, monkeypatch):
    path = write(tmp_path / "x.png", png16(np.full((4, 4, 3), 300, np.uint16)))
    monkeypatch.setattr(formats, "FAST_DECODERS", {})
    with pytest.raises(BadImage, match=r"x\.png: a PNG in colour of 16 bits, .*pip install torchcodec"):
        load_tensor(path)


def test_numbers_beyond_sixteen_bits(tmp_path):
    beyond_pillow()
    array = RANDOM.randn(20, 30).astype(np.float32)
    Image.fromarray(array).save(tmp_path / "x.tif")
    torch.testing.assert_close(load_tensor(str(tmp_path / "x.tif"), 1), torch.from_numpy(array)[None])
    integers = RANDOM.randint(-2000, 2000, (20, 30)).astype(np.int32)
    Image.fromarray(integers).save(tmp_path / "y.tif")
    torch.testing.assert_close(load_tensor(str(tmp_path / "y.tif"), 1), torch.from_numpy(integers).float()[None])
    with pytest.raises(BadImage, match=r"x\.tif: holds float32 values, where most files are 8-bit"):
        load_tensor(str(tmp_path / "x.tif"), 1, depth=8)


def test_eight_bits_among_others_are_scaled(tmp_path):
    for name in ("x.png", "x.jpg"):
        picture().save(tmp_path / name)
        whole = load_tensor(str(tmp_path / name))
        torch.testing.assert_close(load_tensor(str(tmp_path / name), depth=16), whole / 255)
