"""models/fused.py and operators.py: what is written by hand equals the modules it stands for, gradients included, and
gives way to them wherever somebody sees or changes one."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from models import fused, operators
from models.convnextv2 import Block, ConvNeXtV2
from models.fcmae import FCMAE, random_mask
from models.fused import FusedBlock
from models.layers import GRN
from models.operators import depthwise, grn_mlp
from models.visible import VisiblePatches

FOLDED, PLAIN = (3, 4, 5, 6), (3, 2, 3, 6)  # (N, A, B, C): 20 positions are at least 2 * C, 6 are not


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, what=""):
    """The largest difference against the largest value."""
    scale = expected.abs().max()
    assert scale > 0, what
    assert (actual - expected).abs().max() <= 1e-11 * scale, what


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
    monkeypatch.setattr(operators, "CACHE", cache)
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


def test_no_gradient_is_made_of_what_is_kept():
    """It would be zeros, as wide as the activations are."""
    parts = modules(8, torch.float32)
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        grn_mlp(x, *parts).sum().backward()
    seen = [event.input_shapes for event in profile.events() if event.name == "aten::zero_"]
    assert not [shapes for shapes in seen if [2, 16, 32] in shapes or [2, 1, 32] in shapes]


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


# ---- the depthwise convolution of visible patches


def submanifold_by_loops(x, kept, weight, bias):
    """x (N, C, H, W), kept (N, H, W): every kept position sums over the kept positions in its window."""
    n, channels, height, width = x.shape
    halo = weight.shape[-1] // 2
    out = np.zeros_like(x)
    for i in range(n):
        for row, column in np.argwhere(kept[i]):
            for c in range(channels):
                total = bias[c]
                for r in range(-halo, halo + 1):
                    for s in range(-halo, halo + 1):
                        u, v = row + r, column + s
                        if 0 <= u < height and 0 <= v < width and kept[i, u, v]:
                            total += weight[c, 0, r + halo, s + halo] * x[i, c, u, v]
                out[i, c, row, column] = total
    return out


@pytest.mark.parametrize(("grid", "side"), [((3, 4), 1), ((2, 3), 2), ((2, 2), 4)])
@pytest.mark.parametrize("backend", ["map", "window"])
def test_depthwise_equals_loops(backend, grid, side):
    conv = nn.Conv2d(2, 2, 7, padding=3, groups=2).double()
    nn.init.normal_(conv.bias)
    mask = torch.tensor([[0, 1, 0, 1] * 3, [1, 0, 0, 1] * 3])[:, : grid[0] * grid[1]]
    patches = VisiblePatches(mask, grid)
    kept = mask.view(-1, *grid).repeat_interleave(side, 1).repeat_interleave(side, 2) == 0
    x = noise(2, 2, grid[0] * side, grid[1] * side)
    y = depthwise(patches.gather(x.permute(0, 2, 3, 1)), conv, patches, backend)
    y = patches.scatter(y).permute(0, 3, 1, 2).detach()
    expected = submanifold_by_loops(x.numpy(), kept.numpy(), conv.weight.detach().numpy(), conv.bias.detach().numpy())
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
@pytest.mark.parametrize("backend", ["map", "window"])
def test_depthwise_and_its_gradients(backend, side):
    grid, c = (3, 5), 6
    mask = random_mask(noise(3, 15).abs(), 0.6)
    patches = VisiblePatches(mask, grid)
    conv = nn.Conv2d(c, c, 7, padding=3, groups=c).double()
    x = noise(3, patches.num_visible, side * side, c).requires_grad_()
    weight = noise(*x.shape, seed=1)

    def run(y):
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), (x, conv.weight, conv.bias))]

    full = conv(patches.scatter(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = run(patches.gather(full))
    actual = run(depthwise(x, conv, patches, backend))
    for name, a, b in zip(("y", "x", "weight", "bias"), actual, expected, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, name)
    x, conv = x.detach(), conv.requires_grad_(False)
    maps, windows = (patches.row_index(side), [3, 3 * side, 5 * side]), patches.window_index(side, 3)
    assert_close(operators._weight_grad_by_map(x, weight, conv.weight, *maps), expected[2])  # for accelerators
    assert_close(operators._weight_grad_by_window(x, weight, conv.weight, windows), expected[2])


def test_layer_norm_under_cuda_autocast_stays_in_half_precision(monkeypatch):
    """Autocast itself would widen its input and output to float32. FakeTensorMode needs no GPU."""
    monkeypatch.setattr(fused, "_is_plain", lambda *_: True)  # its parameters are of another class
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            block, x = FusedBlock(8), torch.empty(2, 4, 4, 8, dtype=torch.bfloat16)
            assert block._normed(x).dtype == torch.bfloat16
            assert block.norm(x).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---- blocks and models: equal to the plain ones ------------------------------------------------------------------


def randomise(model):
    """Every parameter, in float64, away from its neutral value."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.double()


