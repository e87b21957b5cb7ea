"""utils/data/tars.py: shards against the same tree on disk, their index, damage."""

import builtins
import contextlib
import functools
import gzip
import io
import os
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from tests.pictures import finetune_args, picture, pixels, pretrain_args, save
from tests.small_runs import STEPS, killed_after, load, records, same
from tools import mean_std
from utils.data import tars as tars_module
from utils.data.files import ClassFolders, ImageTree
from utils.data.images import BadImage
from utils.data.tars import open_tar, tar_shards
from utils.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


def jpeg(seed):
    buffer = io.BytesIO()
    picture(seed=seed).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    """A tree of class folders as files, in `one.tar`, and spread over the three tars of `shards`."""
    folders = [f"{name}/{part}" for name in ("bee", "ant", "cat", "a-b") for part in ("x", "x-y", "")]
    names = [f"{folder}/{i}.jpg" for folder in folders for i in (0, 1)]
    (tmp_path / "shards").mkdir()
    with contextlib.ExitStack() as stack:
        paths = [tmp_path / "one.tar", *(tmp_path / f"shards/{i}.tar" for i in range(3))]
        one, *shards = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        for i, name in enumerate(names):
            save(picture(seed=i), path := tmp_path / "tree" / name)
            one.add(path, f"./{name}")
            shards[i % 3].add(path, name)
        for tar in (one, *shards):
            add(tar, "ant/notes.txt", b"no image")
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(f"odd/{kind.decode()}.jpg")
                info.type, info.linkname = kind, "ant/0.jpg"
                tar.addfile(info)
    return tmp_path


@pytest.mark.parametrize("source", ["one.tar", "shards", "shards/", "shards/*.tar", "**/?.tar"])
def test_tars_are_as_the_tree_on_disk(tars, source):
    """Order, labels and pixels, labelled or not."""
    given = ["cat", "bee", "a-b", "ant"]
    for files, found in (
        (ImageTree(str(tars / "tree"), "--data_path"), open_tar(f"{tars}/{source}", "--data_path", 3, labelled=False)),
        (ClassFolders(str(tars / "tree"), "--data_path"), open_tar(f"{tars}/{source}", "--data_path", 3)),
        (ClassFolders(str(tars / "tree"), "--x", given), open_tar(f"{tars}/{source}", "--x", 3, given)),
    ):
        assert getattr(found, "classes", None) == getattr(files, "classes", None)
        assert found.targets == files.targets
        again = pickle.loads(pickle.dumps(found))
        for i, path in enumerate(files.paths):
            assert found.paths[i].partition(".tar/")[2] == os.path.relpath(path, tars / "tree")
            assert torch.equal(found[i][0], files[i][0])
            assert torch.equal(again[i][0], files[i][0])
    with pytest.raises(UsageError, match=r"--x .*: class 'cat' is not among the 3"):
        open_tar(f"{tars}/{source}", "--x", 3, given[1:])


def test_images_outside_of_class_folders_are_told(tmp_path, logs):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("cat/0.jpg", "dog/0.jpg", "stray.jpg"):
            add(tar, name, jpeg(0))
    assert len(open_tar(str(tmp_path / "x.tar"), "--data_path", 3)) == 2
    assert "x.tar: 1 files left out: .jpg 1" in logs.text


def test_a_tar_of_one_folder_that_holds_all(tmp_path):
    """As `tar cf train.tar train` makes it."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "data/train/cat/deep/0.jpg", jpeg(0))
        add(tar, "data/train/dog/0.jpg", jpeg(1))
    assert open_tar(str(tmp_path / "x.tar"), "--data_path", 3).classes == ["cat", "dog"]
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        add(tar, "cat/deep/0.jpg", jpeg(0))
    assert open_tar(str(tmp_path / "y.tar"), "--data_path", 3, ["bee", "cat"]).targets == [1]


@pytest.mark.parametrize("labelled", [True, False])
def test_splits_in_a_tar_are_no_classes(tmp_path, labelled):
    """Nor is validation pre-trained on."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, name in enumerate(("train/a", "train/b", "Val/a", "Val/b")):
            add(tar, f"data/{name}/{i}.jpg", jpeg(i))
    with pytest.raises(UsageError, match=r"x\.tar: its folders Val, train are no classes; make a tar of each"):
        open_tar(str(tmp_path / "x.tar"), "--data_path", 3, labelled=labelled)


