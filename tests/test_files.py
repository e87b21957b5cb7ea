"""utils/data/files.py: folders and lists, bad lines named."""

import os
import shutil
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

import datasets
from tests.pictures import finetune_args, picture, pixels, pretrain_args, save
from tests.small_runs import load, records
from utils.data.files import ClassFolders, ImageList, ImageTree, list_files
from utils.data.tars import open_tar
from utils.errors import UsageError

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


def test_a_run_s_own_pictures_are_no_images(tmp_path):
    """Of an --output_dir inside --data_path, or that is it: a resume would train on them."""
    names = ["0.png", "confusion-ema.png", "confusion.png", "reconstruction-9.ab12cd34.png", "reconstruction-9.png"]
    for folder in ("", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in names:
            (tmp_path / folder / name).touch()
    (tmp_path / "run.json").touch()
    assert list_files(str(tmp_path), (".png",)) == {"": ["0.png"], "out": names}


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
        ("a/0.png,cat\npath,label\n", [], r"line 2, 'path,label', names no image"),
        ("a/0.psd,cat\na/0.png,cat\n", [], r"line 1, 'a/0.psd,cat', names no image"),
        ('"a/0.png,cat\na/1.jpg,cat\n', [], r"line 1, '\"a/0.png,cat', names no image"),
        ("a/0.png big dog\n", [], r"line 1, 'a/0.png big dog', names no image"),
        ("nowhere/0.png\n", None, r"line 1: no file .*nowhere/0.png; paths are absolute or below --data_path \("),
        ("\n \n", None, r"is empty; a line is"),
        ("class,name\n0,cat\n1,dog\n", None, r"line 2, '0,cat', names no image"),
        ("id,path,labels\n1,a/0.png,cat,dog\n", [], r"line 2, .*, has no path, or columns without name"),
        ("id,species,fold\n0,cat,1\n", [], r"line 2, '0,cat,1', names no image"),
        ("a/0.png cat\na/1.jpg bea\n", ["bee", "cat"], r"line 2: label 'bea' is not among the 2 .*did you mean bee\?"),
        ("a/0.png 2\n", ["bee", "cat"], r"line 1: label '2' is not among the 2 classes"),
        ("a/0.png -1\n", ["0", "1"], r"line 1: label '-1' is not among the 2 classes"),
        ("a/0.png -1\na/1.jpg 0\n", [], r"line 2: label '0' is not among the 1 classes"),
        ("a/0.png 0\na/1.jpg -1\n", [], r"line 1: label '0' is not among the 1 classes"),
        ("a/0.png 0\na/1.jpg cat\n", [], r"line 1: label '0' .*; all labels are names, or"),
        ("a/0.png cat\n\na/1.jpg 0\n", [], r"line 3: label '0' is not among the 1 classes"),
        ("a/0.png bee\na/1.jpg 0\n", ["ant", "bee"], r"line 2: label '0' is not among the 2 classes"),
        ("a/0.png 0\na/1.jpg bee\n", ["ant", "bee"], r"line 1: label '0' is not among the 2 classes"),
        ("a/0.png 1\na/1.jpg 0\n", ["1", "2"], r"line 2: label '0' is not among the 2 .*no class is named by a number"),
        ("a/0.png 7\n", ["007", "008"], r"line 1: label '7' is not among the 2 classes"),
        ("a/0.png 0\n", ["7", "cat"], r"line 1: label '0' is not among the 2 classes"),
        (f"a/0.png 0\na/1.jpg {'9' * 5000}\n", [], r"line 2: a label of 5000 digits; number the classes from 0$"),
        (f"a/0.png {'9' * 5000}\n", ["ant", "bee"], r"line 1: a label of 5000 digits"),
        ("a/0.png 7\na/1.jpg 1000003\n", [], r".* 1,000,004 classes, of 2 .*--nb_classes 1000004"),
    ],
)
def test_bad_lines(images, text, classes, message):
    with pytest.raises(UsageError, match=rf"^--train_list .*list\.txt: {message}"):
        listed(images, text, classes)


def test_numbers_without_an_image(images):
    assert listed(images, "a/0.png 1\na/1.jpg 3\n", []).classes == ["0", "1", "2", "3"]
    assert len(listed(images, "a/0.png 1200\n", [], nb_classes=2000).classes) == 2000
    with pytest.raises(UsageError, match="1,201 classes, of 1 images"):
        listed(images, "a/0.png 1200\n", [], nb_classes=1000)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_lists(images, encoding):
    """As Excel and Notepad save them: with a byte order mark; UTF-16 without one is named for what it is."""
    text = "a/0.png,größe\r\na/1.jpg,b\r\n".encode(encoding)
    (images.parent / "list.txt").write_bytes(text)
    read = partial(ImageList, str(images.parent / "list.txt"), "--train_list", str(images), [])
    if encoding.startswith("utf-16-"):
        with pytest.raises(UsageError, match=r"list\.txt: is no text in UTF-8, or in UTF-16 with a byte order mark"):
            read()
    else:
        assert (read().classes, read().targets) == (["b", "größe"], [1, 0])


