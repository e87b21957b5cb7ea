"""tools/visualize.py: pictures that show what they say, and numbers that agree with their definition."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import main_pretrain
from models.convnextv2 import Block, ConvNeXtV2, Encoder
from models.fcmae import FCMAE
from models.layers import GRN
from tests.small_runs import TINY, load, same
from tools import visualize
from utils import layouts
from utils.amp import Amp
from utils.pictures import reconstructions

CPU = Amp(torch.device("cpu"), False, torch.bfloat16)
IDENTITY = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std of images that are not normalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def checkpoint(scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    assert scripts.pretrain("--output_dir", out, "--epochs", 1, "--warmup_epochs", 0).code == 0
    return out / "checkpoint-0.pth"


@pytest.fixture
def draw(scripts, checkpoint, tmp_path):
    """Run the tool on the checkpoint: draw(flags) -> the result and the folder of its pictures."""

    def call(*flags):
        defaults = ("--checkpoint", checkpoint, "--device", "cpu", "--output_dir", tmp_path / "pictures")
        return scripts.call(visualize, *defaults, *flags), tmp_path / "pictures"

    return call


def tiles(picture: Path, rows: int, columns: int, size: int = 128) -> np.ndarray:
    """The squares of a grid with gaps of 4 pixels: (rows, columns, size, size, 3)."""
    pixels = np.asarray(Image.open(picture))
    pitch = size + 4
    assert pixels.shape == (rows * pitch + 4, columns * pitch + 4, 3)
    squares = pixels[4:, 4:].reshape(rows, pitch, columns, pitch, 3).transpose(0, 2, 1, 3, 4)
    return squares[:, :, :size, :size].astype(int)


def test_a_full_disk_is_a_line(draw, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/features.png").symlink_to("/dev/full")
    result, _ = draw("--features", "--input_size", 16)
    assert result.code == 2
    assert re.fullmatch(r"error: .*: No space left on device; make room, or write elsewhere\n", result.err)


def test_a_folder_where_the_picture_goes_is_a_line(draw, tmp_path):
    (tmp_path / "pictures/features.png").mkdir(parents=True)
    result, _ = draw("--features", "--input_size", 16)
    assert result.code == 2
    assert re.fullmatch(r"error: .*/features.png: Is a directory; mend that, or give another\n", result.err)


# ---- reconstructions


def test_reconstructions(draw, scripts):
    """Rows of images and seeds; more is visible at a lower ratio, and what is visible is the image."""
    flags = ("--images", scripts.val, "--max_images", 2, "--mask_ratios", 0.25, 0.75, "--seeds", 0, 1, 2)
    result, out = draw("--reconstructions", *flags)
    assert result.code == 0, result.err
    assert result.out == f"written: {out}/reconstructions.png\n"
    assert [path.name for path in out.iterdir()] == ["reconstructions.png"]
    grid = tiles(out / "reconstructions.png", 6, 5)
    masks = set()
    for row in grid:
        image = row[0]
        for column, removed in ((1, 0.25), (3, 0.75)):
            gray = (abs(row[column] - 127.5) <= 1).all(axis=2)
            assert gray.mean() == pytest.approx(removed, abs=0.02)
            assert (row[column] == image)[~gray].all()
            assert (row[column + 1] == image)[~gray].all()
            assert not (row[column + 1] == image)[gray].all()
            masks.add((column, gray.tobytes()))
    assert (grid[:3, 0] == grid[0, 0]).all()
    assert (grid[3:, 0] == grid[3, 0]).all()
    assert not (grid[0, 0] == grid[3, 0]).all()
    assert len(masks) > 2, "seeds make no difference"


def test_the_autoencoder_is_the_one_of_the_checkpoint(scripts, tmp_path):
    """Its decoder, depth, patch size and the kind of its targets, all read from the file."""
    flags = ("--decoder_depth", 2, "--norm_pix_loss", "false", "--stem_stride", 2, "--input_size", 32)
    assert scripts.pretrain("--output_dir", tmp_path, *flags, "--epochs", 1, "--warmup_epochs", 0).code == 0
    path = tmp_path / "checkpoint-0.pth"
    model = visualize.load_fcmae(path, norm_pix_loss=False)
    assert same(dict(model.state_dict()), dict(load(path)["model"]))
    assert (len(model.decoder), model.patch_size, model.norm_pix_loss) == (2, 16, False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "load_fcmae", lambda path, norm_pix_loss: seen.append(norm_pix_loss) or model)
        flags = ("--reconstructions", "--checkpoint", path, "--input_size", 32, "--output_dir", tmp_path / "out")
        assert scripts.call(visualize, *flags, "--device", "cpu").code == 0
    assert seen == [False]


def test_reconstructions_of_images_with_other_numbers_of_channels():
    for channels, shown in ((1, 1), (2, 1), (4, 3)):
        model = FCMAE(**TINY, in_chans=channels, decoder_embed_dim=16, patch_size=8)
        imgs = torch.rand(2, channels, 16, 16, generator=generator())
        pictures = reconstructions(model, imgs, CPU, (0.0,) * channels, (1.0,) * channels, 0.5)
        assert pictures.shape == (2, 3, shown, 16, 16)
        assert torch.equal(pictures[:, 0], imgs[:, :shown])


# ---- feature maps


def test_principal_colours():
    """Against the singular vectors of the centred rows, scaled between percentiles."""
    maps = torch.randn(3, 7, 5, 6, generator=generator(), dtype=torch.float64) * torch.arange(1.0, 8)[:, None, None]
    colours = visualize.principal_colours(maps)
    assert colours.shape == (3, 3, 5, 6)
    assert (colours.min(), colours.max()) == (0, 1)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 7).numpy()
    rows = rows - rows.mean(axis=0)
    _, _, vectors = np.linalg.svd(rows, full_matrices=False)
    for i, vector in enumerate(vectors[:3]):
        component = rows @ (vector * np.sign(vector[abs(vector).argmax()]))
        low, high = np.quantile(component, (0.01, 0.99), method="nearest")
        expected = ((component - low) / (high - low)).clip(0, 1).reshape(3, 5, 6)
        assert np.allclose(colours[:, i].numpy(), expected, atol=1e-6)


def test_constant_features_are_drawn():
    assert visualize.principal_colours(torch.ones(2, 8, 3, 3)).isfinite().all()


def test_feature_maps(draw, scripts):
    """A row per image: itself, then stages of 16, 8, 4 and 2 positions a side, of one colour each."""
    result, out = draw("--features", "--images", *sorted(scripts.val.rglob("*.png"))[:3])
    assert result.code == 0, result.err
    grid = tiles(out / "features.png", 3, 5)
    for row in grid:
        for column, side in ((1, 16), (2, 8), (3, 4), (4, 2)):
            cells = row[column].reshape(side, 128 // side, side, 128 // side, 3)
            assert (cells == cells[:, :1, :, :1]).all()
            assert len(np.unique(cells[:, 0, :, 0].reshape(-1, 3), axis=0)) > side
    assert not (grid[0, 0] == grid[1, 0]).all()


def test_feature_maps_of_images_with_other_numbers_of_channels(draw, tmp_path):
    """Arrays of four channels, of which the first three are shown, in the file's own normalisation."""
    torch.manual_seed(0)
    state = {"model": ConvNeXtV2(num_classes=4, in_chans=4, **TINY, stem_stride=1).state_dict()}
    torch.save(state | {"args": {"mean": [0.0] * 4, "std": [2.0] * 4, "input_size": 16}}, tmp_path / "four.pth")
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 4), np.uint8)
    np.save(tmp_path / "four.npy", pixels)
    flags = ("--features", "--checkpoint", tmp_path / "four.pth", "--images", tmp_path / "four.npy")
    result, out = draw(*flags)
    assert result.code == 0, result.err
    shown = tiles(out / "features.png", 1, 5)[0, 0, ::8, ::8]
    assert abs(shown - pixels[..., :3]).max() <= 1
    result, _ = draw(*flags, "--mean", 0, "--std", 1)
    assert result.err == "error: --mean: has 1 numbers, --in_chans 4 needs 4\n"
    np.save(tmp_path / "four.npy", pixels.astype(np.float32))
    assert draw(*flags)[0].code == 0
    np.save(tmp_path / "four.npy", pixels[..., :2])
    assert re.match("error: --images .*four.npy: has 2 channels", draw(*flags)[0].err)


