"""tools/mean_std.py against NumPy."""

import numpy as np
import pytest
from PIL import Image

import main_pretrain
from tests.pictures import save
from tools import mean_std
from utils.data.files import ImageTree
from utils.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


def test_mean_std(tmp_path, capsys):
    arrays = [np.random.RandomState(i).rand(20 + i, 30, 3).astype(np.float32) * (i + 1) for i in range(4)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    mean, std, count = mean_std.mean_std(ImageTree(str(tmp_path), "--data_path"))
    expected = np.mean([array.astype(np.float64).mean((0, 1)) for array in arrays], 0)
    square = np.mean([(array.astype(np.float64) ** 2).mean((0, 1)) for array in arrays], 0)
    assert count == 4
    assert "bad.npy" in capsys.readouterr().err
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
        (("--data_path", "{}", "--in_chans", "0"), "--in_chans 0: must be at least 1"),
        (("--data_path", "{}", "--max_images", "-1"), "--max_images -1: must be at least 0"),
        (("--data_path", "{}/same"), r"channel 0 \(of 0 to 2\) is the same everywhere"),
        (("--data_path", "{}/bad"), "none of its images can be read"),
    ],
)
def test_mean_std_errors(tmp_path, capsys, flags, message):
    save(Image.new("RGB", (20, 10), (1, 2, 3)), tmp_path / "same/0.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=message):
        tool(mean_std, capsys, *(word.format(tmp_path) for word in flags))
