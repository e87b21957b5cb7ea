"""Both engines on CUDA, without a card: every tensor is on its device, and nothing waits but for console lines."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from packaging.version import parse
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import engine_finetune
import engine_pretrain
from models import fcmae, fused, kernels, operators
from models.convnextv2 import ConvNeXtV2
from tests.fake_cuda import CUDA, ROOT, WaitsError, WrongDeviceError, fake_cuda, shim
from tests.test_engines import CPU, plain_run
from utils.amp import Amp
from utils.data.sampling import Batch
from utils.data.transforms import Normalise
from utils.knn import knn_score
from utils.lr_sched import Schedule
from utils.metrics import Progress
from utils.param_groups import param_groups
from utils.pictures import reconstructions

INSIDE = bool(os.environ.get("FAKE_CUDA"))
inside = pytest.mark.skipif(not INSIDE, reason="test_with_a_device_that_is_not_there runs it")
TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
STEPS, COUNT, CLASSES = 4, 4, 6
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.slow
@pytest.mark.skipif(INSIDE or not shutil.which("cc") or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs torch for CUDA, and no GPU")
@pytest.mark.skipif(parse(torch.__version__) < parse("2.14"), reason="older fake tensors differ")
def test_with_a_device_that_is_not_there(tmp_path):
    """In a process of its own: what answers for the device must be there before torch is."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__]
    environment = {**os.environ, **shim(tmp_path), "FAKE_CUDA": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(
        fused, "_is_watched", lambda *args: False
    )  # fake tensors have a type of their own, as tracers do
    monkeypatch.setattr(fused, "_is_plain", lambda *args: True)
    with fake_cuda(monkeypatch, kernels, operators) as mode:
        yield mode


class Steps:
    """A `StepLoader` of random CPU batches; between its first and last step, whose lines are due, nothing may wait."""

    def __init__(self, cuda, update_freq=1, masks=False):
        self.cuda, self.update_freq, self.masks = cuda, update_freq, masks
        self.batch_transform = Normalise((0.5,) * 3, (0.5,) * 3, CUDA)

    def __len__(self):
        return STEPS

    def batch(self, last):
        data = [torch.zeros(COUNT, 3, 16, 16, dtype=torch.uint8), torch.zeros(COUNT, dtype=torch.int64)]
        data += [fcmae.random_mask(torch.rand(COUNT, 4), 0.5)] * self.masks
        return Batch(data, 1 / self.update_freq, last)

    def steps(self, epoch, start_step):
        for step in range(STEPS):
            self.cuda.may_wait = step in (0, STEPS - 1)
            yield [self.batch(last) for last in [False] * (self.update_freq - 1) + [True]]
        self.cuda.may_wait = True


class Evaluated(list):
    """An evaluation loader: in its batches nothing may wait but for console lines."""

    sampler = None

    def __init__(self, cuda):
        super().__init__([[torch.randn(COUNT, 3, 16, 16), torch.zeros(COUNT, dtype=torch.int64)]] * 3)
        self.cuda = cuda

    def __iter__(self):
        self.cuda.may_wait = False
        yield from super().__iter__()
        self.cuda.may_wait = True


def run_of(dtype, clip_grad=None):
    return plain_run(Amp(CUDA, dtype is not None, dtype or torch.bfloat16, clip_grad))


def prepared(model, checkpointing=False, triton=True):
    fused.enable(model, triton)
    model.set_grad_checkpointing(checkpointing)
    model.to(CUDA)
    return model, torch.optim.AdamW(param_groups(model.named_parameters(), 0.05), lr=1e-3, fused=True)


def autoencoder():
    return fcmae.FCMAE(**TINY, decoder_embed_dim=16, norm_pix_loss=True, patch_size=8, mask_ratio=0.5)


def check(cuda, model, way):
    assert all(p.is_cuda and p.dtype == torch.float32 for p in model.parameters())
    for kernel in (kernels._convolve_kernel, kernels._weight_grad_kernel):
        assert bool(kernel.count) == way.get("triton", True)
    assert cuda.waits  # at the console lines: the mode sees what waits


WAYS = [*({"dtype": dtype} for dtype in DTYPES), {"checkpointing": True}, {"update_freq": 2}, {"triton": False}]
WAYS += [{"dtype": "float16", "clip_grad": 1.0}]
ids = lambda way: " ".join(f"{name} {value}" for name, value in way.items())  # noqa: E731


@inside
@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_pretraining(cuda, way):
    model, optimizer = prepared(autoencoder(), way.get("checkpointing"), way.get("triton", True))
    run = run_of(DTYPES[way.get("dtype", "bfloat16")], way.get("clip_grad"))
    loader = Steps(cuda, way.get("update_freq", 1), masks=True)
    engine_pretrain.train_one_epoch(model, loader, optimizer, Schedule(1e-3, 0, 0, 3), run, 0)
    check(cuda, model, way)


@inside
@pytest.mark.parametrize("way", [*WAYS, {"mixup": True}, {"ema": True}, {"drop_path": 0.5}], ids=ids)
def test_finetuning(cuda, way):
    classifier = ConvNeXtV2(num_classes=CLASSES, **TINY, stem_stride=1, drop_path_rate=way.get("drop_path", 0.0))
    model, optimizer = prepared(classifier, way.get("checkpointing"), way.get("triton", True))
    run = run_of(DTYPES[way.get("dtype", "bfloat16")], way.get("clip_grad"))
    run.ema = ModelEmaV3(model, decay=0.99) if way.get("ema") else None
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES) if way.get("mixup") else None
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
    loader = Steps(cuda, way.get("update_freq", 1))
    trained = engine_finetune.WithLoss(model, criterion)
    engine_finetune.train_one_epoch(trained, loader, optimizer, Schedule(1e-3, 0, 0, 3), run, 0, mixup)
    check(cuda, model, way)