def shown(imgs, folder: Path, args) -> list[Path]:
    """Which of the folder's images these are, by their pixels."""
    transform = datasets.build_transform(False, args)
    crops = {path: transform(Image.open(path)) for path in sorted(folder.rglob("*.png"))}
    return [path for img in imgs for path, crop in crops.items() if torch.equal(img, crop)]


def test_pictures_show_the_evaluation_crop_of_some_images(scripts, checkpoint):
    args = visualize.get_args_parser().parse_args(
        ["--checkpoint", str(checkpoint), "--images", str(scripts.val), "--max_images", "5", "--input_size", "16"]
    )
    visualize.load_encoder(args)
    paths = shown(visualize.load_images(args), scripts.val, args)
    assert paths == sorted(set(paths))
    assert (len(paths), len({path.parent for path in paths})) == (5, 3)  # the first five are of one class
    args.images = [str(path) for path in reversed(paths)]
    assert shown(visualize.load_images(args), scripts.val, args) == paths[::-1]
    args.images = None
    assert visualize.load_images(args).shape == (5, 3, 16, 16)


def test_pictures_of_pre_training_are_of_several_classes(scripts):
    flags = f"--data_set image_folder --data_path {scripts.train} --input_size 16 --stem_stride 1"
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    imgs = main_pretrain.picture_images(datasets.build_pretrain_dataset(args), args)
    args.crop_pct = None
    paths = shown(imgs, scripts.train, args)
    assert (len(paths), len({path.parent for path in paths})) == (8, 4)


