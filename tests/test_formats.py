"""utils/data/formats.py: every value of a TIFF against what was written, and what other readers cut off or shout."""

import io
import logging
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.pictures import picture, pixels, png
from utils.data.formats import FAST_DECODERS
from utils.data.images import BadImage, Reading, decode, survey
from utils.errors import UsageError

tifffile, imagecodecs = pytest.importorskip("tifffile"), pytest.importorskip("imagecodecs")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop
RNG = np.random.default_rng(0)
DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
LAYOUTS = {
    "one strip": {}, "strips": {"rowsperstrip": 7}, "tiles": {"tile": (16, 16)},
}  # fmt: skip


def noise(shape, dtype):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return (RNG.standard_normal(shape) * 1000).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return RNG.integers(low, high, shape, dtype, endpoint=True)


def tiff(array, **options):
    file = io.BytesIO()
    if array.ndim == 3 and array.shape[-1] < 16:
        options.setdefault("planarconfig", "contig")
    tifffile.imwrite(file, array, **{"photometric": "minisblack", "metadata": None} | options)
    return file.getvalue()


def load(content, in_chans=1, name="x.tif", **reading):
    return decode(content, name, Reading(in_chans, **reading))


def true(array):
    """(C, H, W) as training sees it."""
    if array.dtype == np.uint8:
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(np.float32)) / (65535 if array.dtype == np.uint16 else 1)


# ---- TIFF


