"""The dense probe: its head against the definition, its scores by hand, and whole runs on pairs of images and masks."""

import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.convnextv2 import Encoder
from tests.pictures import png
from tests.small_runs import TINY
from tools import dense, probe
from tools.dense import DenseHead, MaskedImages, ious, picture
from utils.amp import Amp
from utils.data.shapes import CLASSES, Shapes, draw
from utils.errors import UsageError


def test_head_is_one_convolution_of_concatenated_stages():
    """In evaluation, float64: stages enlarged first, then batch norm and 1x1 convolution of all channels at once."""
    torch.manual_seed(0)
    head = DenseHead((3, 5), 4).double().eval()
    for norm, _ in head.layers:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight)
    stages = [torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3)]
    enlarged = [F.interpolate(x, (16, 12), mode="bilinear").double() for x in stages]
    normed = [layer[0](x) for layer, x in zip(head.layers, enlarged, strict=True)]
    weight = torch.cat([layer[1].weight for layer in head.layers], dim=1)
    expected = F.conv2d(torch.cat(normed, dim=1), weight, sum(layer[1].bias for layer in head.layers))
    head.float()
    torch.testing.assert_close(head(stages, (16, 12)), expected.float(), rtol=1e-4, atol=1e-5)


def test_intersection_over_union():
    counts = torch.tensor([[6.0, 2, 0], [1, 1, 0], [0, 0, 0]])
    scores = ious(counts)
    torch.testing.assert_close(scores[:2], torch.tensor([600 / 9, 100 / 4]))
    assert scores[2].isnan()


def test_masks_of_shapes():
    """A mask holds the image's class where its shape is; the shape differs from what is around it in every channel."""
    data = Shapes("val", size=48, num_samples=20)
    for i in range(20):
        mask, image = data.mask(i), np.asarray(data[i][0]).astype(float)
        assert set(np.unique(mask)) == {0, 1 + i % len(CLASSES)}
        assert 0.05 < (mask > 0).mean() < 0.7
        inside, outside = (np.median(image[where], axis=0) for where in (mask > 0, mask == 0))
        assert (abs(inside - outside) > 10).all()
    assert (data.mask(3) == draw(10_000_003, 0, 48, mask=True)).all()


