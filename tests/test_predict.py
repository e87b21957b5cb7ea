"""tools/predict.py: the same answers as an evaluation's, from folders, lists, tars and single files."""

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tests.small_runs import TINY, snapshot
from tools import predict

ROOT = Path(__file__).resolve().parent.parent
COMMON = ("--device", "cpu", "--num_workers", 0)


@pytest.fixture(scope="module")
def trained(scripts, tmp_path_factory):
    """A checkpoint whose settings are no defaults, what evaluation says of each path, and images."""
    out = tmp_path_factory.mktemp("trained")
    flags = ("--epochs", 1, "--warmup_epochs", 0, "--crop_pct", 0.7, "--mean", 0.3, 0.4, 0.5, "--std", 0.2, 0.3, 0.4)
    result = scripts.finetune("--output_dir", out, "--predictions", out / "eval.csv", *flags)
    assert result.code == 0, result.err
    images = out / "images"
    images.symlink_to(scripts.val)
    return out / "checkpoint-0.pth", table(out / "eval.csv"), images


def table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def answer(rows: list[dict]) -> list[tuple]:
    """File, class and probability of each image, of either file."""
    keys = ("prediction", "probability") if "prediction" in rows[0] else ("class1", "probability1")
    return sorted(("/".join(row["path"].split("/")[-2:]), row[keys[0]], float(row[keys[1]])) for row in rows)


def test_the_first_class_is_the_evaluations(trained, scripts, tmp_path):
    checkpoint, evaluated, images = trained
    flags = ("--checkpoint", checkpoint, "--images", images, "--output", tmp_path / "new/a.csv", *COMMON)
    damaged = scripts.val / "c1/damaged.png"
    damaged.write_bytes(b"\x89PNG")
    try:
        result = scripts.call(predict, *flags, "--batch_size", 5, "--grid", tmp_path / "grid.png", "--grid_images", 9)
    finally:
        damaged.unlink()
    assert result.code == 0, result.err
    rows = table(tmp_path / "new/a.csv")
    for ours, theirs in zip(answer(rows), answer(evaluated), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=2e-6)
    assert sum(float(rows[0][f"probability{i}"]) for i in range(1, 5)) == pytest.approx(1, abs=1e-5)
    assert "unreadable image, left out: " in result.out
    assert "1 of 23 images are unreadable and left out" in result.out
    assert "eta" in result.out
    assert Image.open(tmp_path / "grid.png").width == 8 * 168


