"""models/layers.py against the library's layers and the formulas."""

import itertools

import pytest
import torch
from torch import nn

from models.layers import GRN, PatchConv


@pytest.mark.parametrize(("kernel_size", "height", "width"), [(4, 12, 8), (4, 15, 9), (2, 5, 7), (1, 3, 2)])
def test_patch_conv_and_its_gradients_equal_the_library(kernel_size, height, width):
    torch.manual_seed(0)
    ours = PatchConv(5, 6, kernel_size).double()
    theirs = nn.Conv2d(5, 6, kernel_size, stride=kernel_size).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, height, width, dtype=torch.float64, requires_grad=True)
    results = []
    for conv in (ours, theirs):
        y = conv(x)
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("change", [
    {"stride": (1, 1)}, {"padding": (1, 1)}, {"stride": (1, 1), "dilation": (2, 2), "padding": "same"},
])  # fmt: skip
def test_a_patch_conv_that_was_changed_equals_the_library(change):
    """As dense prediction does to downsamplers."""
    ours, theirs = PatchConv(4, 6, 2), nn.Conv2d(4, 6, 2, stride=2)
    theirs.load_state_dict(ours.state_dict())
    for conv, (name, value) in itertools.product((ours, theirs), change.items()):
        setattr(conv, name, value)
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("arguments", "more"), [
    (((2, 2), (2, 2), (0, 0)), {"bias": False}), (((1, 1), (1, 1)), {"bias": False, "groups": 2}),
])  # fmt: skip
def test_a_patch_conv_is_made_like_a_convolution(arguments, more):
    """As LoRA makes its own."""
    ours, theirs = (kind(4, 6, *arguments, **more) for kind in (PatchConv, nn.Conv2d))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_channel_that_is_zero_everywhere_has_finite_derivatives():
    """Of first and second order: the root's own are infinite at zero."""
    grn = GRN(3)
    nn.init.ones_(grn.gamma)
    x = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    x[..., 1] = 0
    (grad,) = torch.autograd.grad(grn(x.requires_grad_()).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad.isfinite().all()
    assert second.isfinite().all()
    assert second[..., 0].any()