def test_two_lists_put_together_have_two_byte_order_marks(images):
    assert listed(images, "\ufeffa/0.png,b\n\ufeffa/1.jpg,b\n", []).paths == [
        str(images / x) for x in ("a/0.png", "a/1.jpg")
    ]


def test_what_cannot_be_seen_in_a_path_is_escaped(images):
    with pytest.raises(UsageError, match=r"no file '.*/a/\\u200b0\.png'; paths are"):
        listed(images, "a/\u200b0.png,b\n", [])


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("path,label\na/0.png,cat\n", ["cat"]),
        ("path;label\r\na/0.png;cat\r\n", ["cat"]),
        ("Image\tClass\r\na/0.png\tbig, cat\r\n", ["big, cat"]),
        ('"c/with blank, so/4.png","big, cat"\n5.png,dog\n', ["big, cat", "dog"]),
        ('"c/with blank, so/4.png" cat\n', ["cat"]),
        ('"c/with blank, so/4.png"\t"a ""cat"""\n', ['a "cat"']),
        ("\nfile,label\n a/0.png , cat \n", ["cat"]),
        ("path,label,,\na/0.png,cat,,\n,,,\n,,,\n", ["cat"]),  # as spreadsheets write them
        ("a/0.png,cat,\n,\n5.png,dog,\n", ["cat", "dog"]),
        ('id, path, label\n1, "a/0.png", "cat"\n', ["cat"]),
    ],
)
def test_csv_rules(images, text, labels):
    found = listed(images, text, [])
    assert [found.classes[target] for target in found.targets] == labels
    assert found[0][0].shape == (3, 40, 60)


def test_quotes_in_lists_without_labels(images):
    assert [x.removeprefix(f"{images}/") for x in listed(images, '"c/with blank, so/4.png"\n5.png\n').paths] == [
        "c/with blank, so/4.png",
        "5.png",
    ]


def test_an_image_with_two_labels_is_told(images, logs):
    listed(images, "a/0.png cat\na/1.jpg dog\na/0.png cat\n", [])
    assert "another label" not in logs.text
    listed(images, "a/0.png cat\na/1.jpg dog\na/0.png dog\n", [])
    assert "1 lines give an image another label than one before; several stand on one line" in logs.text


def test_missing_files_of_a_list_are_told_together(images, logs):
    text = "a/0.png 0\n" * 3 + "".join(f"gone/{i}.jpg 1\n" for i in range(12))
    listed(images, text, [])
    (line,) = logs.text.splitlines()
    assert "line 4: no file" in line
    assert "12 of 15 are not there" in line
    assert [f"gone/{i}.jpg" in line for i in range(12)] == [True] * 10 + [False] * 2
    with pytest.raises(UsageError, match=r"list\.txt: line 1: no file .*gone/0\.jpg, .*\(12 of 12 are not there\)"):
        listed(images, "".join(text.splitlines(keepends=True)[3:]), [])


def test_no_list(tmp_path):
    with pytest.raises(UsageError, match=r"--eval_list .*none\.txt: No such file"):
        ImageList(str(tmp_path / "none.txt"), "--eval_list", None)
    with pytest.raises(UsageError, match="--eval_list /dev/zero: is a device"):
        ImageList("/dev/zero", "--eval_list", None)


