"""Several labels an image: lists, loss, Mixup, scores against direct computations, runs, checkpoints, refusals."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import datasets
import engine_finetune
import main_finetune
from tests.small_runs import STEPS, killed_after, load, records, same
from tests.test_distributed import launch
from tests.test_engines import finetune_args
from tools import export, predict, probe
from utils import report
from utils.amp import Amp
from utils.data.files import MultiLabelList, each_label
from utils.data.sampling import EvalLoader
from utils.errors import UsageError
from utils.report import Answers

SEVERAL = ("--multi_label", "true", "--train_list")


def labels_of(path) -> list[str]:
    """The folder's class, "even" for even numbers; nothing for each seventh."""
    number = int(path.stem)
    return [path.parent.name, *["even"] * (number % 2 == 0)] if number % 7 else []


@pytest.fixture(scope="module")
def lists(scripts, tmp_path_factory):
    """A text and a CSV that list the training and validation images with their labels."""
    folder = tmp_path_factory.mktemp("lists")
    train, val = (sorted(root.rglob("*.png")) for root in (scripts.train, scripts.val))
    (folder / "train.txt").write_text("".join(f"{path} {';'.join(labels_of(path))}\n" for path in train))
    (folder / "val.csv").write_text("path,labels\n" + "".join(f"{x},{'; '.join(labels_of(x))}\n" for x in val))
    return *SEVERAL, folder / "train.txt", "--eval_list", folder / "val.csv"


# ---- scores


def by_thresholds(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision as its definition has it: a threshold at each score, from the highest on."""
    found, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        now = labels[chosen].sum() / labels.sum()
        found, recall = found + (now - recall) * labels[chosen].mean(), now
    return found


@pytest.mark.parametrize("digits", [1, 8], ids=["ties", "no ties"])
def test_average_precision(digits):
    rng = np.random.default_rng(0)
    labels, scores = rng.random((60, 5)) < (0.02, 0.1, 0.5, 0.9, 0.3), rng.random((60, 5)).round(digits)
    labels[0] = True
    found = report.average_precision(torch.tensor(labels), torch.tensor(scores))
    expected = [by_thresholds(y, s) for y, s in zip(labels.T, scores.T, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert report.average_precision(torch.zeros(4, 1, dtype=torch.bool), torch.rand(4, 1)).tolist() == [0]


def test_the_report_by_hand():
    """Class c is in no image, and is predicted once."""
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]) > 0
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.4, 0.8, 0.1], [0.7, 0.6, 0.2], [0.1, 0.1, 0.9]])
    found = report.summarise(Answers(torch.arange(4), labels, scores > 0.5, scores), ["a", "b", "c"], {"loss": 1.0})
    a, b, c = found["classes"]
    assert (a["precision"], a["recall"], a["f1"], a["support"]) == (0.5, 0.5, 0.5, 2)
    assert a["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert (b["precision"], b["recall"], b["f1"], b["average_precision"]) == (1, 1, 1, 1)
    assert (c["f1"], c["support"], c["average_precision"]) == (0, 0, 0)
    assert found["mean_average_precision"] == pytest.approx((5 / 6 + 1) / 3)
    assert found["macro"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5})
    assert found["micro"] == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9})
    assert found["weighted"]["f1"] == pytest.approx(0.75)
    lines = report.table(found)
    assert lines[0].endswith("support      AP")
    assert lines[-1] == "mean average precision 0.6111; 1 classes that no image has count as 0: c"


class Drawn(torch.utils.data.Dataset):
    """Images whose channels' means are the logits of `Means`."""

    several = True
    logits = torch.tensor([[0.1, -0.1, 3.0], [-2.0, 0.3, -0.2], [0.0, -0.4, -0.1]])
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 0]])

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.logits[i][:, None, None].expand(3, 4, 4), self.labels[i]


class Means(torch.nn.Module):
    head = torch.nn.Identity()

    def forward_features(self, imgs):
        return imgs.mean((2, 3))