MASK = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 0]])
VISIBLE = VisiblePatches(MASK, (2, 3))
INPUTS = {  # a block's arguments
    "dense": (noise(2, 5, 4, 6), None),
    "visible, 4 x 4": (noise(2, 3, 16, 6), VISIBLE),
    "visible, 1 x 1": (noise(2, 3, 1, 6), VISIBLE),
}
each_input = pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)


def outcome(block, x, visible):
    """Output with gradients, and without; the gradients of the input and of all parameters that have one."""
    x = (x * 1).requires_grad_()
    torch.manual_seed(0)
    y = block(x, visible)
    parameters = [p for p in block.parameters() if p.requires_grad]
    grads = torch.autograd.grad((y * noise(*y.shape, seed=1)).sum(), [x, *parameters])
    with torch.no_grad():
        torch.manual_seed(0)
        return [y.detach(), block(x, visible), *grads]


def assert_same(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a, b, f"result {i}")


@each_input
def test_a_block_equals_the_plain_one(inputs):
    plain = randomise(Block(6, drop_path=0.2))
    block = copy.deepcopy(plain)
    assert fused.enable(block) == 1
    assert_same(outcome(block, *inputs), outcome(plain, *inputs))
    x, visible = inputs
    names = " ".join(type(f).__name__ for f in graph(block(x.clone().requires_grad_(), visible).grad_fn))
    assert "fcmae_grn_mlp" in names  # it is the fast form that was compared
    assert "fcmae_depthwise" in names


def graph(node):
    if node is not None:
        yield node
        for parent, _ in node.next_functions:
            yield from graph(parent)


@pytest.mark.parametrize("model", [
    ConvNeXtV2(depths=(1, 2, 1, 1), dims=(4, 6, 8, 10), num_classes=3, drop_path_rate=0.3),
    FCMAE(depths=(1, 1, 2, 1), dims=(4, 6, 8, 10), decoder_embed_dim=6, norm_pix_loss=True),
], ids=lambda model: type(model).__name__)  # fmt: skip
def test_a_model_equals_the_plain_one(model):
    plain, imgs, results = randomise(copy.deepcopy(model)), noise(2, 3, 64, 96), []
    quick = copy.deepcopy(plain)
    assert fused.enable(quick) == sum(isinstance(module, Block) for module in plain.modules())
    for each in (plain, quick):
        torch.manual_seed(0)
        y = each(imgs, mask=MASK)[0] if isinstance(each, FCMAE) else each(imgs).square().sum()
        results.append([y.detach(), *torch.autograd.grad(y, list(each.parameters()))])
    assert_same(*results)


def test_the_same_model_to_everybody_else():
    """State dict, copies, pickles and moving averages; and without gradients the same bits on whole images."""
    plain = randomise(ConvNeXtV2(depths=(1, 1, 1, 1), dims=(4, 4, 6, 6), num_classes=3)).eval()
    model = copy.deepcopy(plain)
    fused.enable(model)
    assert fused.enable(model) == 0
    imgs = noise(1, 3, 32, 32)
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        assert isinstance(other.stages[0][0], FusedBlock)
        assert list(other.state_dict()) == list(plain.state_dict())
        for a, b in zip(other.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            assert torch.equal(other(imgs), plain(imgs))


# ---- blocks that somebody looks at or changes --------------------------------------------------------------------


class Adapted(nn.Module):
    """LoRA: the layer that was there, frozen, plus a product of two thin matrices."""

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module):
        super().__init__()
        self.base, self.down, self.up = base.requires_grad_(False), down.double(), up.double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Int8Linear(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 127
        self.register_buffer("weight", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) * self.scale, self.bias)