# ---- diversity of features


def explicit_distance(x: torch.Tensor) -> list[float]:
    """The paper's formula, a pair of channels at a time."""
    means = []
    for image in x.double():
        channels = image.flatten(0, 1).T
        count, total = len(channels), 0.0
        for a in channels:
            for b in channels:
                product = a.norm() * b.norm()
                total += (1 - float(a @ b / product if product > 0 else 0.0)) / 2
        means.append(total / count**2)
    return means


def test_cosine_distance_agrees_with_the_definition():
    x = torch.randn(3, 4, 5, 9, generator=generator()) + 0.3
    x[1, ..., 4] = 0  # a dead channel
    assert visualize.cosine_distance(x).tolist() == pytest.approx(explicit_distance(x), rel=1e-5)
    assert visualize.cosine_distance(x.bfloat16()).tolist() == pytest.approx(explicit_distance(x.bfloat16()), rel=1e-5)


def test_cosine_distance_of_the_extremes():
    pattern = torch.randn(1, 4, 4, 1, generator=generator())
    assert visualize.cosine_distance(pattern * torch.rand(8)).item() == pytest.approx(0, abs=1e-6)  # collapse
    opposite = pattern * torch.tensor([1.0, -1, 2, -2])
    assert visualize.cosine_distance(opposite).item() == pytest.approx(0.5)
    orthogonal = torch.eye(16).view(1, 4, 4, 16)  # distance 1/2 to each other channel, 0 to itself
    assert visualize.cosine_distance(orthogonal).item() == pytest.approx(0.5 * 15 / 16)


