"""--resize_mode: squash and pad against timm's, in training, evaluation, checkpoints, tools and exports."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import datasets
import main_finetune
import main_pretrain
from models.convnextv2 import SIZES, ConvNeXtV2
from tests.small_runs import COMMON, TINY, records
from tools import export, predict, probe, targets
from utils import settings
from utils.data.transforms import eval_transform, mean_std, train_transform
from utils.errors import UsageError, run_cli

AUGMENTATION = {
    "scale": (0.3, 1.0), "auto_augment": None, "color_jitter": None, "interpolation": "bicubic", "re_prob": 0,
    "re_mode": "pixel", "re_count": 1,
}  # fmt: skip
LEVELS = 2.01 / 255 / 0.224  # two levels of 0..255, by which the resizing of tensors and of PIL images differs


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("mode", "theirs"), [("squash", "squash"), ("pad", "border")])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("sides", [(150, 61), (60, 151), (40, 30), (300, 8)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_evaluation_is_timms(mode, theirs, size, sides, crop_pct):
    """timm takes one side for the resized image of a rectangle, where there is a crop."""
    if size[0] != size[1] and crop_pct < 1:
        return
    image, (mean, std) = picture(*sides), mean_std(3)
    ours = eval_transform(size, 3, crop_pct, mean, std, mode)(image)
    expected = timm.data.create_transform(
        (3, *size), interpolation="bicubic", crop_pct=crop_pct, crop_mode=theirs, mean=mean, std=std
    )(image)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= LEVELS


@pytest.mark.parametrize(("sides", "borders"), [((160, 80), (slice(0, 16), slice(48, 64))), ((80, 161), None)])
def test_borders_are_the_mean(sides, borders):
    """The whole image is in the middle of them; of numbers they are the mean itself."""
    mean, std = (0.2, 0.5, 0.8), (0.25,) * 3
    image = torch.full((3, *sides[::-1]), 255, dtype=torch.uint8)
    found = eval_transform((64, 64), 3, 1.0, mean, std, "pad")(image)
    found = found if borders else found.mT
    assert found.mT.shape == (3, 64, 64)
    rows = found[0, :, 32].sub(3.2).abs() < 0.01
    assert rows.sum() == 32
    assert rows[16:48].all()
    assert found[:, ~rows].abs().max() < 0.01
    assert eval_transform((64, 64), 3, 1.0, mean, std, "pad")(image[:, :1]).shape == (3, 64, 64)
    numbers = torch.full((5, 30, 60), 300.0)
    numbers[:, :10] = torch.nan
    found = eval_transform((64, 64), 5, 1.0, (100.0,) * 5, (50.0,) * 5, "pad")(numbers)
    assert set(found.unique().round().tolist()) == {0, 4}
    assert (found[:, :16] == 0).all()
    assert (found[:, 28:47] - 4).abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["squash", "pad"])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_training_sees_the_whole_image(mode, size):
    """Mirrored or not, and nothing else: what evaluation sees, of bytes and of numbers."""
    image = picture(150, 61)
    numbers = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    for eight_bit, given, (mean, std), close in (
        (True, image, mean_std(3), LEVELS), (False, numbers, ((120.0,) * 3, (60.0,) * 3), 1e-6),
    ):  # fmt: skip
        seen = set()
        expected = eval_transform(size, 3, 1.0, mean, std, mode)(given)
        transform = train_transform(size, 3, AUGMENTATION, mean, std, eight_bit, mode)
        for seed in range(8):
            torch.manual_seed(seed)
            found = transform(given)
            distances = [(found - x).abs().max() for x in (expected, expected.flip(-1))]
            assert min(distances) <= close
            seen.add(bool(distances[0] < distances[1]))
        assert seen == {True, False}


@pytest.fixture(scope="module")
def padded(scripts, tmp_path_factory):
    """A run with --resize_mode pad on images of 20 x 40: its folder, and that of the images."""
    folder = tmp_path_factory.mktemp("padded")
    for split in ("train", "val"):
        for i in range(24 if split == "train" else 9):
            path = folder / f"data/{split}/c{i % 2}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(60 + i, 30).rotate(180 * (i % 2)).save(path)
    flags = ("--data_path", folder / "data", "--output_dir", folder / "out", "--resize_mode", "pad")
    result = scripts.call(main_finetune, *COMMON.split(), *flags)
    assert result.code == 0, result.err
    return folder / "out", folder / "data"


def test_evaluation_does_as_training_did(padded, scripts, tmp_path):
    out, data = padded
    flags = ("--eval", "true", "--data_set", "image_folder", "--eval_data_path", data / "val", "--num_workers", 0)
    flags += ("--resume", out / "checkpoint-2.pth", "--device", "cpu")
    result = scripts.call(main_finetune, *flags)
    assert f"loss {records(out)[2]['test_loss']:.4f}" in result.out
    assert "--resize_mode" not in result.out
    result = scripts.call(main_finetune, *flags, "--resize_mode", "crop")
    assert f"--resize_mode crop: {out}/checkpoint-2.pth was trained with pad" in result.out
    assert f"loss {records(out)[2]['test_loss']:.4f}" not in result.out


def test_tools_do_as_training_did(padded, monkeypatch):
    monkeypatch.setitem(SIZES, "convnextv2_atto", TINY)
    out, data = padded
    expected = eval_transform((16, 16), 3, 1.0, *mean_std(3), "pad")(picture(60, 30))
    words = ["--checkpoint", str(out / "checkpoint-2.pth")]
    for tool, load, more in ((probe, probe.load_encoder, []), (predict, predict.load, ["--images", str(data)])):
        args = tool.get_args_parser().parse_args([*words, *more])
        load(args)
        assert torch.equal(datasets.build_transform(False, args)(picture(60, 30)), expected)
    watched = main_pretrain.get_args_parser().parse_args(["--resize_mode", "pad", "--input_size", "16"])
    assert torch.equal(datasets.build_transform(False, watched)(picture(60, 30)), expected)


@pytest.mark.parametrize(
    ("target", "in_chans", "depth", "instead"),
    [("timm", 5, 8, "onnx"), ("timm", 1, 16, "onnx"), ("hf", 5, 8, "onnx"), ("hf", 3, 8, "timm"), ("timm", 1, 8, "")],
)
def test_exports_whose_library_cannot_pad_are_refused(target, in_chans, depth, instead):
    model = ConvNeXtV2(in_chans, 2, **TINY)
    source = targets.Source(model, (16, 16), {}, "pad", 1.0, [], depth, False)
    args = Namespace(to=target, check_on="", multi_label=False, checkpoint="")
    if not instead:
        return export.check_target(args, source)
    with pytest.raises(UsageError, match=f"^--to {target}: it cannot pad .*, or take {instead}$"):
        export.check_target(args, source)
    export.check_target(Namespace(**vars(args) | {"to": instead}), source)


@pytest.mark.slow
def test_exports_hold_it(padded, tmp_path, capsys):
    transformers, *_ = (pytest.importorskip(name) for name in ("transformers", "onnxscript", "onnxruntime"))
    words = ["--checkpoint", str(padded[0] / "checkpoint-2.pth"), "--output", str(tmp_path / "out"), "--to"]
    for target in ("timm", "onnx"):
        export.main([*words, target, "--check_on", str(padded[1] / "val")])
        assert "; each gets the same class\n" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]
    assert (config["crop_mode"], config["crop_pct"]) == ("border", 1.0)
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: export.main([*words, "hf"]))
    line = capsys.readouterr().err
    assert line.startswith("error: --to hf: it cannot pad as these images were; give --resize_mode squash")
    assert line.count("\n") == 1
    image = picture(150, 61)
    for crop_pct in (1.0, 0.8):
        more = ["--resize_mode", "squash", "--crop_pct", str(crop_pct), "--check_on", str(padded[1] / "val")]
        export.main([*words, "hf", *more])
        assert "; each gets the same class\n" in capsys.readouterr().out
        ours = eval_transform((16, 16), 3, crop_pct, *mean_std(3), "squash")(image)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() <= LEVELS


def test_mistakes_and_strangers(scripts, tmp_path):
    result = scripts.finetune("--resize_mode", "letterbox")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.search("--resize_mode.*letterbox.*crop.*squash.*pad", result.err)
    parser = main_finetune.get_args_parser()
    args, size = parser.parse_args(["--crop_mode", "squash"]), type("Size", (), {"in_chans": 3, "stem_stride": 4})
    settings.as_trained(args, "a.pth", {"args": {"resize_mode": "shortest", "input_size": 96}}, size)
    assert (args.resize_mode, args.input_size) == ("squash", (224, 224)), "another trainer's word"
    args = parser.parse_args(["--crop_pct", "0.9"])
    settings.as_trained(args, "a.pth", {"args": {"resize_mode": "pad", "input_size": 96}}, size)
    assert (args.resize_mode, settings.eval_crop(args)) == ("pad", 0.9)