class Halved(torch.Tensor):
    """Weights of a type of their own, as sharded and quantised ones are: a product with them gives the half."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        return y.as_subclass(torch.Tensor) / 2 if function is nn.functional.linear else y


class MeanGRN(GRN):
    def forward(self, x):
        return super().forward(x) - x.mean(dim=(1, 2), keepdim=True)


def set_layer(name, make):
    return lambda block: setattr(block, name, make(getattr(block, name)))


def twice(module, args, output=None):
    """A forward hook, or a pre-hook: doubles what comes out, or what goes in."""
    return 2 * output if output is not None else (2 * args[0],)


def half_gradient(module, grads_in, grads_out=None):
    return tuple(g / 2 for g in grads_in)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    return layer


CHANGES = {
    "another activation": set_layer("act", lambda _: nn.ReLU()),
    "tanh GELU": set_layer("act", lambda _: nn.GELU("tanh")),
    "subclass of GRN": set_layer("grn", lambda _: randomise(MeanGRN(24))),
    "adapter on pwconv1": set_layer(
        "pwconv1", lambda base: Adapted(base, nn.Linear(6, 2), nn.Linear(2, 24, bias=False))
    ),
    "adapter on dwconv": set_layer("dwconv", lambda base: Adapted(base, nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1))),
    "int8 weights": set_layer("pwconv2", Int8Linear),
    "weights of another type": lambda block: setattr(
        block.pwconv1, "weight", nn.Parameter(block.pwconv1.weight.detach().as_subclass(Halved))
    ),
    "no bias": lambda block: setattr(block.pwconv1, "bias", None),
    "another convolution": set_layer(
        "dwconv", lambda _: randomise(nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6))
    ),
    "a convolution of another size": set_layer("dwconv", lambda _: randomise(nn.Conv2d(6, 6, 5, padding=2, groups=6))),
    "circular borders": set_layer(
        "dwconv", lambda _: randomise(nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular"))
    ),
    "pruned": lambda block: prune.l1_unstructured(block.pwconv1, "weight", amount=0.5),
    "parametrised": lambda block: parametrizations.spectral_norm(block.pwconv2.eval()),
    "patched forward": set_layer("pwconv1", patched),
    "forward hook": lambda block: block.act.register_forward_hook(twice),
    "forward hook on dwconv": lambda block: block.dwconv.register_forward_hook(twice),
    "forward pre-hook": lambda block: block.grn.register_forward_pre_hook(twice),
    "backward hook": lambda block: block.pwconv1.register_full_backward_hook(half_gradient),
    "backward pre-hook": lambda block: block.pwconv2.register_full_backward_pre_hook(half_gradient),
    "backward hook on dwconv": lambda block: block.dwconv.register_full_backward_hook(half_gradient),
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False], ids=["before enable", "after enable"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@each_input
def test_a_change_takes_effect(inputs, change, first):
    block, untouched = (randomise(Block(6, drop_path=0.2)) for _ in range(2))
    torch.manual_seed(3)
    change(block)
    quick = randomise(Block(6, drop_path=0.2))
    torch.manual_seed(3)
    for step in (change, fused.enable) if first else (fused.enable, change):
        step(quick)
    results = [outcome(each, *inputs) for each in (quick, block, untouched)]
    assert_same(*results[:2])
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in itertools.zip_longest(*results[1:], fillvalue=MASK)]
    assert not all(same)  # the change is one


def test_global_hooks_fire():
    block, seen = randomise(Block(6)), []
    fused.enable(block)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        block(INPUTS["dense"][0])
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.GELU, GRN, nn.Linear} <= set(seen)


def test_subclasses_of_blocks_are_left_alone():
    class Scaled(Block):
        def forward(self, x, visible=None):
            return 2 * super().forward(x, visible)

    block = Scaled(6)
    assert fused.enable(block) == 0
    assert type(block) is Scaled


# ---- transformations that need single operations -----------------------------------------------------------------


def pair(width=6):
    plain = randomise(Block(width))
    quick = copy.deepcopy(plain)
    fused.enable(quick)
    return quick, plain


@each_input
def test_gradients_of_gradients(inputs):
    """A gradient penalty; and its Hessian-vector product, once more differentiated."""
    results = []
    for block in pair():
        (x, visible), parameters = inputs, list(block.parameters())
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(block(x, visible).square().sum(), x, create_graph=True)
        results.append([grad.detach(), *torch.autograd.grad(grad.square().sum(), [x, *parameters], create_graph=True)])
    assert_same(*results)


@each_input
def test_gradients_of_gradients_of_shared_weights(inputs):
    """The second block's input is itself of the weights that are asked for."""
    results, (start, visible) = [], inputs
    for block in pair():
        x, parameters = start.clone().requires_grad_(), list(block.parameters())
        y = block(block(x, visible), visible)
        grads = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *parameters])
        results.append([*(g.detach() for g in grads), *second])
    assert_same(*results)


