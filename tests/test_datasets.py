"""datasets.py: pixels against PIL, samples that depend on their key alone, steps however work is spread, bad data."""

import contextlib
import dataclasses
import gc
import io
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
from collections import Counter
from functools import partial
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, cifar
from torchvision.transforms.functional import pil_to_tensor

import datasets
import main_finetune
import main_pretrain
from datasets import BadImage, ClassFolders, EvalSamples, ImageTree, StepSampler, TrainSamples
from tests.small_runs import COMMON, STEPS, killed_after, load, records, same
from tools import mean_std
from utils import memory
from utils.crops import Box, crop, draw_box
from utils.errors import UsageError, run
from utils.files import TimmFiles
from utils.seeding import seed_all
from utils.shapes import Shapes

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m9", "original", "originalr", "v0", "v0r", "3a", "augmix-m3-w3")


def finetune_args(**flags):
    return main_finetune.get_args_parser().parse_args([f"--{k}={v}" for k, v in flags.items()])


def pretrain_args(**flags):
    return main_pretrain.get_args_parser().parse_args([f"--{k}={v}" for k, v in flags.items()])


def picture(width=60, height=40, seed=0):
    """Smooth enough to survive JPEG, without symmetry."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def pixels(tensor, mean=MEAN, std=STD):
    """The 8-bit values (H, W, 3) behind a normalised image."""
    values = (tensor * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8).permute(1, 2, 0).numpy()


def assert_about_equal(found, expected):
    """8-bit pixels that differ by rounding alone."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.2


@pytest.fixture
def folders(tmp_path):
    """Class folders train/{ant,bee,cat} and val/{ant,cat} of 60 x 40 images, each of its own colours."""
    for i, name in enumerate(("ant", "bee", "cat")):
        for j in range(4):
            save(picture(seed=10 * i + j), tmp_path / "train" / name / f"{j}.png")
            if name != "bee":
                save(picture(seed=100 + 10 * i + j), tmp_path / "val" / name / f"{j}.jpg")
    return tmp_path


def broken_files():
    """Name -> content of files that look like images."""
    files = {}
    for extension, image_format in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("ppm", "PPM"), ("bmp", "BMP")):
        buffer = io.BytesIO()
        picture().save(buffer, image_format)
        files[f"half.{extension}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    flipped = bytearray(buffer.getvalue())
    flipped[len(flipped) // 2] ^= 64
    return files | {
        "text.png": b"<html>404 not found</html>",
        "zeros.jpg": bytes(1000),
        "nothing.jpg": b"",
        "flipped.png": bytes(flipped),
    }


# ---- transforms


@pytest.mark.parametrize("scale", [0.2, 0.9])
def test_pretrain_transform_crops_then_resizes_as_pil(scale):
    args, image, flips = pretrain_args(input_size=32, min_crop=scale), picture(), 0
    transform = datasets.build_pretrain_transform(args)
    prepare = datasets.build_prepare(None, args, torch.device("cpu"))
    for seed in range(8):
        torch.manual_seed(seed)
        found = transform(image)
        assert (found.dtype, found.shape) == (torch.uint8, (3, 32, 32))
        torch.manual_seed(seed)
        top, left, height, width, mirrored = draw_box(40, 60, scale)
        expected = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        if mirrored:
            expected, flips = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flips + 1
        assert_about_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
        normalised = transforms.functional.normalize(found / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert torch.equal(prepare(found[None])[0], normalised)
        assert width * height >= 0.9 * scale * 60 * 40
    assert 0 < flips < 8


def test_train_transform_crops_then_resizes_as_pil():
    transform = datasets.build_transform(True, finetune_args(input_size=48, aa="", reprob=0, min_crop=0.3))
    image = picture()
    for seed in range(6):
        seed_all(seed)
        found = pixels(transform(image))
        seed_all(seed)
        box = RandomResizedCropAndInterpolation.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = box
        expected = image.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("input_size", "crop_pct", "image_size", "resized"),
    [
        (48, None, (60, 40), (81, 54)),  # 48 / (224 / 256) = 54.86
        (224, None, (60, 40), (384, 256)),
        (48, 1.0, (60, 40), (72, 48)),
        (48, 0.5, (40, 60), (96, 144)),
        (32, None, (32, 32), (32, 32)),
        (32, None, (60, 40), (48, 32)),
        (383, None, (80, 40), (874, 437)),
        (384, None, (60, 40), (384, 384)),  # warped
        (384, 0.5, (60, 40), (1152, 768)),
        (384, 1.0, (60, 40), (576, 384)),
    ],
)
def test_evaluation_transform(input_size, crop_pct, image_size, resized):
    args, image = finetune_args(input_size=input_size), picture(*image_size)
    args.crop_pct = crop_pct
    found = pixels(datasets.build_transform(False, args)(image))
    left, top = (round((side - input_size) / 2) for side in resized)
    expected = image.resize(resized, Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + input_size, top + input_size))
    assert found.shape == (input_size, input_size, 3)
    assert_about_equal(found, np.asarray(expected))


@pytest.mark.parametrize("is_train", [True, False])
def test_normalisation_constants(is_train):
    for flag, mean, std in (("true", MEAN, STD), ("false", torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5))):
        args = finetune_args(input_size=64, aa="", reprob=0, imagenet_default_mean_and_std=flag)
        transform = datasets.build_transform(is_train, args)
        for level in (0, 255):
            found = transform(Image.new("RGB", (80, 70), (level,) * 3))
            assert found.shape == (3, 64, 64)
            torch.testing.assert_close(found, ((level / 255 - mean) / std).expand(3, 64, 64))
    assert datasets.mean_std(pretrain_args()) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_small_inputs_are_padded_and_cropped():
    transform = datasets.build_transform(True, finetune_args(input_size=32, aa="", reprob=0))
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    seen = set()
    for seed in range(24):
        seed_all(seed)
        found = pixels(transform(Image.fromarray(image)))
        windows = {
            (top, left, flipped): padded[top : top + 32, left : left + 32][:, :: -1 if flipped else 1]
            for top in range(9) for left in range(9) for flipped in (False, True)
        }  # fmt: skip
        matching = [place for place, window in windows.items() if np.array_equal(window, found)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) > 15
    assert {0, 4, 8} <= {offset for top, left, _ in seen for offset in (top, left)}
    assert transform(picture(50, 40)).shape == (3, 32, 32)
    assert not any(isinstance(t, RandomResizedCropAndInterpolation) for t in transform.transforms)


def stage(transform, kind):
    return [t for t in transform.transforms if isinstance(t, kind)]


def test_augmentation_flags():
    build = partial(datasets.build_transform, True)
    assert stage(build(finetune_args()), RandomErasing)[0].probability == 0.25
    erasing = stage(build(finetune_args(resplit="true", remode="rand", recount=3)), RandomErasing)[0]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.125, "rand", 3)
    assert not stage(build(finetune_args(reprob=0)), RandomErasing)
    assert stage(build(finetune_args()), auto_augment.RandAugment)
    assert not stage(build(finetune_args(aa="")), auto_augment.RandAugment)
    assert stage(build(finetune_args(aa="", color_jitter=0.4)), transforms.ColorJitter)
    assert not stage(build(finetune_args(aa="")), transforms.ColorJitter)
    assert not stage(build(finetune_args(color_jitter=0.4)), transforms.ColorJitter)  # auto-augment has its own
    crop = stage(build(finetune_args(min_crop=0.4, train_interpolation="bilinear")), RandomResizedCropAndInterpolation)
    assert crop[0].scale == (0.4, 1.0)
    assert crop[0].interpolation is transforms.InterpolationMode.BILINEAR


def test_unknown_policy():
    for name in ("rnd-m9", "rand-x9", "rand-m9-k3"):
        with pytest.raises(UsageError, match=f"--aa {name}: .*rand-m9"):
            datasets.build_transform(True, finetune_args(aa=name))


