"""Classes of unequal size: weights against torch's CrossEntropyLoss, balanced epochs, on any spread, after a resume."""

import json
import subprocess
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import datasets
import main_finetune
from engine_finetune import WithLoss, train_one_epoch
from tests.small_runs import STEPS, killed_after, load, records, same
from tests.test_distributed import launch
from tests.test_engines import classifier, constant, finetune_args, plain_run
from utils.data.balance import balanced_order, balanced_weights, read_weights
from utils.data.sampling import StepSampler, TrainSamples
from utils.errors import UsageError

COUNTS = (24, 10, 4, 2)


@pytest.fixture(scope="module")
def unequal(scripts, tmp_path_factory):
    """Flags of a list of the 40 training images with classes of 24, 10, 4 and 2."""
    file = tmp_path_factory.mktemp("unequal") / "train.csv"
    paths = sorted(scripts.train.rglob("*.png"))
    names = [f"c{c}" for c, count in enumerate(COUNTS) for _ in range(count)]
    file.write_text("path,label\n" + "".join(f"{path},{name}\n" for path, name in zip(paths, names, strict=True)))
    return "--train_list", file


# ---- weights


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_loss_is_torchs(smoothing):
    """In float64, of class numbers and of mixed targets; those that are one class alone give the same."""
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,))
    weight = torch.tensor([0.3, 1, 5, 0.1], dtype=torch.float64)
    args = finetune_args("--smoothing", smoothing)
    found = main_finetune.build_criterion(args, None, weight)(logits, labels) / weight[labels].mean()
    expected = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    args = finetune_args("--smoothing", smoothing, "--mixup", 0.8, "--batch_size", 4)
    criterion = main_finetune.build_criterion(args, main_finetune.build_mixup(args, 4), weight)
    targets = torch.rand(9, 4, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(criterion(logits, targets), nn.CrossEntropyLoss(weight)(logits, targets))
    pure = criterion(logits, nn.functional.one_hot(labels, 4).double()) / weight[labels].mean()
    torch.testing.assert_close(pure, nn.CrossEntropyLoss(weight)(logits, labels), rtol=1e-12, atol=0)


class Rows(Dataset):
    """Images of noise that tell their labels, as ImageFiles does."""

    def __init__(self, count):
        rng = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 16, 16, generator=rng)
        self.targets = [min(int(x), 3) for x in torch.rand(count, generator=rng) * 8]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


def loader_of(dataset, batch_size, update_freq=1, weight=None, **flags):
    args = SimpleNamespace(batch_size=batch_size, update_freq=update_freq, num_workers=0, pin_mem=False, seed=0)
    vars(args).update({"data_set": "x", "multi_label": False} | flags)
    return datasets.build_train_loader(dataset, args, class_weights=weight)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("update_freq", [1, 2])
