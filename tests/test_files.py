"""utils/files.py: lists of files and tars, bad lines named. utils/index.py: what is remembered, and when it is not."""

import builtins
import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_datasets import picture, save
from tests.test_images import pixels
from utils import index
from utils.data import tars as tars_module
from utils.data.files import EXTENSIONS, ClassFolders, ImageList, ImageTree, class_names, open_tar
from utils.data.images import BadImage
from utils.data.tars import tar_shards
from utils.errors import UsageError
from utils.index import cache_path, list_files

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop
JPG = (".jpg", ".png")


@pytest.fixture
def images(tmp_path):
    """Six pictures below `images`, one of them with blanks and a comma in its path."""
    for i, name in enumerate(("a/0.png", "a/1.jpg", "b/2.png", "b/deep/3.PNG", "c/with blank, so/4.png", "5.png")):
        save(picture(seed=i), tmp_path / "images" / name)
    return tmp_path / "images"


def listed(folder, text, classes=None, **options):
    file = folder.parent / "list.txt"
    file.write_text(text)
    return ImageList(str(file), "--train_list", str(folder), classes, **options)


# ---- lists


def test_a_list_without_labels(images):
    text = "a/0.png\n\nc/with blank, so/4.png\r\nb/deep/3.PNG\n" + str(images / "5.png") + "\na/1.jpg 7\n  \n"
    found = listed(images, text)
    names = [os.path.relpath(path, images) for path in found.paths]
    assert names == ["a/0.png", "c/with blank, so/4.png", "b/deep/3.PNG", "5.png", "a/1.jpg"]
    assert found.targets == [0] * 5
    assert torch.equal(found[1][0], pixels(picture(seed=4)))


@pytest.mark.parametrize("separator", ["\t", " ", ",", ", ", " , ", "  "])
def test_labels(images, separator):
    lines = [("a/0.png", "cat"), ("c/with blank, so/4.png", "ant"), ("b/2.png", "cat"), ("5.png", "bee")]
    found = listed(images, "\n".join(separator.join(line) for line in lines), [])
    assert found.classes == ["ant", "bee", "cat"]
    assert found.targets == [2, 0, 2, 1]
    assert os.path.relpath(found.paths[1], images) == "c/with blank, so/4.png"


def test_labels_that_are_numbers(images):
    text = "a/0.png 3\na/1.jpg 0\nb/2.png 03\n"
    found = listed(images, text, [])
    assert (found.classes, found.targets) == (["0", "1", "2", "3"], [3, 0, 3])
    assert len(listed(images, text, [], nb_classes=10).classes) == 10
    among = listed(images, text, ["ant", "bee", "cat", "dog"])  # as numbers of the classes trained on
    assert among.targets == [3, 0, 3]
    assert listed(images, text, ["0", "1", "2", "3"]).targets == [3, 0, 3]  # names and positions are the same
    assert listed(images, "a/0.png 1\na/1.jpg 5\n", ["5", "1"]).targets == [1, 0]  # names first
    assert listed(images, "a/0.png big dog\n".replace(" big", "\tbig"), []).classes == ["big dog"]


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("a/0.png cat\na/1.jpg\n", [], r"line 2, 'a/1.jpg', has no label; a line is the path of an image, then"),
        ("a/0.png\t\n", [], r"line 1, 'a/0.png', has no label"),
        ("a/0.png\n\nb/list.txt 3\n", None, r"line 3, 'b/list.txt 3', names no image \(\.jpg"),
        ("path,label\na/0.png,cat\n", [], r"line 1, 'path,label', names no image"),
        ("a/0.png big dog\n", [], r"line 1, 'a/0.png big dog', names no image"),
        ("nowhere/0.png\n", None, r"line 1: no file .*nowhere/0.png; paths are absolute or below --data_path"),
        ("\n \n", None, r"is empty; a line is"),
        ("a/0.png cat\na/1.jpg bea\n", ["bee", "cat"], r"line 2: label 'bea' is not among the 2 .*did you mean bee\?"),
        ("a/0.png 2\n", ["bee", "cat"], r"line 1: label '2' is not among the 2 classes"),
        ("a/0.png -1\n", ["0", "1"], r"line 1: label '-1' is not among the 2 classes"),
        ("a/0.png -1\na/1.jpg 0\n", [], r"line 2: label '0' is not among the 1 classes"),
        ("a/0.png 0\na/1.jpg -1\n", [], r"line 2: label '-1' is not among the 1 classes"),
        ("a/0.png 0\na/1.jpg cat\n", [], r"line 2: label 'cat' .*; all labels are names, or"),
        ("a/0.png cat\n\na/1.jpg 0\n", [], r"line 3: label '0' is not among the 1 classes"),
        ("a/0.png bee\na/1.jpg 0\n", ["ant", "bee"], r"line 2: label '0' is not among the 2 classes"),
        ("a/0.png 0\na/1.jpg bee\n", ["ant", "bee"], r"line 1: label '0' is not among the 2 classes"),
        ("a/0.png 1\na/1.jpg 0\n", ["1", "2"], r"line 2: label '0' is not among the 2 .*no class is named by a number"),
        ("a/0.png 7\n", ["007", "008"], r"line 1: label '7' is not among the 2 classes"),
        ("a/0.png 0\n", ["7", "cat"], r"line 1: label '0' is not among the 2 classes"),
        ("a/0.png 7\na/1.jpg 1000003\n", [], r".* 1,000,004 classes, of 2 .*--nb_classes 1000004"),
    ],
)
def test_bad_lines(images, text, classes, message):
    with pytest.raises(UsageError, match=rf"^--train_list .*list\.txt: {message}"):
        listed(images, text, classes)