@inside
@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_knn_and_pictures(cuda, dtype):
    amp = run_of(DTYPES[dtype]).amp
    model, _ = prepared(ConvNeXtV2(num_classes=CLASSES, **TINY, stem_stride=1))
    reported = []
    stats = engine_finetune.evaluate(model, Evaluated(cuda), amp, report=lambda answers, _: reported.append(answers))
    assert len(reported[0].predictions) == 3 * COUNT
    assert all(column.device == CPU for column in reported[0])
    assert set(stats) == {"loss", "acc1", "acc5"}
    model, _ = prepared(autoencoder())
    assert 0 <= knn_score(model.encoder, (Evaluated(cuda), Evaluated(cuda)), amp) <= 100
    pictures = reconstructions(model, torch.randn(2, 3, 16, 16), amp, (0.5,) * 3, (0.5,) * 3, 0.6)
    assert pictures.device == CPU


# ---- the entry scripts, from their flags on


@pytest.fixture
def on_cuda(cuda, scripts, monkeypatch):
    """on_cuda(stage, *flags): an epoch of 5 steps, and what follows it; only the first and the last step may wait."""
    every = Progress.__call__

    def steps(progress, items):
        for step, item in every(progress, items):
            cuda.may_wait = progress.due(step)
            yield step, item
        cuda.may_wait = True

    def call(stage, *flags):
        common = ("--epochs", 1, "--warmup_epochs", 0, "--device", "cuda", "--save_ckpt", "false")
        result = getattr(scripts, stage)(*common, *flags)
        assert result.code == 0, result.err

    monkeypatch.setattr(Progress, "__call__", steps)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    return call


RUNS = {
    "pretrain": ("--kernels triton --knn_freq 1", "--fused false --update_freq 2 --batch_size 4 --use_amp false"),
    "finetune": (
        "--kernels triton --mixup 0.8 --cutmix 1 --clip_grad 1 --drop_path 0.2 --grad_checkpointing true",
        "--model_ema true --model_ema_eval true --layer_decay 0.9 --fused false --freeze_stages 2 --best_metric f1",
        "--linear_probe true --opt lars",
        "--class_weights balanced",
    ),
}


