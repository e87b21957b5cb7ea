"""utils/files.py: lists of files and tars, bad lines named. utils/index.py: what is remembered, and when it is not."""

import io
import json
import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_datasets import picture, save
from tests.test_images import pixels
from utils import index
from utils.errors import UsageError
from utils.files import EXTENSIONS, ClassFolders, ImageList, ImageTree, open_tar
from utils.images import BadImage
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
    assert listed(images, "a/0.png bee\na/1.jpg\t2\n", ["ant", "bee", "cat"]).targets == [1, 2]
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
    ],
)
def test_bad_lines(images, text, classes, message):
    with pytest.raises(UsageError, match=rf"^--train_list .*list\.txt: {message}"):
        listed(images, text, classes)


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
    """`plain.tar` with folders of images, `nested.tar` with a tar of images for each class."""
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for i in range(8):
            add(tar, f"train/{('ant', 'bee', 'cat', 'dog')[i % 4]}/{i}.jpg", jpeg(i))
        add(tar, "train/ant/notes.txt", b"no image")
        add(tar, "train/bee/9.jpg", jpeg(9)[:-300])
    with tarfile.open(tmp_path / "nested.tar", "w") as tar:
        for name in ("ant", "bee"):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for i in range(3):
                    add(inner, f"{name}_{i}.JPEG".lower(), jpeg(i))
            add(tar, f"{name}.tar", buffer.getvalue())
    return tmp_path


def test_tars(tars):
    plain = open_tar(str(tars / "plain.tar"), "--data_path", 3)
    assert plain.classes == ["ant", "bee", "cat", "dog"]
    assert Counter(plain.targets) == {0: 2, 1: 3, 2: 2, 3: 2}
    for i in range(9):
        seed = int(os.path.basename(plain.files.filename(i)).split(".")[0])
        if seed == 9:
            with pytest.raises(BadImage, match=rf"plain\.tar: image {i}: "):
                plain[i]
            continue
        image, label = plain[i]
        assert label == plain.targets[i] == seed % 4
        assert torch.equal(image, pixels(Image.open(io.BytesIO(jpeg(seed)))))
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again[0][0], plain[0][0])
    nested = open_tar(str(tars / "nested.tar"), "--data_path", 1)
    assert nested.classes == ["ant", "bee"]
    assert Counter(nested.targets) == {0: 3, 1: 3}
    assert nested[0][0].shape == (1, 40, 60)


def test_tars_with_given_classes(tars):
    nested = open_tar(str(tars / "nested.tar"), "--eval_data_path", 3, ["cat", "bee", "ant"])
    assert Counter(nested.targets) == {2: 3, 1: 3}
    assert nested[0][1] == nested.targets[0] == 2
    with pytest.raises(UsageError, match=r"--eval_data_path .*plain\.tar: class 'dog' is not among the 3"):
        open_tar(str(tars / "plain.tar"), "--eval_data_path", 3, ["cat", "bee", "ant"])


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, None])
def test_bad_tars(tmp_path, content):
    path = tmp_path / "x.tar"
    if content is None:
        with tarfile.open(path, "w") as tar:
            add(tar, "a/readme.txt", b"no image")
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--data_path .*x\.tar: not a tar of images"):
        open_tar(str(path), "--data_path", 3)


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