def test_numbers_without_an_image_are_told(images, logs):
    assert listed(images, "a/0.png 1\na/1.jpg 3\n", []).classes == ["0", "1", "2", "3"]
    assert "--train_list" in logs.text
    assert "2 of 4 classes have no image, the first is 0" in logs.text
    logs.clear()
    listed(images, "a/0.png 1\na/1.jpg 0\n", [])
    listed(images, "a/0.png cat\n", ["ant", "cat"])
    assert not logs.text
    assert len(listed(images, "a/0.png 1200\n", [], nb_classes=2000).classes) == 2000
    with pytest.raises(UsageError, match="1,201 classes, of 1 images"):
        listed(images, "a/0.png 1200\n", [], nb_classes=1000)


def test_a_list_with_a_byte_order_mark(images):
    assert listed(images, "\ufeffa/0.png 1\na/1.jpg 0\n", []).targets == [1, 0]


def test_no_list(tmp_path):
    with pytest.raises(UsageError, match=r"--eval_list .*none\.txt: No such file"):
        ImageList(str(tmp_path / "none.txt"), "--eval_list", None)


# ---- folders


def test_arrays_count_where_they_are_asked_for(tmp_path):
    save(picture(), tmp_path / "mixed/x.png")
    (tmp_path / "arrays").mkdir()
    for folder in ("mixed", "arrays"):
        np.save(tmp_path / folder / "x.npy", np.zeros((4, 8, 8), np.float32))
    assert [os.path.basename(path) for path in ImageTree(str(tmp_path / "mixed"), "--data_path").paths] == ["x.png"]
    assert len(ImageTree(str(tmp_path / "mixed"), "--data_path", in_chans=4)) == 2
    assert len(ImageTree(str(tmp_path / "arrays"), "--data_path")) == 1


def test_files_keep_their_order(tmp_path):
    """By class, folder and name: on it depends which image an index is, so a run's course."""
    for name in ("b/x.png", "a-b/0.png", "a/z.png", "a/k/0.png", "a/b.png", "a/k-2/0.png"):
        save(picture(8, 8), tmp_path / name)
    relative = [os.path.relpath(path, tmp_path) for path in ClassFolders(str(tmp_path), "--data_path").paths]
    assert relative == ["a/b.png", "a/z.png", "a/k/0.png", "a/k-2/0.png", "a-b/0.png", "b/x.png"]
    relative = [os.path.relpath(path, tmp_path) for path in ImageTree(str(tmp_path), "--data_path").paths]
    assert relative == ["a-b/0.png", "a/b.png", "a/k-2/0.png", "a/k/0.png", "a/z.png", "b/x.png"]


def test_hidden_names_are_left_out(tmp_path):
    """In folders, below a folder that is hidden itself, and in tars; not in lists."""
    root = tmp_path / ".hidden"
    hidden = (".ipynb_checkpoints/0.png", "a/.cache/deep/1.png", "a/._0.png", "__MACOSX/a/0.png")
    for name in ("a/0.png", "b/0.png", *hidden):
        save(picture(8, 8), root / name)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(root, ".")
    for found in (ClassFolders(str(root), "--data_path"), open_tar(str(tmp_path / "x.tar"), "--data_path", 3)):
        assert (found.classes, found.targets) == (["a", "b"], [0, 1])
    assert len(ImageTree(str(root), "--data_path")) == 2
    assert class_names(root, "--data_path") == ["a", "b"]
    assert len(listed(root, "a/._0.png\n")) == 1


