"""What only a GPU can show: `pytest -m gpu` runs it, with the kernels' tests. Skipped where there is none."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine_pretrain
from models import kernels
from tests.small_runs import killed_after, load
from tests.test_engines import plain_run
from tests.test_fake_cuda import Steps, autoencoder, prepared
from utils import distributed
from utils.amp import Amp
from utils.lr_sched import Schedule
from utils.metrics import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda", 0)


class WaitsAtLines:
    """Sets torch's own mode, in which what waits for the device is an error, where `Steps` forbids to wait."""

    def __setattr__(self, name, value):
        torch.cuda.set_sync_debug_mode("default" if value else "error")


def train(model, optimizer, loader, amp):
    return engine_pretrain.train_one_epoch(model, loader, optimizer, Schedule(1e-3, 0, 0, 3), plain_run(amp), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_do_not_wait(dtype):
    model, optimizer = prepared(autoencoder(), triton=kernels.available(CUDA, dtype))
    amp = Amp(CUDA, True, dtype)
    loader = Steps(WaitsAtLines(), masks=True)
    for step in loader.steps(0, 0):  # to warm up: compiling and first allocations wait
        for batch in step:
            torch.cuda.set_sync_debug_mode("default")
            amp.backward(model(loader.batch_transform(batch.data[0].to(CUDA)), mask=batch.data[2])[0])
            amp.step(optimizer, False)
    try:
        assert train(model, optimizer, loader, amp)["loss"] > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def strict_steps(monkeypatch):
    """In steps without a console line, torch raises where the device is waited for."""
    every = Progress.__call__

    def steps(progress, items):
        try:
            for step, item in every(progress, items):
                torch.cuda.set_sync_debug_mode("default" if progress.due(step) else "error")
                yield step, item
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Progress, "__call__", steps)


RUNS = {
    "pretrain": (
        "",
        "--kernels triton --grad_checkpointing true",
        "--amp_dtype float16 --update_freq 2 --batch_size 4",
    ),
    "finetune": (
        "--kernels triton --drop_path 0.2 --grad_checkpointing true",
        "--amp_dtype float16 --mixup 0.8 --cutmix 1 --clip_grad 1 --model_ema true",
    ),
}


@pytest.mark.parametrize(("stage", "flags"), [(stage, flags) for stage in RUNS for flags in RUNS[stage]])
def test_scripts_do_not_wait(strict_steps, scripts, stage, flags):
    result = getattr(scripts, stage)("--device", "cuda", *flags.split())
    assert result.code == 0, result.err


def test_a_step_that_waits_is_found(strict_steps, scripts, monkeypatch):
    backward = Amp.backward
    monkeypatch.setattr(Amp, "backward", lambda self, loss: (loss.item(), backward(self, loss)))
    with pytest.raises(RuntimeError, match="synchronizing"):
        scripts.pretrain("--device", "cuda")


def test_float16_steps_over_infinities():
    """A step whose gradients are infinite changes no weight and halves the scale; the next one is taken."""
    model, amp = nn.Linear(4, 4).to(CUDA), Amp(CUDA, True, torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before, scale = model.weight.detach().clone(), amp.scaler.get_scale()
    for factor, changed in ((torch.inf, False), (1.0, True)):
        amp.backward(model(torch.ones(2, 4, device=CUDA)).sum() * factor)
        amp.step(optimizer, False)
        assert torch.equal(model.weight, before) != changed
    assert amp.scaler.get_scale() == scale / 2


def test_one_process_under_nccl(tmp_path):
    """The same losses and weights as without a process group."""
    results = []
    for grouped in (False, True):
        if grouped:
            dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            torch.manual_seed(0)
            model, optimizer = prepared(autoencoder())
            loader = Steps(SimpleNamespace(), masks=True)  # may wait: DDP does in its second step, to sort its buckets
            train(distributed.data_parallel(model, False), optimizer, loader, Amp(CUDA, False, torch.bfloat16))
        finally:
            if grouped:
                dist.destroy_process_group()
        results.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    for name, p in results[0].items():
        torch.testing.assert_close(results[1][name], p, rtol=1e-4, atol=1e-5)


def test_killed_and_resumed(scripts, tmp_path, monkeypatch):
    """The run that was killed ends as the one that was not, up to the order of the library's sums."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = "--device", "cuda", "--save_ckpt_steps", 2
    assert scripts.pretrain(*flags, "--output_dir", tmp_path / "whole").code == 0
    with killed_after(7):
        scripts.pretrain(*flags, "--output_dir", tmp_path / "killed")
    assert scripts.pretrain(*flags, "--output_dir", tmp_path / "killed").code == 0
    whole, killed = (load(tmp_path / name / "checkpoint-2.pth")["model"] for name in ("whole", "killed"))
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, rtol=1e-3, atol=1e-4)