@each_input
def test_float64_under_autocast_stays_as_it_is(inputs):
    results = []
    for block in pair():
        with torch.autocast("cpu", torch.bfloat16):
            results.append(outcome(block, *inputs))
    assert_same(*results)


def test_a_batch_without_images_has_zeros_for_gradients():
    block, _ = pair()
    x = torch.zeros(0, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    grad, *grads = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    assert grad.shape == x.shape
    assert [g.shape for g in grads] == [p.shape for p in block.parameters()]
    assert not any(g.any() for g in grads)


def test_gradients_of_gradients_under_autocast():
    block, plain = (each.float() for each in pair())
    results = []
    for each in (block, plain):
        x = INPUTS["dense"][0].float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            (grad,) = torch.autograd.grad(each(x).float().square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), list(each.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


@each_input
def test_torch_func(inputs):
    x, visible = inputs
    results = []
    for block in pair():
        weights = {name: p.detach() for name, p in block.named_parameters()}

        def loss(weights, x, block=block):
            return torch.func.functional_call(block, weights, (x, visible)).square().sum()

        grads = torch.func.grad(loss)(weights, x)
        _, tangent = torch.func.jvp(lambda x, weights=weights, loss=loss: loss(weights, x), (x,), (x,))
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, torch.stack([x, 2 * x]))
        results.append([tangent, *grads.values(), *each.values()])
    assert_same(*results)


def test_vmap_over_inputs_alone():
    quick, plain = pair()
    x = INPUTS["dense"][0]
    y = torch.func.vmap(quick)(torch.stack([x, 2 * x]))
    assert_close(y, torch.stack([plain(x), plain(2 * x)]))


@pytest.mark.parametrize("layer", ["dwconv", "pwconv1", "pwconv2"])
def test_a_layer_of_another_dtype_is_refused_as_in_the_plain_block(layer):
    for block in pair():
        getattr(block, layer).float()
        with pytest.raises(RuntimeError, match="type"):
            block(INPUTS["dense"][0])


def test_forward_mode():
    results = []
    for block in pair():
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(INPUTS["dense"][0], INPUTS["dense"][0])
            results.append([torch.autograd.forward_ad.unpack_dual(block(x)).tangent.detach()])
    assert_same(*results)


TRACED = {
    "fx": lambda model, imgs: torch.fx.symbolic_trace(model),
    "jit.trace": torch.jit.trace,
    "export": lambda model, imgs: torch.export.export(model, (imgs,)).module(),
    "compile": lambda model, imgs: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("trace", TRACED.values(), ids=TRACED)
@pytest.mark.filterwarnings("ignore")
def test_traced_with_gradients_on(trace, fast):
    model, imgs = randomise(ConvNeXtV2(depths=(1, 1, 1, 1), dims=(4, 4, 6, 6), num_classes=3)), noise(2, 3, 32, 64)
    assert bool(not fast or fused.enable(model))
    results = []
    for each in (trace(model, imgs), model):
        y = each(imgs)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert_same(*results)