# ---- tars


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
        (ClassFolders(str(tars / "tree"), "--x", None, given), open_tar(f"{tars}/{source}", "--x", 3, given)),
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


def test_a_tar_of_one_folder_that_holds_all(tmp_path):
    """As `tar cf train.tar train` makes it."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "data/train/cat/deep/0.jpg", jpeg(0))
        add(tar, "data/train/dog/0.jpg", jpeg(1))
    assert open_tar(str(tmp_path / "x.tar"), "--data_path", 3).classes == ["cat", "dog"]
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        add(tar, "cat/deep/0.jpg", jpeg(0))
    assert open_tar(str(tmp_path / "y.tar"), "--data_path", 3, ["bee", "cat"]).targets == [1]


def test_a_folder_with_tars_beside_images_is_a_folder(tars):
    (tars / "tree/all.tar").touch()
    assert not tar_shards(str(tars / "tree"))
    (tars / "shards/.cache").mkdir()
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
        "damaged header": content[:second] + b"\xff" * 300 + content[second + 300 :],
    }[how]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("empty", "empty file"), ("text", ""), ("compressed", "compressed: unpack it to a plain"),
        ("cut in an image", "unexpected end of data"), ("cut in a header", "cut short or damaged at byte"),
        ("cut between images", "cut short or damaged at byte"), ("damaged header", "cut short or damaged at byte"),
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


def test_a_sparse_member_is_refused(tmp_path):
    """GNU tar stores its data in pieces."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a/x.npy")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UsageError, match=r"a/x\.npy is stored as a sparse file"):
        open_tar(str(tmp_path / "x.tar"), "--data_path", 3)


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


# ---- the index of tars


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
    "a damaged index": lambda root: next(root.glob(".fcmae*")).write_bytes(b"PK\3\4 damaged"),
    "an index cut short": lambda root: os.truncate(next(root.glob(".fcmae*")), 900),
    "an index of pickles": lambda root: np.savez(next(root.glob(".fcmae*")), head=np.array([{}])),
}  # fmt: skip


@pytest.mark.parametrize("change", TAR_CHANGES)
def test_changes_of_tars_are_seen(tars, reads, change):
    before = open_tar(str(tars / "shards"), "--data_path", 3).paths
    assert all(before.read(i) for i in range(len(before)))  # the tars are open
    TAR_CHANGES[change](tars / "shards")
    del reads[:]
    found = open_tar(str(tars / "shards"), "--data_path", 3)
    assert len(reads) == len(list((tars / "shards").glob("*.tar")))
    for path in found.paths:
        shard, _, name = path.partition(".tar/")
        with tarfile.open(f"{shard}.tar") as tar:
            members = {os.path.normpath(member.name): member for member in tar}
            assert found.paths.read(list(found.paths).index(path)) == tar.extractfile(members[name]).read()


