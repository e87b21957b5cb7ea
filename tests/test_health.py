"""Effective rank and dead channels: against their definitions, and beside a pre-training that they leave alone."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset

import main_pretrain
from models.convnextv2 import Encoder
from models.layers import GRN
from tests.small_runs import STEPS, TINY, killed_after, load, records, same
from tests.test_distributed import launch
from utils.amp import Amp
from utils.errors import UsageError
from utils.health import dead_channels, effective_rank, health

LAST = "checkpoint-2.pth"
CPU = Amp(torch.device("cpu"), False, torch.bfloat16)


def test_effective_rank():
    """Of orthonormal columns their number, of one direction 1, else by RankMe's formula in numpy's float64."""
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert effective_rank(torch.linalg.qr(noise)[0][:, :5]) == pytest.approx(5, rel=1e-5)
    assert effective_rank(noise[:, :1] @ noise[:1]) == pytest.approx(1, abs=1e-3)
    values = np.linalg.svd(noise.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    for value in (math.nan, math.inf):  # of float16; torch's svdvals raises
        assert math.isnan(effective_rank(noise.clone().index_fill_(0, torch.tensor(3), value)))
    assert effective_rank(noise) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def collapsed(share: float) -> tuple[Encoder, list[GRN]]:
    """An encoder of which in each block this share of the expanded channels are constant, not zero."""
    torch.manual_seed(0)
    encoder = Encoder(**TINY, stem_stride=1)
    layers = [module for module in encoder.modules() if isinstance(module, GRN)]
    for stage in encoder.stages:
        for block in stage:
            count = round(share * len(block.pwconv1.weight))
            block.pwconv1.weight.data[:count] = 0
            block.pwconv1.bias.data[:count] = 3
    return encoder.train(), layers


def batches(size: int) -> list:
    imgs = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(len(part))) for part in imgs.split(size)]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_dead_channels(share, logs):
    """Of any batch size, told beside a line where they are most; no hook, and no random number, is left behind."""
    encoder, layers = collapsed(share)
    before = torch.get_rng_state()
    found = [health(encoder, layers, batches(size), CPU) for size in (12, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(layer._forward_hooks for layer in layers)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["dead_channels"] == 100 * share
    assert ("most channels after GRN are dead" in logs.text) == (share > 0.5)
    features = encoder.eval().forward_stages(batches(12)[0][0])[-1].mean(dim=(2, 3))
    assert found[0]["effective_rank"] == pytest.approx(effective_rank(features), rel=1e-5)
    assert health(encoder, layers, [], CPU) == {}


def test_a_channel_that_is_dead_in_each_batch_alone_is_not():
    rows = [torch.stack([torch.full((2,), 4.0), 4 * mean, 4 * mean.square()]).double()
            for mean in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))]  # fmt: skip
    assert dead_channels([rows[0] + rows[1]]) == 50
    assert dead_channels([rows[0]]) == 100


@pytest.fixture(scope="module")
def flat(scripts, tmp_path_factory):
    """The training images in one folder, without labels."""
    folder = tmp_path_factory.mktemp("flat")
    for path in scripts.train.rglob("*.png"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.slow
def test_health_needs_no_labels_and_changes_no_bit(scripts, flat, tmp_path):
    data = ("--data_path", flat, "--knn_images", 30)
    flags = {"plain": (), "watched": ("--health_freq", 2), "killed": ("--health_freq", 2)}
    for name, more in flags.items():
        if name == "killed":
            with killed_after(STEPS + 3):
                scripts.pretrain("--output_dir", tmp_path / name, *data, *more)
        result = scripts.pretrain("--output_dir", tmp_path / name, *data, *more)
        assert result.code == 0, result.err
    plain, watched, killed = (tmp_path / name for name in flags)
    assert all(same(load(plain / LAST)[key], load(watched / LAST)[key]) for key in ("model", "optimizer"))
    assert records(killed) == records(watched)
    looks = {line["epoch"]: line for line in records(watched) if "test_effective_rank" in line}
    assert list(looks) == [1, 2]
    for line in looks.values():
        assert 1 <= line.pop("test_effective_rank") <= 16
        assert line.pop("test_dead_channels") == 0
        assert line in records(plain)
    assert len(re.findall(r"^effective rank \d+\.\d of 16, 0\.0 % of the channels dead$", result.out, re.M)) == 2


def test_mistakes(scripts, flat):
    result = scripts.pretrain("--data_path", flat, "--health_freq", 0, "--knn_images", 3, "--epochs", 2)
    assert "--knn_images: no effect without --knn_freq and --health_freq" in result.out
    result = scripts.pretrain("--data_path", flat, "--health_freq", -1)
    assert (result.code, result.err.count("\n")) == (2, 1)
    args = main_pretrain.get_args_parser().parse_args(["--health_freq", "1"])
    with pytest.raises(UsageError, match="--health_freq 1: needs images that have indices"):
        main_pretrain.health_loader(ChainDataset([]), args)


@pytest.mark.slow
def test_health_is_the_same_on_several_processes(scripts, flat, tmp_path):
    """37 images, of which each is looked at once; lr 0 keeps the weights the same."""
    found = []
    flags = ("--data_path", flat, "--knn_images", 37, "--health_freq", 1, "--epochs", 1, "--lr", 0, "--vis_freq", 0)
    for processes, batch_size in ((1, 12), (3, 4)):
        out = tmp_path / str(processes)
        done = launch(
            scripts, "main_pretrain", processes, out, *flags, "--warmup_epochs", 0, "--batch_size", batch_size
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(records(out)[0])
    for name in ("test_effective_rank", "test_dead_channels"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_a_constant_channel_is_dead_whatever_rounding_makes_of_its_variance():
    moments = torch.tensor([[10, 10], [1, 1], [0.1 - 1e-15, 10]], dtype=torch.float64)
    assert dead_channels([moments]) == 50