def test_arrays_count_where_they_are_asked_for(tmp_path):
    save(picture(), tmp_path / "mixed/x.png")
    (tmp_path / "arrays").mkdir()
    for folder in ("mixed", "arrays"):
        np.save(tmp_path / folder / "x.npy", np.zeros((4, 8, 8), np.float32))
    assert [os.path.basename(path) for path in ImageTree(str(tmp_path / "mixed"), "--data_path").paths] == ["x.png"]
    assert len(ImageTree(str(tmp_path / "mixed"), "--data_path", in_chans=4)) == 2
    assert len(ImageTree(str(tmp_path / "arrays"), "--data_path")) == 1
    save(picture(), tmp_path / "arrays/preview.png")
    for i in range(2):
        np.save(tmp_path / f"arrays/{i}.npy", np.zeros((3, 8, 8), np.float32))
    assert len(ImageTree(str(tmp_path / "arrays"), "--data_path")) == 4  # one file does not decide


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
    hidden = [".ipynb_checkpoints/0.png", "a/.cache/deep/1.png", "a/._0.png", "__MACOSX/a/0.png", "@eaDir/a/0.png"]
    hidden += ["lost+found/0.png", "$RECYCLE.BIN/S-1-5-21/$R0.png", "#recycle/a/0.png"]
    for name in ("a/0.png", "b/0.png", *hidden):
        save(picture(8, 8), root / name)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(root, ".")
    for found in (ClassFolders(str(root), "--data_path"), open_tar(str(tmp_path / "x.tar"), "--data_path", 3)):
        assert (found.classes, found.targets) == (["a", "b"], [0, 1])
    assert len(ImageTree(str(root), "--data_path")) == 2
    assert len(listed(root, "a/._0.png\n")) == 1


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("a/0.jpg", "a/1.JPG", "b/deep/2.png", "b/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    return root


CONTENT = {"": [], "a": ["0.jpg", "1.JPG"], "b": [], "b/deep": ["2.png"], "empty": []}


def test_links(tree):
    (tree / "a/back").symlink_to(tree)  # a circle, followed once
    (tree / "c").symlink_to(tree / "b")
    assert list_files(str(tree), JPG) == {**CONTENT, "c": [], "c/deep": ["2.png"]}


def test_what_is_no_file_or_folder(tree, logs):
    """Links to themselves and to nothing, pipes; told by extension what is left out."""
    (tree / "a/loop").symlink_to("loop")
    (tree / "a/3.jpg").symlink_to("nowhere")  # reported when it is read
    os.mkfifo(tree / "a/4.jpg")  # to read it would take for ever
    left_out = Counter()
    assert list_files(str(tree), JPG, left_out) == {**CONTENT, "a": ["0.jpg", "1.JPG", "3.jpg"]}
    assert left_out == {".txt": 1, ".jpg": 1, "without extension": 1}
    assert not logs.text


def test_folders_that_cannot_be_listed(tree, logs, monkeypatch):
    """Gone since, not to be entered, too long a path: told, and a class without images is refused, not forgotten."""
    scandir = os.scandir

    def fails(path):
        if path.rstrip("/").endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    assert list_files(str(tree), JPG) == {**CONTENT, "b/deep": []}
    assert f"'{tree}/b/deep' is left out: Permission denied" in logs.text
    with pytest.raises(UsageError, match="class folder 'b' holds no images"):
        ClassFolders(str(tree), "--data_path")
    (tree / "b").rename(tree / "root-deep")
    args = pretrain_args(data_set="image_folder", data_path=tree / "root-deep")
    with pytest.raises(UsageError, match="root-deep: holds no images"):
        datasets.build_pretrain_dataset(args)
    assert "root-deep/' is left out: Permission denied" in logs.text


def test_deep_folders_and_long_names(tmp_path):
    names = ["x" * 251 + ".jpg", "new\nline.jpg", "\U0001f600.jpg"]
    folder = tmp_path / "deep"
    for i in range(60):
        folder = folder / f"{i}"
    for name in names:
        save(picture(8, 8), folder / name)
    tree = ImageTree(str(tmp_path / "deep"), "--data_path")
    assert [os.path.basename(path) for path in tree.paths] == sorted(names)
    assert all(tree[i][0].shape == (3, 8, 8) for i in range(3))


def test_names_that_are_no_text(tree):
    try:
        (tree / os.fsdecode(b"a/\xff\n.jpg")).touch()
    except OSError:
        pytest.skip("a file system that refuses such names")
    assert list_files(str(tree), JPG)["a"] == ["0.jpg", "1.JPG", os.fsdecode(b"\xff\n.jpg")]


def test_class_folders(folders):
    train = ClassFolders(str(folders / "train"), "--data_path")
    assert train.classes == ["ant", "bee", "cat"]
    assert Counter(train.targets) == {0: 4, 1: 4, 2: 4}
    val = ClassFolders(str(folders / "val"), "--eval_data_path", classes=train.classes)
    assert Counter(val.targets) == {0: 4, 2: 4}  # cat stays 2 although bee is not there
    pairs = zip(val.paths, val.targets, strict=True)
    assert {path.split("/")[-2] for path, label in pairs if label == 2} == {"cat"}


def test_images_outside_of_class_folders_are_told(folders, logs):
    save(picture(), folders / "train/stray.png")
    assert len(ClassFolders(str(folders / "train"), "--data_path")) == 12
    assert f"--data_path {folders}/train: 1 files left out: .png 1" in logs.text


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


@pytest.mark.slow
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