def test_where_the_index_of_tars_is_kept(tars, reads, tmp_path, monkeypatch, logs):
    """Beside them, else in the user's cache, else nowhere, and nothing half written is left."""
    real = open

    def read_only(path, mode="r", **options):
        if "w" in mode and str(tars / "shards") in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, mode, **options)

    monkeypatch.setattr(tars_module, "open", read_only, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        open_tar(str(tars / "shards"), "--data_path", 3)
    assert len(reads) == 3
    assert [path.suffix for path in (tmp_path / "cache/fcmae").iterdir()] == [".npz"]
    assert not list((tars / "shards").glob(".*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tars / "one.tar"))  # is no folder
    for _ in range(2):
        assert len(open_tar(str(tars / "shards"), "--data_path", 3)) == 24
    assert len(reads) == 9
    assert logs.text.count("is made anew at every start") == 2


def test_a_full_disk_leaves_no_part_of_an_index(tars, monkeypatch):
    def full(file, **arrays):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(open_tar(str(tars / "shards"), "--data_path", 3)) == 24
    assert not list((tars / "shards").glob(".*"))


# ---- what is remembered


def age(root, seconds=60):
    """Make every folder as old as those that are remembered."""
    for folder, _, _ in os.walk(root):
        status = os.stat(folder)
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("a/0.jpg", "a/1.JPG", "b/deep/2.png", "b/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    age(root)
    return root


CONTENT = {"": [], "a": ["0.jpg", "1.JPG"], "b": [], "b/deep": ["2.png"], "empty": []}


@pytest.fixture
def scans(monkeypatch):
    """The folders that are listed, as they are."""
    seen, scandir = [], os.scandir

    def counted(path="."):
        seen.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    monkeypatch.setattr(os, "listdir", lambda path=".": pytest.fail("listed another way"))
    return seen


def test_a_second_start_lists_nothing(tree, scans):
    assert list_files(str(tree), JPG) == CONTENT
    assert len(scans) == len(CONTENT)
    assert list_files(str(tree), JPG) == CONTENT
    assert list_files(f"{tree}/./", JPG) == CONTENT
    assert len(scans) == len(CONTENT)
    assert list_files(str(tree), JPG, cache=False) == CONTENT
    assert len(scans) == 2 * len(CONTENT)
    assert list_files(str(tree), (".png",))["a"] == []  # another question
    for _ in range(2):
        del scans[:]
        assert len(ImageTree(str(tree), "--data_path")) == 3
    assert not scans


CHANGES = {
    "a file more": lambda root: (root / "b/deep/new.jpg").touch(),
    "a file less": lambda root: (root / "a/0.jpg").unlink(),
    "a file renamed": lambda root: (root / "a/0.jpg").rename(root / "a/z.jpg"),
    "a file moved": lambda root: (root / "a/0.jpg").rename(root / "b/0.jpg"),
    "a folder more": lambda root: (root / "empty/c").mkdir(),
    "a folder less": lambda root: (root / "empty").rmdir(),
    "a folder renamed": lambda root: (root / "a").rename(root / "c"),
    "a folder in place of another": lambda root: ((root / "a").rename(root / "x"), (root / "b").rename(root / "a")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(tree, change):
    list_files(str(tree), JPG)
    CHANGES[change](tree)
    expected = list_files(str(tree), JPG, cache=False)
    assert expected != CONTENT
    assert list_files(str(tree), JPG) == expected
    age(tree)
    assert list_files(str(tree), JPG) == expected
    assert list_files(str(tree), JPG) == expected


def test_a_folder_that_may_still_change_is_not_remembered(tree):
    """A change within the same tick of the file system's clock would not be seen."""
    age(tree, -60.5)
    list_files(str(tree), JPG)
    assert not cache_path(str(tree), JPG).exists()
    age(tree)
    list_files(str(tree), JPG)
    assert cache_path(str(tree), JPG).exists()


DAMAGE = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}', b'{"version": 1, "root": "ROOT", "folders": 3}',
    b'{"version": 1, "root": "ROOT", "folders": {"": [0, [3]]}}', b'{"version": 1, "root": "ROOT", "folders": {"": 3}}',
    b'{"version": 1, "root": "/", "folders": {}}',
    b'{"version": 0, "root": "ROOT", "folders": {}}', b"\x80\x04cos\nsystem\n",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_memory_is_made_anew(tree, scans, damage):
    list_files(str(tree), JPG)
    path = cache_path(str(tree), JPG)
    path.write_bytes(damage.replace(b"ROOT", os.fsencode(tree)))
    assert list_files(str(tree), JPG) == CONTENT
    del scans[:]
    assert list_files(str(tree), JPG) == CONTENT
    assert not scans
    assert json.loads(path.read_text())["root"] == str(tree)


def test_a_memory_that_cannot_be_written(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # is no folder
    for _ in range(2):
        assert list_files(str(tree), JPG) == CONTENT

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index.json, "dump", full)
    assert list_files(str(tree), JPG) == CONTENT
    assert not list(cache_path(str(tree), JPG).parent.iterdir())  # nothing half written


def test_the_memory_is_in_the_cache_of_the_user(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tmp_path / "cache" in cache_path("/data", JPG).parents
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path / "home/.cache" in cache_path("/data", JPG).parents


def test_links(tree):
    (tree / "a/back").symlink_to(tree)  # a circle, followed once
    (tree / "c").symlink_to(tree / "b")
    age(tree)
    for _ in range(2):
        found = list_files(str(tree), JPG)
        assert found == {**CONTENT, "c": [], "c/deep": ["2.png"]}


def test_names_that_are_no_text(tree):
    try:
        (tree / os.fsdecode(b"a/\xff\n.jpg")).touch()
    except OSError:
        pytest.skip("a file system that refuses such names")
    age(tree)
    for _ in range(2):
        assert list_files(str(tree), JPG)["a"] == ["0.jpg", "1.JPG", os.fsdecode(b"\xff\n.jpg")]


@pytest.mark.parametrize("build", [ImageTree, ClassFolders])
def test_data_sets_can_do_without(tree, scans, build):
    (tree / "empty").rmdir()
    age(tree)
    del scans[:]
    for _ in range(2):
        build(str(tree), "--data_path", index_cache=False)
    assert len(scans) == 8
    assert not cache_path(str(tree), EXTENSIONS).exists()
