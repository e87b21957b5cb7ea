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
import main_pretrain
from models.convnextv2 import Encoder
from tests.small_runs import STEPS, TINY, killed_after, load, records, same
from tests.test_distributed import launch
from tests.test_engines import finetune_args
from tools import export, predict, probe
from utils import checkpoint, knn, report, weights
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
    lines = report.table(found | {"images": 9})
    assert lines[0].endswith("support      AP")
    assert [line.split()[-1] for line in lines[4:7]] == ["4"] * 3  # labels, as scikit-learn counts them
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


def test_the_least_certain_of_all_classes_is_drawn_first(run, scripts, tmp_path, monkeypatch):
    """Whatever --top_k is."""
    drawn, captioned = [], predict.captioned
    monkeypatch.setattr(predict, "captioned", lambda *args: drawn.append(args[0]) or captioned(*args))
    flags = ("--checkpoint", run[0] / "checkpoint-2.pth", "--images", scripts.val, "--device", "cpu")
    flags += ("--output", tmp_path / "a.csv", "--num_workers", 0, "--grid", tmp_path / "a.png", "--grid_images", 5)
    for count in (5, 1):
        result = scripts.call(predict, *flags, "--top_k", count)
        assert result.code == 0, result.err
    assert torch.equal(*drawn)


@pytest.mark.slow
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


# ---- frozen features


def shares(features, labels, queries) -> np.ndarray:
    """The weighted share of the 20 nearest that have each label, by the definition."""
    found = []
    for query in queries:
        cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosines)[:20]
        found.append(np.average(labels[nearest], axis=0, weights=np.exp(cosines[nearest] / 0.07)))
    return np.array(found)


def mean_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """In percent, over all classes, those that no image has being 0."""
    columns = zip(labels.T, scores.T, strict=True)
    return 100 * np.mean([by_thresholds(y, s) if y.any() else 0 for y, s in columns])


def test_the_neighbours_vote_for_each_class():
    rng = np.random.default_rng(0)
    features, queries, labels = rng.normal(size=(30, 6)), rng.normal(size=(11, 6)), rng.random((30, 4)) < 0.4
    given = [torch.from_numpy(x) for x in (features, labels.astype(np.float32), queries)]
    for similarities in (1, 70, knn.SIMILARITIES):
        votes = knn.knn_votes(*given, 4, similarities=similarities)
        np.testing.assert_allclose(votes.numpy(), shares(features, labels, queries), rtol=1e-6)


@pytest.fixture(scope="module")
def by_definition(scripts, lists):
    """Of an encoder: mAP of k-NN on the lists, and of what knows the classes' shares alone."""

    def score(encoder) -> tuple[float, float]:
        args = finetune_args("--data_set", "image_folder", *lists, "--input_size", 16, "--model", "convnextv2_atto")
        splits = []
        for dataset in datasets.labelled_splits(args):
            imgs, labels = (torch.stack(x) for x in zip(*map(dataset.__getitem__, range(len(dataset))), strict=True))
            splits.append((knn.pooled_features(encoder.eval(), imgs).detach().double().numpy(), labels.numpy()))
        (features, labels), (queries, truth) = splits
        return mean_precision(truth, shares(features, labels, queries)), 100 * truth.mean()

    return score


def test_knn_in_pretraining(scripts, lists, by_definition, tmp_path):
    flags = ("--epochs", 1, "--warmup_epochs", 0, "--output_dir", tmp_path, "--save_ckpt_steps", 3)
    with killed_after(4):
        scripts.pretrain(*lists[2:], *flags)
    result = scripts.pretrain(*lists, *flags, "--knn_freq", 1)  # the rest watched
    assert result.code == 0, result.err
    encoder = Encoder(**TINY, stem_stride=1)
    weights.load(encoder, load(tmp_path / "checkpoint-0.pth")["model"])
    found = records(tmp_path)[0]["test_knn_map"]
    assert found == pytest.approx(by_definition(encoder)[0], rel=1e-5)
    assert f"epoch 0: k-NN map {found:.2f}\n" in result.out


