"""datasets.py: data sets by name, their classes, channels and depths, and whole runs on them."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
from collections import Counter
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, cifar

import datasets
import main_finetune
import main_pretrain
from datasets import TrainSamples
from models import fcmae
from tests.pictures import MEAN, STD, broken_files, finetune_args, levels, picture, pretrain_args, save
from tests.small_runs import COMMON, load, same
from tests.test_transforms import POLICIES
from tools import mean_std
from utils.data.balance import first_of_each_class
from utils.data.sampling import EvalSamples
from utils.data.transforms import random_resized_crop
from utils.errors import UsageError
from utils.seeding import seed_all

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


def test_evaluation_leaves_broken_images_out(spoiled, logs):
    args = finetune_args(
        data_set="image_folder", data_path=spoiled / "train", eval_data_path=spoiled / "val", input_size=32,
        batch_size=3, num_workers=0,
    )  # fmt: skip
    dataset, nb_classes = datasets.build_dataset(False, args)
    assert nb_classes == 3
    assert len(dataset) == 8 + len(broken_files())
    loader = datasets.build_eval_loader(dataset, args, spread=True)
    for _ in range(2):
        labels = torch.cat([batch[1] for batch in loader])
        assert Counter(labels.tolist()) == {0: 4, 2: 4}
        assert len(loader.bad) == len(broken_files())
        for name in broken_files():  # once, however often they are met
            assert logs.text.count(f"not evaluated: {spoiled / 'val/cat' / f'0-{name}'}") == 1


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
        ({"data_set": "hfds/x"}, "--data_set hfds/x: unknown; .*Hugging Face.*tar shards, .*wds/ read"),
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
    assert len(datasets.build_pretrain_dataset(pretrain_args(data_set="image_folder", data_path=folders))) == 12
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
            (tmp_path / split / f"n{i:08d}" / "x.JPEG").symlink_to(tmp_path / "x.JPEG")
    save(picture(), tmp_path / "x.JPEG")
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
    assert first_of_each_class(train, 1, name).indices == list(range(6))
    val, nb_classes = datasets.build_dataset(False, args, train.classes)
    assert (len(val), nb_classes) == (6, classes)
    np.testing.assert_array_equal(levels(val[2][0]), noise[2].reshape(3, 32, 32).transpose(1, 2, 0))
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
    shutil.copy(spoiled / "train/bee/0-text.png", spoiled / "train/ant/0.png")  # the first
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
    args = finetune_args(data_set="tfds/some/set", data_path="train_root", eval_data_path="val_root", input_size=32)
    dataset, nb_classes = datasets.build_dataset(False, args)
    assert nb_classes == 2
    torch.testing.assert_close(dataset[0][0], ((1 - MEAN) / STD).expand(3, 32, 32))  # gray becomes RGB
    assert datasets.build_dataset(True, args)[0][0][0].shape == (3, 32, 32)
    assert datasets.build_pretrain_dataset(pretrain_args(data_set="tfds/some/set", input_size=32))[0][0].shape[0] == 3
    assert calls == [
        ("tfds/some/set", "val_root", "validation", False),
        ("tfds/some/set", "train_root", "train", True),
        ("tfds/some/set", None, "train", True),
    ]
    monkeypatch.setattr(Gray, "classes", None)
    with pytest.raises(UsageError, match="does not tell its number of classes; give --nb_classes"):
        datasets.build_dataset(True, args)
    args.nb_classes = 7
    assert datasets.build_dataset(True, args)[1] == 7


def test_everything_sent_to_workers_pickles(folders, cifar_files):
    """Loader processes may be started by spawn or forkserver, which pickle the data set."""
    mask = partial(main_pretrain.sample_mask, 4, 0.6)
    common = {"input_size": 32, "data_path": folders}
    named = [
        datasets.build_dataset(True, finetune_args(data_set=name, **common))[0]
        for name in ("shapes", "CIFAR", "CIFAR10", "torch/image_folder")
    ]
    folder = {"data_set": "image_folder", "input_size": 32, "data_path": folders / "train"}
    augmented = [datasets.build_dataset(True, finetune_args(aa=policy, **folder))[0] for policy in ("", *POLICIES)]
    unlabelled = [datasets.build_pretrain_dataset(pretrain_args(**folder))]
    for dataset in named + augmented + unlabelled:
        samples = TrainSamples(dataset, 0, mask)
        alike = (copy.__getitems__([(1, 3)])[0][0] for copy in (samples, pickle.loads(pickle.dumps(samples))))
        for one, other in zip(*alike, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        pickle.loads(pickle.dumps(EvalSamples(dataset))).__getitems__([0])
    pickle.dumps(datasets.build_dataset(False, finetune_args(eval_data_path=folders / "val", **folder))[0])


def test_training_on_few_images_of_each_class(scripts, tmp_path):
    """The same bits as from a folder with nothing else in it."""
    for source in scripts.train.glob("*/*.png"):
        kept = sorted(source.parent.iterdir())[:4]
        if source in kept:
            save(Image.open(source), tmp_path / "few" / source.parent.name / source.name)
    for name, flags in {
        "folder": ("--data_path", tmp_path / "few"),
        "flag": ("--images_per_class", 4),
    }.items():
        result = scripts.finetune(*flags, "--output_dir", tmp_path / name)
        assert (result.code, result.err) == (0, "")
        assert "16 images, 8 per optimizer step" in result.out
    assert same(*(load(tmp_path / name / "checkpoint-2.pth")["model"] for name in ("folder", "flag")))


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
    assert torch.equal(image, random_resized_crop(torch.from_numpy(array), (16, 16), args.min_crop))
    found = datasets.build_batch_transform(args, torch.device("cpu"))(image[None])[0]
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
    args.input_size = (24, 24)  # shifted over the edges, there black, and mirrored
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
        (("--in_chans", 4), r"a/0\.npy: has 5 channels \(5 x 24 x 24\), not --in_chans 4; give --in_chans 5"),
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
    with pytest.raises(UsageError, match=r"not of 8 bits, which needs --mean and --std.*--in_chans 1 computes"):
        datasets.build_pretrain_dataset(args)
    dataset = datasets.build_pretrain_dataset(with_mean_std(main_pretrain, 1, *flags))
    torch.testing.assert_close(dataset[0][0], torch.full((1, 32, 32), 30000 / 65535))
    torch.testing.assert_close(dataset[1][0], torch.full((1, 32, 32), 0.2))  # all alike
    save(Image.new("L", (60, 40), 51), tmp_path / "2.png")
    dataset = datasets.build_pretrain_dataset(args)  # 8-bit, as most are
    assert torch.equal(dataset[0][0], torch.full((1, 32, 32), round(30000 / 257), dtype=torch.uint8))


def test_nothing_readable_is_said_at_the_start(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"--data_path .*: of a sample of 3 files 3 are unreadable: .*0\.png"):
        datasets.build_pretrain_dataset(pretrain_args(data_set="image_folder", data_path=tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--in_chans 13", r"--in_chans 13: needs --mean and --std, .*mean_std.py --data_path FOLDER --in_chans 13"),
        ("--mean 1 2 3", "--mean: give --mean and --std, or neither"),
        ("--std 1 2 3", "--std: give --mean and --std, or neither"),
        ("--mean 1 2 --std 1 2 3", "--mean: has 2 numbers, --in_chans 3 needs 3"),
        ("--mean 1 2 3 --std 1 2", "--std: has 2 numbers, --in_chans 3 needs 3"),
    ],
)
@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_mistakes_with_channels(script, flags, message):
    with pytest.raises(UsageError, match=message):
        script.check_args(script.get_args_parser().parse_args(flags.split()))


@pytest.mark.slow
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
    source = ("--eval_data_path", data, "--finetune", tmp_path / "pre/checkpoint-1.pth")
    result = scripts.finetune(*flags, *source, "--output_dir", tmp_path / "fine")
    assert result.code == 0, result.err
    best = tmp_path / "fine/checkpoint-best.pth"
    result = scripts.finetune(*flags, "--eval_data_path", data, "--eval", "true", "--resume", best)
    assert result.code == 0, result.err
    assert "(16 images)" in result.out
    result = scripts.pretrain(*flags, "--in_chans", 3)
    assert (result.code, result.err) == (2, "error: --mean: has 5 numbers, --in_chans 3 needs 3\n")


@pytest.mark.slow
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
        assert re.search(r"caf\\udce9/out: no place for curves .*'utf-8' .*; give another --log_dir", result.stderr)
        words += ["--log_dir", tmp_path / "curves"]
        result = script("main_pretrain.py", *words, env={"PYTHONIOENCODING": "utf-8:strict"})
        assert result.returncode == 0, result.stderr
        assert "unreadable image, another takes its place: " in result.stdout
        assert r"caf\udce9/train/c0/\udce9.png" in result.stdout
        assert "Logging error" not in result.stderr
    start = json.loads((root / "out/run.json").read_text())["starts"][0]
    assert start["args"]["data_path"] == str(root / "train")


@pytest.mark.parametrize("given", [(), ("--depth", 8)])
def test_depth_is_that_of_most_files_and_is_kept(scripts, tmp_path, given):
    """Of an 8-bit preview among files of 12 bits in 16; by a resume and by evaluation, whatever these find."""
    data = tmp_path / "data"
    for i in range(24):
        levels = np.random.RandomState(i).randint(0, 4096, (24, 24)).astype(np.uint16)
        save(Image.fromarray(levels), data / f"c{i % 2}/n{i:02}.png")
    save(Image.new("L", (24, 24), 7), data / "c0/a_preview.png")
    depth = 8 if given else 16
    flags = ("--data_path", data, "--eval_data_path", data, "--in_chans", 1, "--mean", 0.03, "--std", 0.02, *given)
    out = ("--output_dir", tmp_path / "out")
    result = scripts.finetune(*flags, *out, "--epochs", 2)
    assert (result.code, result.err) == (0, "")
    assert load(tmp_path / "out/checkpoint-1.pth")["args"]["depth"] == depth
    assert json.loads((tmp_path / "out/run.json").read_text())["starts"][0]["args"]["depth"] == depth
    for path in data.rglob("n*.png"):
        save(Image.new("L", (24, 24), 9), path)  # now all are of 8 bits
    taken, read_alike = [], datasets.read_alike
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "read_alike", lambda *x: (read_alike(*x), taken.append(x[0].reading.depth))[0])
        patch.setattr(datasets, "describe", lambda *x: None)
        assert scripts.finetune(*flags[: len(flags) - len(given)], *out, "--epochs", 3).code == 0
        last = ("--resume", tmp_path / "out/checkpoint-1.pth", "--eval", "true")
        assert scripts.finetune(*flags[:4], *last).code == 0
    assert taken == [depth] * 3
    result = scripts.finetune(*flags[:4], "--in_chans", 1, "--depth", 32)
    assert (result.code, "--depth 32: most of --data_path " in result.err) == (2, True)
    assert result.err.endswith("need --depth 8\n")


def test_what_the_training_data_hold_is_told_on_a_screen(tmp_path, logs):
    for name, count, size in (("ant", 3, (40, 30)), ("bee", 12, (50, 60)), ("cat", 14, (20, 60))):
        for i in range(count):
            save(picture(*size, seed=i), tmp_path / name / f"{i}.png")
    (tmp_path / "ant/bad.png").write_bytes(b"no image")
    for name in ("cat/a.txt", "cat/b.TXT", "notes.doc"):
        (tmp_path / name).touch()
    flags = {"data_set": "image_folder", "data_path": tmp_path, "input_size": 32}
    datasets.build_dataset(True, finetune_args(**flags))
    for words in (
        rf"--data_path {tmp_path}: 3 files left out: .txt 2, .doc 1",
        "30 images, 3 channels, read as bytes",
        "in a sample of 30: 29 PNG, uint8 x 3; 1 unreadable",
        "heights 30 to 60, median 60; widths 20 to 50, median 40; no data in 0 % of the pixels",
        "17 of 30 images are smaller than --input_size 32 and enlarged",
        "images per class: smallest 4 (ant), median 12 (bee), largest 14 (cat)",
        "1 of 3 classes have fewer than 10 images: ant 4",
    ):
        assert words in logs.text, words
    assert len(logs.text.splitlines()) < 10
    logs.clear()
    datasets.build_dataset(False, finetune_args(eval_data_path=tmp_path, **flags), ["ant", "bee", "cat"])
    assert logs.text.count("\n") == 1  # what is left out


def test_no_data_from_the_file_to_the_loss(tmp_path, logs):
    """Of 8-bit colour, so that ImageNet's mean and std do: pictures without data above, as their tag has it."""
    tifffile = pytest.importorskip("tifffile")
    for i in range(6):
        array = np.asarray(picture(64, 64, seed=i)) // 2 + 1
        array[:32] = 0
        tifffile.imwrite(tmp_path / f"{i}.tif", array, photometric="rgb", extratags=[(42113, "s", 0, "0", True)])
    args = pretrain_args(data_set="image_folder", data_path=tmp_path, input_size=32, min_crop=1.0, stem_stride=1)
    dataset = datasets.build_pretrain_dataset(args)
    assert (args.depth, dataset.reading.in_chans) == (16, 3)
    assert "no data in 50 %" in logs.text
    torch.manual_seed(0)
    imgs = datasets.build_batch_transform(args, torch.device("cpu"))(torch.stack([dataset[i][0] for i in range(6)]))
    assert imgs[:, :, :15].isnan().all()
    assert not imgs[:, :, 17:].isnan().any()
    model = fcmae.FCMAE(3, (1, 1, 1, 1), (8, 8, 8, 8), decoder_embed_dim=16, patch_size=8)
    assert model(imgs)[0] > 0
    args = pretrain_args(data_set="image_folder", data_path=tmp_path, input_size=32, depth=8)
    assert datasets.build_pretrain_dataset(args)[0][0].dtype == torch.uint8  # the mean takes its place
    args = finetune_args(data_set="image_folder", data_path=tmp_path, input_size=32)
    assert not any(datasets.build_transform(False, args)(dataset[i][0]).isnan().any() for i in range(6))
