"""Frozen features: k-NN votes, k-NN during pre-training, linear probing by main_finetune.py and by tools/probe.py."""

import math
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import datasets
import engine_finetune
import main_pretrain
from main_finetune import build_optimizer, get_args_parser
from models.convnextv2 import ConvNeXtV2, Encoder, layer_id
from models.linear_probe import LinearProbe, ProbeHead
from tests.small_runs import STEPS, TINY, Scripts, killed_after, load, records, same, write_images
from tests.test_distributed import launch
from tools import probe
from utils import knn, layouts, weights
from utils.amp import Amp
from utils.errors import UsageError
from utils.seeding import seed_all

LAST = "checkpoint-2.pth"
CPU = Amp(torch.device("cpu"), False, torch.bfloat16)
PROBE = ("--linear_probe", "true", "--weight_decay", 0, "--aa", "", "--reprob", 0, "--smoothing", 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])


def write_colours(root, per_class: int, shuffled: bool = False):
    """Noisy images of four colours in class folders; shuffled, the colour says nothing about the class."""
    rng = np.random.RandomState(len(str(root)) + per_class)
    for i in range(4 * per_class):
        folder = root / f"c{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = COLOURS[rng.randint(4) if shuffled else i % 4] + 25 * rng.standard_normal((16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def accuracies(out: str) -> dict[str, list[float]]:
    """The rows of the probe's table, by method."""
    rows = re.findall(r"^\| (knn|linear) \|(.*)\|$", out, re.M)
    return {name: [float(cell) for cell in cells.split("|")] for name, cells in rows}


# ---- votes


def brute_force_votes(features, labels, queries, num_classes, k, temperature):
    """By the definition, one pair of vectors at a time."""
    votes = []
    for query in queries.tolist():
        cosines = []
        for feature, label in zip(features.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, feature, strict=True))
            cosines.append((dot / math.hypot(*query) / math.hypot(*feature), label))
        row = [0.0] * num_classes
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            row[label] += math.exp(cosine / temperature)
        votes.append([vote / sum(row) for vote in row])
    return torch.tensor(votes, dtype=torch.float64)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (1000, 1.0)])
def test_votes_agree_with_the_definition(k, temperature):
    features, queries = (torch.randn(n, 6, generator=generator(n), dtype=torch.float64) for n in (30, 11))
    labels = torch.randint(4, (30,), generator=generator())
    expected = brute_force_votes(features, labels, queries, 4, k, temperature)
    for similarities in (1, 70, knn.SIMILARITIES):
        votes = knn.knn_votes(features, labels, queries, 4, k, temperature, similarities)
        assert torch.allclose(votes / votes.sum(dim=1, keepdim=True), expected, rtol=1e-12, atol=1e-15)


def test_votes_of_any_temperature_are_finite():
    features, queries = torch.randn(30, 6, generator=generator()), torch.randn(5, 6, generator=generator(1))
    labels = torch.arange(30) % 3
    votes = knn.knn_votes(features, labels, queries, 3, temperature=1e-5)
    assert votes.isfinite().all()
    nearest = (F.normalize(queries) @ F.normalize(features).T).argmax(dim=1)
    assert torch.equal(votes.argmax(dim=1), labels[nearest])


def test_the_memory_of_similarities_is_bounded(monkeypatch):
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **kw: sizes.append(x.numel()) or topk(x, *a, **kw))
    knn.knn_votes(torch.randn(50, 4), torch.arange(50) % 5, torch.randn(40, 4), 5, similarities=500)
    assert max(sizes) <= 500
    assert sum(sizes) == 50 * 40


def test_training_images_of_all_processes_vote(monkeypatch):
    """Seen from a process whose own images are of class 0, and the query's neighbours another's, of class 1."""
    mine, others = torch.eye(4)[:3].view(3, 4, 1, 1), torch.eye(4)[3:].repeat(2, 1)
    monkeypatch.setattr(knn, "gather", lambda rows: [rows, others if rows.ndim == 2 else torch.ones(2).long()])
    loaders = [(mine, torch.zeros(3).long())], [(others.view(2, 4, 1, 1), torch.ones(2).long())]
    assert knn.knn_accuracy(lambda imgs: imgs.flatten(1), 4, *loaders, CPU) == 100