def policy_ops(transform):
    for part in transform.transforms:
        yield from getattr(part, "ops", [])
        yield from (op for sub_policy in getattr(part, "policy", []) for op in sub_policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_posterize_to_no_bits_is_black(policy):
    transform = datasets.build_transform(True, finetune_args(input_size=32, aa=policy))
    ops = list(policy_ops(transform))
    posterizing = [op for op in ops if op.name.startswith("Posterize")]
    assert ops
    assert posterizing or policy == "3a"
    image = picture()
    for op in posterizing:
        op.prob, op.level_fn = 1.0, lambda magnitude, hparams: (0,)
        assert op(image).getextrema() == ((0, 0),) * 3
        op.level_fn = lambda magnitude, hparams: (2,)
        assert op(image).tobytes() == auto_augment.posterize(image, 2).tobytes() != image.tobytes()


def test_the_policy_of_the_recipes_reaches_no_bits():
    """With the default policy, magnitude 10 is 0 bits: what the guard is there for does happen."""
    transform = datasets.build_transform(True, finetune_args())
    (op,) = [op for op in policy_ops(transform) if op.name.startswith("Posterize")]
    assert op.level_fn(10, op.hparams) == (0,)
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert op(picture()).getextrema() == ((0, 0),) * 3


# ---- images


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_loads_as_rgb(tmp_path, mode):
    image = Image.new("I;16", (60, 40)) if mode == "I;16" else picture().convert(mode)
    path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    save(image, path)
    loaded = datasets.load_image(str(path))
    assert (loaded.mode, loaded.size) == ("RGB", (60, 40))
    if mode == "L":
        assert loaded.tobytes() == image.convert("RGB").tobytes()


def test_broken_images_are_named(tmp_path):
    for name, content in broken_files().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name):
            datasets.load_image(str(tmp_path / name))
    with pytest.raises(BadImage, match=r"missing\.png"):
        datasets.load_image(str(tmp_path / "missing.png"))


@pytest.fixture
def spoiled(folders):
    """Those folders, with every kind of broken file in train/bee and val/cat; 12 and 8 good ones remain."""
    for name, content in broken_files().items():
        for split in ("train/bee", "val/cat"):
            (folders / split / f"0-{name}").write_bytes(content)
    return folders


def test_training_replaces_broken_images(spoiled, logs):
    dataset = ImageTree(str(spoiled / "train"), "--data_path", datasets.build_pretrain_transform(pretrain_args()))
    samples = TrainSamples(dataset, seed=3)
    bad = [i for i, path in enumerate(dataset.paths) if "0-" in path]
    assert len(bad) == len(broken_files())
    for index in bad:
        image, _ = samples[5, index]
        assert dataset.paths[index] in logs.text
        seed_all(3, 5, index)  # the next good one, under this sample's own seed
        expected, _ = dataset[max(bad) + 1]
        assert torch.equal(image, expected)
        assert torch.equal(image, samples[5, index][0])


def test_evaluation_leaves_broken_images_out(spoiled, logs):
    args = finetune_args(
        data_set="image_folder", data_path=spoiled / "train", eval_data_path=spoiled / "val", input_size=32,
        batch_size=3, num_workers=0,
    )  # fmt: skip
    dataset, nb_classes = datasets.build_dataset(False, args)
    assert nb_classes == 3
    assert len(dataset) == 8 + len(broken_files())
    batches = list(datasets.build_eval_loader(dataset, args, spread=True))
    assert None in batches  # three broken ones in a row
    labels = torch.cat([batch[1] for batch in batches if batch is not None])
    assert Counter(labels.tolist()) == {0: 4, 2: 4}
    for name in broken_files():
        assert str(spoiled / "val/cat" / f"0-{name}") in logs.text


class OnlyBroken(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        raise BadImage(f"{index}.jpg: broken")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_ends_in_one_line(num_workers, capsys, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # or the worker is waited for for 5 s
    args = finetune_args(batch_size=4, num_workers=num_workers)
    steps = datasets.build_train_loader(OnlyBroken(), args).steps(0)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: next(next(steps)))
    gc.collect()  # while the worker is not waited for
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1
    assert "100 unreadable images in a row" in errors[0]
    assert "Traceback" not in errors[0]


# ---- folders


def test_class_folders(folders):
    train = ClassFolders(str(folders / "train"), "--data_path")
    assert train.classes == ["ant", "bee", "cat"]
    assert Counter(train.targets) == {0: 4, 1: 4, 2: 4}
    val = ClassFolders(str(folders / "val"), "--eval_data_path", classes=train.classes)
    assert Counter(val.targets) == {0: 4, 2: 4}  # cat stays 2 although bee is not there
    pairs = zip(val.paths, val.targets, strict=True)
    assert {path.split("/")[-2] for path, label in pairs if label == 2} == {"cat"}


def test_class_folder_errors(folders, tmp_path):
    train = str(folders / "train")
    with pytest.raises(UsageError, match=r"--data_path .*nowhere: no such folder"):
        ClassFolders(str(tmp_path / "nowhere"), "--data_path")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no class folders"):
        ClassFolders(str(tmp_path / "empty"), "--data_path")
    with pytest.raises(UsageError, match="holds no class folders"):
        ClassFolders(f"{train}/ant", "--data_path")
    save(picture(), folders / "val/beee/0.png")
    with pytest.raises(UsageError, match=r"--eval_data_path .*'beee' is not among the 3 .*did you mean bee\?"):
        ClassFolders(str(folders / "val"), "--eval_data_path", classes=["ant", "bee", "cat"])
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(UsageError, match="dog"):
        ClassFolders(train, "--data_path")
    (tmp_path / "void/x").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no images"):
        ClassFolders(str(tmp_path / "void"), "--eval_data_path", classes=["x", "y"])


def test_image_tree(folders, tmp_path):
    nested = tmp_path / "nested"
    for name in ("top.JPG", "a/b/c/deep.png", "a/other.webp"):
        save(picture(), nested / name)
    (nested / "a/notes.txt").write_text("no image")
    tree = ImageTree(str(nested), "--data_path")
    assert [path.removeprefix(f"{nested}/") for path in tree.paths] == ["a/b/c/deep.png", "a/other.webp", "top.JPG"]
    image, label = tree[0]
    assert torch.equal(image, pil_to_tensor(picture()))
    assert (label, len(tree)) == (0, 3)
    with pytest.raises(UsageError, match="no such folder"):
        ImageTree(str(tmp_path / "nowhere"), "--data_path")
    (tmp_path / "hollow/a").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no images"):
        ImageTree(str(tmp_path / "hollow"), "--data_path")


# ---- data sets by name


def test_image_folder_data_set(folders):
    args = finetune_args(
        data_set="image_folder", data_path=folders / "train", eval_data_path=folders / "val", input_size=64
    )
    train, nb_classes = datasets.build_dataset(True, args)
    image, label = train[0]
    assert (len(train), nb_classes, image.shape, label) == (12, 3, (3, 64, 64), 0)
    for classes in (None, train.classes):  # with and without the training set's word for it
        val, nb_classes = datasets.build_dataset(False, args, classes)
        assert (len(val), nb_classes, val[7][1]) == (8, 3, 2)
    args.data_path = None  # evaluation alone, the class names from a checkpoint or from the folders themselves
    assert datasets.build_dataset(False, args, train.classes)[0].targets == val.targets
    assert datasets.build_dataset(False, args)[1] == 2
    args.data_path, args.eval_data_path = str(folders / "train"), None
    with pytest.raises(UsageError, match="--eval_data_path"):
        datasets.build_dataset(False, args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_set": "image_folder"}, "image_folder needs --data_path"),
        ({"data_set": "IMNET"}, "IMNET needs --data_path"),
        ({"data_set": "CIFAR"}, "CIFAR needs --data_path"),
        ({"data_set": "torch/image_folder"}, "needs --data_path"),
        ({"data_set": "shape"}, r"unknown \(did you mean shapes\?\)"),
        ({"data_set": "cifar"}, r"unknown.*one of IMNET, image_folder, CIFAR, CIFAR10, shapes"),
        ({"data_set": "torch/nothing_of_the_kind", "data_path": "{}"}, "timm could not open it.*nothing_of_the_kind"),
        ({"data_set": "torch/image_folder", "data_path": "{}/nowhere"}, "timm could not open it.*nowhere"),
        ({"data_set": "wds/x", "data_path": "{}/nowhere"}, "timm could not open it"),
        ({"data_set": "image_folder", "data_path": "{}/train", "nb_classes": 5}, "--nb_classes 5: .* 3 classes"),
        ({"data_set": "shapes", "nb_classes": 1000}, "--nb_classes 1000: .* 10 classes"),
        ({"data_set": "IMNET", "data_path": "{}"}, "3 class folders, --data_set IMNET has 1000.*image_folder"),
        ({"data_set": "IMNET", "data_path": "{}/train"}, "train: no such folder"),
    ],
)
def test_data_set_errors(folders, flags, message):
    flags = {k: v.format(folders) if isinstance(v, str) else v for k, v in flags.items()}
    with pytest.raises(UsageError, match=message):
        datasets.build_dataset(True, finetune_args(**flags))