@pytest.mark.parametrize("labelled", [True, False])
def test_tars_of_several_splits_are_refused(tmp_path, labelled):
    """As the shards of ImageNet lie in one folder: validation images would be trained on."""
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for label in "ab":
                add(tar, f"{label}/{name}{label}.jpg", jpeg(0))
    glob = re.escape(f"'{tmp_path}/*train*.tar' or '{tmp_path}/*validation*.tar'")
    for path in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(UsageError, match=f"its tars are of several splits; give those of one: {glob}$"):
            open_tar(str(path), "--data_path", 3, labelled=labelled)
    assert len(open_tar(f"{tmp_path}/*train*.tar", "--data_path", 3, labelled=labelled)) == 4
    (tmp_path / "imagenet1k-validation-00.tar").rename(tmp_path / "train_val_2.tar")
    assert len(open_tar(str(tmp_path), "--data_path", 3, labelled=labelled)) == 6


def test_a_folder_with_tars_beside_images_is_a_folder(tars):
    (tars / "tree/all.tar").touch()
    assert not tar_shards(str(tars / "tree"))
    (tars / "shards/.cache").mkdir()
    (tars / "shards/2.tar").rename(tars / "shards/2.TAR")
    assert len(tar_shards(str(tars / "shards"))) == 3
    save(picture(8, 8), tars / "shards/0.png")
    assert not tar_shards(str(tars / "shards"))


