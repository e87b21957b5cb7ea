"""tools/shrink.py: a folder or tar to one tar of smaller images, which goes on where it was stopped."""

import contextlib
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.pictures import picture, save
from tests.test_formats import png
from tools import shrink
from utils.data.tars import open_tar
from utils.errors import run_cli


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*flags):
        monkeypatch.setattr("sys.argv", ["shrink.py", "--num_workers", "1", *map(str, flags)])
        with contextlib.suppress(SystemExit):
            run_cli(shrink.main)
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


@pytest.fixture
def images(tmp_path):
    for i, name in enumerate(("ant/a.png", "ant/b.jpg", "bee/c.webp", "bee/small.png")):
        image = picture(seed=i)  # 60 x 40
        save(image if "small" not in name else image.resize((20, 12)), tmp_path / "in" / name)
    (tmp_path / "in/bee/broken.jpg").write_bytes(b"none")
    return tmp_path / "in"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_folder_becomes_a_tar_that_data_path_reads(call, images, tmp_path, kind):
    output = tmp_path / "out.tar"
    text = call("--data_path", images, "--output", output, "--size", 24, "--format", kind)
    assert "4 images, 1 left out" in text
    assert f"left out: {images}/bee/broken.jpg" in text
    found = open_tar(str(output), "--data_path", 3)
    assert found.classes == ["ant", "bee"]
    assert found.targets == [0, 0, 1, 1]
    assert [tuple(found[i][0].shape) for i in range(4)] == [(3, 24, 36)] * 3 + [(3, 12, 20)]
    smaller = tmp_path / "smaller.tar"
    assert "4 images" in call("--data_path", output, "--output", smaller, "--size", 12, "--format", kind)
    assert min(open_tar(str(smaller), "--data_path", 3)[0][0].shape[1:]) == 12
    with tarfile.open(output) as tar:
        assert tar.extractfile("bee/small.png").read() == (images / "bee/small.png").read_bytes()


def test_a_large_image_is_reduced_first_which_changes_little(call, tmp_path):
    image = picture(seed=1).resize((288, 256), Image.Resampling.BICUBIC)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.jpg", quality=95)
    call("--data_path", tmp_path / "in", "--output", tmp_path / "out.tar", "--size", 32, "--quality", 95)
    small, _ = open_tar(str(tmp_path / "out.tar"), "--data_path", 3, labelled=False)[0]
    usual = pil_to_tensor(image.resize((36, 32), Image.Resampling.BICUBIC))
    assert small.shape == usual.shape
    assert (small.int() - usual.int()).abs().float().mean() < 4


def test_more_than_eight_bits(call, tmp_path):
    """One among others becomes what training makes of it; where most are such, or lack data, they are refused."""
    deep = np.asarray(picture()).astype(">u2") * 257
    flags = "--data_path", tmp_path / "in", "--size", 24, "--output"
    for name in ("c.png", "d.png"):
        save(picture(), tmp_path / "in" / name)
    (tmp_path / "in/a.png").write_bytes(png(deep))
    assert "3 images, 0 left out" in call(*flags, tmp_path / "one.tar")
    small, _ = open_tar(str(tmp_path / "one.tar"), "--data_path", 3, labelled=False)[0]
    usual = pil_to_tensor(picture().resize((36, 24), Image.Resampling.BICUBIC))
    assert (small.int() - usual.int()).abs().float().mean() < 8
    (tmp_path / "in/b.ppm").write_bytes(b"P6 60 40 65535\n" + deep.tobytes())
    (tmp_path / "in/d.png").unlink()
    for _ in range(2):
        text = call(*flags, tmp_path / "out.tar")
        assert text.splitlines()[-1].startswith(f"error: --data_path {tmp_path}/in: most of its files have more than 8")
        for name in ("a.png", "b.ppm"):
            (tmp_path / "in" / name).unlink(missing_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "in/d.tif", tiffinfo={42113: "0"})