def test_feature_diversity_layer_by_layer():
    """Against the blocks run by hand, whatever the batch."""
    torch.manual_seed(0)
    encoder = Encoder(**TINY, stem_stride=1).eval()
    for module in encoder.modules():
        if isinstance(module, GRN):
            torch.nn.init.normal_(module.gamma)
            torch.nn.init.normal_(module.beta)
    imgs = torch.randn(5, 3, 16, 16, generator=generator())
    rows = visualize.feature_diversity(encoder, imgs, CPU, batch_size=2)
    blocks = [(name, module) for name, module in encoder.named_modules() if isinstance(module, Block)]
    assert [name for name, *_ in rows] == [name for name, _ in blocks]
    x, expected = imgs.permute(0, 2, 3, 1), []
    with torch.no_grad():
        for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
            x = downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            for block in stage:
                y = block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                before = block.act(block.pwconv1(block.norm(y)))
                after = block.grn(before)
                expected.append([float(visualize.cosine_distance(z).mean()) for z in (before, after)])
                x = x + block.pwconv2(after)
    assert torch.allclose(torch.tensor([row[1:] for row in rows]), torch.tensor(expected), atol=1e-6)
    assert all(before != after for _, before, after in rows)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_diversity_is_printed_and_drawn(draw):
    pytest.importorskip("matplotlib")
    result, out = draw("--diversity")
    assert result.code == 0, result.err
    table = re.findall(r"^\| (\d) \| (stages\.\d\.\d) \| (0\.\d{4}) \| (0\.\d{4}) \|$", result.out, re.M)
    names = ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    assert [row[:2] for row in table] == [(str(i + 1), name) for i, name in enumerate(names)]
    pixels = np.asarray(Image.open(out / "diversity.png").convert("RGB"))
    assert pixels.shape == (600, 750, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_any_layout_is_drawn(draw, scripts, checkpoint, tmp_path):
    """A classifier has features, from a file without arguments too, but nothing to reconstruct with."""
    torch.manual_seed(0)
    path = tmp_path / "classifier.pth"
    torch.save(layouts.to_timm(ConvNeXtV2(num_classes=4, **TINY, stem_stride=1).state_dict()), path)
    result, out = draw("--features", "--checkpoint", path, "--input_size", 24, "--max_images", 2)
    assert result.code == 0, result.err
    tiles(out / "features.png", 2, 5, size=120)
    result, _ = draw("--reconstructions", "--checkpoint", path, "--input_size", 24)
    assert result.code == 2
    assert re.match("error: --reconstructions: needs a pre-training checkpoint, .* holds no decoder", result.err)


# ---- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "nothing to draw: give --reconstructions, --features or --diversity"),
        ("--features --checkpoint /nowhere.pth", "--checkpoint /nowhere.pth: no such file"),
        ("--features --images /nowhere.png", "--images /nowhere.png: no such file or folder"),
        ("--features --images $text", "--images .*text.png: .*cannot identify image"),
        ("--features --images $empty", "--images .*empty: holds no images"),
        ("--features --input_size 7", "--input_size 7: must be at least the model's total stride 8"),
        ("--reconstructions --input_size 20", "--input_size 20: must be a multiple of the model's patch size 8"),
        ("--reconstructions --mask_ratios 0.6 1", "--mask_ratios 1.0: mask_ratio 1.0 keeps 0 of 4 patches"),
        ("--reconstructions --mask_ratios 0", "--mask_ratios 0.0: mask_ratio 0.0 keeps 4 of 4 patches"),
        ("--features --output_dir /proc/pictures", "--output_dir /proc/pictures: cannot be written"),
        ("--feature", "unknown argument --feature .did you mean --features"),
    ],
)
def test_mistakes(flags, message, draw, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    result, out = draw(*re.sub(r"\$(\w+)", rf"{tmp_path}/\1", flags).replace("/text", "/text.png").split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.match(f"error: {message}", result.err), result.err
    assert not out.exists()


def test_images_are_read_at_the_depth_of_training(draw, scripts, checkpoint, tmp_path):
    """Numbers as they are, normalised as such, are no bytes."""
    content = torch.load(checkpoint, weights_only=True)
    deep = {"depth": 32, "mean": [99.0] * 3, "std": [9.0] * 3}
    torch.save(content | {"args": content["args"] | deep}, tmp_path / "deep.pth")
    result, _ = draw("--features", "--checkpoint", tmp_path / "deep.pth", "--images", scripts.val)
    assert result.code == 2
    assert re.search("png: holds uint8 values, where most files hold other numbers", result.err), result.err
    pixels = np.random.RandomState(0).normal(99, 9, (3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "deep.npy", pixels)
    flags = ("--features", "--reconstructions", "--checkpoint", tmp_path / "deep.pth")
    result, out = draw(*flags, "--images", tmp_path / "deep.npy", "--mask_ratios", 0.5)
    assert result.code == 0, result.err
    expected = 255 * (0.5 + 0.25 * (pixels - 99) / 9).clip(0, 1).transpose(1, 2, 0)
    for name, columns in (("features", 5), ("reconstructions", 3)):
        assert abs(tiles(out / f"{name}.png", 1, columns)[0, 0, ::8, ::8] - expected).max() <= 1


def test_without_matplotlib(draw, monkeypatch):
    """Refused before another picture is drawn."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result, out = draw("--features", "--diversity")
    assert result.code == 2
    assert not out.exists()
    assert result.err == "error: --diversity: draws with matplotlib, which is missing: pip install matplotlib\n"
    assert draw("--features", "--max_images", 1)[0].code == 0