def test_pretraining_data_sets(folders):
    assert len(datasets.build_pretrain_dataset(pretrain_args(data_set="image_folder", data_path=folders))) == 20
    assert len(datasets.build_pretrain_dataset(pretrain_args(data_set="IMNET", data_path=folders))) == 12
    shapes = datasets.build_pretrain_dataset(pretrain_args(data_set="shapes", input_size=32))
    assert shapes[0][0].shape == (3, 32, 32)
    for flags, message in (
        ({"data_set": "IMNET", "data_path": folders / "train"}, "no folder 'train'.*image_folder"),
        ({"data_set": "image_folder"}, "needs --data_path"),
        ({"data_set": "image_folder", "data_path": folders / "none"}, "no such folder"),
        ({"data_set": "imagefolder"}, "did you mean image_folder"),
    ):
        with pytest.raises(UsageError, match=message):
            datasets.build_pretrain_dataset(pretrain_args(**flags))


def test_a_whole_imagenet_of_class_folders(tmp_path):
    for i in range(1000):
        for split in ("train", "val"):
            (tmp_path / split / f"n{i:08d}").mkdir(parents=True)
            (tmp_path / split / f"n{i:08d}" / "x.JPEG").touch()
    for split in ("train", "val"):
        save(picture(), tmp_path / split / "n00000003" / "x.JPEG")
    for is_train in (True, False):
        dataset, nb_classes = datasets.build_dataset(is_train, finetune_args(data_path=tmp_path))
        assert (len(dataset), nb_classes, dataset.targets) == (1000, 1000, list(range(1000)))


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """The files of CIFAR-10 and CIFAR-100 with a few noise images each, and no checksums."""
    monkeypatch.setattr(cifar, "check_integrity", lambda *args: True)
    noise = np.random.RandomState(0).randint(0, 256, (6, 3072), dtype=np.uint8)
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for folder, names, key, classes in (
        (ten, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels", 10),
        (hundred, ["train", "test"], "fine_labels", 100),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(pickle.dumps({"data": noise, key: [0, 1, 2, 3, 4, classes - 1]}))
        meta = {"label_names": list(range(10)), "fine_label_names": list(range(100))}
        (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(meta))
    return tmp_path, noise


@pytest.mark.parametrize(("name", "classes", "length"), [("CIFAR", 100, 6), ("CIFAR10", 10, 30)])
def test_cifar(cifar_files, name, classes, length):
    folder, noise = cifar_files
    args = finetune_args(data_set=name, data_path=folder, input_size=32)
    train, nb_classes = datasets.build_dataset(True, args)
    assert (len(train), nb_classes, train[5][1]) == (length, classes, classes - 1)
    assert datasets.first_of_each_class(train, 1, name).indices == list(range(6))
    val, nb_classes = datasets.build_dataset(False, args, train.classes)
    assert (len(val), nb_classes) == (6, classes)
    np.testing.assert_array_equal(pixels(val[2][0]), noise[2].reshape(3, 32, 32).transpose(1, 2, 0))
    with pytest.raises(UsageError, match=f"{classes} classes in its validation split, 3 were trained on"):
        datasets.build_dataset(False, args, ["ant", "bee", "cat"])


def test_cifar_without_network(tmp_path, monkeypatch):
    def refuse(self):
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", refuse)
    with pytest.raises(UsageError, match=r"CIFAR10 is not there and cannot be downloaded .*no route"):
        datasets.build_dataset(True, finetune_args(data_set="CIFAR10", data_path=tmp_path))


def test_timm_data_set_end_to_end(spoiled, logs):
    """torch/image_folder of timm.data.create_dataset, down to batches, broken files among the images."""
    flags = {"data_set": "torch/image_folder", "data_path": spoiled, "input_size": 32, "num_workers": 0}
    args = finetune_args(batch_size=7, **flags)
    dataset, nb_classes = datasets.build_dataset(True, args)
    assert (len(dataset), nb_classes) == (21, 3)
    batches = [batch for step in datasets.build_train_loader(dataset, args).steps(0) for batch in step]
    assert [batch.data[0].shape for batch in batches] == [(7, 3, 32, 32)] * 3
    assert "half.jpg" in logs.text
    assert len(datasets.build_pretrain_dataset(pretrain_args(**flags))) == 21
    with pytest.raises(UsageError, match="2 classes in its validation split, 3 were trained on"):
        datasets.build_dataset(False, args, dataset.classes)  # its labels would be others
    save(picture(), spoiled / "val/bee/0.png")
    val, nb_classes = datasets.build_dataset(False, args, dataset.classes)
    labels = [label for batch in datasets.build_eval_loader(val, args, True) if batch for label in batch[1].tolist()]
    assert (nb_classes, Counter(labels)) == (3, {0: 4, 1: 1, 2: 4})


class Gray(Dataset):
    """Like torchvision's MNIST: one channel."""

    classes = ("zero", "one")
    transform = None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(Image.new("L", (28, 28), 255)), index % 2


def test_timm_names_are_passed_on(tmp_path, monkeypatch):
    calls = []

    def create_dataset(name, **options):
        calls.append((name, options["root"], options["split"], options["is_training"]))
        return Gray()

    monkeypatch.setattr(datasets.timm.data, "create_dataset", create_dataset)
    monkeypatch.setattr(datasets, "_give_way", lambda data_set: None)
    args = finetune_args(data_set="hfds/some/set", data_path="train_root", eval_data_path="val_root", input_size=32)
    dataset, nb_classes = datasets.build_dataset(False, args)
    assert nb_classes == 2
    torch.testing.assert_close(dataset[0][0], ((1 - MEAN) / STD).expand(3, 32, 32))  # gray becomes RGB
    assert datasets.build_dataset(True, args)[0][0][0].shape == (3, 32, 32)
    assert datasets.build_pretrain_dataset(pretrain_args(data_set="hfds/some/set", input_size=32))[0][0].shape[0] == 3
    assert calls == [
        ("hfds/some/set", "val_root", "validation", False),
        ("hfds/some/set", "train_root", "train", True),
        ("hfds/some/set", None, "train", True),
    ]
    monkeypatch.setattr(Gray, "classes", None)
    with pytest.raises(UsageError, match="does not tell its number of classes; give --nb_classes"):
        datasets.build_dataset(True, args)
    args.nb_classes = 7
    assert datasets.build_dataset(True, args)[1] == 7


def test_everything_sent_to_workers_pickles(folders, cifar_files):
    """Loader processes may be started by spawn or forkserver, which pickle the data set."""
    draw = partial(main_pretrain.draw_mask, 4, 0.6)
    common = {"input_size": 32, "data_path": folders}
    named = [
        datasets.build_dataset(True, finetune_args(data_set=name, **common))[0]
        for name in ("shapes", "CIFAR", "CIFAR10", "torch/image_folder")
    ]
    folder = {"data_set": "image_folder", "input_size": 32, "data_path": folders / "train"}
    augmented = [datasets.build_dataset(True, finetune_args(aa=policy, **folder))[0] for policy in ("", *POLICIES)]
    unlabelled = [datasets.build_pretrain_dataset(pretrain_args(**folder))]
    for dataset in named + augmented + unlabelled:
        samples = TrainSamples(dataset, 0, draw)
        for one, other in zip(samples[1, 3], pickle.loads(pickle.dumps(samples))[1, 3], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        pickle.loads(pickle.dumps(EvalSamples(dataset)))[0]
    pickle.dumps(datasets.build_dataset(False, finetune_args(eval_data_path=folders / "val", **folder))[0])


# ---- data sets in memory


@pytest.fixture
def uneven(folders):
    """Those folders with an image of another size, and one that is broken."""
    save(picture(30, 50), folders / "train/ant/other.png")
    (folders / "train/bee/broken.png").write_bytes(b"no image")
    return folders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_in_host_memory_are_those_on_disk(uneven, logs, num_workers):
    flags = {"data_set": "image_folder", "data_path": uneven / "train", "input_size": 32, "num_workers": num_workers}
    pretrain, finetune = pretrain_args(in_memory="host", **flags), finetune_args(in_memory="host", **flags)
    for dataset, args in (
        (datasets.build_pretrain_dataset(pretrain), pretrain), (datasets.build_dataset(True, finetune)[0], finetune),
    ):  # fmt: skip
        held = datasets.in_memory(dataset, args)
        assert "13 images in memory" in logs.text
        (bad,) = held.errors
        with pytest.raises(BadImage, match=r"bee/broken\.png"):
            held[bad]
        samples = [TrainSamples(x, 3, partial(torch.rand, 4)) for x in (dataset, held)]
        for epoch in (0, 1):
            for index in range(14):
                one, other = (x[epoch, index] for x in samples)
                assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
    (uneven / "train").rename(uneven / "gone")
    assert held[0][0].shape == (3, 32, 32)


def test_memory_is_for_what_can_be_held(uneven, monkeypatch):
    flags = {"data_set": "image_folder", "data_path": uneven / "train", "input_size": 32, "num_workers": 0}
    args = pretrain_args(in_memory="device", **flags)
    dataset = datasets.build_pretrain_dataset(args)
    assert datasets.in_memory(dataset, pretrain_args(**flags)) is dataset
    with pytest.raises(UsageError, match=r"images differ in size \((60 x 40 and 30 x 50|30 x 50 and 60 x 40)\)"):
        datasets.in_memory(dataset, args, datasets.pretrain_draw(args))
    with pytest.raises(UsageError, match=r"--in_memory device: --data_set image_folder is a stream"):
        datasets.in_memory(Stream(5), args)
    monkeypatch.setattr(memory, "free_memory", lambda device: 15_000)
    with pytest.raises(UsageError, match=r"--in_memory: 2 of 14 images take .* give --in_memory no"):
        datasets.in_memory(dataset, args)


def held_on_the_device(folders, **flags):
    common = {"data_set": "image_folder", "data_path": folders / "train", "in_memory": "device", "num_workers": 0}
    args = pretrain_args(batch_size=6, **common, **flags)
    dataset = datasets.in_memory(datasets.build_pretrain_dataset(args), args, datasets.pretrain_draw(args))
    return args, dataset, datasets.build_prepare(dataset, args, torch.device("cpu"))


@pytest.mark.parametrize("size", [32, 48])
def test_the_device_cuts_what_the_host_would(folders, size):
    (folders / "train/bee/broken.png").write_bytes(b"no image")
    args, dataset, prepare = held_on_the_device(folders, input_size=size)
    loaders = [
        datasets.build_train_loader(x, args, partial(torch.rand, 4), prepare=p)
        for x, p in (
            (dataset, prepare),
            (datasets.build_pretrain_dataset(args), datasets.build_prepare(None, args, torch.device("cpu"))),
        )
    ]
    for device, host in zip(*(loader.steps(3) for loader in loaders), strict=True):
        (boxes, *rest), (images, *others) = next(device).data, next(host).data
        assert boxes.dtype == torch.int64
        assert boxes.shape == (len(images), 6)
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))  # labels, masks
        cut, whole = (loader.prepare(x) for loader, x in zip(loaders, (boxes, images), strict=True))
        difference = ((cut - whole) * STD * 255).abs()
        assert difference.max() < 2.01
        assert difference.mean() < 0.25


def test_what_the_device_cuts_does_not_depend_on_workers_or_processes(folders, monkeypatch):
    args, dataset, prepare = held_on_the_device(folders, input_size=32)
    args.batch_size = 12
    ((batch,),) = datasets.build_train_loader(dataset, args).steps(1)
    alone = prepare(batch.data[0])
    args.batch_size, args.num_workers = 6, 2
    monkeypatch.setattr(datasets, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
        parts += [batch.data[0] for step in datasets.build_train_loader(dataset, args).steps(1) for batch in step]
    assert torch.equal(torch.cat([prepare(part) for part in parts]), alone)


def test_a_device_without_room(folders, monkeypatch):
    args, dataset, _ = held_on_the_device(folders, input_size=32)
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**20)
    dataset.held.images *= 50
    with pytest.raises(UsageError, match=r"the images take 0\.0 GiB, cpu has 0\.0 GiB free; give --in_memory host"):
        datasets.build_prepare(dataset, args, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"crops and flips alone, which --aa rand-m9-mstd0.5-inc1 is not; give --aa '', or --in_memory host"),
        ({"aa": "", "reprob": 0.25}, "--reprob 0.25 is not; give --reprob 0"),
        ({"aa": "", "reprob": 0, "color_jitter": 0.4}, "--color_jitter 0.4 is not"),
        ({"aa": "", "reprob": 0, "train_interpolation": "random"}, "--train_interpolation bicubic"),
        ({"aa": "", "reprob": 0, "input_size": 32}, "--input_size 32: .* above 32 or the .*short side, which is 40"),
    ],
)
def test_fine_tuning_on_the_device_only_crops_and_flips(folders, flags, message):
    common = {"data_set": "image_folder", "data_path": folders / "train", "in_memory": "device", "num_workers": 0}
    args = finetune_args(**common, **flags)
    dataset, _ = datasets.build_dataset(True, args)
    with pytest.raises(UsageError, match=message):
        datasets.finetune_in_memory(dataset, args, torch.device("cpu"))


