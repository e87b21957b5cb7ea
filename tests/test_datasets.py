"""datasets.py: pixels against PIL, samples that depend on their key alone, steps however work is spread, bad data."""

import io
import logging
import pickle
import random
from collections import Counter
from functools import partial
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
from utils.crops import draw_box
from utils.errors import UsageError, run
from utils.seeding import seed_all
from utils.shapes import Shapes

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
def logs(caplog, monkeypatch):
    """The log, whether or not a script run by another test has redirected it."""
    log = logging.getLogger("fcmae")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    return caplog


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
        (384, 0.5, (60, 40), (384, 384)),
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


def test_jpeg_cut_anywhere_is_refused(tmp_path):
    save(picture(), tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    for length in range(0, len(whole) - 2, max(1, len(whole) // 60)):
        (tmp_path / "x.jpg").write_bytes(whole[:length])
        with pytest.raises(BadImage):
            datasets.load_image(str(tmp_path / "x.jpg"))


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
    loader = datasets.build_train_loader(OnlyBroken(), args)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: list(loader.steps(0)))
    assert stopped.value.code == 2
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
    steps = list(datasets.build_train_loader(dataset, args).steps(0))
    assert [step[0].data[0].shape for step in steps] == [(7, 3, 32, 32)] * 3
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
    steps = [[next(batches) for _ in sampler.step(step)[1]] for step in range(start_step, sampler.steps)]
    assert next(batches, None) is None
    return steps


def test_steps_hold_the_same_samples_however_they_are_spread():
    leftovers = 0
    for num_samples, batch_size, update_freq, world_size, multiple in SPREADS:
        case = (num_samples, batch_size, update_freq, world_size, multiple)
        total = batch_size * update_freq * world_size
        samplers = [
            StepSampler(num_samples, batch_size, update_freq, rank, world_size, seed=5, multiple=multiple)
            for rank in range(world_size)
        ]
        alone = StepSampler(num_samples, total, seed=5)
        for sampler in [*samplers, alone]:
            sampler.set_epoch(3)
        expected = [step[0] for step in by_step(alone)]
        ranks = [by_step(sampler) for sampler in samplers]
        assert len({len(steps) for steps in ranks}) == 1, case
        assert len(expected) - len(ranks[0]) in (0, 1), case
        used = []
        for step, reference in enumerate(expected[: len(ranks[0])]):
            spread = [steps[step] for steps in ranks]
            assert len({len(batches) for batches in spread}) == 1, case  # or gradients could not be averaged
            assert 1 <= len(spread[0]) <= update_freq, case
            sizes = [len(batch) for batches in spread for batch in batches]
            assert all(0 < size <= batch_size and size % multiple == 0 for size in sizes), case
            for together in zip(*spread, strict=True):  # even shares
                assert max(map(len, together)) - min(map(len, together)) <= multiple, case
            samples = [key for batches in spread for batch in batches for key in batch]
            assert len(set(samples)) == len(samples), case
            assert set(samples) == set(reference[: len(samples)]), case
            if len(reference) == total:
                assert len(samples) == total, case
            used += samples
        assert {epoch for epoch, _ in used} <= {3}
        left = num_samples - len(used)
        leftovers += left
        assert left < multiple * world_size, case
        rest = num_samples % total
        if left >= multiple:  # only where the rest, in whole batches, does not go round the processes
            assert rest // multiple // -(-rest // (batch_size * world_size)) < world_size, case
    assert leftovers


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
        for spread in zip(*(loader.steps(0) for loader in loaders), strict=True):
            batches = [batch for step in spread for batch in step]
            values = torch.cat([batch.data[0] for batch in batches])
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


class Stream(IterableDataset):
    """Gives `count` samples (epoch, number) and claims `claimed`."""

    def __init__(self, count, claimed=None):
        self.count, self.claimed, self.epoch, self.workers = count, claimed or count, None, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __len__(self):
        return self.claimed

    def __iter__(self):
        return iter([(self.epoch, i) for i in range(self.count)])


@pytest.mark.parametrize(
    ("count", "claimed", "windows"),
    [
        (12, None, [2, 2, 2]),
        (11, None, [2, 2, 1]),  # the last window is partial, the last batch, not full, is dropped
        (3, None, [1]),
        (11, 16, [2, 2, 1]),  # the stream ends before its word
        (16, 11, [2, 2, 1]),  # and after it
    ],
)
def test_streams(count, claimed, windows):
    args = finetune_args(batch_size=2, update_freq=2, num_workers=0)
    stream = Stream(count, claimed)
    loader = datasets.build_train_loader(stream, args, multiple=2)
    assert stream.workers is None
    for epoch in (0, 5):
        steps = list(loader.steps(epoch))
        assert [len(step) for step in steps] == windows
        for step in steps:
            assert [batch.share for batch in step] == [1 / len(step)] * len(step)
            assert [batch.last for batch in step] == [False] * (len(step) - 1) + [True]
        numbers = torch.cat([batch.data[1] for step in steps for batch in step])
        assert numbers.tolist() == list(range(2 * sum(windows)))
        assert {e for step in steps for batch in step for e in batch.data[0].tolist()} == {epoch}
    if claimed is None:
        assert len(loader) == len(windows)
    assert sum(len(batch[1]) for batch in datasets.build_eval_loader(stream, args, True)) == count


def test_streams_know_the_loader_processes():
    stream = Stream(12)
    datasets.build_train_loader(stream, finetune_args(batch_size=2, num_workers=2))
    assert stream.workers == 2
    with pytest.raises(UsageError, match=r"--batch_size 64: .* 12 images"):
        datasets.build_train_loader(stream, finetune_args(num_workers=0))


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