@pytest.fixture
def pairs(tmp_path):
    """Images whose halves are red and blue, the border between them anywhere; masks with a stripe that is ignored."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for kind in ("images", "masks"):
            (tmp_path / split / kind / "deeper").mkdir(parents=True)
        for i in range(count):
            border = rng.integers(8, 24)
            pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
            pixels[:, :border, 0] += 180
            pixels[:, border:, 2] += 180
            mask = np.zeros((32, 32), np.uint8)
            mask[:, border:] = 1
            mask[:2] = 255
            Image.fromarray(pixels).save(tmp_path / split / "images/deeper" / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(tmp_path / split / "masks/deeper" / f"{i}.png")
    torch.manual_seed(0)
    torch.save({"model": Encoder(**TINY).state_dict()}, tmp_path / "encoder.pth")
    flags = ["--checkpoint", tmp_path / "encoder.pth", "--data_set", "image_folder", "--dense", "true"]
    for prefix, split in (("", "train"), ("eval_", "val")):
        flags += [f"--{prefix}data_path", tmp_path / split / "images", f"--{prefix}masks", tmp_path / split / "masks"]
    return [*flags, "--input_size", 32, "--picture", tmp_path / "dense.png"]


def run(flags, *more):
    probe.main(probe.get_args_parser().parse_args([str(word) for word in (*flags, *more)]))


@pytest.mark.slow
def test_pairs_are_learnt(pairs, tmp_path, capsys):
    run(pairs, "--epochs", 60, "--random_init", "true")
    out = capsys.readouterr().out
    found = re.findall(r"^\| (\w+) \|([\d. |]+)\|$", out, re.M)
    rows = {name: [float(x) for x in cells.split("|")] for name, cells in found}
    assert set(rows) == {"0", "1", "mean"}
    own, random, chance = rows["mean"]
    assert min(own, random) > 75
    assert chance < 40
    with Image.open(tmp_path / "dense.png") as picture:
        assert picture.size == (6 * 132 + 4, 4 * 132 + 4)
    run(pairs, "--epochs", 60)
    assert float(re.search(r"^\| mean \| ([\d.]+)", capsys.readouterr().out, re.M)[1]) == own  # the same seed


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_few_bits_are_as_stored(bits, pairs, tmp_path):
    labels = np.random.default_rng(0).integers(0, 2**bits, (32, 32, 1), np.uint8)
    (tmp_path / "train/masks/deeper/0.png").write_bytes(png(labels, bits=bits))
    args = probe.get_args_parser().parse_args([str(word) for word in pairs])
    args.in_chans = 3
    data = MaskedImages(("", ""), str(tmp_path / "train/images"), str(tmp_path / "train/masks"), args)
    assert torch.equal(data.mask(0), torch.from_numpy(labels[..., 0].astype(np.int64)))


def test_what_is_refused(pairs, tmp_path):
    masks = tmp_path / "train/masks/deeper"
    with pytest.raises(UsageError, match="--eval_masks: --dense true needs it"):
        run([word for word in pairs if "eval_masks" not in str(word) and word != tmp_path / "val/masks"])
    Image.new("RGB", (32, 32)).save(masks / "3.png")
    with pytest.raises(UsageError, match=r"--masks .*3\.png is not one channel"):
        run(pairs)
    (masks / "3.png").write_text("no image")
    with pytest.raises(UsageError, match=r"--masks .*3\.png: cannot identify image file$"):
        run(pairs)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8)).save(file, "PNG")
    (masks / "3.png").write_bytes(file.getvalue()[:500].ljust(len(file.getvalue()), b"\0"))  # copied in part
    with pytest.raises(UsageError, match=r"--masks .*3\.png: is damaged: a wrong checksum$"):
        run(pairs)
    (masks / "3.png").unlink()
    with pytest.raises(UsageError, match=r"--masks .*1 images have no mask; the first would be .*3\.png"):
        run(pairs)
    (tmp_path / "train/images/deeper/3.jpg").unlink()
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(masks / "4.png")
    with pytest.raises(UsageError, match=r"--masks .*4\.png has the class 60000; at most 4095, and 255 to be ignored"):
        run(pairs)
    Image.new("L", (32, 32)).save(masks / "4.png")
    with pytest.raises(UsageError, match="--data_set CIFAR10: --dense true labels shapes, or an image_folder"):
        run(pairs, "--data_set", "CIFAR10")
    for i in {*range(1, 24)} - {3}:
        (tmp_path / f"train/images/deeper/{i}.jpg").unlink()
    with pytest.raises(UsageError, match=r"--data_path .*: holds one image alone"):
        run(pairs)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("mask", "fits"),
    [((32, 32), True), ((7, 7), True), ((8, 7), True), ((65, 64), True), ((9, 7), False), ((48, 32), False)],
)
def test_a_mask_has_the_proportions_of_its_image(mask, fits, split, pairs, tmp_path, monkeypatch):
    """Of every pair; where the first has others, before the head is trained."""
    folder = tmp_path / split / "masks/deeper"
    Image.new("1", mask[::-1], 1).save(folder / "0.png")  # of two classes, one bit is enough
    if fits:
        return run(pairs, "--epochs", 1)
    monkeypatch.setattr(dense, "train_head", None)
    height, width = mask
    flag = "masks" if split == "train" else "eval_masks"
    shown = rf"0\.png is {height} x {width}, its image 32 x 32; both need the same proportions"
    with pytest.raises(UsageError, match=f"--{flag} .*{shown}"):
        run(pairs)


def test_the_shapes_have_the_channels_of_training(tmp_path, capsys):
    torch.save({"model": Encoder(**TINY | {"in_chans": 1}).state_dict()}, tmp_path / "encoder.pth")
    words = ("--checkpoint", tmp_path / "encoder.pth", "--dense", "true", "--epochs", 1, "--max_images", 10)
    run(words, "--input_size", 32, "--picture", tmp_path / "dense.png")
    assert "| background |" in capsys.readouterr().out


def test_flags_without_effect_are_told(pairs, capsys):
    with pytest.raises(UsageError, match="missing"):
        run(pairs, "--batch_size", 8, "--eval_resize", 40, "--checkpoint", "missing.pth")
    assert "--eval_resize, --batch_size: no effect with --dense" in capsys.readouterr().out
    with pytest.raises(UsageError, match="missing"):  # of --data_set, shapes is the default
        run(("--checkpoint", "missing.pth", "--data_path", "photos"))
    assert "--data_path: no effect with --data_set shapes" in capsys.readouterr().out


def test_numbers_are_read_and_drawn_as_in_training(tmp_path):
    """Pixels without data become the mean, and deviations from it, not values above 1, are what is drawn."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    heights = np.random.default_rng(0).normal(900, 100, (32, 32)).astype(np.float32)
    heights[:4] = -9999
    for i in range(2):
        np.save(tmp_path / "images" / f"{i}.npy", heights)
        Image.new("L", (32, 32), i).save(tmp_path / "masks" / f"{i}.png")
    words = ["--checkpoint", "x", "--input_size", "32", "--nodata=-9999", "--mean", "900", "--std", "100"]
    args = probe.get_args_parser().parse_args(words)
    args.in_chans = 1
    data = MaskedImages(("--data_path", "--masks"), str(tmp_path / "images"), str(tmp_path / "masks"), args)
    image, mask = data[1]
    assert (image[:, :4] == 0).all()
    assert image[:, 4:].std() == pytest.approx(1, abs=0.1)
    assert (mask == 1).all()
    encoder = Encoder(**TINY | {"in_chans": 1}).eval()
    drawn = picture(encoder, DenseHead(encoder.dims, 2).eval(), data, 2, args, Amp(torch.device("cpu"), False, None))
    grey = drawn[0, 6:120, 6:120]  # the first image, of which a mean of 900 is no white
    assert 0.3 < grey.mean() < 0.7
