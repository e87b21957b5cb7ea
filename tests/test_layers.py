"""models/layers.py: what is written by hand equals the modules it stands for, gradients included."""

import pytest
import torch
from torch import nn

from models import layers
from models.convnextv2 import Block
from models.layers import GRN, depthwise, grn_mlp

FOLDED, PLAIN = (3, 4, 5, 6), (3, 2, 3, 6)  # (N, A, B, C): 20 positions are at least 2 * C, 6 are not


def modules(dim: int, dtype=torch.float64) -> list[nn.Module]:
    torch.manual_seed(dim)
    fc1, grn, fc2 = nn.Linear(dim, 4 * dim), GRN(4 * dim), nn.Linear(4 * dim, dim)
    nn.init.normal_(grn.gamma)
    nn.init.normal_(grn.beta)
    return [module.to(dtype) for module in (fc1, grn, fc2)]


def one_by_one(x, fc1, grn, fc2):
    return fc2(grn(nn.functional.gelu(fc1(x))))


def results(form, x, parts, dtype=None):
    """The output, and the gradients of x and of every parameter, for a loss that weighs outputs unevenly."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = form(x, *parts)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    parameters = [p for part in parts for p in part.parameters()]
    return [y, *torch.autograd.grad((y.double() * weights).sum(), [x, *parameters])]


@pytest.mark.parametrize("cache", [1, 4 << 20], ids=["sample by sample", "at once"])
@pytest.mark.parametrize("shape", [FOLDED, PLAIN], ids=["folded", "plain"])
def test_equals_the_modules(shape, cache, monkeypatch):
    monkeypatch.setattr(layers._GRNMLP, "CACHE", cache)
    parts = modules(shape[-1])
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(results(grn_mlp, x, parts), results(one_by_one, x, parts), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 8, 16, 32), (4, 5, 4, 32)], ids=["folded", "plain"])
def test_bfloat16_autocast(shape):
    """Within the error that the modules themselves have under autocast: both are compared with float64."""
    parts = modules(shape[-1], torch.float32)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    exact = results(one_by_one, x.double(), [part.double() for part in parts])
    parts = [part.float() for part in parts]
    fused, modular = (results(form, x, parts, torch.bfloat16) for form in (grn_mlp, one_by_one))
    assert fused[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in fused[1:])
    names = ["y", "x", "w1", "b1", "gamma", "beta", "w2", "b2"]
    for name, ours, theirs, true in zip(names, fused, modular, exact, strict=True):
        ours, theirs = ((t.double() - true).norm() / true.norm() for t in (ours, theirs))
        assert ours < max(1.5 * theirs, 4e-3), name


def test_a_dead_channel_has_no_gradient_and_no_nan():
    """A channel whose activation is zero everywhere: GELU gives exactly 0 at 0."""
    parts = modules(6)
    with torch.no_grad():
        parts[0].weight[3] = parts[0].bias[3] = 0.0
    x = torch.randn(*FOLDED, dtype=torch.float64)
    for form in (grn_mlp, one_by_one):
        grads = results(form, x, parts)[1:]
        assert all(torch.isfinite(g).all() for g in grads)
    for ours, theirs in zip(results(grn_mlp, x, parts), results(one_by_one, x, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [FOLDED, PLAIN], ids=["folded", "plain"])
def test_a_dead_channel_under_float16(shape):
    """What is divided by its norm must not overflow: infinity times zero would be NaN."""
    parts = modules(6, torch.float32)
    with torch.no_grad():
        parts[0].weight[3] = parts[0].bias[3] = 0.0
    assert all(torch.isfinite(t).all() for t in results(grn_mlp, torch.randn(*shape), parts, torch.float16))


def test_statistics_are_float32_in_half_precision():
    """The norm over 4096 positions of equal values, whose sum of squares no half-precision sum would get right."""
    fc1, grn, fc2 = modules(2, torch.float32)
    x = torch.ones(1, 64, 64, 2)
    fused = results(grn_mlp, x, [fc1, grn, fc2], torch.bfloat16)[0]
    exact = one_by_one(x.double(), fc1.double(), grn.double(), fc2.double())
    torch.testing.assert_close(fused.double(), exact, rtol=2e-2, atol=2e-2)


def test_only_training_takes_the_fused_form(monkeypatch):
    """Without gradients the modules run, hooks and exporters see them; with gradients the result is the same."""
    block, x = Block(6).double(), torch.randn(*FOLDED, dtype=torch.float64)
    nn.init.normal_(block.grn.gamma)
    seen = []
    block.grn.register_forward_hook(lambda *_: seen.append(1))
    trained = block(x)
    assert not seen
    with torch.no_grad():
        torch.testing.assert_close(block(x), trained, rtol=1e-12, atol=1e-12)
    assert seen


def test_what_is_kept_for_backward():
    """x and two wide activations: 9 * C values a position; the modules keep 13."""
    parts, kept = modules(8, torch.float32), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(4, 16, 64, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grn_mlp(x, *parts)
    assert sum(kept.values()) / (4 * x.numel()) == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (1, 5), (9, 4)])
@pytest.mark.parametrize("kernel_size", [7, 3])
def test_depthwise_and_its_gradients_equal_the_library(height, width, kernel_size):
    conv = nn.Conv2d(5, 5, kernel_size, padding=kernel_size // 2, groups=5).double()
    x = torch.randn(3, height, width, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(
        results(depthwise, x, [conv]),
        results(lambda x, conv: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x, [conv]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_depthwise_under_autocast():
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    x = torch.randn(2, 14, 14, 8, generator=torch.Generator().manual_seed(4))
    low = results(depthwise, x, [conv], torch.bfloat16)
    assert low[0].dtype == torch.bfloat16
    assert low[2].dtype == torch.float32
    for ours, exact in zip(low, results(depthwise, x.double(), [conv.double()]), strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-2


def test_depthwise_of_a_frozen_kernel():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4).requires_grad_(False)
    x = torch.randn(1, 8, 8, 4, requires_grad=True)
    depthwise(x, conv).sum().backward()
    assert x.grad.abs().sum() > 0
    assert conv.weight.grad is None