def test_labels_of_a_webdataset(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(4):
                add(tar, f"{i:05}.jpg", jpeg(4 * shard + i))
                add(tar, f"{i:05}.cls", b"%d\n" % (i + shard))
    found = open_tar(str(tmp_path), "--data_path", 3)
    assert found.classes == ["0", "1", "2", "3", "4"]
    labels = dict(zip(found.paths, found.targets, strict=True))
    assert labels == {f"{tmp_path}/{shard}.tar/{i:05}.jpg": i + shard for shard in range(2) for i in range(4)}
    image, label = found[list(labels).index(f"{tmp_path}/1.tar/00002.jpg")]
    assert torch.equal(image, pixels(Image.open(io.BytesIO(jpeg(6)))))
    assert label == 3
    assert open_tar(str(tmp_path), "--eval_data_path", 3, ["a", "b", "c", "d", "e"]).targets == found.targets
    assert len(open_tar(str(tmp_path), "--data_path", 3, nb_classes=9).classes) == 9
    assert open_tar(str(tmp_path), "--data_path", 3, labelled=False).targets == [0] * 8
    with pytest.raises(UsageError, match=r"--x .*1\.tar/00003\.jpg: label '4' is not among the 4 classes"):
        open_tar(str(tmp_path), "--x", 3, ["a", "b", "c", "d"])
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        add(tar, "00009.jpg", jpeg(0))
    with pytest.raises(UsageError, match=r"--x .*2\.tar/00009\.jpg has no \.cls file, as others have"):
        open_tar(str(tmp_path), "--x", 3)
    with pytest.raises(UsageError, match=r"--x .*2\.tar: holds no labels; a labelled image is CLASS/NAME\.jpg, or"):
        open_tar(str(tmp_path / "2.tar"), "--x", 3)


def test_names_with_dots_have_labels_of_their_own(tmp_path):
    """Also where a file of a label has a byte order mark."""
    content = {"a.left.jpg": jpeg(0), "a.right.jpg": jpeg(1), "a.cls": b"\xef\xbb\xbf1", "a.seg.cls": b"7"}
    content |= {"photo.v2.0.jpg": jpeg(2), "photo.v2.0.cls": b"0", "photo.v2.1.jpg": jpeg(3), "photo.v2.1.cls": b"2"}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in content:
            add(tar, f"./x.y/{name}", content[name])
    found = open_tar(str(tmp_path), "--data_path", 3)
    labels = {path.rpartition("/")[2]: label for path, label in zip(found.paths, found.targets, strict=True)}
    assert labels == {"a.left.jpg": 1, "a.right.jpg": 1, "photo.v2.0.jpg": 0, "photo.v2.1.jpg": 2}


def test_arrays_in_tars(tmp_path):
    array = io.BytesIO()
    np.save(array, np.full((4, 8, 8), 7, np.float32))
    for names in (("a/x.npy",), ("a/x.npy", "a/x.jpg")):
        with tarfile.open(tmp_path / f"{len(names)}.tar", "w") as tar:
            for name in names:
                add(tar, name, array.getvalue() if name.endswith("npy") else jpeg(0))
    assert torch.equal(open_tar(str(tmp_path / "1.tar"), "--x", 4)[0][0], torch.full((4, 8, 8), 7.0))
    assert len(open_tar(str(tmp_path / "2.tar"), "--x", 4)) == 2
    assert [path[-5:] for path in open_tar(str(tmp_path / "2.tar"), "--x", 3).paths] == ["x.jpg"]
    assert len(open_tar(str(tmp_path / "1.tar"), "--x", 3)) == 1


def test_names_in_tars(tmp_path):
    """Long ones in either format, bytes that are no text, and one twice, of which the later counts."""
    long, strange = "a/" + "long" * 50 + ".jpg", os.fsdecode(b"b/caf\xe9.jpg")
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as tar:
            for i, name in enumerate((long, strange, "a/0.jpg", "a/0.jpg")):
                add(tar, name, jpeg(i))
        for _ in range(2):
            found = open_tar(str(tmp_path / f"{kind}.tar"), "--x", 3)
            assert [path.partition(".tar/")[2] for path in found.paths] == ["a/0.jpg", long, strange]
            for i, seed in enumerate((3, 0, 1)):
                assert torch.equal(found[i][0], pixels(Image.open(io.BytesIO(jpeg(seed)))))


def damage(content: bytes, how: str) -> bytes:
    second = 512 + -(-len(jpeg(0)) // 512) * 512
    return {
        "empty": b"",
        "text": b"no tar at all" * 100,
        "compressed": gzip.compress(content),
        "cut in an image": content[: second + 700],
        "cut in a header": content[: second + 100],
        "cut between images": content[:second],
        "zeros": content[:second] + bytes(1024) + content[second + 1024 :],
        "damaged header": content[:second] + b"\xff" * 300 + content[second + 300 :],
    }[how]


DAMAGE = r"cut short or damaged at byte [\d,]+ of [\d,]+: all that follows a/\d\.jpg is lost; pack it anew"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("empty", "empty file"), ("text", ""), ("compressed", "compressed: unpack it"),
        ("cut in an image", DAMAGE), ("cut in a header", DAMAGE), ("cut between images", DAMAGE),
        ("damaged header", DAMAGE), ("zeros", DAMAGE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shards", [1, 3])
def test_bad_tars(tmp_path, how, reason, shards):
    """Nothing after the damage is left out without a word, and a shard among others is named."""
    for i in range(shards):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            for name in ("a/0.jpg", "a/1.jpg"):
                add(tar, name, jpeg(0))
    path = tmp_path / f"{shards - 1}.tar"
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(UsageError, match=rf"^--data_path {path}: not a tar of images \({reason}"):
        open_tar(str(tmp_path if shards > 1 else path), "--data_path", 3)


@pytest.mark.parametrize("name", ["x.tgz", "x.tar.gz", "x.tar.xz", "x.zip", "x.tar"])
@pytest.mark.parametrize("whole", [True, False])
def test_compressed_tars_are_to_be_unpacked(tmp_path, name, whole):
    """Whether the file is given or the folder that holds nothing else."""
    (tmp_path / name).write_bytes(b"PK\3\4" if name.endswith("zip") else gzip.compress(b"x" * 2000))
    path = tmp_path / name if whole or name.endswith("zip") else tmp_path
    with pytest.raises(UsageError, match=rf"{name}: not a tar of images \(compressed: unpack it"):
        open_tar(str(path), "--data_path", 3)


def test_tars_without_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a/readme.txt", b"no image")
        add(tar, "a/inner.tar", b"not looked into")
    with pytest.raises(UsageError, match=r"x\.tar: not a tar of images \(holds no \.jpg.*unpack tars in it"):
        open_tar(str(tmp_path / "x.tar"), "--data_path", 3)
    with pytest.raises(UsageError, match=r"--data_path .*none\.tar: No such file"):
        open_tar(str(tmp_path / "none.tar"), "--data_path", 3)
    with pytest.raises(UsageError, match=r"--data_path .*\*\.tar: No such file"):
        open_tar(str(tmp_path / "y/*.tar"), "--data_path", 3)


def test_members_that_are_left_out_are_counted(tars, logs):
    with tarfile.open(tars / "one.tar", "a") as tar:
        add(tar, "../up.jpg", jpeg(0))
        add(tar, "/abs/0.jpg", jpeg(1))
    found = open_tar(str(tars / "one.tar"), "--data_path", 3)
    assert "abs" in found.classes  # below the root, as tar unpacks it
    assert "--data_path" in logs.text
    assert "5 files left out: links and devices 3, .txt 1, names with .. 1" in logs.text


def test_sparse_members_are_refused(tmp_path):
    """GNU tar stores the pieces between holes, as in this array of 2000 zeros and 2000 ones; others follow."""
    np.save(tmp_path / "x.npy", np.repeat(np.array([0, 1], np.uint8), 2000).reshape(1, 40, 100))
    whole = (tmp_path / "x.npy").read_bytes()
    stored = whole[:128] + whole[2128:]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a/x.npy")
        info.pax_headers = {"GNU.sparse.map": "0,128,2128,2000", "GNU.sparse.size": str(len(whole))}
        info.size = len(stored)
        tar.addfile(info, io.BytesIO(stored))
        add(tar, "a/y.npy", whole)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.extractfile("a/x.npy").read() == whole
    with pytest.raises(UsageError, match=r"a/x\.npy is stored as a sparse file: pack without --sparse"):
        open_tar(str(tmp_path / "x.tar"), "--data_path", 1)


def test_images_of_tars_that_cannot_be_read(tars):
    """Damaged when packed, and tars that change after the start."""
    with tarfile.open(tars / "x.tar", "w") as tar:
        add(tar, "b/9.jpg", jpeg(9)[:-300])
        add(tar, "b/8.jpg", jpeg(8))
    found = open_tar(str(tars / "x.tar"), "--data_path", 3)
    assert found[0][0].shape == (3, 40, 60)
    with pytest.raises(BadImage, match=r"x\.tar/b/9\.jpg: "):
        found[1]
    os.truncate(tars / "x.tar", 600)
    with pytest.raises(BadImage, match=r"x\.tar/b/8\.jpg: the tar was cut short"):
        found[0]
    found = open_tar(str(tars / "one.tar"), "--data_path", 3)
    (tars / "one.tar").unlink()
    with pytest.raises(BadImage, match=r"one\.tar/.*: No such file"):
        found[0]


def test_many_shards_are_not_all_kept_open(tars, monkeypatch):
    monkeypatch.setattr(tars_module, "opened", functools.lru_cache(2)(tars_module.opened.__wrapped__))
    found = open_tar(str(tars / "shards"), "--data_path", 3)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(found)):
        found[i]
    assert tars_module.opened.cache_info().currsize == 2
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.fixture
def reads(monkeypatch):
    """The tars whose headers are read, in this process."""
    seen, scan = [], tars_module._scan

    def counted(flag, path):
        seen.append(os.path.basename(path))
        return scan(flag, path)

    monkeypatch.setattr(tars_module, "_scan", counted)
    monkeypatch.setattr(tars_module, "ProcessPoolExecutor", lambda count: contextlib.nullcontext(builtins))
    return seen


def test_tars_are_indexed_once(tars, reads):
    for labelled in (True, False, True):
        open_tar(str(tars / "shards"), "--data_path", 3, labelled=labelled)
    assert reads == ["0.tar", "1.tar", "2.tar"]
    (tars / "shards").rename(tars / "moved")
    assert open_tar(str(tars / "moved"), "--data_path", 3)[0][0].shape == (3, 40, 60)
    assert len(reads) == 3
    assert len(list((tars / "moved").iterdir())) == 4
    open_tar(str(tars / "moved/0.tar"), "--data_path", 3)
    assert len(reads) == 4


TAR_CHANGES = {
    "a shard more": lambda root: shutil.copy(root / "0.tar", root / "3.tar"),
    "a shard less": lambda root: (root / "0.tar").unlink(),
    "a shard renamed": lambda root: (root / "0.tar").rename(root / "9.tar"),
    "two shards exchanged": lambda root: [(root / f"{a}.tar").rename(root / f"{b}.tar") for a, b in ("0x", "10", "x1")],
    "a shard rewritten": lambda root: (root / "0.tar").write_bytes((root / "1.tar").read_bytes()),
    "a shard touched": lambda root: os.utime(root / "0.tar", ns=(1, 1)),
    "a damaged index": lambda root: next(root.glob(".fcmae*")).write_bytes(b"{damaged"),
    "an index cut short": lambda root: os.truncate(next(root.glob(".fcmae*")), 900),
    "an index of another kind": lambda root: next(root.glob(".fcmae*")).write_text("[]"),
}  # fmt: skip


@pytest.mark.parametrize("change", TAR_CHANGES)
def test_changes_of_tars_are_seen(tars, reads, change):
    before = open_tar(str(tars / "shards"), "--data_path", 3)
    assert all(before.read(i) for i in range(len(before)))  # the tars are open
    TAR_CHANGES[change](tars / "shards")
    del reads[:]
    found = open_tar(str(tars / "shards"), "--data_path", 3)
    assert len(reads) == len(list((tars / "shards").glob("*.tar")))
    for path in found.paths:
        shard, _, name = path.partition(".tar/")
        with tarfile.open(f"{shard}.tar") as tar:
            members = {os.path.normpath(member.name): member for member in tar}
            assert found.read(found.paths.index(path)) == tar.extractfile(members[name]).read()


def test_where_the_index_of_tars_cannot_be_kept(tars, reads, monkeypatch, logs):
    """Beside them, or nowhere."""

    def read_only(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", read_only)
    for _ in range(2):
        assert len(open_tar(str(tars / "shards"), "--data_path", 3)) == 24
    assert len(reads) == 6
    assert logs.text.count("is made anew at every start") == 2


def test_a_full_disk_leaves_no_part_of_an_index(tars, monkeypatch):

    def full(path, text):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert len(open_tar(str(tars / "shards"), "--data_path", 3)) == 24
    assert not list((tars / "shards").glob(".*"))


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


@pytest.mark.slow
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

    monkeypatch.setattr("utils.data.tars.main_process_first", first)
    save(picture(8, 8), tmp_path / "x/a/0.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", "x")
    open_tar(str(tmp_path / "x.tar"), "--data_path", 3)
    assert entered == [True, True]


def test_mean_and_deviation_of_shards(scripts, tmp_path, capsys, monkeypatch):
    printed = []
    for path in (scripts.train, shards_of(tmp_path / "train", scripts.train)):
        monkeypatch.setattr(sys, "argv", ["mean_std.py", "--data_path", str(path), "--num_workers", "0"])
        mean_std.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