@inside
@pytest.mark.parametrize(("stage", "flags"), [(stage, flags) for stage in RUNS for flags in RUNS[stage]])
def test_scripts(on_cuda, stage, flags, tmp_path):
    on_cuda(stage, *flags.split(), "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").exists()
    assert (tmp_path / "reconstruction-0.png").exists() == (stage == "pretrain")
    assert bool(kernels._weight_grad_kernel.count) == ("triton" in flags)


@inside
def test_several_labels(on_cuda, scripts, tmp_path):
    for split in ("train", "val"):
        paths = sorted(getattr(scripts, split).rglob("*.png"))
        (tmp_path / f"{split}.csv").write_text("".join(f"{path},{path.parent.name};all\n" for path in paths))
    lists = ("--multi_label", "--train_list", tmp_path / "train.csv", "--eval_list", tmp_path / "val.csv")
    on_cuda("finetune", *lists, "--cutmix", 1.0, "--class_weights", "balanced", "--output_dir", tmp_path)
    assert (tmp_path / "report.json").exists()


@inside
def test_a_read_in_a_script_names_its_line(on_cuda, monkeypatch):
    backward = Amp.backward
    monkeypatch.setattr(Amp, "backward", lambda self, loss: (loss.item(), backward(self, loss)))
    with pytest.raises(WaitsError, match=r"^tests/test_fake_cuda.py:\d+ .*loss.item"):
        on_cuda("pretrain")


# ---- the harness itself ----------------------------------------------------------------------------------------------

WAITING = {
    ".item()": lambda x: x.sum().item(),
    "a float": lambda x: float(x.sum()),
    "a branch": lambda x: 1 if x.sum() > 0 else 2,
    "a copy to the CPU": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
    "a blocking copy from the CPU": lambda x: torch.zeros(4).to(CUDA),
    "a copy into a tensor": lambda x: x.copy_(torch.zeros(4)),
    "a new tensor": lambda x: torch.tensor([1, 2], device=CUDA),
    "nonzero": lambda x: x.nonzero(),
    "a boolean index": lambda x: x[x > 0],
    "an assignment by a boolean index": lambda x: x.__setitem__(x > 0, torch.ones(4, device=CUDA)),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@inside
@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_found(cuda, name):
    x = torch.ones(4, device=CUDA)
    cuda.may_wait = False
    with pytest.raises(WaitsError, match=r"tests/test_fake_cuda.py:\d+ .*lambda x"):
        WAITING[name](x)


@inside
def test_what_does_not_wait_is_let_through(cuda):
    x, mask = torch.ones(4, device=CUDA), torch.zeros(4, dtype=torch.int64)
    cuda.may_wait = False
    y = torch.where(x > 0, x, 0.0)[mask.to(CUDA, non_blocking=True)] * torch.tensor(2.0)
    y[:2] += 1
    assert y.device == CUDA
    assert torch.equal(torch.ones(3).nonzero().flatten(), torch.arange(3))  # on the CPU


@inside
@pytest.mark.parametrize("wrong", [lambda x: x + torch.ones(4), lambda x: x[torch.tensor([0, 1])]])
def test_a_wrong_device_is_found(cuda, wrong):
    with pytest.raises((WrongDeviceError, RuntimeError), match=r"test_fake_cuda\.py"):
        wrong(torch.ones(4, device=CUDA))


@inside
@pytest.mark.parametrize("fault", [lambda loss: loss.item(), lambda loss: loss + torch.ones(1)])
def test_a_fault_in_an_engine_is_found(cuda, monkeypatch, fault):
    """Injected where the model returns, in the second step."""
    model, optimizer = prepared(autoencoder())
    forward = model.forward

    def faulty(*args, **kwargs):
        loss, *rest = forward(*args, **kwargs)
        if not cuda.may_wait:
            fault(loss)
        return loss, *rest

    model.forward = faulty
    loader, schedule = Steps(cuda, masks=True), Schedule(1e-3, 0, 0, 3)
    with pytest.raises((WaitsError, WrongDeviceError)):
        engine_pretrain.train_one_epoch(model, loader, optimizer, schedule, run_of(torch.bfloat16), 0)
