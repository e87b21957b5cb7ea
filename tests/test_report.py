"""The report of an evaluation: its scores against direct computations, its files, on several processes."""

import csv
import json
from collections import Counter

import pytest
import torch
from PIL import Image

import main_finetune
from tests.small_runs import Scripts, records
from utils import report
from utils.pictures import confusion_picture, shortened
from utils.report import Answers


def answers(labels, predictions, probabilities=None) -> Answers:
    probabilities = probabilities or [0.5] * len(labels)
    return Answers(*map(torch.tensor, (range(len(labels)), labels, predictions, probabilities)))


def test_scores_by_hand():
    """Of class c there is no image, and it is never predicted; d is only predicted."""
    found = report.summarise(answers([0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 3]), ["a", "b", "c", "d"], {})
    rows = {row.pop("name"): row for row in found["classes"]}
    assert rows["a"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 4, "f1": 1 / 3, "support": 4})
    assert rows["b"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2})
    assert rows["c"] == rows["d"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert found["macro"] == pytest.approx({"precision": 5 / 18, "recall": 1 / 4, "f1": 11 / 45})
    assert found["weighted"]["precision"] == pytest.approx((4 / 2 + 2 / 3) / 6)
    assert found["balanced_accuracy"] == pytest.approx(3 / 8)
    assert found["confusion_matrix"] == [[1, 2, 0, 1], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert found["most_confused"][0] == {"label": "a", "prediction": "b", "images": 2}


def test_calibration_error():
    """Two bins: 0.9 with accuracy 1/2, 0.3 with accuracy 1."""
    found = answers([0, 0, 1], [0, 1, 1], [0.9, 0.9, 0.3])
    assert report.calibration_error(found) == pytest.approx((2 * 0.4 + 0.7) / 3)
    assert report.calibration_error(answers([0, 1], [0, 1], [1.0, 1.0])) == 0
    assert report.calibration_error(answers([0, 1], [1, 0], [0.0, 0.0])) == 0


def test_many_classes(tmp_path):
    """Beyond 50 the picture has the most confused ones, beyond 1000 the file no matrix."""
    labels = list(range(1200)) * 2
    predictions = [(label + 1 if 300 <= label < 340 else label) for label in labels]
    found = answers(labels, predictions)
    chosen = report.most_confused(found, 1200)
    assert set(range(300, 341)) <= set(chosen.tolist())
    assert len(chosen) == 50
    assert report.count_pairs(found, chosen, 1200).sum() == 100
    names = [f"n{i}" for i in range(1200)]
    whole = report.summarise(found, names, {"loss": float("nan")})
    assert "confusion_matrix" not in whole
    assert whole["loss"] is None
    lines = report.table(whole)
    assert len(lines) == 1 + 50 + 2 + 3
    assert lines[1].startswith("n300 ")
    picture = confusion_picture(report.count_pairs(found, chosen, 1200), [names[i] for i in chosen])
    assert picture.width == picture.height > 1000


def test_a_confused_cell_is_dark():
    picture = confusion_picture(torch.tensor([[0, 9], [0, 0]]), ["a", "b"])
    left, top = picture.width - 10 - 64, picture.height - 10 - 128
    assert picture.getpixel((left + 8, top + 8)) == (8, 48, 107)
    assert picture.getpixel((left + 8, top + 72)) == (255, 255, 255)


def test_names_in_pictures():
    """The font has no letters beyond ASCII, and draws the same box for each; long names may differ in their ends."""
    assert [shortened(x, 7) for x in ("Café", "Cafe\u0301", "a\nb", "", "日本\n語", "Straße", "\udcff")] == [
        "Cafe", "Cafe", "a b", "", "class 7", "class 7", "?",
    ]  # fmt: skip
    assert shortened("a name with an end of its own 1", 7) != shortened("a name with an end of its own 2", 7)
    assert shortened("0123456789" * 3, 7, 16) == "0123456...456789"
    assert shortened("x" * 24, 7) == "x" * 24


@pytest.fixture(scope="module")
def run(scripts: Scripts, tmp_path_factory):
    """A fine-tuning with its report, one validation image being damaged."""
    out = tmp_path_factory.mktemp("report")
    damaged = scripts.val / "c0/damaged.png"
    damaged.write_bytes(b"\x89PNG")
    flags = ("--model_ema", "true", "--model_ema_eval", "true", "--predictions", out / "csv/all.csv")
    yield out, scripts.finetune("--output_dir", out, *flags)
    damaged.unlink()


def test_the_end_of_a_fine_tuning(run, scripts):
    out, result = run
    assert result.code == 0, result.err
    for suffix, key in (("", ""), ("-ema", "_ema")):
        found, record = json.loads((out / f"report{suffix}.json").read_text()), records(out)[-1]
        matrix = torch.tensor(found["confusion_matrix"])
        assert 100 * matrix.trace().item() / matrix.sum().item() == found["acc1"] == record[f"test_acc1{key}"]
        assert (found["images"], found["unreadable"]) == (22, 1)
        assert [row["name"] for row in found["classes"]] == ["c0", "c1", "c2", "c3"]
        Image.open(out / f"confusion{suffix}.png").verify()
        rows = list(csv.DictReader((out / f"csv/all{suffix}.csv").open()))
        pairs = Counter((int(row["label"][1]), int(row["prediction"][1])) for row in rows)
        assert pairs == {(i, j): n for i, row in enumerate(matrix.tolist()) for j, n in enumerate(row) if n}
        assert all(row["path"].startswith(f"{scripts.val}/{row['label']}/") for row in rows)
    assert result.out.count("balanced accuracy") == 2, "of the last epoch alone"


def test_evaluation_reports_the_same(run, scripts, tmp_path):
    out, _ = run
    flags = ("--eval", "true", "--resume", out / "checkpoint-2.pth", "--data_set", "image_folder", "--device", "cpu")
    flags += ("--eval_data_path", scripts.val, "--num_workers", 0, "--output_dir", tmp_path, "--batch_size", 5)
    result = scripts.call(main_finetune, *flags, "--predictions", tmp_path / "a.csv")
    assert result.code == 0, result.err
    then, now = (json.loads((folder / "report.json").read_text()) for folder in (out, tmp_path))
    assert now["evaluated"] == str(out / "checkpoint-2.pth")
    for name in ("confusion_matrix", "acc1", "classes"):
        assert now[name] == then[name]
    refused = scripts.call(main_finetune, *flags, "--predictions", tmp_path / "a.txt")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "must be a file that ends in .csv" in refused.err
    (tmp_path / "b.csv").mkdir()
    refused = scripts.call(main_finetune, *flags, "--predictions", tmp_path / "b.csv")
    assert refused.code == 2
    assert "b.csv: is a folder or a device; give a file to write" in refused.err


def test_predictions_are_not_written_over_labels(run, scripts, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{path},{path.parent.name}\n" for path in scripts.val.rglob("*.png")))
    before = labels.read_text()
    flags = ("--eval", "true", "--resume", run[0] / "checkpoint-2.pth", "--data_set", "image_folder", "--device", "cpu")
    refused = scripts.call(main_finetune, *flags, "--eval_list", labels, "--predictions", labels)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "labels.csv: is what --eval_list names; give another file" in refused.err
    assert labels.read_text() == before