def test_a_step_is_the_weighted_mean_of_its_images(world_size, update_freq, monkeypatch):
    """As gradients are combined over batches and processes, in float64; the last step has 5 images of 12."""
    weight, dataset = torch.tensor([0.2, 1, 3, 7], dtype=torch.float64), Rows(29)
    monkeypatch.setattr(datasets, "get_world_size", lambda: world_size)
    loaders = []
    for rank in range(world_size):
        monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
        loaders.append(loader_of(dataset, 12 // world_size // update_freq, update_freq, weight))
    assert len(loaders[0]) == 3
    for steps in zip(*(loader.steps(0) for loader in loaders), strict=True):
        batches = [batch for step in steps for batch in step]
        values = [(batch.data[0].double().mean((1, 2, 3)), weight[batch.data[1]]) for batch in batches]
        pairs = zip(batches, values, strict=True)
        combined = sum(batch.loss_weight * (v * w).mean() for batch, (v, w) in pairs) / world_size
        counted = [x for batch, x in zip(batches, values, strict=True) if batch.loss_weight]
        v, w = (torch.cat(column) for column in zip(*counted, strict=True))
        torch.testing.assert_close(combined, (v * w).sum() / w.sum())


@pytest.mark.parametrize(("batch_size", "update_freq"), [(12, 1), (6, 2), (4, 3)])
def test_a_training_step_is_that_of_cross_entropy(batch_size, update_freq):
    """With smoothing: the weights after a step equal those by CrossEntropyLoss(weight) on the whole step."""
    weight, dataset = torch.tensor([0.2, 1, 3, 7, 1, 1], dtype=torch.float64), Rows(12)
    criterion = main_finetune.build_criterion(finetune_args("--smoothing", 0.1), None, weight.float())
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = loader_of(dataset, batch_size, update_freq, weight)
    train_one_epoch(WithLoss(model, criterion), loader, optimizer, constant(0.1), plain_run(), 0)
    direct = classifier()
    loss = nn.CrossEntropyLoss(weight.float(), label_smoothing=0.1)
    loss(direct(dataset.images), torch.tensor(dataset.targets)).backward()
    torch.optim.SGD(direct.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_balanced_weights():
    """Those of scikit-learn: images / (classes * images of the class), of classes that have any."""
    expected = torch.tensor([40 / 4 / count for count in COUNTS], dtype=torch.float64)
    torch.testing.assert_close(balanced_weights(torch.tensor(COUNTS)), expected)
    assert balanced_weights(torch.tensor([1, 0, 3])).tolist() == [2, 1, 4 / 6]


@pytest.mark.parametrize("text", ["b,2\na,0.5\n", "class,weight\nb,2\n\na,0.5", '"b"; 2\na\t.5', "1 2\n0 5e-1\n"])
def test_files_of_weights(text, tmp_path):
    (tmp_path / "w.csv").write_text(text)
    assert read_weights(str(tmp_path / "w.csv"), "--class_weights", ["a", "b"]).tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,1", "has 0 weights for class 'b'; give each one"),
        ("a,1\nb,2\na,1", "has 2 weights for class 'a'"),
        ("a,1\nbc,2", r"line 2: label 'bc' is not among the 2 classes \(did you mean b"),
        ("a,1\nb,-2", "line 2, 'b,-2': a line is a class and, after a comma, its weight, a number from 1e-9"),
        ("a,nan\nb,2", "line 1, 'a,nan'"),
        ("a,1\nb,1e-45", "line 2, 'b,1e-45'"),  # in float32 it would be 0, or a step's mean infinite
        ("a\nb", "line 1, 'a'"),
        ("a,1\nb,x", "line 2, 'b,x'"),
        ("\n", "is empty"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_a_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "w.csv").write_text(text)
    with pytest.raises(UsageError, match=rf"^--class_weights {tmp_path}/w.csv: {message}"):
        read_weights(str(tmp_path / "w.csv"), "--class_weights", ["a", "b"])


def test_weights_of_a_file_are_relative(tmp_path):
    """Ten times as large, they are the same; the mean over the images is 1."""
    dataset, found = Rows(29), []
    for factor in (1, 10):
        (tmp_path / "w.csv").write_text("".join(f"{i},{factor * (i + 1)}\n" for i in range(4)))
        args = finetune_args("--class_weights", tmp_path / "w.csv")
        found.append(datasets.class_weights(dataset, args, list("abcd")))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][dataset.targets].mean().item() == pytest.approx(1)
    assert (found[0] / found[0][0]).tolist() == pytest.approx([1, 2, 3, 4])


# ---- balanced sampling


def drawn(labels, seed=0):
    return balanced_order(labels, torch.Generator().manual_seed(seed))


def test_each_class_is_shown_equally_often():
    labels = torch.tensor([c for c, count in enumerate((24, 10, 0, 4, 2)) for _ in range(count)])
    order = drawn(labels)
    assert len(order) == 40
    shown = labels[order % 40]
    for first in range(0, 40, 4):  # from the first step on, and wherever an epoch is cut
        assert sorted(shown[first : first + 4].tolist()) == [0, 1, 3, 4]
    images = Counter((order % 40).tolist())
    assert max(images[i] for i in range(24)) == 1
    assert {images[i] for i in range(38, 40)} == {5}
    assert {images[i] for i in range(24, 34)} == {1}
    assert len(set(order.tolist())) == 40, "each time under another number"
    assert torch.equal(order, drawn(labels))
    assert not torch.equal(order, drawn(labels, 1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_balanced_steps_do_not_depend_on_the_spread(world_size):
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 2)
    steps = [set() for _ in range(5)]
    for rank in range(world_size):
        sampler = StepSampler(40, 8 // world_size, 1, rank, world_size, seed=3)
        sampler.draw = partial(balanced_order, labels)
        sampler.set_epoch(2)
        for step, batch in zip(steps, sampler, strict=True):
            step.update(batch)
        sampler.set_epoch(2, 3)
        assert [set(batch) <= step for batch, step in zip(sampler, steps[3:], strict=True)] == [True, True]
    order = StepSampler(40, 8, seed=3)
    order.draw = partial(balanced_order, labels)
    order.set_epoch(2)
    assert steps == [set(batch) for batch in order]


def test_an_image_that_is_shown_again_is_augmented_anew():
    class Random(Rows):
        def __getitem__(self, i):
            return torch.rand(()).item(), i

    samples = TrainSamples(Random(10), seed=0)
    (first, i), (again, j), (same_again, _) = samples.__getitems__([(0, 3), (0, 13), (0, 13)])[0]
    assert i == j == 3
    assert first != again == same_again


# ---- runs


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--class_weights balanced", "--balanced_sampling true"])
def test_a_run_is_recorded_and_resumed_bit_for_bit(flags, scripts, unequal, tmp_path):
    words = (*unequal, *flags.split(), "--epochs", 2)
    whole = scripts.finetune(*words, "--output_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    with killed_after(STEPS + 3):
        scripts.finetune(*words, "--output_dir", tmp_path / "cut", "--save_ckpt_steps", 1)
    other = scripts.finetune(*unequal, "--epochs", 2, "--output_dir", tmp_path / "cut")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"{flags.split()[0]} " in other.err
    assert f" {'none' if 'weights' in flags else False}: " in other.err
    assert "is inside an epoch that was begun with" in other.err
    result = scripts.finetune(*words, "--output_dir", tmp_path / "cut", "--save_ckpt_steps", 1)
    assert result.code == 0, result.err
    first, second = (load(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "cut"))
    assert same(first["model"], second["model"])
    plain = scripts.finetune(*unequal, "--epochs", 2, "--output_dir", tmp_path / "plain")
    assert plain.code == 0
    assert not same(first["model"], load(tmp_path / "plain/checkpoint-1.pth")["model"])
    name, value = flags[2:].split()
    (start,) = json.loads((tmp_path / "whole/run.json").read_text())["starts"]
    assert start["args"][name] == (value if name == "class_weights" else True)
    if name == "class_weights":
        assert "class weights: 0.417 (c0) to 5 (c3)" in whole.out


@pytest.mark.slow
def test_inside_an_epoch_an_edited_file_of_weights_is_refused_and_a_moved_one_is_not(scripts, unequal, tmp_path):
    file, moved = tmp_path / "w.csv", tmp_path / "moved.csv"
    file.write_text("c0,1\nc1,2\nc2,3\nc3,4\n")
    words = (*unequal, "--epochs", 2, "--output_dir", tmp_path / "out", "--save_ckpt_steps", 1, "--class_weights")
    with killed_after(2):
        scripts.finetune(*words, file)
    file.rename(moved)
    file.write_text("c0,1\nc1,2\nc2,3\nc3,5\n")
    other = scripts.finetune(*words, file)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "--class_weights weights of CRC-32 " in other.err
    assert "is inside an epoch that was begun with weights of CRC-32 " in other.err
    result = scripts.finetune(*words, moved)
    assert result.code == 0, result.err
    assert "resumed from" in result.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--class_weights balanced --balanced_sampling", "either makes up for unequal classes; give one"),
        ("--class_weights balance", "--class_weights balance: must be balanced, or a file"),
    ],
)
def test_mistakes_are_a_line(flags, message, scripts):
    result = scripts.finetune(*flags.split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--class_weights balanced", "--balanced_sampling true"])
def test_two_processes_are_one(flags, scripts, unequal, tmp_path):
    lines = []
    for processes, batch_size, update_freq in ((1, 12, 1), (1, 4, 3), (2, 6, 1), (3, 4, 1)):
        folder = tmp_path / f"{processes}-{update_freq}"
        spread = ("--batch_size", batch_size, "--update_freq", update_freq, "--epochs", 2)
        done: subprocess.CompletedProcess = launch(
            scripts, "main_finetune", processes, folder, *spread, *unequal, *flags.split()
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(records(folder)[-1])
    for line in lines[1:]:
        for key in ("train_loss", "test_loss"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-4), key