def test_what_training_leaves_out_is_left_out(call, tmp_path):
    """A JPEG that lacks a stretch, which Pillow reads; too many pixels. And the image of a TIFF, not its thumbnail."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    picture(200, 200).save(tmp_path / "in/a.jpg", quality=97)
    content = (tmp_path / "in/a.jpg").read_bytes()
    (tmp_path / "in/a.jpg").write_bytes(content[:2000] + content[2400:])
    (tmp_path / "in/b.pgm").write_bytes(b"P5 60000 60000 255\n")
    with tifffile.TiffWriter(tmp_path / "in/c.tif") as writer:
        writer.write(np.full((30, 30), 255, np.uint8), subfiletype=1)
        writer.write(np.zeros((50, 50), np.uint8))
    text = call("--data_path", tmp_path / "in", "--output", tmp_path / "out.tar", "--size", 24)
    assert "a.jpg: is damaged: Corrupt JPEG data" in text
    assert "b.pgm: has 60,000 x 60,000 pixels, above --max_pixels" in text
    small, _ = open_tar(str(tmp_path / "out.tar"), "--data_path", 3, labelled=False)[0]
    assert small.max() < 9


@pytest.mark.parametrize("share", [0.0, 0.005, 0.03, 0.06, 0.3, 0.62, 0.9, 1.0])
def test_what_was_stopped_goes_on(call, images, tmp_path, share):
    """However much of the tar was on disk: the bytes are those of a run that was not stopped."""
    (images / "bee/broken.jpg").unlink()
    flags = "--data_path", images, "--size", 24, "--output"
    whole, output = tmp_path / "whole.tar", tmp_path / "out.tar"
    call(*flags, whole)
    content = whole.read_bytes()
    part = tmp_path / "out.tar.part"
    part.write_bytes(content[: int(share * len(content))])
    assert "4 images" in call(*flags, output)
    assert not part.exists()
    assert output.read_bytes() == content


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(call, images, tmp_path):
    flags = "--data_path", images, "--size", 24, "--output"
    call(*flags, tmp_path / "whole.tar")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        text = call(*flags, tmp_path / "out.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = text.splitlines()[-1]
    assert (
        line == f"error: --output: {tmp_path}/out.tar.part: File too large; with that mended, the same command goes on"
    )
    assert "Traceback" not in text
    call(*flags, tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()


def test_two_files_of_one_name_are_refused(call, tmp_path):
    """In JPEG a.png becomes a.png.jpg, which is there already; the name of a JPEG stays."""
    for name in ("a.png", "a.png.jpg"):
        save(picture(), tmp_path / "in" / name)
    flags = "--data_path", tmp_path / "in", "--output", tmp_path / "out.tar", "--size", 24
    assert call(*flags).endswith("in: two of its files would be a.png.jpg in the tar; rename one\n")
    assert not (tmp_path / "out.tar.part").exists()
    assert "2 images, 0 left out" in call(*flags, "--format", "webp")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output x.zip", "--output x.zip: must end in .tar"),
        ("--output {}/in/../there.tar", "is there already"),
        ("--output {}/begun.tar", "was begun with other flags"),
        ("--output {}/download.tar", "or is another file; delete"),
        ("--output {}/x.tar --data_path {}/splits", "splits: holds a folder for each split; make a tar of each"),
        ("--output {}/none/x.tar", "none/x.tar.part: No such file or directory"),
        ("--quality 0 --output x.tar", "--quality 0: must be"),
    ],
)
def test_mistakes_are_one_line(call, images, tmp_path, flags, message):
    (tmp_path / "there.tar").touch()
    with tarfile.open(tmp_path / "begun.tar.part", "w") as tar:
        tar.addfile(tarfile.TarInfo(shrink.SETTINGS))
    for split in ("train", "val"):
        save(picture(), tmp_path / "splits" / split / "a/0.png")
    (tmp_path / "download.tar.part").write_bytes(b"half a download")
    text = call("--data_path", images, *flags.replace("{}", str(tmp_path)).split())
    assert message in text.splitlines()[-1]
    assert (tmp_path / "download.tar.part").read_bytes() == b"half a download"
    assert Image.open(images / "ant/a.png").size == (60, 40)
