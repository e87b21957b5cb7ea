"""engine_pretrain.py, engine_finetune.py: one epoch against what it should do, computed another way."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import ToTensor

import datasets
import engine_finetune
import engine_pretrain
import main_finetune
from models.convnextv2 import ConvNeXtV2, layer_id
from models.fcmae import FCMAE
from tests.small_runs import STEPS, Scripts, load, records, same
from utils.amp import Amp
from utils.data.images import BadImage
from utils.data.shapes import Shapes
from utils.errors import NonFiniteLoss
from utils.interrupts import Interrupts
from utils.lr_sched import Schedule
from utils.metrics import EpochTracker
from utils.param_groups import param_groups
from utils.run import Run

CPU = torch.device("cpu")
TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
CLASSES = 6


class Noise(Dataset):
    """Images of noise with the label hidden in their brightness: (3, 16, 16) tensors, nothing random in reading."""

    def __init__(self, count, dtype=torch.float32, classes=CLASSES, unreadable=()):
        rng = torch.Generator().manual_seed(5)
        self.labels = torch.randint(classes, (count,), generator=rng).tolist()
        noise = torch.randn(count, 3, 16, 16, generator=rng, dtype=torch.float64)
        self.images = (noise + torch.tensor(self.labels).view(-1, 1, 1, 1)).to(dtype)
        self.unreadable = unreadable

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if i in self.unreadable:
            raise BadImage(f"{i}.png", "broken")
        return self.images[i], self.labels[i]


def train_loader(dataset, batch_size, update_freq=1, sample_mask=None, batch_divisor=1):
    args = SimpleNamespace(batch_size=batch_size, update_freq=update_freq, num_workers=0, pin_mem=False, seed=0)
    args.data_set = "tfds/x"
    return datasets.build_train_loader(dataset, args, sample_mask, batch_divisor)


def eval_loader(dataset, batch_size=4):
    args = SimpleNamespace(batch_size=batch_size, num_workers=0, pin_mem=False)
    return datasets.build_eval_loader(dataset, args, spread=True)


def sample_mask():
    return (torch.rand(4).argsort() < 2).float()


def fcmae(dtype=torch.float32):
    torch.manual_seed(0)
    return FCMAE(**TINY, decoder_embed_dim=16, norm_pix_loss=True, patch_size=8, mask_ratio=0.5).to(dtype)


def classifier(classes=CLASSES, **kwargs):
    torch.manual_seed(0)
    return ConvNeXtV2(num_classes=classes, **TINY, stem_stride=1, **kwargs)


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(param_groups(model.named_parameters(), 0.05), lr=lr, fused=True)


def precise(**kwargs):
    return Amp(CPU, False, torch.bfloat16, **kwargs)


def plain_run(amp=None, ema=None):
    run = Run(vars(main_finetune.get_args_parser().parse_args([])), amp or precise(), Interrupts())
    run.ema = ema
    run.model = nn.Module()  # whose weights are checked at an epoch's end
    return run


def pretrain(model, loader, optimizer=None, amp=None, schedule=None, epochs=1):
    """Statistics of each epoch."""
    optimizer, schedule = optimizer or adamw(model), schedule or Schedule(1e-3, 0, 0, 3)
    return [
        engine_pretrain.train_one_epoch(model, loader, optimizer, schedule, plain_run(amp), epoch)
        for epoch in range(epochs)
    ]


def finetune(model, loader, criterion=None, optimizer=None, amp=None, schedule=None, epoch=0, mixup=None, ema=None):
    optimizer, schedule = optimizer or adamw(model), schedule or Schedule(1e-3, 0, 0, 3)
    criterion = criterion or nn.CrossEntropyLoss()
    return engine_finetune.train_one_epoch(
        engine_finetune.WithLoss(model, criterion), loader, optimizer, schedule, plain_run(amp, ema), epoch, mixup
    )


def constant(lr):
    return Schedule(lr, lr, 0, 1)


def finetune_args(*flags):
    return main_finetune.get_args_parser().parse_args([str(flag) for flag in flags])


def weights(model):
    return copy.deepcopy(model.state_dict())


def moved(before, model):
    """L2 norm of the change of all weights together."""
    after = model.state_dict()
    return math.sqrt(sum((after[name] - before[name]).double().square().sum().item() for name in before))


# ---- accumulation, clipping, moving average


@pytest.mark.parametrize("count", [24, 22, 18], ids=["even", "uneven last window", "last window of one batch"])
def test_pretraining_accumulation_is_one_large_batch(count):
    """22 images, 8 a step: the last step's 6 are split 3 + 3."""
    results = []
    for batch_size, update_freq in ((8, 1), (4, 2), (2, 4)):
        model = fcmae(torch.float64)
        loader = train_loader(Noise(count, torch.float64), batch_size, update_freq, sample_mask)
        assert len(loader) == 3
        stats = pretrain(model, loader, epochs=2)
        results.append(([s["loss"] for s in stats], weights(model)))
    losses, expected = results[0]
    assert moved(fcmae(torch.float64).state_dict(), model) > 1e-2
    for other_losses, other in results[1:]:
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name in expected:
            torch.testing.assert_close(other[name], expected[name], rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("count", [24, 22])
def test_finetuning_accumulation_is_one_large_batch(count):
    results = []
    for batch_size, update_freq in ((8, 1), (4, 2)):
        model = classifier().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        loader = train_loader(Noise(count, torch.float64), batch_size, update_freq)
        stats = finetune(model, loader, optimizer=optimizer, schedule=constant(0.05))
        results.append((stats, weights(model)))
    (stats, expected), (other_stats, other) = results
    assert moved(classifier().double().state_dict(), model) > 1e-2
    for key in ("loss", "class_acc", "lr"):
        assert other_stats[key] == pytest.approx(stats[key], rel=1e-5)
    for name in expected:  # the loss itself is float32
        torch.testing.assert_close(other[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def last_step(world_size, batch_size, monkeypatch, engine, build, sample_mask=None):
    """The mean over processes of the weights after the last step alone, and the mean loss that each of them counted."""
    means, counted = None, []
    monkeypatch.setattr(datasets, "get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
        model, loader = build(), train_loader(Noise(22, torch.float64), batch_size, sample_mask=sample_mask)
        names = 1 + (engine is engine_finetune)
        sums = torch.zeros(2, names + 1, dtype=torch.float64)
        run = plain_run()
        run.epoch_progress = {"step": 1, "averages": [sums]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        whole = engine_finetune.WithLoss(model, nn.CrossEntropyLoss()) if names == 2 else model
        stats = engine.train_one_epoch(whole, loader, optimizer, constant(0.1), run, 0)
        counted.append(stats["loss"])
        state = weights(model)
        means = {name: (means[name] if means else 0) + value / world_size for name, value in state.items()}
    return means, counted


@pytest.mark.parametrize("engine", [engine_pretrain, engine_finetune])
def test_a_process_without_a_share_of_the_last_step_changes_nothing(engine, monkeypatch):
    """22 images, 16 a step: the last one's 6 on 8 processes leave two that go along with weight 0."""
    build = (lambda: fcmae(torch.float64)) if engine is engine_pretrain else (lambda: classifier().double())
    draw = sample_mask if engine is engine_pretrain else None
    expected, (loss,) = last_step(1, 16, monkeypatch, engine, build, draw)
    found, losses = last_step(8, 2, monkeypatch, engine, build, draw)
    assert max((expected[name] - value).abs().max() for name, value in build().state_dict().items()) > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    counted = [x for x in losses if not math.isnan(x)]
    assert len(counted) == 6  # of the others nothing was
    assert sum(counted) / 6 == pytest.approx(loss, rel=1e-5)


class Streamed(IterableDataset):
    """16 images, one after the other, without masks, as timm's streams give them."""

    reader = SimpleNamespace(num_samples=16)

    def __len__(self):
        return 16

    def __iter__(self):
        return iter([(torch.rand(3, 64, 64), 0)] * 16)

    def set_epoch(self, epoch):
        pass


def test_masks_of_a_stream_are_drawn_anew_for_every_batch(monkeypatch):
    """In every step, epoch and process, each under a seed of its own, so that a run can be repeated."""
    found = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(engine_pretrain, "get_rank", lambda r=rank: r)
        model, masks = fcmae(), []
        draw = model.gen_random_mask
        monkeypatch.setattr(model, "gen_random_mask", lambda *a, m=masks, d=draw: m.append(d(*a)) or m[-1])
        pretrain(model, train_loader(Streamed(), 4, update_freq=2), epochs=2)
        found.append(torch.stack(masks))
    assert found[0].shape == (2 * 2 * 2, 4, 64)
    assert torch.equal(found[0], found[2])
    rows = torch.cat(found[:2]).flatten(0, 1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_randomness_of_a_batch_does_not_depend_on_how_it_was_loaded():
    """Without workers, loading a step's second batch draws augmentations between the forward passes."""
    found = []
    for num_workers in (0, 1):
        args = finetune_args("--input_size", 32, "--batch_size", 2, "--update_freq", 3, "--num_workers", num_workers)
        dataset = Shapes("train", size=32, num_samples=12, transform=datasets.build_transform(True, args))
        model, drawn = classifier(classes=10, drop_path_rate=0.5), []
        model.register_forward_hook(lambda *_, drawn=drawn: drawn.append(torch.rand(1).item()))
        finetune(model, datasets.build_train_loader(dataset, args))
        found.append((weights(model), drawn))
    assert same(*found)
    assert len(set(found[0][1])) == 6  # each batch draws anew


def test_training_statistics_are_means_over_the_samples():
    """Frozen weights, so the epoch's mean is a direct computation; batches of 4, 4 and 3."""
    dataset, model = Noise(11), classifier()
    stats = finetune(model, train_loader(dataset, 4), schedule=constant(0.0), optimizer=torch.optim.SGD(
        model.parameters(), lr=0.0))  # fmt: skip
    logits, labels = model(dataset.images), torch.tensor(dataset.labels)
    assert stats["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert stats["class_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item() * 100)
    assert stats["lr"] == 0


def test_clipping_without_amp():
    for clip_grad, scale in ((None, None), (1e-3, 1e-3), (1e6, None)):
        model = classifier()
        before = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        finetune(model, train_loader(Noise(8), 8), optimizer=optimizer, amp=precise(clip_grad=clip_grad),
                 schedule=constant(1.0))  # fmt: skip
        if clip_grad is None:
            unclipped = moved(before, model)
            assert unclipped > 0.1
        assert moved(before, model) == pytest.approx(scale or unclipped, rel=1e-3)


def test_moving_average_after_each_optimizer_step():
    model = classifier()
    optimizer, ema = adamw(model), ModelEmaV3(model, decay=0.9)
    average, steps = weights(model), []

    def after_step(*_):
        steps.append(1)
        for name, value in model.state_dict().items():
            average[name] = 0.9 * average[name] + 0.1 * value

    optimizer.register_step_post_hook(after_step)
    finetune(model, train_loader(Noise(24), 4, update_freq=2), optimizer=optimizer, ema=ema)
    assert len(steps) == 3
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    assert moved(ema.module.state_dict(), model) > 1e-3


def test_moving_average_kept_on_the_cpu_stays_there():
    """Evaluating it must not move it to the model's device, where the next update would find it; meta plays the GPU."""
    ema = main_finetune.build_ema(classifier(), finetune_args("--model_ema", "--model_ema_force_cpu", "true"))
    seen = []

    def evaluate(model, loader, amp, header="eval", report=None):
        seen.append(next(model.parameters()).device.type)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_finetune, "evaluate", evaluate)
        engine_finetune.score(classifier().to("meta"), ema, None, SimpleNamespace(device=torch.device("meta")))
    assert seen == ["meta", "meta"]
    assert next(ema.module.parameters()).device == CPU


# ---- schedules


def test_layer_decay_and_warmup_set_each_groups_rate():
    """Three steps an epoch, two epochs of warm-up: the last step of epoch 1 is at 1 + 2/3."""
    model = classifier()
    args = finetune_args("--opt", "sgd", "--layer_decay", 0.5)
    optimizer = main_finetune.build_optimizer(model, args, lr=0.3)
    stats = finetune(model, train_loader(Noise(24), 8), optimizer=optimizer, schedule=Schedule(0.3, 0, 2, 10), epoch=1)
    lr = 0.3 * (1 + 2 / 3) / 2
    assert stats["lr"] == pytest.approx(lr)
    assert len(optimizer.param_groups) == 2 * 4 + 2 - 0  # four layers and the head, with decay and without
    for group in optimizer.param_groups:
        ids = {layer_id(name, TINY["depths"]) for name in group["names"]}
        assert group["lr"] == pytest.approx(lr * 0.5 ** (4 + 1 - ids.pop()))
        assert not ids
    assert {round(group["lr"] / lr, 4) for group in optimizer.param_groups} == {0.0625, 0.125, 0.25, 0.5, 1.0}


def test_weight_decay_schedule_changes_the_groups():
    model = classifier()
    args = finetune_args("--weight_decay", 0.2, "--weight_decay_end", 0.1, "--epochs", 4, "--warmup_epochs", 1)
    optimizer = main_finetune.build_optimizer(model, args, lr=1e-3)
    schedule = main_finetune.build_schedule(args, 1e-3, steps=3)
    finetune(model, train_loader(Noise(24), 8), optimizer=optimizer, schedule=schedule, epoch=2)
    expected = 0.1 + 0.1 * 0.5 * (1 + math.cos(math.pi * (2 + 2 / 3) / 4))
    found = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert found == {"decay": pytest.approx(expected), "no_decay": 0.0}


def test_warmup_steps_override_warmup_epochs():
    args = finetune_args("--epochs", 4, "--warmup_steps", 8, "--warmup_epochs", 1)
    schedule = main_finetune.build_schedule(args, 1.0, steps=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0)
    rates = [schedule.apply(optimizer, step / 5) for step in range(10)]
    assert rates[:9] == pytest.approx([step / 8 for step in range(9)])
    assert rates[9] < 1
    args.warmup_steps = 0  # starts at the peak
    assert main_finetune.build_schedule(args, 1.0, steps=5).apply(optimizer, 0) == 1


# ---- losses


def test_mixup_targets_and_their_loss():
    args = finetune_args("--mixup", 0.8, "--cutmix", 1.0, "--batch_size", 4, "--smoothing", 0.1)
    mixup = main_finetune.build_mixup(args, CLASSES)
    criterion, seen = main_finetune.build_criterion(args, mixup), []
    assert isinstance(criterion, SoftTargetCrossEntropy)

    def watched(logits, targets):
        seen.append((logits.detach(), targets))
        return criterion(logits, targets)

    # 11 images in pairs: batches of 4, 4 and 2
    stats = finetune(classifier(), train_loader(Noise(11), 4, batch_divisor=2), watched, mixup=mixup)
    assert [len(logits) for logits, _ in seen] == [4, 4, 2]
    assert "class_acc" not in stats
    losses = torch.cat([-(targets * logits.log_softmax(1)).sum(1) for logits, targets in seen])
    assert stats["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for _, targets in seen:
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
        assert targets.min().item() == pytest.approx(0.1 / CLASSES)
    assert any(((targets > 0.05).sum(1) == 2).any() for _, targets in seen), "no image was mixed"


def test_the_loss_follows_the_flags():
    logits, labels = torch.randn(5, CLASSES), torch.arange(5)

    def loss(*flags):
        args = finetune_args(*flags)
        return main_finetune.build_criterion(args, main_finetune.build_mixup(args, CLASSES))(logits, labels)

    torch.testing.assert_close(loss("--smoothing", 0), F.cross_entropy(logits, labels))
    torch.testing.assert_close(loss(), F.cross_entropy(logits, labels, label_smoothing=0.1))
    for flags in (("--mixup", 0.1), ("--cutmix", 0.1), ("--cutmix_minmax", 0.2, 0.8)):
        args = finetune_args(*flags)
        assert main_finetune.build_mixup(args, CLASSES) is not None
        assert isinstance(main_finetune.build_criterion(args, True), SoftTargetCrossEntropy)


# ---- evaluation


def expected_scores(model, dataset, left_out=()):
    keep = [i for i in range(len(dataset)) if i not in left_out]
    with torch.no_grad():
        logits, labels = model.eval()(dataset.images[keep]), torch.tensor(dataset.labels)[keep]
    order = logits.argsort(dim=1, descending=True)
    hits = order == labels[:, None]
    return {
        "acc1": hits[:, :1].any(1).double().mean().item() * 100,
        "acc5": hits[:, :5].any(1).double().mean().item() * 100,
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }


def confident(classes=CLASSES):
    """A classifier whose predictions differ from image to image."""
    model = classifier(classes, drop_path_rate=0.5)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("unreadable", [(), (5,), (8, 9, 10)], ids=["all", "one out", "last batch out"])
def test_evaluation_equals_a_direct_computation(unreadable):
    """11 images in batches of 4, 4 and 3: a mean of batch means would be off."""
    dataset, model = Noise(11, unreadable=unreadable), confident()
    stats = engine_finetune.evaluate(model.train(), eval_loader(dataset), precise())
    assert model.training
    expected = expected_scores(model, dataset, unreadable)
    assert stats == pytest.approx(expected, rel=1e-5)
    assert 0 < stats["acc1"] < stats["acc5"] < 100
    batches = [model(x).detach() for x in dataset.images.split(4)]
    losses = [F.cross_entropy(x, y).item() for x, y in zip(batches, torch.tensor(dataset.labels).split(4), strict=True)]
    assert abs(sum(losses) / 3 - expected["loss"]) > 1e-3


def test_evaluation_of_fewer_than_five_classes():
    dataset, model = Noise(9, classes=3), confident(3)
    stats = engine_finetune.evaluate(model, eval_loader(dataset), precise())
    assert stats["acc5"] == 100
    assert stats["acc1"] == pytest.approx(expected_scores(model, dataset)["acc1"])


def test_evaluation_restores_the_mode_and_leaves_no_gradient():
    for training in (True, False):
        model = confident().train(training)
        before = weights(model)
        engine_finetune.evaluate(model, eval_loader(Noise(8)), precise())
        assert model.training is training
        assert same(before, model.state_dict())
        assert all(p.grad is None for p in model.parameters())


def test_probabilities_are_for_a_report_alone(monkeypatch):
    asked, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *args: (asked.append(1), softmax(*args))[1])
    reports = []
    for report, batches in ((None, 0), (lambda *args: reports.append(args), 2)):
        engine_finetune.evaluate(confident(), eval_loader(Noise(8)), precise(), report=report)
        assert len(asked) == batches
    assert len(reports[0][0].probabilities) == 8


# ---- non-finite losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_names_its_step(value):
    calls = []

    def criterion(logits, labels):
        calls.append(1)
        return F.cross_entropy(logits, labels) * (value if len(calls) == 6 else 1)  # second batch of step 2

    with pytest.raises(NonFiniteLoss, match=r"in step 2 of epoch 7"):
        finetune(classifier(), train_loader(Noise(40), 4, update_freq=2), criterion, epoch=7)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_non_finite_loss_leaves_the_last_checkpoint(stage, tmp_path, monkeypatch):
    scripts, out, calls, update = Scripts(tmp_path), tmp_path / "out", [], EpochTracker.update

    def poisoned(self, step, samples, **values):
        calls.append(1)
        update(self, step, samples, **{k: v * (math.nan if len(calls) == STEPS + 2 else 1) for k, v in values.items()})

    monkeypatch.setattr(EpochTracker, "update", poisoned)
    result = getattr(scripts, stage)("--output_dir", out)
    assert result.code == 1
    assert result.err.startswith("error: the loss became NaN or infinite in step 1 of epoch 1")
    assert result.err.count("\n") == 1
    assert [path.name for path in out.glob("checkpoint-?.pth")] == ["checkpoint-0.pth"]
    assert all(value.isfinite().all() for value in load(out / "checkpoint-0.pth")["model"].values())
    assert len(records(out)) == 1


# ---- precision, memory, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu(dtype):
    seen = set()
    for model, train in ((fcmae(), pretrain), (classifier(), finetune)):
        before = weights(model)
        block = (model.encoder if train is pretrain else model).stages[0][0]
        block.norm.register_forward_pre_hook(lambda m, inputs: seen.add(inputs[0].dtype))  # the convolution's output
        stats = train(model, train_loader(Noise(24), 8), amp=Amp(CPU, True, dtype, clip_grad=1.0))
        stats = stats[0] if isinstance(stats, list) else stats
        assert math.isfinite(stats["loss"])
        assert moved(before, model) > 1e-3
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert seen == {dtype}
    scores = engine_finetune.evaluate(model, eval_loader(Noise(8)), Amp(CPU, True, dtype))
    assert math.isfinite(scores["loss"])


def test_the_loss_goes_down():
    images = Shapes("train", size=16, num_samples=64, transform=ToTensor())
    model = fcmae()
    loader = train_loader(images, 16, sample_mask=sample_mask)
    stats = pretrain(model, loader, schedule=Schedule(1e-3, 0, 1, 25), epochs=25)
    losses = [s["loss"] for s in stats]
    assert 0.8 < losses[0] < 1.3
    assert losses[-1] < 0.92 * losses[0]  # 0.80 to 0.86 under five other seeds


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_results_do_not_depend_on_the_number_of_workers(stage, tmp_path):
    scripts, results = Scripts(tmp_path), []
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        flags = ("--output_dir", out, "--epochs", 2, "--num_workers", workers)
        result = getattr(scripts, stage)(*flags, *(("--mixup", 0.8, "--drop_path", 0.2) if stage == "finetune" else ()))
        assert result.code == 0, result.err
        results.append([load(out / "checkpoint-1.pth")[key] for key in ("model", "optimizer")] + records(out))
    assert same(*results)


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__")


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "clipped", "mixup", "ema"])
def test_the_device_is_read_only_where_a_line_is_due(stage, monkeypatch):
    """45 steps: lines are due at steps 0, 20, 40 and 44. What reads a tensor in between would stall an accelerator."""
    model, at, reads = fcmae() if stage == "pretrain" else classifier(), [-2], []  # applied once before the first step
    apply = Schedule.apply

    def counted(*args):
        at[0] += 1
        return apply(*args)

    def watch(name):
        original = getattr(torch.Tensor, name)
        return lambda self, *args, **kwargs: (reads.append(at[0]), original(self, *args, **kwargs))[1]

    loader, optimizer = train_loader(Noise(90), 2), adamw(model)
    args = finetune_args("--mixup", 0.8, "--batch_size", 2)
    more = {
        "clipped": {"amp": precise(clip_grad=1.0)},
        "mixup": {"mixup": main_finetune.build_mixup(args, CLASSES), "criterion": SoftTargetCrossEntropy()},
        "ema": {"ema": ModelEmaV3(model)},
    }.get(stage, {})
    monkeypatch.setattr(Schedule, "apply", counted)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watch(name))
    if stage == "pretrain":
        pretrain(model, loader, optimizer)
    else:
        finetune(model, loader, optimizer=optimizer, **more)
    monkeypatch.undo()
    assert at[0] == 44
    assert {step for step in reads if step >= 0} == {0, 20, 40, 44}