def test_features_are_the_mean_over_the_last_stage():
    encoder = Encoder(**TINY, stem_stride=1).eval()
    imgs = torch.randn(3, 3, 16, 24, generator=generator())
    *_, last = encoder.channels_last_stages(imgs)  # (3, 2, 3, 16)
    features = knn.pooled_features(encoder, imgs)
    assert torch.allclose(features, sum(last[:, i, j] for i in range(2) for j in range(3)) / 6, atol=1e-6)
    assert knn.pooled_features(encoder.bfloat16(), imgs.bfloat16()).dtype == torch.float32


# ---- during pre-training


@pytest.fixture(scope="module")
def pretrained(scripts, tmp_path_factory):
    """Pre-training without k-NN, and with it on the held-out fifth of the training folder: folders and the output."""
    plain, watched = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("watched")
    assert scripts.pretrain("--output_dir", plain).code == 0
    result = scripts.pretrain("--output_dir", watched, "--knn_freq", 2)
    assert result.code == 0, result.err
    return plain, watched, result.out


def test_knn_leaves_the_training_as_it_is(pretrained):
    plain, watched, _ = pretrained
    a, b = load(plain / LAST), load(watched / LAST)
    assert same(a["model"], b["model"])
    assert same(a["optimizer"], b["optimizer"])
    kept = [{k: v for k, v in record.items() if not k.startswith("test_")} for record in records(watched)]
    assert kept == records(plain)