@pytest.mark.parametrize(("size", "kind"), [(32, "shifts"), (48, "crops")])
def test_fine_tuning_on_the_device(tmp_path, size, kind):
    for i in range(6):
        save(picture(40, 32, seed=i), tmp_path / "ab"[i % 2] / f"{i}.png")
    args = finetune_args(
        data_set="image_folder", data_path=tmp_path, in_memory="device", num_workers=0, aa="", reprob=0, input_size=size
    )
    dataset, prepare = datasets.finetune_in_memory(datasets.build_dataset(True, args)[0], args, torch.device("cpu"))
    seed_all(0)
    boxes, labels = zip(*(dataset[i] for i in range(6)), strict=True)
    assert labels == (0, 0, 0, 1, 1, 1)
    found = prepare(torch.stack(boxes))
    for (index, *box), image in zip(torch.stack(boxes).tolist(), found, strict=True):
        assert (box[2:4] == [32, 32]) == (kind == "shifts")
        whole = dataset.held.images[index]
        expected = crop(whole, Box(*box), size) / 255
        difference = (image * STD + MEAN - expected).abs() * 255
        assert difference.max() < (2.01 if kind == "crops" else 1e-3)


def test_pretraining_from_memory(scripts, tmp_path):
    """From the host's memory with the same bits, from the device's with the same loss up to rounding."""
    for mode in ("no", "host", "device"):
        flags = ("--in_memory", mode, "--epochs", 2, "--vis_freq", 1)
        result = scripts.pretrain(*flags, "--output_dir", tmp_path / mode)
        assert result.code == 0, result.err
    models = {mode: load(tmp_path / mode / "checkpoint-1.pth")["model"] for mode in ("no", "host")}
    assert same(*models.values())
    losses = [records(tmp_path / mode)[-1]["train_loss"] for mode in ("no", "device")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    pictures = [(tmp_path / mode / "reconstruction-0.png").read_bytes() for mode in ("no", "host")]
    assert pictures[0] == pictures[1]


# ---- the first images of each class


def test_first_of_each_class(folders):
    dataset, _ = datasets.build_dataset(True, finetune_args(data_set="image_folder", data_path=folders / "train"))
    own = dataset.transform
    few = datasets.first_of_each_class(dataset, 3, "it")
    chosen = [dataset.paths[i] for i in few.indices]
    expected = [folders / "train" / name / f"{j}.png" for name in ("ant", "bee", "cat") for j in range(3)]
    assert (len(few), chosen) == (9, [str(path) for path in expected])
    assert len(datasets.first_of_each_class(dataset, 99, "it")) == len(dataset)
    whole = memory.with_transform(few, torch.clone)
    image, label = whole[4]
    assert (label, few[4][0].shape) == (1, (3, 224, 224))
    np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(expected[4])))
    assert dataset.transform is few.transform is own


def test_first_of_each_class_needs_labels(tmp_path):
    save(picture(), tmp_path / "a" / "0.png")
    files = datasets.build_dataset(True, finetune_args(data_set="torch/image_folder", data_path=tmp_path))[0]
    assert len(datasets.first_of_each_class(files, 1, "it")) == 1
    remote = TimmFiles(SimpleNamespace(reader=SimpleNamespace()), "hfds/it", in_chans=3)
    for unlisted in (Stream(5), remote):
        with pytest.raises(UsageError, match=r"--images_per_class 2: it does not list its labels; leave it out"):
            datasets.first_of_each_class(unlisted, 2, "it")


def test_training_on_few_images_of_each_class(scripts, tmp_path):
    """The same bits as from a folder with nothing else in it, also from memory."""
    for source in scripts.train.glob("*/*.png"):
        kept = sorted(source.parent.iterdir())[:4]
        if source in kept:
            save(Image.open(source), tmp_path / "few" / source.parent.name / source.name)
    for name, flags in {
        "folder": ("--data_path", tmp_path / "few"),
        "flag": ("--images_per_class", 4),
        "memory": ("--images_per_class", 4, "--in_memory", "host"),
    }.items():
        result = scripts.finetune(*flags, "--output_dir", tmp_path / name)
        assert (result.code, result.err) == (0, "")
        assert "16 images of 4 classes" in result.out
    models = [load(tmp_path / name / "checkpoint-2.pth")["model"] for name in ("folder", "flag", "memory")]
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    result = scripts.finetune("--images_per_class", 0)
    assert (result.code, result.err) == (2, "error: --images_per_class 0: must be at least 1\n")