@pytest.mark.parametrize("layout", [*LAYOUTS, "planes"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("order", "<>")
def test_every_value_of_a_tiff(order, compression, layout):
    for dtype in DTYPES:
        for channels in (1, 3, 5):
            array = noise((channels, 20, 30), dtype)
            options = {"byteorder": order, "compression": compression, **LAYOUTS.get(layout, {})}
            if layout == "planes" and channels > 1:
                content = tiff(array, planarconfig="separate", **options)
            elif layout == "planes":
                before, after = (struct.pack(order + "HHI", tag, 3, 1) for tag in (285, 284))
                content = tiff(array[0], extratags=[(285, "H", 1, 2)], **options).replace(before, after)
            else:
                content = tiff(array.transpose(1, 2, 0) if channels > 1 else array[0], **options)
            assert torch.equal(load(content, channels), true(array)), (dtype, channels)
            predictor = compression and dtype != "float16"
            if predictor and layout == "strips" and channels < 5:
                content = tiff(array.transpose(1, 2, 0).squeeze(), predictor=True, **options)
                assert torch.equal(load(content, channels), true(array)), dtype


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16"])
def test_white_may_be_zero(dtype):
    array = noise((20, 30), dtype)
    for order in "<>":
        content = tiff(array, photometric="miniswhite", byteorder=order)
        assert torch.equal(load(content), true(~array[None]))
        both = np.stack([array, array[::-1]], axis=-1)
        content = tiff(both, photometric="miniswhite", extrasamples=["unassalpha"], byteorder=order)
        assert torch.equal(load(content, 2), true(np.stack([~array, array[::-1]])))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_black_is_zero_in_a_tiff_that_does_not_say(dtype):
    for channels in (1, 3, 4):
        array = noise((20, 30, channels), dtype)
        content = tiff(array.squeeze(), photometric="minisblack" if channels == 1 else "rgb")
        place = content.index(struct.pack("<HHI", 262, 3, 1))
        content = content[:place] + struct.pack("<H", 65000) + content[place + 2 :]  # a private tag
        assert torch.equal(load(content, channels), true(array.transpose(2, 0, 1)))


def test_few_bits_fill_the_range_of_a_byte():
    for bits in (1, 2, 4):
        array = RNG.integers(0, 2**bits, (16, 24)).astype(np.uint8)
        packed = tiff(array if bits > 1 else array.astype(bool), bitspersample=bits)
        expected = torch.from_numpy(array * (255 // (2**bits - 1)))[None]
        assert torch.equal(load(packed), expected)
        twice = tiff(
            np.stack([array, array]) if bits > 1 else np.stack([array, array]).astype(bool), bitspersample=bits
        )
        assert torch.equal(load(twice), expected)  # by tifffile


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_colours_are_divided_by_their_alpha(dtype):
    most = 1 if dtype == "float32" else np.iinfo(dtype).max
    colours, alpha = RNG.random((3, 20, 30)), RNG.random((20, 30)).round(2)
    stored = np.concatenate([colours * alpha, alpha[None]]) * most
    stored = stored.transpose(1, 2, 0).astype(dtype)
    content = tiff(stored, photometric="rgb", extrasamples=["assocalpha"])
    seen = alpha > 0.2
    found = load(content, 3).double() / (255 if dtype == "uint8" else 1)
    assert found.shape == (3, 20, 30)
    tolerance = 1 / most / 0.2 if most > 1 else 1e-5
    np.testing.assert_allclose(found[:, seen], colours[:, seen], atol=tolerance)
    np.testing.assert_allclose(load(content, 4)[3].double() / (255 if dtype == "uint8" else 1), alpha, atol=1.1 / most)
    grey = tiff(stored[..., 2:], extrasamples=["assocalpha"])
    np.testing.assert_allclose(load(grey, 1)[0].double().numpy()[seen] / (255 if dtype == "uint8" else 1),
                               colours[2][seen], atol=tolerance)  # fmt: skip


def test_colours_of_print_and_palettes():
    image = picture().convert("CMYK")
    expected = pixels(image.convert("RGB")).int()
    for scale, dtype in ((1, "uint8"), (257, "uint16")):
        content = tiff(np.asarray(image).astype(dtype) * scale, photometric="separated", extrasamples=[])
        found = load(content, 3)
        assert ((found if dtype == "uint8" else found * 255).int() - expected).abs().max() <= 1
    palette = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
    index = noise((2, 20, 30), "uint8")
    content = tiff(index, photometric="palette", colormap=palette)
    assert torch.equal(load(content, 3), torch.from_numpy((palette[:, index[0]] >> 8).astype(np.uint8)))
    content = tiff(noise((20, 30, 3), "uint8"), photometric="cielab")
    with pytest.raises(BadImage, match=r"holds colours of the kind .*CIELAB"):
        load(content, 3)


def test_palettes_of_16_bits():
    indices, colours = noise((20, 30), "uint16"), noise((3, 65536), "uint16")
    content = tiff(indices, photometric="palette", colormap=colours)
    assert torch.equal(load(content, 3), true((colours >> 8)[:, indices].astype(np.uint8)))


def test_palettes():
    """Colours of 8 bits, which are black to Pillow; alpha; no data, which is an index."""
    palette, index = RNG.integers(0, 256, (3, 256)).astype(np.uint16), noise((20, 30), "uint8")
    expected = torch.from_numpy(palette[:, index].astype(np.uint8))
    content = tiff(index, photometric="palette", colormap=palette)
    assert torch.equal(load(content, 3), expected)
    content = tiff(index, photometric="palette", colormap=palette * 257)
    assert torch.equal(load(content, 3), expected)
    found = load(content, 3, nodata=7)
    assert np.array_equal(found.isnan().all(dim=0), index == 7)
    assert torch.equal((found * 255).round()[:, index != 7], expected[:, index != 7].float())
    file = io.BytesIO()
    clear = picture().convert("P").convert("PA")
    clear.save(file, "TIFF")
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        found = load(file.getvalue(), channels)
        assert (found.int() - pixels(clear.convert("RGBA").convert(mode)).int()).abs().max() <= (mode == "L")


def test_print_colours_with_alpha():
    """The alpha is dropped, not a colour in its place; among RGBA, CMYK is reported."""
    image = picture().convert("CMYK")
    stored = np.concatenate([np.asarray(image), noise((40, 60, 1), "uint8")], axis=2)
    content = tiff(stored, photometric="separated", extrasamples=["unassalpha"])
    for channels, mode in ((1, "L"), (3, "RGB")):
        expected = pixels(image.convert("RGB").convert(mode))
        assert (load(content, channels).int() - expected.int()).abs().max() <= 2
    assert torch.equal(load(content, 4), pixels(image))
    file = io.BytesIO()
    image.save(file, "JPEG")
    for name, stored in {"x.tif": content, "x.jpg": file.getvalue()}.items():
        with pytest.raises(BadImage, match="holds CMYK, where most files have alpha"):
            load(stored, 4, name, depth=8, alpha=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
def test_stretches_that_are_left_out(dtype, layout):
    """GDAL leaves out what holds no data: no offset, no bytes. They are 0, or what GDAL_NODATA says."""
    array, tile = noise((32, 16), dtype) // 2 * 2, {"tile": (16, 16)} if layout == "tiles" else {"rowsperstrip": 16}
    for tags, empty in (([], 0), ([(42113, "s", 0, "5", True)], np.nan)):
        content = bytearray(tiff(array, extratags=tags, **tile))
        page = tifffile.TiffFile(io.BytesIO(content)).pages.first
        for code in (324, 325) if layout == "tiles" else (273, 279):
            tag = page.tags[code]
            struct.pack_into("<H" if tag.dtype == 3 else "<I", content, tag.valueoffset + tag.valuebytecount // 2, 0)
        expected = true(array)[None].float() / (255 if dtype == "uint8" and tags else 1)
        expected[:, 16:] = empty
        torch.testing.assert_close(load(bytes(content)).float(), expected, equal_nan=True)


def test_volumes_have_their_first_slice():
    volume = noise((4, 20, 30), "uint16")
    assert torch.equal(load(tiff(volume, volumetric=True)), true(volume[:1]))


def test_orientation_of_a_tiff_is_applied_as_pillow_does():
    array = noise((20, 30), "uint8")
    for orientation in range(1, 9):
        tags = [(274, "H", 1, orientation, True)]
        expected = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(tiff(array, extratags=tags)))))
        assert torch.equal(load(tiff(array, extratags=tags)), expected)
        by_tifffile = tiff(np.stack([array] * 2), extratags=tags)
        assert torch.equal(load(by_tifffile), expected)


def test_compressions_that_pillow_has_not():
    array = noise((20, 30, 3), "uint8")
    for compression in ("webp", "jpeg2000", "zstd"):
        content = tiff(array, photometric="rgb", compression=compression, compressionargs={"level": -1})
        assert torch.equal(load(content, 3), torch.from_numpy(array.transpose(2, 0, 1)))


def test_a_thumbnail_before_the_image_is_passed_over(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        writer.write(image[::5, ::5], photometric="rgb", subfiletype=1)
        writer.write(image, photometric="rgb")
    content = (tmp_path / "x.tif").read_bytes()
    assert np.array_equal(load(content, 3).permute(1, 2, 0), image)
    old = content.replace(struct.pack("<HHI", 254, 4, 1), struct.pack("<HHI", 255, 3, 1))  # a thumbnail is kind 2
    old = old.replace(struct.pack("<HHII", 255, 3, 1, 1), struct.pack("<HHII", 255, 3, 1, 2))
    assert old != content
    assert np.array_equal(load(old, 3).permute(1, 2, 0), image)
    alone = tiff(image, photometric="rgb", subfiletype=1)
    assert np.array_equal(load(alone, 3).permute(1, 2, 0), image)


def test_pages():
    """The first page, unless they are the channels: in_chans of one kind, none an overview, a mask or of a palette."""
    for dtype, channels in (("uint8", 1), ("int64", 1), ("uint8", 3), ("uint16", 3)):
        array = noise((5, 20, 30, 3)[: 2 + 1 + (channels == 3)], dtype)
        content = tiff(array, photometric="rgb" if channels == 3 else "minisblack")
        first = torch.from_numpy(array[0]).reshape(20, 30, channels).permute(2, 0, 1).numpy()
        assert torch.equal(load(content, channels), true(first))
        if channels == 1:
            assert torch.equal(load(content, 5), true(array))
            assert torch.equal(load(content, 3), true(first).expand(3, 20, 30))
            with pytest.raises(BadImage, match="has 5 pages of a channel, not --in_chans 4; give --in_chans 5"):
                load(content, 4)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(array[..., 0][0], photometric="minisblack", metadata=None)
        writer.write(array[..., 0][0][::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
        writer.write(array[..., 1][0] > 9, photometric="minisblack", subfiletype=4, metadata=None)
    for channels in (1, 3):
        assert torch.equal(load(file.getvalue(), channels), true(array[0, ..., 0]).expand(channels, 20, 30))
    with pytest.raises(BadImage, match="has 1 channel"):
        load(file.getvalue(), 2)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for i, kind in enumerate((0, 1, 0)):
            writer.write(array[i, ..., 0], photometric="minisblack", subfiletype=kind, metadata=None)
    assert torch.equal(load(file.getvalue(), 2), true(array[:3:2, ..., 0]))
    fax = noise((3, 20, 30), "uint8") > 99
    assert torch.equal(load(tiff(fax), 3), torch.from_numpy(fax[:1] * np.uint8(255)).expand(3, 20, 30))
    index = noise((3, 20, 30), "uint8")
    grey = np.arange(256, dtype=np.uint16) * 257
    content = tiff(index, photometric="palette", colormap=np.stack([grey] * 3))
    assert torch.equal(load(content, 3), torch.from_numpy(index[:1]).expand(3, 20, 30))


def tags_last(content):
    """A little-endian TIFF whose tags follow its pixels, as Pillow and libtiff write them."""
    page, content = tifffile.TiffFile(io.BytesIO(content)).pages.first, bytearray(content)
    place = len(content)
    struct.pack_into("<I", content, 4, place)
    content += content[page.offset : page.offset + 2 + 12 * len(page.tags)] + bytes(4)
    for i, tag in enumerate(page.tags):
        if tag.valuebytecount > 4:
            struct.pack_into("<I", content, place + 10 + 12 * i, len(content))
            content += content[tag.valueoffset : tag.valueoffset + tag.valuebytecount]
    return bytes(content)


def test_damaged_tiffs(capfd):
    for dtype in ("uint8", "uint16"):
        for compression in (None, "lzw", "deflate", "jpeg"):
            if (dtype, compression) == ("uint16", "jpeg"):
                continue
            content = tiff(noise((40, 48, 3), dtype), photometric="rgb", compression=compression, rowsperstrip=8)
            for end in (len(content) * 9 // 10, len(content) // 2, 12, 6):
                with pytest.raises(BadImage, match=r"x\.tif: \S"):
                    load(content[:end], 3)
    for dtype, options in (("uint16", {}), ("int16", {}), ("float32", {}), ("uint8", {"compression": "lzw"})):
        for channels in (1, 3):
            array = noise((60, 50, 3)[: 2 + (channels == 3)], dtype)
            content = tags_last(tiff(array, photometric="rgb" * (channels == 3) or 1, rowsperstrip=8, **options))
            assert torch.equal(load(content, channels), true(array.reshape(60, 50, -1).transpose(2, 0, 1)))
            for end in range(len(content) - 60, len(content), 5):  # in what tells offsets, bits or kinds
                with pytest.raises(BadImage, match="is cut short"):
                    load(content[:end], channels)
    array = noise((20, 30), "float32")
    content = tiff(array, extratags=[(65001, "H", 1, 3, True)])
    content = content.replace(
        struct.pack("<HH", 65001, 3), struct.pack("<HH", 65001, 99)
    )  # of a kind that nobody knows
    assert torch.equal(load(content), true(array[None]))
    content = tiff(noise((40, 48, 3), "uint8"), photometric="rgb", compression="lzw")
    with pytest.raises(BadImage, match=r"x\.tif: .*code not yet in table"):  # libtiff's words
        load(content[: len(content) // 2] + bytes(len(content)), 3)
    assert capfd.readouterr().err == ""


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    colour, deep = noise((20, 30, 3), "uint8"), noise((20, 30), "int16")
    assert torch.equal(load(tiff(colour, photometric="rgb"), 3), torch.from_numpy(colour).permute(2, 0, 1))
    with pytest.raises(BadImage, match=r"x\.tif: is a TIFF beyond Pillow: pip install tifffile imagecodecs"):
        load(tiff(deep))


def test_decoders_are_quiet(capfd):
    thirteen = noise((13, 20, 30), "uint8")
    assert torch.equal(load(tiff(thirteen.transpose(1, 2, 0)), 13), torch.from_numpy(thirteen))
    tags = [(42113, "s", 0, "-1", True), (65000, "H", 1, 3, True), (34736, "d", 1, 1.0, True)]
    load(tiff(noise((20, 30, 3), "uint8"), photometric="rgb", compression="lzw", extratags=tags), 3)
    file = io.BytesIO()
    picture().save(file, "JPEG")
    for behind in (b"\0\0\0", b""):
        content = file.getvalue().replace(b"\xff\xda", behind + b"\xff\xda", 1)
        assert torch.equal(load(content, 3, "x.jpg"), pixels(Image.open(file)))
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not FAST_DECODERS, reason="Pillow says nothing")
def test_what_libjpeg_says_of_damage_is_reported(capfd):
    """A JPEG in which a stretch of pixels is missing decodes, to grey below it."""
    file = io.BytesIO()
    picture(200, 200).save(file, "JPEG", quality=97)
    content = file.getvalue()
    start = content.index(b"\xff\xda") + 200
    with pytest.raises(BadImage, match=r"^x\.jpg: is damaged: Corrupt JPEG data: premature end of data segment$"):
        load(content[:start] + content[-2:], 3, "x.jpg")
    assert capfd.readouterr().err == ""


# ---- scales


def test_sixteen_bits_whatever_holds_them():
    grey, colour = noise((20, 30), "uint16"), noise((20, 30, 3), "uint16")
    files = {"x.tif": tiff(grey), "big.tif": tiff(grey, byteorder=">")}
    for name, dtype in (("little.npy", "<u2"), ("big.npy", ">u2")):
        file = io.BytesIO()
        np.save(file, grey.astype(dtype))
        files[name] = file.getvalue()
    for image_format in ("PNG", "PPM", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(grey).save(file, image_format)
        files[image_format] = file.getvalue()
    for name, content in files.items():
        assert torch.equal(load(content, 1, name), true(grey[None])), name
    text = " ".join(map(str, colour.ravel())).encode()
    for content in (b"P6 30 20 65535\n" + colour.astype(">u2").tobytes(), b"P3\n# by hand\n30 20\n65535\n" + text):
        assert torch.equal(load(content, 3, "x.ppm"), true(colour.transpose(2, 0, 1)))
    with pytest.raises(BadImage):
        load(b"P6 30 20 65535\n" + colour.astype(">u2").tobytes()[:-1], 3, "x.ppm")


@pytest.mark.parametrize("bits", [1, 4, 6])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_jpeg_2000_of_few_bits_fills_the_range_of_a_byte(bits, channels):
    array = RNG.integers(0, 2**bits, (20, 30, channels), "uint8")
    content = imagecodecs.jpeg2k_encode(
        array.squeeze(), level=0, bitspersample=bits, codecformat="jp2", reversible=True
    )
    expected = (array.transpose(2, 0, 1) * 255.0 / (2**bits - 1)).round().astype(np.uint8)
    assert torch.equal(load(content, channels, "x.jp2"), true(expected))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_jpeg_2000_keeps_its_bits(bits, channels, monkeypatch):
    array = RNG.integers(0, 2**bits, (20, 30, channels), "uint8" if bits == 8 else "uint16")
    content = imagecodecs.jpeg2k_encode(array, level=0, bitspersample=bits, codecformat="jp2", reversible=True)
    assert torch.equal(load(content, channels, "x.jp2"), true((array << (-bits % 8)).transpose(2, 0, 1)))
    for planes in (1, channels):
        signed = (array[..., :planes].squeeze().astype(int) - 2 ** (bits - 1)).astype("int8" if bits == 8 else "int16")
        content = imagecodecs.jpeg2k_encode(signed, level=0, bitspersample=bits, codecformat="jp2", reversible=True)
        expected = true(signed.reshape(20, 30, planes).transpose(2, 0, 1))
        assert torch.equal(load(content, planes, "x.jp2"), expected)
    content = imagecodecs.jpeg2k_encode(array, level=0, bitspersample=bits, codecformat="jp2", reversible=True)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    if bits > 8:
        with pytest.raises(BadImage, match=r"x\.jp2: is a JPEG 2000 beyond Pillow: pip install imagecodecs"):
            load(content, channels, "x.jp2")


@pytest.mark.parametrize(
    ("bits", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)]
)  # fmt: skip
def test_a_colour_of_a_png_may_be_transparent(bits, channels):
    dtype, most = ("uint16", 65535) if bits == 16 else ("uint8", 255)
    array = RNG.integers(0, 2**bits, (20, 30, channels), dtype)
    content = png(array, (b"tRNS", array[3, 4].astype(">u2").tobytes()), bits=bits)
    values = (array * (255 // (2**bits - 1)) if bits < 8 else array).astype(dtype)
    opaque = (array != array[3, 4]).any(axis=2, keepdims=True) * np.array(most, dtype)
    expected = true(np.concatenate([values, opaque], axis=2).transpose(2, 0, 1))
    assert torch.equal(load(content, channels + 1, "x.png"), expected)
    assert torch.equal(load(content, channels, "x.png"), expected[:-1])
    if channels == 1:
        assert torch.equal(load(content, 4, "x.png", alpha=True), expected[[0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_grey_of_colour_is_of_the_stored_values(dtype):
    colour = noise((20, 30, 3), dtype)
    grey = (colour @ np.array([0.299, 0.587, 0.114])).round()
    linear = (b"gAMA", struct.pack(">I", 100000))
    for content, name in (
        (png(colour), "x.png"),
        (png(colour, linear), "x.png"),
        (tiff(colour, photometric="rgb"), "x.tif"),
    ):
        found = load(content, 1, name)[0] * (1 if dtype == "uint8" else 65535)
        assert (found.double() - torch.from_numpy(grey)).abs().max() <= 1.01
        assert torch.equal(load(content, 3, name), true(colour.transpose(2, 0, 1)))


# ---- no data


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        ("float32", -9999, "-9999"), ("float32", np.finfo(np.float32).min, "-3.40282346638528898e+38"),
        ("float64", -1.79769313486232e308, "-1.79769313486232e+308"), ("float64", -9999, "-9999.0"),
        ("float32", np.nan, "nan"), ("float32", np.nan, None), ("int16", -32768, "-32768"), ("uint16", 0, "0"),
        ("uint32", 4294967295, "4294967295"), ("uint8", 255, "255 "), ("int32", -2147483648, "-2147483648"),
    ],
)  # fmt: skip
def test_pixels_without_data(dtype, value, text):
    """They are NaN, whoever says what has none: the file, NaN itself, or --nodata."""
    array, holes = noise((20, 30), "uint8").astype(dtype) // 3 + 9, RNG.random((20, 30)) < 0.2
    expected = true(array)[None].float() / (255 if dtype == "uint8" else 1)
    stored = np.where(holes, value, array).astype(dtype)
    expected[0, torch.from_numpy(holes)] = torch.nan
    tags = [(42113, "s", 0, text, True)] if text else []
    for order in "<>":
        content = tiff(stored, byteorder=order, compression="lzw", extratags=tags)
        torch.testing.assert_close(load(content, nodata=7777), expected, equal_nan=True)
    torch.testing.assert_close(load(content, 3), expected.expand(3, 20, 30), equal_nan=True)
    file = io.BytesIO()
    np.save(file, stored)
    torch.testing.assert_close(load(file.getvalue(), 1, "x.npy", nodata=value), expected, equal_nan=True)
    torch.testing.assert_close(load(tiff(stored), nodata=value), expected, equal_nan=True)


def test_black_in_colour_is_no_hole():
    """Of bytes, a pixel has no data where all its colours have the value; to bytes, the mean takes its place."""
    array = noise((20, 30, 3), "uint8") // 2 + 1
    array[:5] = 0
    array[7, 7, 1] = 0
    content = tiff(array, photometric="rgb", extratags=[(42113, "s", 0, "0", True)])
    found = load(content, 3)
    assert found[:, :5].isnan().all()
    torch.testing.assert_close(found[:, 5:], torch.from_numpy(array.transpose(2, 0, 1))[:, 5:] / 255)
    filled = load(content, 3, depth=8)
    assert torch.equal(filled[:, 5:], torch.from_numpy(array.transpose(2, 0, 1))[:, 5:])
    mean = torch.from_numpy(array[5:].mean((0, 1))).view(3, 1, 1)
    assert (filled[:, :5] - mean).abs().max() <= 0.51
    with pytest.raises(BadImage, match="holds no data"):
        load(tiff(array[:5], photometric="rgb"), 3, depth=8, nodata=0)
    array[8, :2] = ((255, 0, 0), (76, 76, 76))  # both are of the grey 76
    for content, name in ((png(array), "x.png"), (tiff(array, photometric="rgb"), "x.tif")):
        assert load(content, 1, name, nodata=76)[0].isnan().nonzero().tolist() == [[8, 1]]
    clear = np.concatenate([array, noise((20, 30, 1), "uint8")], axis=2)  # of which opacity is no colour
    for content, name in ((png(clear), "x.png"), (tiff(clear, photometric="rgb", extrasamples=[2]), "x.tif")):
        for in_chans in (1, 3, 4):
            assert load(content, in_chans, name, nodata=76)[-1].isnan().nonzero().tolist() == [[8, 1]]
    grey = noise((20, 30), "uint8")
    content = tiff(grey, photometric="miniswhite", extratags=[(42113, "s", 0, "0", True)])
    assert np.array_equal(load(content)[0].isnan(), grey == 0)


# ---- data sets


class Files:
    """What a survey asks of a data set."""

    def __init__(self, files):
        self.paths, self.contents = list(files), list(files.values())

    def read(self, index):
        return self.contents[index]


def test_depth_is_that_of_most_files():
    deep, bytes_, floats = (tiff(noise((20, 30), dtype)) for dtype in ("uint16", "uint8", "float32"))
    odd = {f"a{i}.tif": bytes_ for i in range(4)} | {f"{i}.tif": deep for i in range(200)} | {"z.tif": floats}
    found = survey(Files(odd), Reading(1), "--data_path X")
    assert (found.reading, found.eight_bit) == (Reading(1, depth=16), False)
    assert found.kinds["TIFF, uint8 x 1"] == 1
    assert sum(found.kinds.values()) == len(found.sizes) == 64
    assert set(found.sizes) == {(20, 30)}
    for kind, depth in ((floats, 32), (deep, 16), (bytes_, 8)):
        files = {"a.tif": {8: deep}.get(depth, bytes_)} | {f"{i}.tif": kind for i in range(3)} | {"z.tif": b"no"}
        found = survey(Files(files), Reading(1), "--data_path X")
        assert found.reading.depth == depth
        assert [error.path for error in found.bad] == ["z.tif"]
    for i in range(2):  # every second file a preview
        found = survey(Files({f"{k}.tif": (bytes_, deep)[(k + i) % 2] for k in range(128)}), Reading(1), "X")
        assert min(found.kinds["TIFF, uint8 x 1"], found.kinds["TIFF, uint16 x 1"]) > 20
    holed = tiff(noise((20, 30), "uint8") // 2, extratags=[(42113, "s", 0, "0", True)])
    found = survey(Files({"a.tif": holed, "b.tif": bytes_, "c.tif": bytes_}), Reading(1), "X")
    assert (found.reading.depth, found.eight_bit) == (16, True)
    assert 0 < found.no_data < 0.01


def test_other_depths_than_most_are_reported():
    for dtype, depth, most in (("float32", 8, "are 8-bit"), ("int16", 16, "8 or 16 bits"), ("uint8", 32, "other num")):
        with pytest.raises(BadImage, match=f"x.tif: holds {dtype} values, where most files .*{most}"):
            load(tiff(noise((20, 30), dtype)), depth=depth)


def test_alpha_of_a_data_set():
    """Where most files have it, the others are opaque; where the fourth channel is none, three are another kind."""

    def png_of(mode):
        file = io.BytesIO()
        picture().convert(mode).save(file, "PNG")
        return file.getvalue()

    clear = {f"{i}.png": png_of("RGBA") for i in range(3)}
    reading = survey(Files(clear | {"a.png": png_of("RGB")}), Reading(4), "X").reading
    assert reading.alpha
    for mode in ("RGB", "L", "RGBA", "LA"):
        content = png_of(mode)
        expected = pixels(Image.open(io.BytesIO(content)).convert("RGBA"))
        assert torch.equal(decode(content, "a.png", reading), expected)
    found = survey(Files(clear | {f"{i}.jpg": png_of("RGB") for i in range(5)}), Reading(4), "X")
    assert (found.reading, found.bad) == (reading, [])  # more are without, but none is of another kind
    bands = {f"{i}.tif": tiff(noise((20, 30, 4), "uint8"), extrasamples=["unspecified"] * 3) for i in range(3)}
    reading = survey(Files(bands), Reading(4), "X").reading
    with pytest.raises(BadImage, match="has 3 channels"):
        decode(png_of("RGB"), "a.png", reading)


def test_a_folder_of_the_wrong_kind(caplog, monkeypatch):
    files = {f"{i}.tif": tiff(noise((20, 30, 5), "int16")) for i in range(100)}
    with pytest.raises(UsageError, match=r"^X: of a sample of 64 files 64 are unreadable: \d\.tif: has 5 channels"):
        survey(Files(files), Reading(3), "X")
    pages = {f"{i}.tif": tiff(noise((5, 20, 30), "int16")) for i in range(3)}
    monkeypatch.setattr(logging.getLogger("fcmae"), "propagate", True)
    survey(Files(pages), Reading(3), "X")
    assert "X: files of 5 pages, of which the first is read; --in_chans 5 takes all" in caplog.text
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    plain = {f"{i}.png": png(noise((20, 30, 3), "uint8")) for i in range(3)}
    survey(Files(plain | {"0.tif": files["0.tif"]}), Reading(3), "X")
    clear = {f"{i}.png": png(noise((20, 30, 4), "uint8")) for i in range(3)}
    survey(Files(clear | {"0.tif": files["0.tif"]}), Reading(4), "Y")
    told = "{}: 1 of a sample of 4 files: is a TIFF beyond Pillow: pip install tifffile imagecodecs"
    once, again = (caplog.text.count(told.format(source)) for source in "XY")
    assert again == once > 0  # though it looked twice, for alpha


# ---- sizes


def test_bombs_are_refused_from_their_headers():
    jpeg = io.BytesIO()
    picture(64, 48).save(jpeg, "JPEG")
    place = jpeg.getvalue().index(b"\xff\xc0") + 5
    jpeg = jpeg.getvalue()[:place] + struct.pack(">HH", 60000, 60000) + jpeg.getvalue()[place + 4 :]
    big = png(noise((1, 1, 3), "uint8"))
    big = big[:16] + struct.pack(">II", 60000, 60000) + big[24:]
    header = big[12:29]
    big = big[:29] + struct.pack(">I", zlib.crc32(header)) + big[33:]
    files = {"x.jpg": jpeg, "x.png": big, "x.pgm": b"P5 60000 60000 255\n"}
    for name, content in files.items():
        with pytest.raises(BadImage, match=f"{name}: has 60,000 x 60,000 pixels, above --max_pixels 178956970"):
            load(content, 3, name)
    small = tiff(noise((30, 40), "uint16"))
    arrays, claim = io.BytesIO(), io.BytesIO()
    np.savez_compressed(arrays, np.zeros((30, 40), np.float64))
    np.lib.format.write_array_header_1_0(claim, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)})
    with pytest.raises(BadImage, match=r"x\.npy"):
        load(claim.getvalue(), 1, "x.npy")
    with pytest.raises(BadImage, match="above --max_pixels"):
        load(arrays.getvalue(), 1, "x.npz", max_pixels=9)
    with pytest.raises(BadImage, match="has 30 channels, not --in_chans 3"):
        load(tiff(noise((20, 10, 30), "uint8"), planarconfig="contig"), 3)
    for dtype in ("uint8", "uint16"):
        wide = tiff(noise((30, 40), dtype), tile=(16, 16), compression="lzw")
        for tag in (322, 323):
            wide = wide.replace(struct.pack("<HHII", tag, 4, 1, 16), struct.pack("<HHII", tag, 4, 1, 2**16))
        with pytest.raises(BadImage, match=r"x\.tif: has 65,536 x 65,536 pixels, above"):
            load(wide)
    for name, content in (("x.tif", small), ("x.tif", tiff(noise((30, 40), "uint8")))):
        with pytest.raises(BadImage, match="has 30 x 40 pixels, above --max_pixels 1199"):
            load(content, 1, name, max_pixels=1199)
        assert load(content, 1, name, max_pixels=1200).shape == (1, 30, 40)