def test_a_label_is_predicted_above_a_half():
    loader, found = EvalLoader(Drawn(), batch_size=2), []
    amp = Amp(torch.device("cpu"), False, torch.bfloat16)
    stats = engine_finetune.evaluate(Means(), loader, amp, report=lambda answers, stats: found.append(answers))
    assert found[0].predictions.tolist() == [[True, False, True], [False, True, False], [False] * 3]
    torch.testing.assert_close(found[0].probabilities, Drawn.logits.sigmoid())
    assert torch.equal(found[0].labels, Drawn.labels > 0)
    expected = F.binary_cross_entropy_with_logits(Drawn.logits, Drawn.labels).item()
    assert stats == {"loss": pytest.approx(expected)}


# ---- loss


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [("--mixup", 0.8), ("--cutmix", 1.0), ("--mixup", 0.8, "--cutmix", 1.0)])
def test_labels_are_mixed_as_their_images_are(mode, kind):
    """Each image has a channel of its own, so that its mean tells its share; smoothing changes nothing."""
    args = finetune_args("--multi_label", "--mixup_mode", mode, *kind)
    mixup = main_finetune.build_mixup(args, 3)
    labels = (torch.rand(8, 3) < 0.5).float()
    for seed in range(5):
        torch.manual_seed(seed)
        np.random.seed(seed)
        imgs, targets = mixup(torch.eye(8)[:, :, None, None].repeat(1, 1, 16, 16), labels)
        torch.testing.assert_close(targets, imgs.mean((2, 3)) @ labels)
    assert ((targets > 0) & (targets < 1)).any()


def test_the_loss_is_torchs():
    logits, labels, weight = torch.randn(5, 3), (torch.rand(5, 3) < 0.5).float(), torch.tensor([0.5, 2, 7])
    args = finetune_args("--multi_label")
    mixup = main_finetune.build_mixup(args, 3)
    assert torch.equal(mixup(None, labels)[1], labels)
    loss = main_finetune.build_criterion(args, mixup)(logits, labels)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels))
    loss = main_finetune.build_criterion(args, mixup, weight)(logits, labels)
    torch.testing.assert_close(loss, torch.nn.BCEWithLogitsLoss(weight)(logits, labels))
    args = finetune_args("--multi_label", "--mixup", 0.8, "--bce_target_thresh", 0.3)
    loss = main_finetune.build_criterion(args, mixup)(logits, labels * 0.4)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels))


# ---- lists


@pytest.mark.parametrize("text", ["a.png cat;dog\nb.png dog\nc.png\n", 'a.png,"dog; cat"\nb.png,dog;\nc.png,\n',
                                  "id,image,labels\n1,a.png,cat;dog;cat\n2,b.png,dog\n3,c.png,\n"])  # fmt: skip
def test_lists(text, tmp_path, scripts):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(next(scripts.train.rglob("*.png")).read_bytes())
    (tmp_path / "list.csv").write_text(text)
    dataset = MultiLabelList(str(tmp_path / "list.csv"), "--train_list", str(tmp_path), [])
    assert dataset.classes == ["cat", "dog"]
    assert [dataset[i][1].tolist() for i in range(3)] == [[1, 1], [0, 1], [0, 0]]
    assert sorted(each_label(dataset.targets)) == [0, 1, 1]  # what weights count: each label once an image
    part = dataset.part([1, 2])
    assert [part[i][1].tolist() for i in range(2)] == [[0, 1], [0, 0]]
    known = MultiLabelList(str(tmp_path / "list.csv"), "--eval_list", str(tmp_path), ["ape", "dog", "cat"])
    assert known[0][1].tolist() == [0, 1, 1]
    with pytest.raises(UsageError, match=r"list.csv: line \d: label 'cat' is not among the 2 classes"):
        MultiLabelList(str(tmp_path / "list.csv"), "--eval_list", str(tmp_path), ["ape", "dog"])
    (tmp_path / "list.csv").write_text("a.png\n")
    with pytest.raises(UsageError, match=r"list.csv: holds no labels; a line is a path, a comma, and labels as in cat"):
        MultiLabelList(str(tmp_path / "list.csv"), "--eval_list", str(tmp_path), [])


def test_weights_follow_the_numbers_of_labels(lists, scripts):
    args = finetune_args(
        "--data_set", "image_folder", *lists, "--class_weights", "balanced", "--model", "convnextv2_atto"
    )
    dataset, count = datasets.build_dataset(True, args)
    found = [labels_of(path) for path in sorted(scripts.train.rglob("*.png"))]
    numbers = [sum(name in labels for labels in found) for name in dataset.classes]
    weights = datasets.class_weights(dataset, args, dataset.classes)
    assert weights.tolist() == pytest.approx([sum(numbers) / count / number for number in numbers])