# ---- channels and depths


def array_folder(root, dtype, channels=5, count=8, size=24):
    """Class folders a and b of .npy files, whose channels differ between the classes."""
    random = np.random.RandomState(0)
    for i in range(count):
        array = random.randint(0, 200, (channels, size, size)).astype(dtype)
        array[i % 2] += np.asarray(50, dtype)
        path = root / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array if i % 3 else array.transpose(1, 2, 0))
    return root


def with_mean_std(parser, channels, *flags):
    words = ["--in_chans", channels, "--mean", *[0.3] * channels, "--std", *[0.2] * channels, *flags]
    return parser.get_args_parser().parse_args([str(word) for word in words])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_many_channels_in_pretraining(tmp_path, dtype):
    array_folder(tmp_path, dtype)
    args = with_mean_std(main_pretrain, 5, "--data_set", "image_folder", "--data_path", tmp_path, "--input_size", 16)
    dataset = datasets.build_pretrain_dataset(args)
    image, _ = dataset[0]
    assert (image.shape, image.dtype) == ((5, 16, 16), torch.uint8 if dtype == np.uint8 else torch.float32)
    seed_all(1)
    image, _ = dataset[3]
    seed_all(1)
    array = np.load(dataset.paths[3])
    array = array if array.shape[0] == 5 else np.ascontiguousarray(array.transpose(2, 0, 1))
    array = array if dtype == np.uint8 else array.astype(np.float32) / (65535 if dtype == np.uint16 else 1)
    assert torch.equal(image, crop(torch.from_numpy(array), draw_box(24, 24, args.min_crop), 16))
    found = datasets.build_prepare(dataset, args, torch.device("cpu"))(image[None])[0]
    torch.testing.assert_close(found, (image / (255 if dtype == np.uint8 else 1) - 0.3) / 0.2)


def test_many_channels_in_fine_tuning(tmp_path, logs):
    array_folder(tmp_path, np.uint16)
    common = ("--data_set", "image_folder", "--data_path", tmp_path, "--eval_data_path", tmp_path, "--input_size", 40)
    args = with_mean_std(main_finetune, 5, *common, "--reprob", 1)
    train, nb_classes = datasets.build_dataset(True, args)
    assert nb_classes == 2
    assert "--aa rand-m9-mstd0.5-inc1: is made for 8-bit RGB images, so it is off" in logs.text
    seed_all(0)
    image, _ = train[0]
    assert (image.shape, image.dtype) == ((5, 40, 40), torch.float32)
    kept = (image * 0.2 + 0.3).abs() < 0.02  # values are below 300 of 65535, what is erased is noise around 0
    assert 0.3 < kept.float().mean() < 0.99
    val, _ = datasets.build_dataset(False, args)
    image, _ = val[1]
    assert image.shape == (5, 40, 40)
    torch.testing.assert_close(image * 0.2 + 0.3, torch.full_like(image, 100 / 65535), rtol=0, atol=300 / 65535)
    args.input_size = 24  # shifted over the edges, there black, and mirrored
    args.reprob = 0
    train, _ = datasets.build_dataset(True, args)
    seed_all(0)
    assert ((train[1][0] * 0.2 + 0.3).abs() < 1e-6).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--aa", "rand-m5"), "--aa rand-m5: is for 8-bit RGB images, which these are not; leave it out"),
        (("--color_jitter", 0.4), "--color_jitter 0.4: is for 8-bit RGB images"),
        (("--train_interpolation", "random"), "--train_interpolation random: is for 8-bit RGB images"),
        (("--in_chans", 4), r"a/0\.npy: has 5 channels \(24 x 24 x 5\), not --in_chans 4; give --in_chans 5"),
    ],
)
def test_many_channels_and_flags_that_are_not_for_them(tmp_path, flags, message):
    array_folder(tmp_path, np.uint16)
    args = with_mean_std(main_finetune, 5, "--data_set", "image_folder", "--data_path", tmp_path, *flags)
    with pytest.raises(UsageError, match=message):
        datasets.build_dataset(True, args)


def test_one_channel(tmp_path):
    for i in range(4):
        save(picture(seed=i).convert("L" if i else "RGB"), tmp_path / f"a/{i}.png")
    flags = {"data_set": "image_folder", "data_path": tmp_path, "input_size": 32, "in_chans": 1}
    args = pretrain_args(**flags)
    dataset = datasets.build_pretrain_dataset(args)
    assert {dataset[i][0].shape for i in range(4)} == {(1, 32, 32)}
    mean, std = datasets.mean_std(args)
    assert (mean, std) == ((np.mean(IMAGENET_DEFAULT_MEAN),), (np.mean(IMAGENET_DEFAULT_STD),))
    finetune = finetune_args(imagenet_default_mean_and_std="false", **flags)
    assert datasets.mean_std(finetune) == ((0.5,), (0.5,))
    image = datasets.build_transform(False, finetune)(picture())
    assert image.shape == (1, 32, 32)
    grey = datasets.build_transform(False, finetune)(picture().convert("L"))
    assert torch.equal(image, grey)
    shapes = datasets.build_pretrain_dataset(pretrain_args(data_set="shapes", input_size=32, in_chans=1))
    assert shapes[0][0].shape == (1, 32, 32)
    with pytest.raises(UsageError, match=r"--data_set shapes: has 3 channels .* not --in_chans 2; give --in_chans 3"):
        datasets.build_pretrain_dataset(with_mean_std(main_pretrain, 2, "--data_set", "shapes", "--input_size", 32))


def test_sixteen_bits_need_a_mean(tmp_path):
    Image.fromarray(np.full((40, 60), 30000, np.uint16)).save(tmp_path / "0.png")
    save(Image.new("L", (60, 40), 51), tmp_path / "1.png")
    flags = ("--data_set", "image_folder", "--data_path", tmp_path, "--input_size", 32)
    args = pretrain_args(data_set="image_folder", data_path=tmp_path, input_size=32, in_chans=1)
    with pytest.raises(UsageError, match=r"0\.png: not of 8 bits, which needs --mean and --std.*--in_chans 1 computes"):
        datasets.build_pretrain_dataset(args)
    dataset = datasets.build_pretrain_dataset(with_mean_std(main_pretrain, 1, *flags))
    torch.testing.assert_close(dataset[0][0], torch.full((1, 32, 32), 30000 / 65535))
    torch.testing.assert_close(dataset[1][0], torch.full((1, 32, 32), 0.2))  # all alike
    (tmp_path / "0.png").rename(tmp_path / "2.png")
    dataset = datasets.build_pretrain_dataset(args)  # 8-bit, as the first one is
    assert torch.equal(dataset[1][0], torch.full((1, 32, 32), round(30000 / 257), dtype=torch.uint8))


def test_nothing_readable_is_said_at_the_start(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"--data_path .*: its first 3 images are unreadable: .*2\.png"):
        datasets.build_pretrain_dataset(pretrain_args(data_set="image_folder", data_path=tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--in_chans 13", r"--in_chans 13: needs --mean and --std, .*mean_std.py --data_path FOLDER --in_chans 13"),
        ("--in_chans 0", "--in_chans 0: must be at least 1"),
        ("--mean 1 2 3", "--mean: give --mean and --std, or neither"),
        ("--std 1 2 3", "--std: give --mean and --std, or neither"),
        ("--mean 1 2 --std 1 2 3", "--mean: has 2 numbers, --in_chans 3 needs 3"),
        ("--mean 1 2 3 --std 1 2", "--std: has 2 numbers, --in_chans 3 needs 3"),
        ("--mean 1 2 3 --std 1 2 0", "--std 0.0: must be above 0"),
    ],
)
@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_mistakes_with_channels(script, flags, message):
    with pytest.raises(UsageError, match=message):
        script.check_args(script.get_args_parser().parse_args(flags.split()))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_many_channels_end_to_end(scripts, tmp_path, dtype):
    """Pre-training, fine-tuning from its checkpoint and evaluation of five-channel arrays, by the printed flags."""
    data = array_folder(tmp_path / "data", dtype, count=16)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mean_std.py", "--data_path", str(data), "--in_chans", "5"])
        mean_std.main()
    flags = ("--data_path", data, "--in_chans", 5, *out.getvalue().split(), "--epochs", 2)
    result = scripts.pretrain(*flags, "--output_dir", tmp_path / "pre", "--vis_freq", 1)
    assert result.code == 0, result.err
    assert (tmp_path / "pre/reconstruction-1.png").is_file()
    for more in ((), ("--in_memory", "device", "--aa", "", "--reprob", 0, "--input_size", 24)):
        source = ("--eval_data_path", data, "--finetune", tmp_path / "pre/checkpoint-1.pth", "--auto_resume", "false")
        result = scripts.finetune(*flags, *source, "--output_dir", tmp_path / "fine", *more)
        assert result.code == 0, result.err
    best = tmp_path / "fine/checkpoint-best.pth"
    result = scripts.finetune(*flags, "--eval_data_path", data, "--eval", "true", "--resume", best)
    assert result.code == 0, result.err
    assert "(16 images)" in result.out
    result = scripts.pretrain(*flags, "--in_chans", 3)
    assert (result.code, result.err) == (2, "error: --mean: has 5 numbers, --in_chans 3 needs 3\n")


