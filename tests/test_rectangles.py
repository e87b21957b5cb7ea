"""--input_size H W: crops in its proportions, evaluation as timm's, runs, pictures, tools; what is refused."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import datasets
import main_finetune
import main_pretrain
from tests.pictures import finetune_args, levels, picture, pretrain_args
from tests.small_runs import load, records, same
from tools import benchmark, export, predict, probe, visualize
from utils.args import check_image_arguments
from utils.data.shapes import draw
from utils.data.transforms import eval_crop, eval_transform, mean_std, pretrain_transform, sample_box, train_transform
from utils.errors import run_cli
from utils.seeding import seed_all

TALL, WIDE = (48, 24), (16, 40)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Class folders train/ and val/ of images that are 2.5 times as wide as high, as WIDE is, and of narrower ones."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count, first in (("train", 40, 0), ("val", 22, 100)):
        for i in range(count):
            folder = root / split / f"c{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(60 if i % 3 else 30, 24, seed=first + i).save(folder / f"{i:03}.png")
    return root


# ---- transforms


@pytest.mark.parametrize("size", [TALL, WIDE])
def test_pretraining_crops_have_the_proportions_of_the_input(size):
    image, aspects = picture(200, 160), []
    for seed in range(200):
        torch.manual_seed(seed)
        top, left, height, width, mirrored = sample_box(160, 200, 0.1, size[1] / size[0])
        aspects.append(width / height * size[0] / size[1])
        if seed < 4:
            torch.manual_seed(seed)
            found = pretrain_transform(size, 3, 0.1)(image)
            expected = image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
            expected = np.asarray(expected)[:, :: -1 if mirrored else 1].astype(int)
            assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 2
    assert 0.72 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4


@pytest.mark.parametrize("size", [TALL, WIDE])
def test_boxes_are_distributed_as_torchvisions_of_that_ratio(size):
    torch.manual_seed(0)
    wide, image = size[1] / size[0], torch.empty(3, 60, 90)
    boxes = [sample_box(60, 90, 0.2, wide) for _ in range(3000)]
    ratio = (3 / 4 * wide, 4 / 3 * wide)
    theirs = [transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), ratio) for _ in range(3000)]
    for i in range(4):
        a, b = (np.sort([box[i] for box in drawn]) for drawn in (boxes, theirs))
        grid = np.union1d(a, b)
        shares = [np.searchsorted(x, grid, "right") / len(x) for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 0.05  # Kolmogorov-Smirnov at 0.1 %
    assert sample_box(10, 400, 1.0, wide)[:4] == transforms.RandomResizedCrop.get_params(
        torch.empty(3, 10, 400), (1.0, 1.0), ratio
    )


def test_fine_tuning_crops_have_them_too():
    image = picture(200, 160)
    args = finetune_args(aa="", reprob=0, min_crop=0.1)
    args.input_size = TALL
    transform = datasets.build_transform(True, args)
    for seed in range(4):
        seed_all(seed)
        found = levels(transform(image))
        seed_all(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, (0.1, 1.0), (3 / 8, 2 / 3))
        expected = image.crop((left, top, left + width, top + height)).resize((24, 48), Image.Resampling.BICUBIC)
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else expected
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("image_size", [(60, 24), (24, 60), (400, 3)])
def test_small_inputs_are_covered_and_shifted(eight_bit, image_size):
    names = ("scale", "auto_augment", "color_jitter", "interpolation", "re_prob", "re_mode", "re_count")
    augmentation = dict(zip(names, ((0.3, 1.0), None, None, "bicubic", 0, "pixel", 1), strict=True))
    transform = train_transform((16, 32), 3, augmentation, (0.0,) * 3, (1.0,) * 3, eight_bit)
    white = Image.new("RGB", image_size, "white")
    for seed in range(8):
        seed_all(seed)
        found = transform(white)
        assert found.shape == (3, 16, 32)
        assert (found > 0.99).float().mean() >= 12 / 16 * 28 / 32  # black from beyond an edge by 4 pixels at most


@pytest.mark.parametrize("image_size", [(500, 300), (300, 500), (333, 333), (128, 64), (97, 41), (30, 900)])
@pytest.mark.parametrize(
    ("size", "crop_pct"), [((64, 128), None), ((128, 64), 0.7), ((96, 160), 1.0), ((384, 400), None)]
)
def test_evaluation_is_timms(image_size, size, crop_pct):
    image = to_pil_image(torch.from_numpy(draw(3, 0, 512)).permute(2, 0, 1)).resize(image_size)
    share = eval_crop(size, crop_pct)
    mode = "center" if share else "squash"
    theirs = timm.data.create_transform((3, *size), interpolation="bicubic", crop_pct=share or 1.0, crop_mode=mode)
    ours = eval_transform(size, 3, share, *mean_std(3))(image)
    assert ours.shape == (3, *size)
    if "interpolation=bilinear" in str(theirs):
        pytest.skip("this timm resizes rectangles bilinearly, whatever is asked for")
    if max(image_size) < 20 * min(image_size):  # beyond 8 times the input, the middle alone is resized
        difference = (theirs(image) - ours).abs() * 255 * 0.224  # levels of 0..255
        assert difference.max() <= 6
        assert difference.mean() <= 0.5


@pytest.mark.parametrize(
    ("size", "resize", "resized"),
    [((40, 40), 53, (106, 53)), ((400, 400), 450, (900, 450)), ((48, 96), 59, (118, 59)), ((32, 96), 32, (96, 48))],
)
def test_eval_resize_is_what_the_short_side_becomes(size, resize, resized):
    """To the pixel: 40 / (40 / 53) is below 53. Both sides of the input are covered."""
    args, image = finetune_args(eval_resize=resize), picture(120, 60)
    args.input_size = size
    check_image_arguments(args)
    found = levels(datasets.build_transform(False, args)(image)).astype(int)
    left, top = (round((a - b) / 2) for a, b in zip(resized, size[::-1], strict=True))
    expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size[1], top + size[0]))
    difference = np.abs(found - np.asarray(expected))
    assert difference.max() <= 2
    assert difference.mean() < 0.2


# ---- runs


def flags_of(scenes, size) -> tuple:
    return ("--data_path", scenes, "--input_size", *size)


@pytest.mark.slow
def test_a_pretraining_run_and_what_goes_on_from_it(scripts, scenes, tmp_path):
    flags = (*flags_of(scenes, WIDE), "--epochs", 2, "--vis_freq", 1, "--knn_freq", 1, "--norm_pix_loss", "false")
    whole = scripts.pretrain(*flags, "--output_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert all(np.isfinite(line["train_loss"]) for line in records(tmp_path / "whole"))
    picture_of = Image.open(tmp_path / "whole/reconstruction-1.png")
    assert picture_of.size == (6 * (3 * 40 + 4) + 4, 4 * (3 * 16 + 4) + 4)  # eight triples, three times enlarged
    end = load(tmp_path / "whole/checkpoint-1.pth")
    assert end["args"]["input_size"] == [16, 40]
    assert json.loads((tmp_path / "whole/run.json").read_text())["starts"][0]["args"]["input_size"] == [16, 40]
    part = scripts.pretrain(*flags, "--save_ckpt_num", 5, "--output_dir", tmp_path / "part")
    assert part.code == 0
    (tmp_path / "part/checkpoint-1.pth").unlink()
    again = scripts.pretrain(*flags, "--output_dir", tmp_path / "part")
    assert "going on with epoch 1" in again.out
    assert same(load(tmp_path / "part/checkpoint-1.pth")["model"], end["model"])
    # one that is as long with square images is another model's input, not another model
    assert scripts.finetune("--finetune", tmp_path / "whole/checkpoint-1.pth", *flags_of(scenes, TALL)).code == 0


def test_masks_keep_their_share_of_a_rectangle(scenes):
    flags = {"model": "convnextv2_atto", "stem_stride": 1, "mask_ratio": 0.7, "batch_size": 40, "num_workers": 0}
    args = pretrain_args(data_set="image_folder", data_path=scenes, **flags)
    args.input_size = WIDE
    loader = main_pretrain.build_loader(datasets.build_pretrain_dataset(args), args, torch.device("cpu"))
    (batch,) = next(iter(loader.steps(0)))
    imgs, _, mask = batch.data
    assert (imgs.shape[2:], mask.shape) == (WIDE, (40, 10))
    assert mask.sum(dim=1).tolist() == [7.0] * 40
    assert len(mask.unique(dim=0)) > 10
    model = main_pretrain.build_model(args)
    features = model.forward_encoder(loader.batch_transform(imgs), mask)
    assert torch.equal(features.abs().sum(1) == 0, mask.view(40, 2, 5) == 1)


def test_a_checkpoint_brings_its_rectangle_along(scripts, scenes, tmp_path):
    run = ("--epochs", 1, "--warmup_epochs", 0, "--output_dir", tmp_path)
    trained = scripts.finetune(*flags_of(scenes, WIDE), *run, "--eval_data_path", scenes / "val", "--mixup", 0.8)
    assert trained.code == 0, trained.err
    best = tmp_path / "checkpoint-best.pth"
    quick = ("--num_workers", 0, "--device", "cpu")
    data = ("--data_set", "image_folder", "--data_path", scenes)
    acc1 = records(tmp_path)[-1]["test_acc1"]
    alone = scripts.call(main_finetune, "--eval", "true", "--resume", best, *data, *quick)
    assert f"acc1 {acc1:.2f}" in alone.out
    assert "warning" not in alone.out.lower()
    other = scripts.call(main_finetune, "--eval", "true", "--resume", best, *data, *quick, "--input_size", 40, 16)
    assert f"--input_size 40 16: {best} was trained with 16 40" in other.out + other.err
    images = ("--checkpoint", best, "--images", scenes / "val", *quick)
    result = scripts.call(predict, *images, "--output", tmp_path / "all.csv", "--grid", tmp_path / "grid.png")
    assert result.code == 0, result.err
    rows = [line.split(",") for line in (tmp_path / "all.csv").read_text().splitlines()[1:]]
    right = sum(f"/{name}/" in path for path, name, *_ in rows)
    assert 100 * right / len(rows) == pytest.approx(acc1, abs=0.01)
    assert Image.open(tmp_path / "grid.png").size == (8 * 168, 3 * (64 + 42))  # 160 x 64, and two lines below
    probed = scripts.call(probe, "--checkpoint", best, *data, *quick, "--method", "knn")
    assert " 16 40 px; " in probed.out
    pictures = ("--checkpoint", best, "--images", scenes / "val", "--device", "cpu", "--output_dir", tmp_path / "shown")
    assert scripts.call(visualize, *pictures, "--features").code == 0
    assert Image.open(tmp_path / "shown/features.png").size[0] == 5 * (3 * 40 + 4) + 4


# ---- tools


@pytest.fixture
def exported(best, tmp_path, capsys):
    """Export the checkpoint: exported(target) -> what the tool printed."""

    def call(target, output=tmp_path) -> str:
        export.main(["--checkpoint", str(best), "--to", target, "--output", str(output)])
        out = capsys.readouterr().out
        assert ", below --tolerance" in out
        return out

    return call


@pytest.fixture(scope="module")
def best(scripts, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    run = ("--epochs", 1, "--warmup_epochs", 0, "--output_dir", folder, "--crop_pct", 0.8)
    assert scripts.finetune(*flags_of(scenes, (24, 64)), *run, "--eval_data_path", scenes / "val").code == 0
    return folder / "checkpoint-best.pth"


def test_timm_takes_the_rectangle(exported, tmp_path):
    exported("timm")
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["pool_size"], config["crop_pct"]) == ([3, 24, 64], [3, 8], 0.8)
    image = picture(150, 100)
    theirs = timm.data.create_transform(config["input_size"], interpolation="bicubic", crop_pct=config["crop_pct"])
    ours = eval_transform((24, 64), 3, 0.8, *mean_std(3))(image)
    assert (theirs(image) - ours).abs().max() <= 2.01 / 255 / 0.224


def test_transformers_takes_the_rectangle(exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = exported("hf")
    assert "# warps images that are not 24 : 64, which --eval crops" in out
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [24, 64]
    image = picture(128, 48)  # of the input's proportions
    ours = eval_transform((24, 64), 3, 0.8, *mean_std(3))(image)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 2.01 / 255 / 0.224


@pytest.mark.parametrize("what", ["encoder", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_the_benchmark_takes_rectangles(what, monkeypatch, capsys, tmp_path):
    small = "--device cpu --batch_size 1 --repeats 1 --threads 1 --memory false --input_size 32 96"
    monkeypatch.setattr(
        "sys.argv", ["benchmark.py", "--what", what, *small.split(), "--json", str(tmp_path / "a.json")]
    )
    run_cli(benchmark.main)
    assert ", 32 96 px," in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text().splitlines()[0])["input_size"] == [32, 96]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input_size 16 24 3", "--input_size 16 24 3: must be one number, of a square, or two, height and width"),
        ("--input_size 16 28", r"--input_size 16 28: must be a multiple of the patch size 8 .*, such as 16 32"),
        ("--input_size 20 20", r"--input_size 20: must be a multiple of the patch size 8 .*, such as 16"),
        ("--input_size 8 16", "--mask_ratio 0.6: .*larger --input_size"),
        ("--input_size 32 65536", "--input_size 65536: must be a whole number from 1 to 16384"),
        ("--input_size 32 wide", "--input_size wide: must be a whole number"),
        ("--input_size 32 -32", "--input_size"),
        ("--input_size", "--input_size"),
    ],
)
def test_odd_sizes_are_a_line(flags, message, scripts, scenes):
    result = scripts.pretrain("--data_path", scenes, *flags.split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.search(message, result.err), result.err


def test_odd_sizes_of_fine_tuning_and_tools(best, scripts, scenes, tmp_path):
    result = scripts.finetune(*flags_of(scenes, (64, 7)))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--input_size 64 7: must be at least the model's total stride 8" in result.err
    assert scripts.finetune(*flags_of(scenes, (20, 30)), "--epochs", 1, "--warmup_epochs", 0).code == 0  # no multiples
    shown = ("--checkpoint", best, "--features", "--input_size", 64, 7, "--output_dir", tmp_path)
    assert scripts.call(visualize, *shown).code == 2