def test_the_probe(run, scripts, lists, by_definition, monkeypatch):
    """Beside chance and random weights."""
    monkeypatch.setattr(probe, "PENALTIES", (0.1,))
    flags = ("--checkpoint", run[0] / "checkpoint-best.pth", "--data_set", "image_folder", "--num_workers", 0)
    flags += ("--device", "cpu", "--random_init", "true")
    result = scripts.call(probe, *flags, *lists)
    assert result.code == 0, result.err
    assert "40 training and 22 test images of 5 classes" in result.out
    head, _, *rows = [line.strip("| ").split(" | ") for line in result.out.splitlines() if line.startswith("| ")]
    assert head == ["method", "mAP", "chance", "random weights", "seconds"]
    table = {row[0]: [*map(float, row[1:])] for row in rows}
    (expected, chance), (fresh, _) = (by_definition(encoder) for encoder in encoders(run[0] / "checkpoint-best.pth"))
    assert table["knn"][:3] == pytest.approx([expected, chance, fresh], abs=0.0051)
    assert table["linear"][1] == table["knn"][1] < table["linear"][0] <= 100


def encoders(path):
    """Of a checkpoint, and the random one beside it."""
    args = probe.get_args_parser().parse_args(["--checkpoint", str(path)])
    yield probe.load_encoder(args)
    torch.manual_seed(0)
    yield Encoder(**TINY, stem_stride=1)


def test_a_regression_for_each_class():
    """Where the gradient, written out, vanishes; whatever the number of rows at a time."""
    features, labels = torch.randn(60, 5).double(), (torch.rand(60, 3) < 0.4).double()
    with pytest.MonkeyPatch.context() as patch:
        for logits in (probe.LOGITS, 21):
            patch.setattr(probe, "LOGITS", logits)
            weight, bias = probe.fit_linear(features, labels, 3, 0.01)
            error = ((features @ weight.T + bias).sigmoid() - labels) / 60
            assert (error.T @ features + 0.01 * weight).abs().max() < 1e-4
            assert error.sum(dim=0).abs().max() < 1e-4


def test_the_same_images_are_held_out_in_pretraining(lists):
    """Which a resume with another --multi_label would not do; without, that is of k-NN alone."""
    now, then = {"multi_label": True}, {"args": {"val_split": 0.1, "split_seed": 0}}
    checkpoint.check_same_run("a.pth", {"args": {}}, now, None, {})
    with pytest.raises(UsageError, match=r"--multi_label True: a.pth was trained with False; go on with that"):
        checkpoint.check_same_run("a.pth", then, now | then["args"], None, {})
    flags = [str(x) for x in ("--data_set", "image_folder", *lists[:-2], "--val_split", 0.25, "--input_size", 32)]
    found = datasets.build_pretrain_dataset(main_pretrain.get_args_parser().parse_args(flags))
    assert found.paths == datasets.build_dataset(True, finetune_args(*flags))[0].paths
    assert len(found) == 30


def test_one_class_of_several_names_is_told(run, scripts, tmp_path):
    (tmp_path / "all.txt").write_text("".join(f"{x} {x.parent.name};all\n" for x in scripts.train.rglob("*.png")))
    flags = ("--data_set", "image_folder", "--train_list", tmp_path / "all.txt", "--num_workers", 0, "--device", "cpu")
    plain = scripts.finetune(*flags, "--epochs", 1, "--warmup_epochs", 0, "--disable_eval", "true")
    probed = scripts.call(probe, "--checkpoint", run[0] / "checkpoint-2.pth", *flags)
    for result in (plain, probed):
        assert result.code == 0, result.err
        assert re.search("'c.;all' is taken for one class; --multi_label true would split it at ';'", result.out)
    assert "| method | top-1 | top-5 |" in probed.out


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


@pytest.mark.slow
@pytest.mark.parametrize("images", [37, 1])
def test_processes_agree_on_neighbours(images, scripts, lists, tmp_path):
    """Also where one of them has no image of either."""
    common = ("--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--vis_freq", 0, "--health_freq", 0)
    common += (*lists, "--knn_freq", 1, "--knn_images", images)
    assert scripts.pretrain("--output_dir", tmp_path / "1", *common).code == 0
    done = launch(scripts, "main_pretrain", 2, tmp_path / "2", *common)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (records(tmp_path / name)[0]["test_knn_map"] for name in ("1", "2"))
    assert one == pytest.approx(two)