def test_tars_lists_files_and_features(trained, scripts, tmp_path):
    """In JSON lines: the same answers from every source, and features in the rows' order, which give them."""
    checkpoint, evaluated, images = trained
    known = {path: (name, share) for path, name, share in answer(evaluated)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(f"{images}/", "x")
    beside = os.path.relpath(images, tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{beside}/{x}.png\n" for x in ("c0/000", "c1/001", "c2/gone")))
    single = images / "c2/002.png"
    head = torch.load(checkpoint, weights_only=True)["model"]
    for source, count, more in (
        (tmp_path / "a.tar", 22, "f.npy"),
        (tmp_path / "list.txt", 2, "f.safetensors"),
        (single, 1, "g.npy"),
    ):
        flags = ("--checkpoint", checkpoint, "--images", source)
        flags += ("--output", tmp_path / "a.jsonl")
        result = scripts.call(predict, *flags, *COMMON, "--json", "--top_k", 2, "--embeddings", tmp_path / more)
        assert result.code == 0, result.err
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert len(rows) == count
        if more.endswith(".npy"):
            features = torch.from_numpy(np.load(tmp_path / more))
            paths = json.loads((tmp_path / f"{more}.paths.json").read_text())
        else:
            with safe_open(tmp_path / more, "pt") as file:
                features, paths = file.get_tensor("features"), json.loads(file.metadata()["paths"])
        assert paths == [row["path"] for row in rows]
        shares = (features @ head["head.weight"].T + head["head.bias"]).softmax(1).max(1).values.tolist()
        for row, share in zip(rows, shares, strict=True):
            name, probability = known["/".join(row["path"].split("/")[-2:])]
            assert row["classes"][0] == name
            assert (len(row["classes"]), len(row["probabilities"])) == (2, 2)
            assert row["probabilities"][0] == pytest.approx(probability, abs=2e-6) == pytest.approx(share, abs=1e-5)


def test_patch_features(trained, scripts, tmp_path):
    """Their mean gives the pooled ones: of a classifier through its norm, of an encoder itself."""
    torch.save({"model": FCMAE(**TINY, patch_size=8).state_dict()}, tmp_path / "pre.pth")
    for checkpoint, more in ((trained[0], ("--input_size", 16, 24)), (tmp_path / "pre.pth", ("--input_size", 16))):
        flags = ("--checkpoint", checkpoint, "--images", trained[2], "--output", tmp_path / "a.csv", *COMMON, *more)
        flags += ("--batch_size", 5, "--patch_features", "true", "--embeddings")
        result = scripts.call(predict, *flags, tmp_path / "a.safetensors")
        assert result.code == 0, result.err
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            features, patches = (file.get_tensor(name) for name in ("features", "patches"))
        assert patches.shape == (22, 16, 2, 3 if checkpoint == trained[0] else 2)
        pooled = patches.mean(dim=(2, 3))
        if checkpoint == trained[0]:
            state = torch.load(checkpoint, weights_only=True)["model"]
            pooled = F.layer_norm(pooled, (16,), state["norm.weight"], state["norm.bias"], 1e-6)
        torch.testing.assert_close(pooled, features, rtol=1e-4, atol=1e-5)
    refused = scripts.call(predict, *flags, tmp_path / "a.npy")
    assert (refused.code, refused.err) == (2, "error: --patch_features true: needs --embeddings FILE.safetensors\n")


def test_unreadable_files_alone(trained, scripts, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    flags = ("--checkpoint", trained[0], "--images", tmp_path / "x.png", "--output", tmp_path / "a.csv", *COMMON)
    result = scripts.call(predict, *flags, "--grid", tmp_path / "a.png", "--embeddings", tmp_path / "a.npy")
    assert result.code == 0, result.err
    assert "1 of 1 images are unreadable" in result.out
    assert table(tmp_path / "a.csv") == []


def test_an_encoder_gives_features_alone(scripts, tmp_path):
    torch.save({"model": FCMAE(**TINY, patch_size=8).state_dict()}, tmp_path / "pre.pth")
    flags = ("--checkpoint", tmp_path / "pre.pth", "--images", scripts.val, "--output", tmp_path / "a.csv", *COMMON)
    flags += ("--input_size", 16)
    result = scripts.call(predict, *flags, "--embeddings", tmp_path / "a.npy")
    assert result.code == 0, result.err
    assert np.load(tmp_path / "a.npy").shape == (22, 16)
    assert list(table(tmp_path / "a.csv")[0]) == ["path"]
    refused = scripts.call(predict, *flags)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "pre.pth: an encoder without a classifier's head" in refused.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images /nowhere", "--images /nowhere: no such file"),
        ("--grid a.jpg", "--grid a.jpg: must be a file that ends in .png"),
        ("--embeddings a.pt", "--embeddings a.pt: must be a file that ends in .npy or .safetensors"),
        ("--output /dev/null/x.csv", "--output /dev/null.*: cannot be written"),
        ("--output /dev", "--output /dev: is a folder or a device; give a file to write"),
        ("--output $link", "--output .*link: is a folder or a device"),
        ("--output $image.png", "--output .*image.png: is what --images names; give another file"),
        ("--output $a.pth", "--output .*a.pth: is what --checkpoint names; give another file"),
        ("--output $b.png --grid $other/../b.png", "--grid .*b.png: is what --output names; give another file"),
        ("--in_chans 4", "unknown argument --in_chans"),
    ],
)
def test_mistakes_are_a_line(flags, message, scripts, tmp_path):
    torch.save({"model": ConvNeXtV2(num_classes=3, **TINY).state_dict()}, tmp_path / "a.pth")
    (tmp_path / "link").symlink_to("/dev/null")
    image = tmp_path / "image.png"
    Image.new("RGB", (9, 9)).save(image)
    words = ("--checkpoint", tmp_path / "a.pth", "--images", image, *COMMON, "--output", tmp_path / "a.csv")
    before = snapshot(tmp_path)
    result = scripts.call(predict, *words, *flags.replace("$", f"{tmp_path}/").split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert snapshot(tmp_path) == before
    assert re.search(message, result.err), result.err


@pytest.mark.parametrize("classes", [3, ["a"], {"a": 0, "b": 1, "c": 2}, "abc"])
def test_what_names_no_classes_is_passed_over(classes, scripts, tmp_path):
    """As files of other trainers have it under that name."""
    torch.save({"model": ConvNeXtV2(num_classes=3, **TINY).state_dict(), "classes": classes}, tmp_path / "a.pth")
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    words = ("--images", scripts.val, *COMMON, "--input_size", 32, "--output", tmp_path / "a.csv")
    result = scripts.call(predict, "--checkpoint", tmp_path / "a.pth", *words)
    assert result.code == 0, result.err
    assert {row["class1"] for row in table(tmp_path / "b.csv")} <= {"0", "1", "2"}


def test_images_may_be_as_large_as_in_training(scripts, tmp_path):
    state = ConvNeXtV2(num_classes=3, **TINY).state_dict()
    torch.save({"model": state, "args": {"max_pixels": 99}}, tmp_path / "a.pth")
    for side in (9, 10):
        Image.new("RGB", (side, 11)).save(tmp_path / f"{side}.png")
    words = ("--checkpoint", tmp_path / "a.pth", "--images", tmp_path, *COMMON, "--output", tmp_path / "a.csv")
    result = scripts.call(predict, *words, "--input_size", 32)
    assert result.code == 0, result.err
    assert "10.png: has 11 x 10 pixels, above --max_pixels 99" in result.out
    assert [Path(row["path"]).name for row in table(tmp_path / "a.csv")] == ["9.png"]


@pytest.mark.slow
def test_two_processes_write_what_one_does(trained, scripts, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ("--checkpoint", trained[0], "--images", trained[2], *COMMON)
    words = [*run, ROOT / "tests/small_process.py", "tools.predict", *flags, "--output", tmp_path / "two.csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert scripts.call(predict, *flags, "--output", tmp_path / "one.csv").code == 0
    ours, theirs = answer(table(tmp_path / "two.csv")), answer(table(tmp_path / "one.csv"))
    assert [x[:2] for x in ours] == [x[:2] for x in theirs]
    assert len(ours) == 22