def test_lists_end_to_end(scripts, tmp_path):
    """The classes of a training list number those of an evaluation list, with other paths; both without the folders."""
    train = [f"{path.relative_to(scripts.train)}\tclass {path.parent.name}" for path in scripts.train.rglob("*.png")]
    val = [f"{path.relative_to(scripts.val)} {path.parent.name[1]}" for path in scripts.val.rglob("*.png")]
    for name, lines in (("train", sorted(train)), ("val", sorted(val)), ("bare", [x.split("\t")[0] for x in train])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    result = scripts.pretrain("--train_list", tmp_path / "bare.txt", "--epochs", 2)
    assert "40 images" in result.out, result.err
    flags = ("--train_list", tmp_path / "train.txt", "--eval_list", tmp_path / "val.txt", "--epochs", 2)
    result = scripts.finetune(*flags, "--output_dir", tmp_path / "out")
    assert "40 images of 4 classes" in result.out, result.err
    best = tmp_path / "out/checkpoint-best.pth"
    assert load(best)["classes"] == [f"class c{i}" for i in range(4)]
    folders = scripts.finetune("--epochs", 2, "--output_dir", tmp_path / "folders")
    assert load(tmp_path / "folders/checkpoint-1.pth")["classes"] == [f"c{i}" for i in range(4)]
    assert records(tmp_path / "out")[-1] == records(tmp_path / "folders")[-1], folders.err
    for more in (flags, flags[2:]):  # with and without the training list
        result = scripts.finetune(*more, "--eval", "true", "--resume", best)
        assert "(22 images)" in result.out, result.err
    result = scripts.finetune("--train_list", tmp_path / "bare.txt")
    assert result.code == 2
    assert "line 1, " in result.err
    result = scripts.finetune("--train_list", tmp_path / "train.txt", "--data_set", "shapes")
    assert result.err == "error: --train_list: is for --data_set image_folder, not shapes\n"


def test_tars_end_to_end(scripts, tmp_path):
    for name, folder in (("train", scripts.train), ("val", scripts.val)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(folder, name)
    flags = ("--data_path", tmp_path / "train.tar", "--epochs", 2)
    result = scripts.pretrain(*flags, "--num_workers", 2)
    assert "40 images" in result.out, result.err
    result = scripts.finetune(*flags, "--eval_data_path", tmp_path / "val.tar")
    assert "40 images of 4 classes" in result.out, result.err
    assert "(22 images)" in result.out
    result = scripts.finetune(*flags)  # folders are numbered by the classes in the tar
    assert "(22 images)" in result.out, result.err


def shards_of(root, folder, count=3):
    """The files of a folder, spread over a folder of tars."""
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{i % count}.tar", "a") as tar:
            tar.add(path, path.relative_to(folder))
    return root


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_on_shards_gives_the_bits_of_files(scripts, tmp_path, stage):
    """Also when it is stopped inside an epoch and goes on, and with loader processes."""
    train, val = (shards_of(tmp_path / folder.name, folder) for folder in (scripts.train, scripts.val))
    flags = ("--data_path", train, *(["--eval_data_path", f"{val}/*.tar"] if stage == "finetune" else []))
    common = ("--epochs", 2, "--save_ckpt_steps", 3)
    script = getattr(scripts, stage)
    assert script(*common, "--output_dir", tmp_path / "files").code == 0
    with killed_after(STEPS + 4):
        script(*common, *flags, "--output_dir", tmp_path / "tars")
    result = script(*common, *flags, "--output_dir", tmp_path / "tars", "--num_workers", 2)
    assert "resumed from" in result.out, result.err
    assert same(*(load(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("files", "tars")))
    scores = [records(tmp_path / name)[-1].get("test_loss") for name in ("files", "tars")]
    assert scores[0] == scores[1]


def test_shards_are_evaluated_by_the_classes_of_training(scripts, tmp_path):
    """Of shards, folders or lists, whichever was trained on."""
    train = shards_of(tmp_path / "train", scripts.train)
    few = shards_of(tmp_path / "few", scripts.val / "c2")
    with pytest.raises(UsageError, match=r"few: holds no labels"):
        datasets.labelled_files(True, finetune_args(data_set="image_folder", data_path=few))
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        tar.add(scripts.val / "c2", "c2")
    for path in (train, scripts.train):
        args = finetune_args(data_set="image_folder", data_path=path, eval_data_path=tmp_path / "few.tar")
        found = datasets.labelled_files(False, args)
        assert (found.classes, set(found.targets)) == (["c0", "c1", "c2", "c3"], {2})
    args = finetune_args(data_set="IMNET", data_path=tmp_path)
    assert len(datasets.build_pretrain_dataset(pretrain_args(data_set="IMNET", data_path=tmp_path))) == 40
    with pytest.raises(UsageError, match="4 class folders, --data_set IMNET has 1000"):
        datasets.build_dataset(True, args)


def test_ranks_make_one_index_of_tars(tmp_path, monkeypatch):
    """The first process goes first, the others find it."""
    entered = []

    @contextlib.contextmanager
    def first():
        entered.append(not list(tmp_path.glob(".fcmae*")))
        yield
        entered.append(bool(list(tmp_path.glob(".fcmae*"))))

    monkeypatch.setattr("utils.files.main_process_first", first)
    save(picture(8, 8), tmp_path / "x/a/0.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", "x")
    datasets.open_tar(str(tmp_path / "x.tar"), "--data_path", 3)
    assert entered == [True, True]


def test_mean_and_deviation_of_shards(scripts, tmp_path, capsys, monkeypatch):
    printed = []
    for path in (scripts.train, shards_of(tmp_path / "train", scripts.train)):
        monkeypatch.setattr(sys, "argv", ["mean_std.py", "--data_path", str(path), "--num_workers", "0"])
        mean_std.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_hidden_folders_are_no_classes(scripts, tmp_path):
    for split, folder in (("train", scripts.train), ("val", scripts.val)):
        shutil.copytree(folder, tmp_path / split)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
    save(picture(24, 24), tmp_path / "train/.ipynb_checkpoints/0.png")
    save(picture(24, 24), tmp_path / "train/c0/.ipynb_checkpoints/0.png")
    (tmp_path / "train/c0/._0.png").write_text("Mac OS X")
    flags = ("--data_path", tmp_path / "train", "--eval_data_path", tmp_path / "val", "--epochs", 1)
    result = scripts.finetune(*flags, "--warmup_epochs", 0)
    assert "40 images of 4 classes" in result.out, result.err
    assert "unreadable" not in result.out
    args = finetune_args(data_set="image_folder", data_path=tmp_path / "train", eval_data_path=tmp_path / "val")
    assert datasets.labelled_files(False, args).classes == ["c0", "c1", "c2", "c3"]


def test_paths_that_are_no_text(scripts, script, tmp_path):
    """They are shown with escapes wherever something is shown."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        shutil.copytree(scripts.train, root / "train")
    except OSError:
        pytest.skip("a file system that refuses such names")
    (root / "train/c0" / os.fsdecode(b"\xe9.png")).write_text("no image")
    (root / "list.txt").write_bytes(b"".join(os.fsencode(path) + b"\tx\n" for path in (root / "train").rglob("*.png")))
    for more in ((), ("--train_list", root / "list.txt")):
        words = [*COMMON.split(), "--data_path", root / "train", "--epochs", 1, "--warmup_epochs", 0, *more]
        words += ["--output_dir", root / "out", "--auto_resume", "false", "--decoder_embed_dim", 16]
        result = script("main_pretrain.py", *words)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert r"caf\udce9/out: TensorBoard writes to UTF-8 paths alone; give a --log_dir" in result.stderr
        words += ["--log_dir", tmp_path / "curves"]
        result = script("main_pretrain.py", *words, env={"PYTHONIOENCODING": "utf-8:strict"})
        assert result.returncode == 0, result.stderr
        assert "unreadable image, the next one takes its place: " in result.stdout
        assert r"caf\udce9/train/c0/\udce9.png" in result.stdout
        assert "Logging error" not in result.stderr
    start = json.loads((root / "out/run.json").read_text())["starts"][0]
    assert start["args"]["data_path"] == rf"{tmp_path}/caf\udce9/train"


def test_hugging_faces_package_has_the_name_of_this_module(tmp_path, monkeypatch):
    """`import datasets` finds it from then on, with whatever it imports of itself later."""
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(UsageError, match=r"--data_set hfds/x: needs Hugging Face's package: pip install datasets"):
        datasets._give_way("hfds/x")
    assert sys.modules["datasets"] is datasets
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/__init__.py").write_text("def load_dataset(): from datasets import late; return late.WORD")
    (tmp_path / "datasets/late.py").write_text("WORD = 7")
    path = [*sys.path, str(tmp_path)]
    monkeypatch.setattr(sys, "path", path)
    for _ in range(2):
        datasets._give_way("hfds/x")
        assert sys.path is path
        assert __import__("datasets").load_dataset() == 7


# ---- tools


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


# ---- samples


def drawn(size=32, count=10):
    transform = datasets.build_transform(True, finetune_args(input_size=size))
    return Shapes("train", size=size, num_samples=count, transform=transform)


def test_samples_depend_on_seed_epoch_and_index_alone():
    samples = TrainSamples(drawn(), seed=1, draw=partial(torch.rand, 4))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(5)]
    first = {key: samples[key] for key in keys}
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    for key in reversed(keys):
        image, label, mask = samples[key]
        assert torch.equal(image, first[key][0])
        assert label == key[1]
        assert torch.equal(mask, first[key][2])
    assert len({tuple(mask.tolist()) for _, _, mask in first.values()}) == len(keys)
    for index in range(5):
        assert not torch.equal(first[0, index][0], first[1, index][0])
        assert not torch.equal(first[0, index][0], TrainSamples(drawn(), seed=2)[0, index][0])


def epoch_of(loader, epoch, start_step=0):
    return [[part.clone() for part in batch.data] for step in loader.steps(epoch, start_step) for batch in step]


def test_loader_does_not_depend_on_workers():
    loaders = [
        datasets.build_train_loader(
            drawn(), finetune_args(batch_size=2, update_freq=2, num_workers=n, seed=4), partial(torch.rand, 3)
        )
        for n in (0, 2)
    ]
    epochs = []
    for epoch in (0, 1):  # the workers live on
        one, other = (epoch_of(loader, epoch) for loader in loaders)
        assert len(one) == len(other) == 5
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        epochs.append(torch.cat([labels for _, labels, _ in one]).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]  # also on one process, every epoch has its own order
    again = epoch_of(loaders[1], 0, start_step=1)  # a resume in the middle
    expected = epoch_of(loaders[0], 0)[2:]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, expected, strict=True))


# ---- steps

SPREADS = [
    (num_samples, batch_size, update_freq, world_size, multiple)
    for num_samples in (1, 2, 5, 7, 8, 11, 12, 23, 24, 25, 47, 60)
    for batch_size in (1, 2, 4, 6)
    for update_freq in (1, 2, 3)
    for world_size in (1, 2, 3, 5)
    for multiple in (1, 2)
    if batch_size % multiple == 0
]


def by_step(sampler, start_step=0):
    """The batches of every step, as the sampler yields them one after the other."""
    batches = iter(sampler)
    steps = [[next(batches) for _ in sampler.step(step)] for step in range(start_step, sampler.steps)]
    assert next(batches, None) is None
    return steps


def samples_of_steps(num_samples, batch_size, update_freq, world_size, multiple):
    """The samples of each step over all processes, shares checked; and how many batches were another process's."""
    samplers = [
        StepSampler(num_samples, batch_size, update_freq, rank, world_size, seed=5, multiple=multiple)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(3)
    found, borrowed = [], 0
    for step, ranks in enumerate(zip(*map(by_step, samplers), strict=True)):
        assert len(set(map(len, ranks))) == 1  # or gradients could not be averaged
        assert 1 <= len(ranks[0]) <= update_freq
        shares = [share for sampler in samplers for *_, share in sampler.step(step)]
        batches = [keys for batches in ranks for keys in batches]
        samples = [key for keys, share in zip(batches, shares, strict=True) if share for key in keys]
        assert len(set(samples)) == len(samples)
        for keys, share in zip(batches, shares, strict=True):
            assert 0 < len(keys) <= batch_size
            assert len(keys) % multiple == 0
            if share:  # every sample has the same part in the mean of the gradients over processes
                assert share / len(keys) / world_size == pytest.approx(1 / len(samples))
            else:
                assert len(keys) == multiple
                assert set(keys) <= set(samples)
                borrowed += 1
        found.append(set(samples))
    return found, borrowed


def test_steps_hold_the_same_samples_however_they_are_spread():
    """Every way to make up a global batch; the rest is a step from a quarter of it on."""
    borrowed, cases = 0, Counter()
    for total in (1, 2, 4, 6, 8, 12, 16, 30):
        for num_samples in {*range(total, 2 * total), 3 * total + total // 4}:
            for multiple in {1, 2 - total % 2}:
                full, rest = divmod(num_samples, total)
                rest -= rest % multiple
                sizes = [total] * full + [rest] * (rest >= total / 4)
                expected = None
                sides = itertools.product(range(multiple, total + 1, multiple), range(1, total + 1))
                for batch_size, world_size in sides:
                    if total % (batch_size * world_size):
                        continue
                    update_freq = total // (batch_size * world_size)
                    found, more = samples_of_steps(num_samples, batch_size, update_freq, world_size, multiple)
                    expected, borrowed = expected or found, borrowed + more
                    assert list(map(len, found)) == sizes, (num_samples, batch_size, update_freq, world_size)
                    assert found == expected, (num_samples, batch_size, update_freq, world_size)
                    cases[rest > 0, len(sizes) > full] += 1
    assert borrowed
    assert min(cases[False, False], cases[True, False], cases[True, True]) > 0


def test_epochs_and_seeds_have_their_own_order():
    sampler = StepSampler(50, 10)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler.seed = seed
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for _, index in batch])
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    sampler.set_epoch(0)
    assert orders[2] == [index for batch in sampler for _, index in batch]


@pytest.mark.parametrize(("world_size", "multiple"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_a_start_in_the_middle_goes_on_as_before(world_size, multiple):
    sampler = StepSampler(45, 4, 2, 0, world_size, seed=1, multiple=multiple)
    whole = by_step(sampler)
    assert len(sampler) == sum(map(len, whole))
    for start in range(len(whole) + 1):
        sampler.set_epoch(0, start)
        assert by_step(sampler, start) == whole[start:]
        assert len(sampler) == sum(map(len, whole[start:]))
        assert sampler.steps == len(whole)


class Numbers(Dataset):
    def __init__(self, count):
        self.values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index], index


def test_shares_weigh_every_sample_of_a_step_alike(monkeypatch):
    for num_samples, batch_size, update_freq, world_size, multiple in SPREADS:
        if num_samples not in (11, 25) or num_samples < batch_size * update_freq * world_size:
            continue
        monkeypatch.setattr(datasets, "get_world_size", lambda n=world_size: n)
        args = finetune_args(batch_size=batch_size, update_freq=update_freq, num_workers=0)
        loaders = []
        for rank in range(world_size):
            monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
            loaders.append(datasets.build_train_loader(Numbers(num_samples), args, multiple=multiple))
        assert len({len(loader) for loader in loaders}) == 1
        count = 0
        for steps in zip(*(loader.steps(0) for loader in loaders), strict=True):
            spread = [list(step) for step in steps]
            batches = [batch for step in spread for batch in step]
            values = torch.cat([batch.data[0] for batch in batches if batch.share])
            # the mean over processes of the sum over batches, as gradients are combined
            combined = sum(batch.share * batch.data[0].mean() for batch in batches) / world_size
            torch.testing.assert_close(combined, values.mean())
            assert sum(batch.share for batch in batches) / world_size == pytest.approx(1)
            for step in spread:
                assert [batch.last for batch in step] == [False] * (len(step) - 1) + [True]
            count += 1
        assert count == len(loaders[0])


def test_fewer_images_than_a_step():
    with pytest.raises(UsageError, match=r"--batch_size 4: a step takes 12 images .* has 11"):
        datasets.build_train_loader(Numbers(11), finetune_args(batch_size=4, update_freq=3, num_workers=0))
    assert len(datasets.build_train_loader(Numbers(12), finetune_args(batch_size=4, update_freq=3, num_workers=0))) == 1


def test_batches_are_loaded_when_they_are_asked_for():
    read = []

    class Watched(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = datasets.build_train_loader(Watched(24), finetune_args(batch_size=2, update_freq=3, num_workers=0))
    for step, batches in enumerate(loader.steps(0)):
        for i, batch in enumerate(batches):
            assert len(read) == 6 * step + 2 * i + 2
            assert batch.last == (i == 2)
    assert len(read) == 24


class Stream(IterableDataset):
    """Gives `count` samples (epoch, number) and claims `claimed`; as its own reader, as timm's, of shards with `wds/`.

    Shards are spread over processes and workers, and cut or repeated to one length on several processes, as timm does.
    """

    def __init__(self, count, claimed=None, shards=1):
        self.count, self.num_samples, self.epoch, self.workers = count, claimed or count, None, None
        self.reader, self.ds, self.dist_rank, self.dist_num_replicas = self, None, 0, 1
        self.split_info = SplitInfo([range(i, count, shards) for i in range(shards)])

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.ds is None:
            first, every = self.dist_rank * workers + worker, self.dist_num_replicas * workers
            self.ds = [number for shard in self.split_info.filenames[first::every] for number in shard]
        numbers = iter(self.ds)
        if self.dist_num_replicas > 1:
            numbers = itertools.islice(numbers, -(-self.count // (self.dist_num_replicas * workers)))
        return ((torch.tensor(-1 if self.epoch is None else self.epoch), number) for number in numbers)


@dataclasses.dataclass
class SplitInfo:
    filenames: list
    shard_lengths: tuple = ()


@pytest.mark.parametrize(
    ("count", "claimed", "steps"),
    [
        (12, None, 3),
        (11, None, 3),  # the rest of 3 is more than a quarter
        (9, None, 3),
        (4, None, 1),
        (11, 16, 4),  # the stream ends before its word
        (19, 11, 3),  # and after it
    ],
)
def test_streams(count, claimed, steps):
    """As many full steps as there are of files, also where the stream has to be read on from its beginning."""
    args = finetune_args(batch_size=2, update_freq=2, num_workers=0)
    stream = Stream(count, claimed)
    loader = datasets.build_train_loader(stream, args, multiple=1)
    assert stream.workers is None
    for epoch in (0, 5):
        found = [list(step) for step in loader.steps(epoch)]
        assert len(found) == len(loader) == steps
        for step in found:
            assert [batch.share for batch in step] == [0.5, 0.5]
            assert [batch.last for batch in step] == [False, True]
        numbers = torch.cat([batch.data[1] for step in found for batch in step]).tolist()
        again = list(range(count // 2 * 2))
        assert numbers == (again * 9)[: 4 * steps]
        assert {e for step in found for batch in step for e in batch.data[0].tolist()} == {epoch}
        resumed = [batch.data[1].tolist() for step in loader.steps(epoch, start_step=1) for batch in step]
        assert [n for batch in resumed for n in batch] == numbers[4:]


def test_the_steps_of_a_stream_depend_on_the_global_batch_alone(monkeypatch):
    """Processes whose parts differ take the same number of batches, or their collectives would not meet."""
    for claimed in (12, 14, 15, 16, 40):
        for processes, batch_size, update_freq in ((1, 12, 1), (2, 6, 1), (3, 2, 2), (1, 3, 4)):
            monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
            args = finetune_args(batch_size=batch_size, update_freq=update_freq, num_workers=0)
            for count in (12, 13, 29):
                loader = datasets.build_train_loader(Stream(count, claimed), args)
                taken = [len(list(step)) for step in loader.steps(0)]
                assert taken == [update_freq] * (claimed // 12 + (claimed % 12 >= 3))


def test_a_stream_without_a_batch_is_one_line():
    loader = datasets.build_train_loader(Stream(3, 9), finetune_args(batch_size=4, num_workers=0))
    with pytest.raises(UsageError, match="--batch_size 4: no loader process has as many images of the stream"):
        next(next(loader.steps(0)))


def test_streams_know_the_loader_processes():
    stream = Stream(12)
    datasets.build_train_loader(stream, finetune_args(batch_size=2, num_workers=2))
    assert stream.workers == 2
    with pytest.raises(UsageError, match=r"--batch_size 64: .* has 12"):
        datasets.build_train_loader(stream, finetune_args(num_workers=0))


@pytest.mark.parametrize(
    ("shards", "processes", "workers", "lowered"),
    [(4, 2, 2, None), (4, 2, 3, 2), (5, 2, 3, 2), (1, 1, 10, 1), (2, 2, 0, None), (7, 3, 1, None)],
)
def test_each_loader_process_has_a_shard(shards, processes, workers, lowered, monkeypatch, logs):
    monkeypatch.setattr(datasets, "get_world_size", lambda: processes)
    args = finetune_args(data_set="wds/x", batch_size=2, num_workers=workers)
    stream = Stream(40, shards=shards)
    loader = datasets.build_train_loader(stream, args).loader
    assert loader.num_workers == (stream.workers or 0) == (workers if lowered is None else lowered)
    line = f"--num_workers {workers}: lowered to {lowered}, for {shards} shards in all"
    assert (line in logs.text) == (lowered is not None)
    assert args.num_workers == workers


def test_fewer_shards_than_processes(monkeypatch):
    monkeypatch.setattr(datasets, "get_world_size", lambda: 3)
    for workers in (0, 4):
        args = finetune_args(data_set="wds/x", batch_size=2, num_workers=workers)
        with pytest.raises(UsageError, match="--data_set wds/x: 2 shards for 3 processes; start 2, or write more"):
            datasets.build_train_loader(Stream(40, shards=2), args)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_shards_counts_every_image_once(workers, monkeypatch):
    args = finetune_args(data_set="wds/x", batch_size=4, num_workers=workers)
    for processes, shards in [(n, s) for n in (1, 2, 3) for s in (1, 2, 3, 5)] if not workers else [(2, 3), (2, 1)]:
        monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
        seen, claimed = [], 0
        for rank in range(processes):
            monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
            stream = Stream(23, shards=shards)
            stream.dist_rank, stream.dist_num_replicas = rank, processes  # as timm finds them
            stream.split_info.shard_lengths = [len(shard) for shard in stream.split_info.filenames]
            loader = datasets.build_eval_loader(stream, args, spread=True)
            seen += [number for batch in loader for number in batch[1].tolist()]
            claimed += len(loader.dataset)
        assert sorted(seen) == list(range(23)), (processes, shards)
        assert claimed == 23


def test_evaluation_of_other_streams_says_what_it_cannot(monkeypatch, logs):
    for processes, told in ((1, False), (2, True)):
        monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
        datasets.build_eval_loader(Stream(9), finetune_args(data_set="tfds/x", num_workers=0), spread=True)
        assert ("--data_set tfds/x: on several processes, images may count twice" in logs.text) == told


class Begun(Stream):
    def __iter__(self):
        self.reader.ds = "begun"
        return iter([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 9)


def test_pictures_do_not_begin_the_stream():
    """A reader that has begun before its workers are forked gives each of them the same part."""
    stream = Begun(40)
    assert main_pretrain.picture_images(stream, pretrain_args(data_set="wds/x", input_size=32)).shape == (8, 3, 32, 32)
    assert stream.reader.ds is None


def test_loaders_compare_the_number_of_images_between_processes(monkeypatch):
    compared = []
    monkeypatch.setattr(datasets, "check_same", lambda *values: compared.append(values))
    args = finetune_args(batch_size=4, num_workers=0)
    datasets.build_train_loader(Numbers(12), args)
    datasets.build_train_loader(Stream(9), args)
    datasets.build_eval_loader(Numbers(5), args, spread=True)
    assert compared == [(12, "training images"), (9, "training images"), (5, "evaluation images")]


# ---- evaluation


@pytest.mark.parametrize(("count", "world_size"), [(11, 1), (11, 2), (11, 3), (2, 3)])
def test_evaluation_sees_every_image_once(monkeypatch, count, world_size):
    args = finetune_args(batch_size=4, num_workers=0)
    monkeypatch.setattr(datasets, "get_world_size", lambda: world_size)
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
        for batch in datasets.build_eval_loader(Numbers(count), args, spread=True):
            assert len(batch[1]) <= 4
            seen += batch[1].tolist()
        whole = datasets.build_eval_loader(Numbers(count), args, spread=False)
        assert [i for batch in whole for i in batch[1].tolist()] == list(range(count))
    assert sorted(seen) == list(range(count))


def test_evaluation_does_not_depend_on_workers():
    transform = datasets.build_transform(False, finetune_args(input_size=32))
    dataset = Shapes("val", size=32, num_samples=7, transform=transform)
    one, other = (
        list(datasets.build_eval_loader(dataset, finetune_args(batch_size=3, num_workers=n), True)) for n in (0, 2)
    )
    assert [len(labels) for _, labels in one] == [3, 3, 1]
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
