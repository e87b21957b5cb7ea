"""tools/mean_std.py against NumPy."""

import re

import numpy as np
import pytest
from PIL import Image

import main_pretrain
from tests.pictures import save
from tools import mean_std
from utils.data.files import ImageTree
from utils.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


def test_mean_std(tmp_path, capsys, logs):
    arrays = [np.random.RandomState(i).rand(20 + i, 30, 3).astype(np.float32) * (i + 1) for i in range(4)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    mean, std, count = mean_std.mean_std(ImageTree(str(tmp_path), "--data_path"))
    expected = np.mean([array.astype(np.float64).mean((0, 1)) for array in arrays], 0)
    square = np.mean([(array.astype(np.float64) ** 2).mean((0, 1)) for array in arrays], 0)
    assert count == 4
    assert "bad.npy" in logs.text
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(square - expected**2), rtol=1e-6)
    args = main_pretrain.get_args_parser().parse_args(tool(mean_std, capsys, "--data_path", tmp_path).split())
    np.testing.assert_allclose(args.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(args.std, std, rtol=1e-5)
    few = tool(mean_std, capsys, "--data_path", tmp_path, "--max_images", 2)
    assert few != tool(mean_std, capsys, "--data_path", tmp_path, "--max_images", 0)
    assert few == tool(mean_std, capsys, "--data_path", tmp_path, "--max_images", 2, "--num_workers", 1)


def test_mean_std_of_eight_bits(tmp_path, capsys):
    for i, level in enumerate((0, 255)):
        save(Image.new("RGB", (20, 10 + i), (level, level // 5, 255 - level)), tmp_path / f"{i}.png")
    assert tool(mean_std, capsys, "--data_path", tmp_path) == "--mean 0.5 0.1 0.5 --std 0.5 0.1 0.5\n"


def tool(module, capsys, *words):
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tool", *(str(word) for word in words)])
        module.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_path", "{}/nowhere"), "no such folder"),
        (("--data_path", "{}", "--in_chans", "0"), "--in_chans 0: must be a whole number from 1"),
        (("--data_path", "{}", "--images", "-1"), "--max_images -1: must be a whole number from 0"),
        (("--data_path", "{}/same"), r"channel 0 \(of 0 to 2\) is the same everywhere"),
        (("--data_path", "{}/bad"), "of a sample of 1 files 1 are unreadable"),
    ],
)
def test_mean_std_errors(tmp_path, capsys, flags, message):
    save(Image.new("RGB", (20, 10), (1, 2, 3)), tmp_path / "same/0.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.png").write_bytes(b"no image")
    with pytest.raises((UsageError, SystemExit)) as error:
        tool(mean_std, capsys, *(word.format(tmp_path) for word in flags))
    assert re.search(message, str(error.value) + capsys.readouterr().err)


def test_the_flags_are_taken_back(tmp_path, capsys):
    """Also where means are small and negative, or large."""
    for scale in (1e-4, 1, 1e9):
        for i in range(3):
            array = np.random.RandomState(i).randn(40, 40).astype(np.float32) - 0.1
            np.save(tmp_path / f"{i}.npy", array * np.float32(scale))
        words = tool(mean_std, capsys, "--data_path", tmp_path, "--in_chans", 1).split()
        args = main_pretrain.get_args_parser().parse_args([*words, "--in_chans", "1"])
        assert args.mean == [pytest.approx(-0.1 * scale, rel=0.5)]
        assert args.std == [pytest.approx(scale, rel=0.1)]


def test_what_training_skips_and_how_it_reads(tmp_path, capsys):
    """One file of another kind; 16 bits among 8; pixels without data."""
    for i in range(8):
        save(
            Image.fromarray(np.random.RandomState(i).randint(0, 256, (20, 30, 3), dtype=np.uint8)),
            tmp_path / f"{i}.png",
        )
    expected = tool(mean_std, capsys, "--data_path", tmp_path)
    save(Image.fromarray(np.full((20, 30), 1e6, np.float32)), tmp_path / "x.tif")
    assert tool(mean_std, capsys, "--data_path", tmp_path) == expected
    holes = np.random.RandomState(0).rand(4, 20, 30).astype(np.float32)
    (tmp_path / "holes").mkdir()
    for i, array in enumerate(holes):
        np.save(tmp_path / f"holes/{i}.npy", array)
    expected = tool(mean_std, capsys, "--data_path", tmp_path / "holes", "--in_chans", 1)
    np.save(tmp_path / "holes/4.npy", np.full((20, 30), np.nan, np.float32))
    assert tool(mean_std, capsys, "--data_path", tmp_path / "holes", "--in_chans", 1) == expected
    holes[:, :5] = -9
    for i, array in enumerate(holes):
        np.save(tmp_path / f"holes/{i}.npy", array)
    words = tool(mean_std, capsys, "--data_path", tmp_path / "holes", "--in_chans", 1, "--nodata", -9).split()
    mean, square = (np.mean([x.mean() for x in values[:, 5:]]) for values in (holes, holes**2))
    assert float(words[1]) == pytest.approx(mean, rel=1e-5)
    assert float(words[3]) == pytest.approx((square - mean**2) ** 0.5, rel=1e-4)


def test_a_list_and_progress(tmp_path, capsys):
    for i in range(30):
        save(Image.new("RGB", (20, 10), (i, 2 * i, 255 - i)), tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png\n" for i in range(20)))
    flags = ("--data_path", tmp_path, "--train_list", tmp_path / "list.txt")
    assert tool(mean_std, capsys, *flags).startswith(f"--mean {19 / 2 / 255:.6g} ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tool", *map(str, flags), "--images", "12"])
        mean_std.main()
    told = capsys.readouterr().err
    assert "12 images" in told
    assert "mean and std [1/1]  eta 0:00:00" in told