def test_a_class_that_no_image_has_counts_as_0():
    labels = torch.tensor([[True, False]])
    answers = Answers(torch.tensor([0]), labels, labels, labels.float())
    assert report.summarise(answers, ["a", "b"], {})["macro"]["f1"] == 0.5


# ---- runs


@pytest.fixture(scope="module")
def run(scripts, lists, tmp_path_factory):
    out = tmp_path_factory.mktemp("several")
    flags = ("--mixup", 0.5, "--model_ema", "true", "--model_ema_eval", "true", "--predictions", out / "all.csv")
    result = scripts.finetune(*lists, *flags, "--output_dir", out)
    assert result.code == 0, result.err
    return out, result


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_and_its_report(run, scripts):
    out, result = run
    assert "40 images of 5 classes" in result.out
    assert "train.txt: 6 of 40 images have no label" in result.out
    lines = records(out)
    assert all({"test_map", "test_f1", "test_f1_micro", "test_loss", "test_map_ema"} <= line.keys() for line in lines)
    assert "test_acc1" not in lines[0]
    best = load(out / "checkpoint-best.pth")
    assert best["best"]["map"] == max(line["test_map"] for line in lines)
    assert best["args"]["multi_label"] is True
    assert best["classes"] == ["c0", "c1", "c2", "c3", "even"]
    found = json.loads((out / "report.json").read_text())
    assert 100 * found["mean_average_precision"] == pytest.approx(lines[-1]["test_map"])
    assert 100 * found["micro"]["f1"] == pytest.approx(lines[-1]["test_f1_micro"])
    assert not (out / "confusion.png").exists()
    table = rows(out / "all.csv")
    assert len(table) == 22
    for row in table:
        path = next(path for path in scripts.val.rglob("*.png") if str(path) == row["path"])
        assert row["label"] == ";".join(labels_of(path))
    assert sum("even" in row["label"] for row in table) == found["classes"][4]["support"]
    assert f"best map {best['best']['map']:.2f} in epoch" in result.out


def test_evaluation_and_predictions_need_no_flag(run, scripts, lists, tmp_path):
    """The same scores; probabilities of classes do not depend on each other."""
    out, _ = run
    flags = ("--data_set", "image_folder", "--num_workers", 0, "--device", "cpu")
    words = ("--eval", "true", "--resume", out / "checkpoint-2.pth", *lists[-2:], "--output_dir", tmp_path, *flags)
    result = scripts.call(main_finetune, *words, "--predictions", tmp_path / "all.csv")
    assert result.code == 0, result.err
    then, now = (json.loads((folder / "report.json").read_text()) for folder in (out, tmp_path))
    assert now["classes"] == then["classes"]
    assert now["mean_average_precision"] == then["mean_average_precision"]
    answers = ("--checkpoint", out / "checkpoint-2.pth", "--images", scripts.val, "--output", tmp_path / "a.csv")
    result = scripts.call(predict, *answers, *flags[2:], "--grid", tmp_path / "a.png")
    assert result.code == 0, result.err
    evaluated = {row["path"]: row for row in rows(tmp_path / "all.csv")}
    for row in rows(tmp_path / "a.csv"):
        shares = {row[f"class{i}"]: float(row[f"probability{i}"]) for i in range(1, 6)}
        theirs = evaluated[row["path"]]
        known = zip(theirs["prediction"].split(";"), theirs["probability"].split(";"), strict=True)
        assert {name for name, share in shares.items() if share > 0.5} == {*theirs["prediction"].split(";")} - {""}
        for name, share in known if theirs["prediction"] else ():
            assert shares[name] == pytest.approx(float(share), abs=2e-6)
        assert sum(shares.values()) != pytest.approx(1, abs=1e-3)
    refused = scripts.call(main_finetune, *words, "--multi_label", "false")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "a checkpoint of another model, with --multi_label True, not False" in refused.err


