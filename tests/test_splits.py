"""utils/named_files.py and utils/data/splits.py: train/ and val/, what --val_split holds out, lists."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest

import datasets
from tests.pictures import finetune_args, pretrain_args
from tests.small_runs import load, write_images
from utils.data.files import ImageFiles
from utils.data.splits import parts, split_folders
from utils.errors import UsageError


def names(dataset) -> list[str]:
    return sorted("/".join(Path(path).parts[-2:]) for path in dataset.paths)


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("train val", {"train": "train", "val": "val"}),
        ("train valid test other .hidden", {"train": "train", "val": "valid"}),
        ("Training Testing", {"train": "Training", "val": "Testing"}),
        ("train", {"train": "train"}),
        ("train bus car", {}),
        ("cat test", {}),
        ("", {}),
    ],
)
def test_folders_of_splits(tmp_path, folders, found):
    for name in folders.split():
        (tmp_path / name).mkdir()
    assert split_folders(str(tmp_path)) == {split: str(tmp_path / name) for split, name in found.items()}


def test_train_and_val_are_used_as_such(folders, logs):
    args = finetune_args(data_set="image_folder", data_path=folders, input_size=32)
    train, val = (datasets.build_dataset(is_train, args)[0] for is_train in (True, False))
    assert (train.classes, len(train)) == (["ant", "bee", "cat"], 12)
    assert (val.classes, len(val)) == (["ant", "bee", "cat"], 8)
    assert f"--data_path {folders}: holds a folder for each split; {folders}/train is read" in logs.text
    assert names(datasets.build_pretrain_dataset(pretrain_args(data_set="image_folder", data_path=folders))) == names(
        train
    )
    args.data_path, args.eval_data_path = str(folders / "train"), str(folders)
    assert names(datasets.build_dataset(False, args)[0]) == names(val)


def test_parts_are_of_each_class_and_by_names(tmp_path):
    counts = {"a": 1, "b": 2, "c": 11, "d": 40}
    files = [f"/{name}/{i}.png" for name, count in counts.items() for i in range(count)]
    whole = ImageFiles(files, [ord(path[1]) for path in files], 3, "it", {})
    train, held = parts(whole, 0.2, 0)
    assert [sum(path[1] == name for path in held.paths) for name in counts] == [0, 1, 2, 8]
    assert sorted(train.paths + held.paths) == sorted(files)
    assert held.targets == [ord(path[1]) for path in held.paths]
    moved = ImageFiles([f"/else/where{x}" for x in files[::-1]], whole.targets[::-1], 3, "it", {})
    assert names(parts(moved, 0.2, 0)[1]) == names(held)
    assert names(parts(whole, 0.2, 1)[1]) != names(held)
    assert parts(whole, None)[1].paths == ["/c/4.png", "/c/9.png", *(f"/d/{i}.png" for i in range(4, 40, 5))]
    assert len(parts(whole.part(range(3)), 0.999, 0)[0]) == 2
    thrice = whole.part([*range(len(files))] * 3)  # lines of a list
    for share in (0.2, None):
        assert [x.paths for x in parts(thrice, share)] == [x.paths * 3 for x in parts(whole, share)]


def test_tars_hold_out_the_same(scripts, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(scripts.train, ".")
    flags = {"data_set": "image_folder", "val_split": 0.25, "input_size": 16}
    whole = datasets.build_dataset(False, finetune_args(data_path=scripts.train, **flags))[0]
    packed = datasets.build_dataset(False, finetune_args(data_path=tmp_path, **flags))[0]
    assert names(whole) == names(packed)
    assert len(whole) == 8
    assert all((a[0] == b[0]).all() for a, b in zip(sorted(whole, key=str), sorted(packed, key=str), strict=True))


def test_val_split_of_whole_runs(scripts, tmp_path):
    """Fine-tuning, evaluation by the checkpoint's word, and pre-training hold out the same images."""
    flags = ("--data_set", "image_folder", "--data_path", scripts.train, "--val_split", 0.2, "--eval_data_path", "")
    result = scripts.finetune(*flags, "--output_dir", tmp_path, "--epochs", 2)
    assert (result.code, result.err) == (0, "")
    assert "--val_split 0.2: of 40 images, 8 are held out" in result.out
    assert "32 images, 8 per optimizer step" in result.out
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["args"]["val_split"] == 0.2
    file = tmp_path / "checkpoint-1.pth"
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_acc1"]
    evaluated = scripts.finetune("--eval", "true", "--resume", file, "--eval_data_path", "")
    assert evaluated.code == 0, evaluated.err
    assert re.search(rf"acc1 {last:.2f} .*\(8 images\)", evaluated.out)
    assert evaluated.out.count("--val_split 0.2: of 40 images, 8 are held out") == 1, "of other images, too, a share"
    for changed in ("--val_split 0.3", "--val_split 0.2 --split_seed 1", f"--eval_data_path {scripts.val}"):
        words = changed.split() if "eval" in changed else [*changed.split(), "--eval_data_path", ""]
        refused = scripts.finetune("--resume", file, "--epochs", 3, *words)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "was trained with --val_split 0.2 --split_seed 0; go on with that" in refused.err
    copy = shutil.copytree(scripts.train, tmp_path / "more")
    for image in list(copy.glob("*/*"))[:10]:
        shutil.copy(image, image.with_stem(f"a{image.stem}"))
    refused = scripts.finetune("--resume", file, "--epochs", 3, *flags, "--data_path", copy)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "was trained on 32 images, now there are 40: others may be held out" in refused.err
    told = "--val_split 0.2: leaves 40 images, 32 were trained on: some held out may be of them"
    evaluated = scripts.finetune("--eval", "true", "--resume", file, "--eval_data_path", "", "--data_path", copy)
    assert evaluated.out.count(told) == 1
    evaluated = scripts.finetune("--eval", "true", "--resume", file, "--eval_data_path", "", "--split_seed", 1)
    assert "were trained on" not in evaluated.out
    assert f"--split_seed 1: {file} was trained with 0" in evaluated.out
    assert "split_seed: no effect" not in evaluated.out
    assert load(file)["args"]["split_seed"] == 0
    args = finetune_args(data_set="image_folder", data_path=scripts.train, val_split=0.2, seed=5, input_size=16)
    train, val = (datasets.build_dataset(is_train, args)[0] for is_train in (True, False))
    args = pretrain_args(data_set="image_folder", data_path=scripts.train, val_split=0.2, input_size=16)
    assert names(datasets.build_pretrain_dataset(args)) == names(train)
    assert [names(split) for split in datasets.labelled_splits(args)] == [names(train), names(val)]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("finetune", "--data_path $/one", "has one class alone, c0; at least two"),
        ("finetune", "--data_path $/one/c0", "holds no class folders"),
        ("finetune", "--val_split 0.1", "--val_split 0.1: --eval_data_path tells the validation images already"),
        (
            "pretrain",
            "--data_path $/both --val_split 0.1",
            "--val_split 0.1: .*$/both/val tells the validation images al",
        ),
        ("pretrain", "--data_path $/one/c0 --val_split 0.1", "--val_split 0.1: needs labelled images; .*no class fold"),
        ("pretrain", "--data_set shapes --val_split 0.1", "--val_split: is for --data_set image_folder, not shapes"),
        ("finetune", "--val_split 1", "--val_split 1: must be a number above 0, below 1"),
        ("finetune", "--data_path $/none.csv", "--data_path $/none.csv: No such file"),
        ("finetune", "--data_path $/bad.csv", "line 2, 'a.png,1', has no label; .*a header names the columns"),
    ],
)
def test_mistakes(scripts, tmp_path, script, flags, message):
    shutil.copytree(scripts.train / "c0", tmp_path / "one/c0")
    for split in ("train", "val"):
        write_images(tmp_path / "both" / split, split, 8)
    (tmp_path / "bad.csv").write_text("path,species,fold\na.png,1\n")
    result = getattr(scripts, script)(*flags.replace("$", str(tmp_path)).split())
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert re.search(message.replace("$", str(tmp_path)), result.err), result.err


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nant/0.png,ant\ncat/1.png,cat\n",
        "label,path\nant,ant/0.png\ncat,cat/1.png\n",
        'id;File Name;fold;Class\n7;"ant/0.png";0;ant\n8;cat/1.png;1;cat\n',
        "\timage\ttarget\n0\tant/0.png\tant\n1\tcat/1.png\tcat\n",
        "image_path,species\nant/0.png,ant\ncat/1.png,cat\n",
    ],
)
def test_lists_as_data(folders, monkeypatch, text):
    (folders / "train/all.csv").write_text(text)
    monkeypatch.chdir(folders)
    for flags in ({}, {"data_set": "image_folder"}):
        args = finetune_args(data_path="train/all.csv", eval_data_path="train/all.csv", input_size=32, **flags)
        for is_train in (True, False):
            dataset, count = datasets.build_dataset(is_train, args)
            assert (names(dataset), dataset.classes, count) == (["ant/0.png", "cat/1.png"], ["ant", "cat"], 2)
        dataset = datasets.build_pretrain_dataset(pretrain_args(data_path="train/all.csv", **flags))
        assert (names(dataset), dataset[1][1]) == (["ant/0.png", "cat/1.png"], 0)
    args.eval_data_path = None
    with pytest.raises(UsageError, match="give it, --val_split"):
        datasets.build_dataset(False, args)


def test_a_list_of_paths_alone_has_a_header_too(folders):
    (folders / "all.csv").write_text("path\ntrain/ant/0.png\ntrain/cat/1.png\n")
    args = pretrain_args(data_path=folders / "all.csv")
    assert names(datasets.build_pretrain_dataset(args)) == ["ant/0.png", "cat/1.png"]