def test_knn_is_logged_when_due_and_at_the_end(pretrained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, watched, out = pretrained
    logged = {record["epoch"]: record["test_knn_acc1"] for record in records(watched) if "test_knn_acc1" in record}
    assert list(logged) == [1, 2]
    assert re.findall(r"^epoch (\d): k-NN acc1 (\S+)$", out, re.M) == [(str(i), f"{v:.2f}") for i, v in logged.items()]
    events = EventAccumulator(str(watched)).Reload().Scalars("test/knn_acc1")
    assert [event.step for event in events] == [2000, 3000]
    assert [event.value for event in events] == pytest.approx(list(logged.values()))


@pytest.mark.slow
def test_knn_accuracy_is_what_the_checkpoint_gives(scripts, tmp_path):
    """Against the definition, from the files: --eval_data_path, then the fifth image of each class folder."""
    colours = write_colours(tmp_path / "colours", 15, shuffled=True)
    transform = datasets.build_transform(False, main_pretrain.get_args_parser().parse_args(["--input_size", "16"]))
    flags = ("--data_path", colours, "--epochs", 1, "--warmup_epochs", 0, "--knn_freq", 1)
    for name, more in (("val", ("--eval_data_path", scripts.val)), ("fifth", ())):
        out = tmp_path / name
        assert scripts.pretrain("--output_dir", out, *flags, *more).code == 0
        encoder = Encoder(**TINY, stem_stride=1).eval()
        weights.load(encoder, load(out / "checkpoint-0.pth")["model"])
        folders = [sorted(folder.iterdir()) for folder in sorted(colours.iterdir())]
        train = [path for folder in folders for i, path in enumerate(folder) if more or i % 5 != 4]
        test = sorted(scripts.val.rglob("*.png")) if more else [path for folder in folders for path in folder[4::5]]
        features, queries = (
            encoder.forward_stages(torch.stack([transform(Image.open(path)) for path in paths]))[-1].mean(dim=(2, 3))
            for paths in (train, test)
        )
        labels, truth = (torch.tensor([int(path.parent.name[1]) for path in paths]) for paths in (train, test))
        votes = brute_force_votes(features, labels, queries, 4, 20, 0.07)
        expected = 100 * float((votes.argmax(dim=1) == truth).double().mean())
        assert records(out)[0]["test_knn_acc1"] == pytest.approx(expected)


@pytest.mark.slow
def test_resume_with_knn_is_bit_for_bit(scripts, pretrained, tmp_path):
    plain, watched, _ = pretrained
    flags = ("--output_dir", tmp_path, "--knn_freq", 2)
    with killed_after(STEPS + 3):
        scripts.pretrain(*flags)
    assert "resumed from" in scripts.pretrain(*flags).out
    assert same(load(tmp_path / LAST)["model"], load(plain / LAST)["model"])
    assert (tmp_path / "log.txt").read_text() == (watched / "log.txt").read_text()


def test_knn_leaves_the_random_generators_alone(scripts):
    """Training seeds them anew at each step, but a streamed data set's workers take theirs from them."""
    args = main_pretrain.get_args_parser().parse_args(
        f"--data_set image_folder --data_path {scripts.train} --input_size 16 --num_workers 0 --knn_freq 1".split()
    )
    loaders, encoder = main_pretrain.knn_loaders(args), Encoder(**TINY, stem_stride=1)
    seed_all(1)
    before = torch.get_rng_state()
    knn.knn_score(encoder, loaders, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    list(loaders[0])
    assert not torch.equal(torch.get_rng_state(), before), "the loader draws nothing, so nothing was tested"


def test_knn_images_are_a_fixed_random_part(monkeypatch):
    blank = torch.zeros(3, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(datasets.Shapes, "__getitem__", lambda self, i: (blank, self.targets[i]))
    args = main_pretrain.get_args_parser().parse_args(
        ["--data_set", "shapes", "--input_size", "16", "--num_workers", "0", "--knn_freq", "1", "--knn_images", "400"]
    )
    for loader, size in zip(main_pretrain.knn_loaders(args), (8000, 2000), strict=True):
        labels = torch.cat([labels for _, labels in loader])
        again = torch.cat([labels for _, labels in main_pretrain.knn_loaders(args)[size == 2000]])
        assert torch.equal(labels, again)
        assert len(labels) == 400
        assert labels.bincount(minlength=10).min() > 20, "picks of every tenth image would all be of one class"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--knn_freq 1 --data_path $flat", "--knn_freq 1: needs labelled images; --data_path .* no class folders"),
        ("--knn_freq 1 --data_path $one", "--knn_freq 1: .* one class alone, c0; at least two"),
        ("--knn_freq 1 --data_path $few", "--knn_freq 1: .* fewer than five images in each"),
        ("--knn_freq 1 --eval_data_path /nowhere", "--knn_freq 1: .*--eval_data_path /nowhere: no such folder"),
        ("--knn_freq 1 --eval_data_path $other", "--knn_freq 1: .*class folder 'd0' is not among the 4 training"),
        ("--knn_freq 1 --data_set IMNET --data_path $imagenet", "--knn_freq 1: .*has 1000; for other data"),
    ],
)
def test_mistakes_with_knn(flags, message, scripts, tmp_path):
    shutil.copytree(scripts.train / "c0", tmp_path / "flat")
    shutil.copytree(scripts.train / "c0", tmp_path / "one" / "c0")
    shutil.copytree(scripts.val / "c0", tmp_path / "other" / "d0")
    shutil.copytree(scripts.train, tmp_path / "imagenet" / "train")
    shutil.copytree(scripts.val, tmp_path / "imagenet" / "val")
    write_images(tmp_path / "few", "train", 8)
    flags = re.sub(r"\$(\w+)", rf"{tmp_path}/\1", flags).split()
    result = scripts.pretrain("--output_dir", tmp_path / "out", *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.match(f"error: {message}", result.err), result.err


def test_unreadable_images_of_knn(tmp_path):
    """A damaged one is left out; that none at all is left, a data set can tell only once it is read whole."""
    scripts = Scripts(tmp_path)
    damaged = sorted(scripts.val.rglob("*.png"))[3]
    damaged.write_bytes(damaged.read_bytes()[:100])
    result = scripts.pretrain("--knn_freq", 3, "--eval_data_path", scripts.val)
    assert result.code == 0, result.err
    assert f"unreadable image, not evaluated: {damaged}" in result.out
    assert "k-NN: 1 unreadable images left out" in result.out
    images = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    assert knn.knn_accuracy(lambda imgs: imgs, 3, images, images, CPU) == 50
    for loaders in ((images, []), ([], images)):
        with pytest.raises(UsageError, match="none of the labelled images can be read"):
            knn.knn_accuracy(lambda imgs: imgs, 3, *loaders, CPU)


@pytest.mark.slow
def test_several_processes_agree(scripts, tmp_path):
    """k-NN over 37 and 22 images, the former shared unevenly; lr 0 keeps the weights the same."""
    common = ("--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--vis_freq", 0)
    common += ("--knn_freq", 1, "--eval_data_path", scripts.val, "--knn_images", 37)
    assert scripts.pretrain("--output_dir", tmp_path / "1", *common).code == 0
    done = launch(scripts, "main_pretrain", 2, tmp_path / "2", *common)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (records(tmp_path / name)[0]["test_knn_acc1"] for name in ("1", "2"))
    assert one == pytest.approx(two)


# ---- linear probing by main_finetune.py


@pytest.fixture(scope="module")
def probed(scripts, pretrained, tmp_path_factory):
    """A linear probe of the pre-trained encoder: its folder and the output."""
    out = tmp_path_factory.mktemp("probed")
    result = scripts.finetune("--output_dir", out, "--finetune", pretrained[0] / LAST, *PROBE, "--lr", 0.05)
    assert result.code == 0, result.err
    return out, result.out


def test_only_the_head_is_trained(pretrained, probed):
    out, _ = probed
    encoder = layouts.to_backbone(load(pretrained[0] / LAST)["model"])
    first, last = (load(out / f"checkpoint-{epoch}.pth") for epoch in (0, 2))
    assert all(torch.equal(last["model"][name], value) for name, value in encoder.items())
    moved = {name for name, value in last["model"].items() if not torch.equal(value, first["model"][name])}
    assert moved == {"head.weight", "head.bias", *(f"head.batch_norm.{x}" for x in STATISTICS)}
    assert [len(group["params"]) for group in last["optimizer"]["param_groups"]] == [1, 1]


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_augmentation_of_the_recipe_is_weak():
    args = get_args_parser().parse_args(["@recipes/linear_probe.args"])
    assert (args.aa, args.reprob, args.smoothing) == ("", 0.0, 0.0)
    stages = [type(stage).__name__ for stage in datasets.build_transform(True, args).transforms]
    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & set(stages)
    assert {"RandomResizedCropAndInterpolation", "RandomHorizontalFlip"} <= set(stages)


def test_resume_of_a_probe_is_bit_for_bit(scripts, pretrained, probed, tmp_path):
    flags = ("--output_dir", tmp_path, "--finetune", pretrained[0] / LAST, *PROBE, "--lr", 0.05, "--save_ckpt_steps", 2)
    with killed_after(STEPS + 3):
        scripts.finetune(*flags)
    assert (tmp_path / "checkpoint-1-step2.pth").exists()
    result = scripts.finetune(*flags)
    assert "resumed from" in result.out
    a, b = (load(folder / LAST) for folder in (tmp_path, probed[0]))
    assert all(same(a[key], b[key]) for key in ("model", "optimizer", "best"))
    assert records(tmp_path) == records(probed[0])


def test_evaluation_of_a_probe(scripts, probed):
    """With and without the flag: the file tells. Its batch norm's statistics count."""
    out, _ = probed
    for flags in ((), ("--linear_probe", "true")):
        result = scripts.finetune("--eval", "true", "--resume", out / LAST, *flags)
        assert result.code == 0, result.err
        assert f"loss {records(out)[2]['test_loss']:.4f}" in result.out
    state = load(out / LAST)["model"]
    state["head.batch_norm.running_mean"] += 1
    changed = out / "changed.pth"
    torch.save(state, changed)
    result = scripts.finetune("--eval", "true", "--resume", changed)
    changed.unlink()
    assert f"loss {records(out)[2]['test_loss']:.4f}" not in result.out


def test_a_probe_can_be_finetuned(scripts, probed):
    result = scripts.finetune("--finetune", probed[0] / LAST, "--epochs", 1, "--warmup_epochs", 0)
    assert result.code == 0, result.err
    assert "dropped: head.*" in result.out


def test_an_odd_last_step_has_no_batch_of_one(scripts, tmp_path):
    """41 images in steps of 8 leave one, which batch norm cannot take."""
    data = write_images(tmp_path / "data", "train", 41)
    result = scripts.finetune("--data_path", data, *PROBE, "--epochs", 1, "--warmup_epochs", 0)
    assert result.code == 0, result.err
    assert "epoch 0 [5/5]" in result.out
    assert "--linear_probe true without --finetune: the frozen encoder is a random one" in result.out


def small_probe(num_classes: int = 5) -> LinearProbe:
    torch.manual_seed(0)
    model = LinearProbe(num_classes, **TINY, stem_stride=1).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def test_the_probe_by_its_definition():
    model, imgs = small_probe(), torch.randn(6, 3, 16, 16, generator=generator(), dtype=torch.float64)
    model.train()
    assert [name for name, module in model.named_modules() if module.training] == ["", "head", "head.batch_norm"]
    logits = model(imgs)
    features = ConvNeXtV2.forward_features(model, imgs)
    standard = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(logits, standard @ model.head.weight.T + model.head.bias, rtol=1e-12)
    logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert not model.eval().head.batch_norm.training


def test_folding_the_batch_norm():
    model, imgs = small_probe(), torch.randn(6, 3, 16, 16, generator=generator(), dtype=torch.float64)
    model.train()(imgs)
    classifier = ConvNeXtV2(num_classes=5, **TINY, stem_stride=1).double()
    classifier.load_state_dict(layouts.fold_batch_norm(model.state_dict()))
    assert torch.allclose(classifier.eval()(imgs), model.eval()(imgs), rtol=1e-10)
    plain = classifier.state_dict()
    assert layouts.fold_batch_norm(plain) is plain


def test_lars_takes_the_steps_of_mae():
    """Its formula, for a matrix and a bias without weight decay: only the matrix's step is scaled by its norm."""
    args = get_args_parser().parse_args(["--linear_probe", "true", "--opt", "lars", "--weight_decay", "0"])
    model = small_probe()
    optimizer = build_optimizer(model, args, 0.5)
    expected = {name: p.detach().clone() for name, p in model.head.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        for p in model.head.parameters():
            p.grad = torch.randn(p.shape, generator=generator(step), dtype=p.dtype)
        for name, p in expected.items():
            update = dict(model.head.named_parameters())[name].grad.clone()
            if p.ndim > 1:
                update *= 0.001 * p.norm() / update.norm()
            velocity[name] = 0.9 * velocity[name] + update
            p -= 0.5 * velocity[name]
        optimizer.step()
    for name, p in model.head.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-7), name


def test_a_new_probe_head():
    head = ProbeHead(400, 300)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.bias.any()
    assert not head.batch_norm.running_mean.any()


@pytest.mark.slow
def test_processes_evaluate_with_the_statistics_that_are_saved(scripts, tmp_path):
    """Each process sees other images; the checkpoint, evaluated by one, gives what both together logged."""
    flags = (*PROBE, "--batch_size", 4, "--epochs", 2, "--lr", 0.05)
    done = launch(scripts, "main_finetune", 2, tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    result = scripts.finetune("--eval", "true", "--resume", tmp_path / "checkpoint-1.pth")
    assert f"loss {records(tmp_path)[1]['test_loss']:.4f}" in result.out


def test_buffers_are_the_first_process_s(tmp_path):
    """Also where another process's are NaN."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model(torch.randn(5, 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def share(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        if rank == 1:
            model[0].running_mean.fill_(torch.nan)
            model[0].num_batches_tracked.add_(5)
        engine_finetune.share_buffers(model)
        assert same(before, dict(model.named_buffers()))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=share, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    engine_finetune.share_buffers(model)  # alone, they stay
    assert same(before, dict(model.named_buffers()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer_decay 0.9", "--layer_decay 0.9 and --linear_probe true: .*; leave out --layer_decay"),
        ("--drop_path 0.1", "--drop_path 0.1 and --linear_probe true"),
        ("--model_ema true", "--model_ema True and --linear_probe true"),
        ("--freeze_stages 1", "--freeze_stages 1 and --linear_probe true"),
        ("--grad_checkpointing true", "--grad_checkpointing True and --linear_probe true"),
        ("--batch_size 5", "--batch_size 5: must be even, .*batch norm"),
        ("--resume $pre", ".*: was written by main_pretrain.py"),
    ],
)
def test_mistakes_with_a_probe(flags, message, scripts, pretrained):
    result = scripts.finetune(*PROBE, *flags.replace("$pre", str(pretrained[0] / LAST)).split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.match(f"error: {message}", result.err), result.err


# ---- tools/probe.py


@pytest.fixture(scope="module")
def random_encoder(tmp_path_factory):
    """A dense checkpoint with a head, of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("random") / "random.pth"
    torch.save(ConvNeXtV2(num_classes=3, **TINY, stem_stride=1).state_dict(), path)
    return path


COMMON = ("--device", "cpu", "--num_workers", 0, "--input_size", 16)


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_both_methods_find_what_is_there_and_nothing_else(shuffled, scripts, random_encoder, tmp_path):
    """Colours, which even a random encoder tells apart; with shuffled labels both methods fall to chance, a quarter."""
    train = write_colours(tmp_path / "train", 50, shuffled)
    val = write_colours(tmp_path / "val", 50, shuffled)
    flags = ("--checkpoint", random_encoder, "--data_set", "image_folder", "--data_path", train)
    result = scripts.call(probe, *COMMON, *flags, "--eval_data_path", val, "--random_init", "true")
    assert result.code == 0, result.err
    assert "200 training and 200 test images of 4 classes" in result.out
    table = accuracies(result.out)
    assert set(table) == {"knn", "linear"}
    for top1, top5, chance, baseline, _ in table.values():
        assert chance == 25
        assert top5 == 100  # of four classes
        assert (abs(top1 - 25) < 12) if shuffled else top1 > 90  # 12 points: four standard deviations
        assert (abs(baseline - 25) < 12) if shuffled else baseline > 90


def test_the_probe_needs_no_data(scripts, random_encoder):
    flags = ("--checkpoint", random_encoder, "--max_images", 60)
    result = scripts.call(probe, *COMMON, *flags)
    assert "60 training and 60 test images of 10 classes" in result.out
    assert all(0 <= row[0] <= row[1] <= 100 for row in accuracies(result.out).values())
    result = scripts.call(probe, *COMMON, *flags, "--method", "knn", "--k", 3, "--temperature", 1)
    assert set(accuracies(result.out)) == {"knn"}


@pytest.mark.slow
def test_lists_are_probed_as_the_folders_they_list(scripts, random_encoder, tmp_path):
    flags = ("--checkpoint", random_encoder, "--data_set", "image_folder", "--data_path", scripts.train)
    folders = scripts.call(probe, *COMMON, *flags, "--eval_data_path", scripts.val)
    for name, folder in (("train", scripts.train), ("val", scripts.val)):
        paths = sorted(folder.rglob("*.png"))
        (tmp_path / f"{name}.txt").write_text("".join(f"{path}\t{path.parent.name}\n" for path in paths))
    listed = ("--train_list", tmp_path / "train.txt", "--eval_list", tmp_path / "val.txt")
    lists = scripts.call(probe, *COMMON, *flags, *listed)
    assert lists.code == 0, lists.err
    tables = [{name: row[:3] for name, row in accuracies(result.out).items()} for result in (folders, lists)]
    assert tables[0] == tables[1] != {}


def test_any_layout_gives_the_same_features(pretrained, probed, tmp_path):
    pre = load(pretrained[0] / LAST)
    torch.save(layouts.to_timm(pre["model"]), tmp_path / "timm.pth")
    torch.save({f"module.{name}": v for name, v in layouts.to_backbone(pre["model"]).items()}, tmp_path / "dense.pth")
    imgs = torch.randn(2, 3, 16, 16, generator=generator())
    features = []
    for path in (pretrained[0] / LAST, tmp_path / "timm.pth", tmp_path / "dense.pth", probed[0] / LAST):
        args = probe.get_args_parser().parse_args(["--checkpoint", str(path)])
        encoder = probe.load_encoder(args)
        assert args.input_size == ((16, 16) if "args" in load(path) else (224, 224))
        features.append(knn.pooled_features(encoder, imgs))
    assert all(torch.equal(x, features[0]) for x in features)


def test_logistic_regression_finds_the_optimum():
    """Where the gradient, written out, vanishes; whatever the start and the number of rows at a time."""
    features = torch.randn(60, 5, generator=generator(), dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=generator())
    for start in (None, [torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]):
        weight, bias = probe.fit_linear(features, labels, 3, 0.01, start)
        error = ((features @ weight.T + bias).softmax(dim=1) - F.one_hot(labels, 3)) / 60
        assert (error.T @ features + 0.01 * weight).abs().max() < 1e-4
        assert error.sum(dim=0).abs().max() < 1e-4


def test_logistic_regression_in_chunks(monkeypatch):
    features, labels = torch.randn(60, 5, generator=generator()).double(), torch.arange(60) % 3
    whole = probe.fit_linear(features, labels, 3, 0.01)
    monkeypatch.setattr(probe, "LOGITS", 21)
    parts = probe.fit_linear(features, labels, 3, 0.01)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_the_penalty_is_picked_without_the_test_images(monkeypatch):
    """One of 200 features tells the class, so a strong penalty is right, whatever the queries are."""
    labels, penalties, fit = torch.arange(400) % 2, [], probe.fit_linear
    features = torch.randn(400, 200, generator=generator())
    features[:, 0] += 2.0 * labels

    def recorded(features, labels, num_classes, penalty, start=None):
        penalties.append((len(features), penalty))
        return fit(features, labels, num_classes, penalty, start)

    monkeypatch.setattr(probe, "fit_linear", recorded)
    for queries in (features, -features):
        penalties.clear()
        probe.linear_scores(features, labels, queries, 2)
        assert penalties[:-1] == [(320, penalty) for penalty in probe.PENALTIES]
        assert penalties[-1] == (400, 0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint /nowhere.pth", "--checkpoint /nowhere.pth: no such file"),
        ("--checkpoint $v1", "--checkpoint .*: not a ConvNeXt V2 in a known layout"),
        ("--max_images 3", "--max_images 3: must be a whole number from 10"),
        ("--input_size 7", "--input_size 7: must be at least the model's total stride 8"),
        ("--data_set image_folder", "--data_set image_folder needs --data_path"),
        ("--data_set image_folder --data_path /nowhere", "--data_path /nowhere: no such folder"),
        ("--data_set shape", "--data_set shape: unknown"),
        ("--method ridge", "argument --method: invalid choice"),
        ("--checkpoints x", "unknown argument --checkpoints"),
    ],
)
def test_mistakes_with_the_probe(flags, message, scripts, random_encoder, tmp_path):
    torch.save({"stages.0.0.gamma": torch.ones(3)}, tmp_path / "v1.pth")
    flags = flags.replace("$v1", str(tmp_path / "v1.pth")).split()
    result = scripts.call(probe, "--checkpoint", random_encoder, *COMMON, *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.match(f"error: {message}", result.err), result.err


# ---- frozen stages

FREEZE = ("--weight_decay", 0.5, "--layer_decay", 0.8, "--drop_path", 0.3, "--grad_checkpointing", "true")
FREEZE += ("--model_ema", "true", "--model_ema_decay", 0.5, "--clip_grad", 1)


def is_frozen(name: str, count: int) -> bool:
    return name.startswith(tuple(f"{part}.{i}." for part in ("downsample_layers", "stages") for i in range(count)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_frozen_stages_keep_their_bits(count, scripts, pretrained, tmp_path):
    """In model and average, killed or not; what is above them is trained at its own share of the learning rate."""
    flags = ("--finetune", pretrained[0] / LAST, *FREEZE, "--freeze_stages", count)
    for name in ("whole", "killed"):
        if name == "killed":
            with killed_after(STEPS + 2):
                scripts.finetune("--output_dir", tmp_path / name, *flags)
        result = scripts.finetune("--output_dir", tmp_path / name, *flags)
        assert result.code == 0, result.err
    assert re.search(r": 0\.0\d M parameters, 0\.0\d M trained, lr", result.out)
    before, (after, again) = (
        load(pretrained[0] / LAST)["model"],
        (load(tmp_path / n / LAST) for n in ("whole", "killed")),
    )
    assert all(same(after[key], again[key]) for key in ("model", "model_ema", "optimizer", "best"))
    frozen = {name for name in after["model"] if is_frozen(name, count)}
    assert 0 < len(frozen) < len(after["model"])
    for name in frozen:
        assert same(before[f"encoder.{name}"], after["model"][name])
        assert same(after["model"][name], after["model_ema"][name])
    groups = after["optimizer"]["param_groups"]
    trained = {name for group in groups for name in group["names"]}
    assert trained == after["model"].keys() - frozen
    assert not any(same(before.get(f"encoder.{name}"), after["model"][name]) for name in trained)
    ids = {name: layer_id(name, TINY["depths"]) for name in trained}
    for group in groups:
        assert group["lr_scale"] == pytest.approx(0.8 ** (sum(TINY["depths"]) + 1 - ids[group["names"][0]]))


def test_mistakes_with_frozen_stages(scripts, tmp_path):
    flags = ("--output_dir", tmp_path, "--epochs", 2)
    result = scripts.finetune(*flags, "--freeze_stages", 2)
    assert "--freeze_stages 2 without --finetune: the frozen encoder is a random one" in result.out
    result = scripts.finetune(*flags, "--freeze_stages", 1, "--epochs", 3)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "its optimizer does not fit --opt or --layer_decay or --freeze_stages" in result.err
    result = scripts.finetune("--freeze_stages", 5)
    assert (result.code, result.err) == (2, "error: --freeze_stages 5: must be a whole number from 0 to 4\n")