def test_a_resume_is_of_the_same_kind_and_bit_for_bit(scripts, lists, tmp_path):
    words = (*lists, "--epochs", 2, "--class_weights", "balanced", "--save_ckpt_steps", 1, "--best_metric", "loss")
    assert scripts.finetune(*words, "--output_dir", tmp_path / "whole").code == 0
    with killed_after(STEPS + 2):
        scripts.finetune(*words, "--output_dir", tmp_path / "cut")
    other = scripts.finetune("--epochs", 2, "--output_dir", tmp_path / "cut")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "--multi_label False: " in other.err
    result = scripts.finetune(*words, "--output_dir", tmp_path / "cut")
    assert result.code == 0, result.err
    assert same(*(load(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("whole", "cut")))
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    assert all("test_map" in line for line in records(tmp_path / "whole"))


@pytest.mark.parametrize(("share", "held"), [(0.25, 10), (0.1, 4)])
def test_a_share_is_held_out(scripts, lists, share, held):
    args = finetune_args("--data_set", "image_folder", *lists[:-2], "--val_split", share, "--model", "convnextv2_atto")
    train, val = datasets.build_dataset(True, args)[0], datasets.build_dataset(False, args)[0]
    assert (len(train), len(val)) == (40 - held, held)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images_per_class 3", "--images_per_class and --multi_label true: images have no class of their own"),
        ("--balanced_sampling", "--balanced_sampling and --multi_label true: images have no class of their own"),
        ("--best_metric acc1", "--best_metric acc1: is of one label an image; f1 and loss are of both"),
        ("--multi_label false --best_metric map", "--best_metric map: is of several labels an image"),
        ("--data_set shapes", "--multi_label: is for --data_set image_folder, not shapes"),
        ("", "--multi_label true: --data_path .*train is no list, which tells several labels of an image"),
    ],
)
def test_mistakes_are_a_line(flags, message, scripts):
    result = scripts.finetune("--multi_label", *flags.split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.search(message, result.err), result.err


def test_what_a_checkpoint_asks_for_is_not_called_a_flag(run, scripts):
    checkpoint = ("--eval", "true", "--resume", run[0] / "checkpoint-best.pth")
    of_lists = {"image_folder": "--multi_label true .of the checkpoint.: .* is no list"}
    for images, told in (of_lists | {"shapes": "--multi_label .of the checkpoint.: is for"}).items():
        data = ("--data_set", images, "--data_path", scripts.train, "--eval_data_path", scripts.val)
        result = scripts.call(main_finetune, *checkpoint, *data, "--device", "cpu")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert re.search(told, result.err), result.err


def test_who_takes_one_label_says_so(run, scripts, tmp_path):
    (tmp_path / "all.txt").write_text("".join(f"{x} {x.parent.name};all\n" for x in scripts.train.rglob("*.png")))
    flags = ("--data_set", "image_folder", "--train_list", tmp_path / "all.txt", "--num_workers", 0, "--device", "cpu")
    probed = scripts.call(probe, "--checkpoint", run[0] / "checkpoint-2.pth", *flags)
    knn = scripts.pretrain(*flags, "--knn_freq", 1)
    split = scripts.pretrain(*flags, "--val_split", 0.2)  # fine-tuning would hold out others
    for result in (probed, knn, split):
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "'c0;all' is several labels; here each image has one" in result.err
    plain = scripts.finetune(*flags, "--epochs", 1, "--warmup_epochs", 0, "--disable_eval", "true")
    assert plain.code == 0, plain.err
    assert re.search("'c.;all' is taken for one class; --multi_label true would split it at ';'", plain.out)


def test_exports_tell_it(run, tmp_path):
    words = ["--checkpoint", str(run[0] / "checkpoint-best.pth"), "--to", "hf", "--output", str(tmp_path)]
    export.main(words)
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "multi_label_classification"
    with pytest.raises(UsageError, match=r"--check_on: is for one label an image; .*best.pth was trained with --multi"):
        export.main([*words, "--check_on", str(tmp_path)])


@pytest.mark.slow
def test_one_two_and_three_processes_score_alike(scripts, lists, tmp_path):
    lines, tables = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        flags = ("--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0, "--batch_size", 4)
        done = launch(scripts, "main_finetune", processes, folder, *flags, *lists, "--predictions", folder / "a.csv")
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(records(folder)[0])
        tables.append([row["path"] for row in rows(folder / "a.csv")])
    assert tables[0] == tables[1] == tables[2]
    for line in lines[1:]:
        for key in ("test_map", "test_f1", "test_f1_micro", "test_loss"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-6)
