"""models/convnextv2.py: the reference's golden outputs, and an independent dense form for every other size."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from models import convnextv2
from models.convnextv2 import (
    SIZES,
    Block,
    ConvNeXtV2,
    Encoder,
    convnextv2_atto,
    convnextv2_tiny,
    layer_id,
    num_layer_ids,
)
from models.layers import GRN
from models.visible import VisiblePatches

GOLDEN = Path(__file__).parent / "golden"
FILL = runpy.run_path(str(GOLDEN / "fill.py"))
SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)}


def golden_name(factory):
    return factory.__name__.replace("convnextv2", "dense")


def fill(model, how):
    state_dict = {name: torch.from_numpy(FILL[how](name, p.shape)) for name, p in model.state_dict().items()}
    model.load_state_dict(state_dict)
    return model


def small(**kwargs):
    """A small model in float64 whose every parameter, GRN's too, is far from its neutral value."""
    return fill(ConvNeXtV2(**SMALL, num_classes=7, **kwargs), "fill_fcmae").double().eval()


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_stages(model, x):
    """The four stages, written once more: channels first, library convolutions, norms by their formulas."""
    p = model.state_dict()

    def layer_norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * p[f"{name}.weight"].view(1, -1, 1, 1) + p[f"{name}.bias"].view(1, -1, 1, 1)

    def grn(x, name):
        g = x.square().sum((2, 3), keepdim=True).sqrt()
        n = g / (g.mean(1, keepdim=True) + 1e-6)
        return p[f"{name}.gamma"].view(1, -1, 1, 1) * (x * n) + p[f"{name}.beta"].view(1, -1, 1, 1) + x

    def linear(x, name):
        return F.conv2d(x, p[f"{name}.weight"][:, :, None, None], p[f"{name}.bias"])

    outputs = []
    for i, depth in enumerate(model.depths):
        name = f"downsample_layers.{i}"
        if i == 0:
            x = F.conv2d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], stride=model.stem_stride)
            x = layer_norm(x, f"{name}.1")
        else:
            x = F.conv2d(layer_norm(x, f"{name}.0"), p[f"{name}.1.weight"], p[f"{name}.1.bias"], stride=2)
        for j in range(depth):
            name = f"stages.{i}.{j}"
            y = F.conv2d(x, p[f"{name}.dwconv.weight"], p[f"{name}.dwconv.bias"], padding=3, groups=x.shape[1])
            y = linear(layer_norm(y, f"{name}.norm"), f"{name}.pwconv1")
            y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
            x = x + linear(grn(y, f"{name}.grn"), f"{name}.pwconv2")
        outputs.append(x)
    return outputs


# ---- the reference's dense model


@pytest.mark.parametrize("factory", [convnextv2_atto, convnextv2_tiny])
def test_golden_outputs(factory):
    golden = np.load(GOLDEN / f"{golden_name(factory)}.npz")
    model = fill(factory(), "fill_dense").eval()
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        logits, features, stages = model(x), model.forward_features(x), model.forward_stages(x)
    for name, value in {"logits": logits, "forward_features": features}.items():
        np.testing.assert_allclose(value, golden[name], rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(value, golden[f"{name}64"], rtol=0, atol=1e-5, err_msg=name)
    assert len(stages) == 4
    for i, y in enumerate(stages):
        assert y.shape == (2, model.dims[i], 56 >> i, 56 >> i)
        np.testing.assert_allclose(y.mean((2, 3)), golden[f"stage{i}_mean_hw"], rtol=0, atol=1e-5, err_msg=f"stage {i}")
        corner = golden[f"stage{i}_corner"]  # single values of up to 16: rounding grows with them
        np.testing.assert_allclose(y[:, :8, :4, :4], corner, rtol=0, atol=3e-6 * np.abs(corner).max())


@pytest.mark.parametrize("factory", [convnextv2_atto, convnextv2_tiny])
def test_state_dict_names_and_shapes(factory):
    expected = json.loads((GOLDEN / f"{golden_name(factory)}.state_dict.json").read_text())
    assert {name: list(p.shape) for name, p in factory().state_dict().items()} == expected


@pytest.mark.parametrize(("size", "millions"), [
    ("atto", 3.71), ("femto", 5.23), ("pico", 9.07), ("nano", 15.62),
    ("tiny", 28.64), ("base", 88.72), ("large", 197.96), ("huge", 660.29),
])  # fmt: skip
def test_parameter_counts(size, millions):
    with torch.device("meta"):
        model = getattr(convnextv2, f"convnextv2_{size}")()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_factories_cover_the_table():
    sizes = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
    assert list(SIZES) == [f"convnextv2_{size}" for size in sizes]
    model = convnextv2_atto(num_classes=10, in_chans=1, stem_stride=2, drop_path_rate=0.1)
    assert (model.num_classes, model.in_chans, model.stem_stride) == (10, 1, 2)
    assert (model.depths, model.dims) == ((2, 2, 6, 2), (40, 80, 160, 320))


# ---- shapes and sizes


@pytest.mark.parametrize(("stem_stride", "height", "width"), [
    (4, 32, 32), (4, 75, 50), (4, 47, 95), (4, 63, 32), (4, 64, 96),
    (2, 33, 17), (2, 16, 16), (2, 47, 31), (1, 15, 8), (1, 8, 8), (1, 23, 33),
])  # fmt: skip
def test_any_size_equals_the_dense_form(stem_stride, height, width):
    model = small(stem_stride=stem_stride)
    x = noise(2, 3, height, width)
    with torch.inference_mode():
        stages, expected = model.forward_stages(x), dense_stages(model, x)
        pooled = F.layer_norm(expected[-1].mean((2, 3)), (24,), model.norm.weight, model.norm.bias, eps=1e-6)
        logits = F.linear(pooled, model.head.weight, model.head.bias)
        torch.testing.assert_close(model.forward_features(x), pooled, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x), logits, rtol=1e-10, atol=1e-10)
    side = (height // stem_stride, width // stem_stride)
    for i, (a, b) in enumerate(zip(stages, expected, strict=True)):
        assert a.shape[2:] == (side[0] >> i, side[1] >> i)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"stage {i}: {m}")


def test_gradients_equal_the_dense_form():
    model, x = small(), noise(2, 3, 75, 50)
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(("norm.", "head."))}
    weights = [noise(*y.shape, seed=i) for i, y in enumerate(dense_stages(model, x))]

    def gradients(stages):
        loss = sum((y * w).sum() for y, w in zip(stages, weights, strict=True))
        return torch.autograd.grad(loss, parameters.values())

    actual = gradients(model.forward_stages(x))
    model.state_dict = lambda: parameters  # so that the independent form sees parameters, not detached copies
    for name, a, b in zip(parameters, actual, gradients(dense_stages(model, x)), strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name
        assert b.abs().max() > 0, name


@pytest.mark.parametrize(("stem_stride", "height", "width"), [
    (4, 31, 64), (4, 64, 31), (2, 15, 32), (1, 7, 8), (1, 8, 1),
])  # fmt: skip
def test_too_small_images_are_refused(stem_stride, height, width):
    model = small(stem_stride=stem_stride)
    for method in (model, model.forward_features, model.forward_stages):
        with pytest.raises(ValueError, match=rf"{height} x {width} .*at least {8 * stem_stride}\b"):
            method(noise(1, 3, height, width))


@pytest.mark.parametrize("in_chans", [1, 5])
def test_in_chans(in_chans):
    model = small(in_chans=in_chans)
    x = noise(1, in_chans, 40, 32)
    torch.testing.assert_close(model.forward_stages(x)[-1], dense_stages(model, x)[-1], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=f"3 channels.*in_chans={in_chans}"):
        model(noise(1, 3, 32, 32))


def test_without_classes_forward_gives_features():
    model = ConvNeXtV2(**SMALL, num_classes=0).eval()
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    assert model(x).shape == (2, 24)
    assert torch.equal(model(x), model.forward_features(x))
    assert {name for name in model.state_dict() if not name.startswith(("downsample_layers.", "stages."))} == {
        "norm.weight",
        "norm.bias",
    }


@pytest.mark.parametrize("stem_stride", [0, 3, 8])
def test_other_stem_strides_are_refused(stem_stride):
    with pytest.raises(ValueError, match=f"4, 2 or 1, got {stem_stride}"):
        ConvNeXtV2(**SMALL, stem_stride=stem_stride)


# ---- initialisation, drop path


def test_initial_weights():
    torch.manual_seed(0)
    model = convnextv2_atto()
    kinds = set()
    for name, module in model.named_modules():
        kinds.add(type(module))
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.weight.mean().abs() < 0.002, name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-6, name
        elif isinstance(module, GRN):
            assert module.gamma.shape == (1, 1, 1, module.gamma.numel()), name
            assert not module.gamma.any(), name
            assert not module.beta.any(), name
    assert {nn.Conv2d, nn.Linear, nn.LayerNorm, GRN} <= kinds


def test_drop_path_rises_linearly():
    blocks = [m for m in convnextv2_atto(drop_path_rate=0.22).modules() if isinstance(m, Block)]
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)], rel=1e-6)
    assert not any(isinstance(m, DropPath) for m in convnextv2_atto().modules())


def test_drop_path_acts_in_training_only():
    model = fill(ConvNeXtV2(**SMALL, num_classes=7, drop_path_rate=0.9), "fill_fcmae")
    x = noise(1, 3, 32, 32, dtype=torch.float32).repeat(8, 1, 1, 1)
    torch.manual_seed(0)
    assert len(torch.unique(model(x)[:, 0].detach().round(decimals=3))) > 1  # samples drop independently
    y = model.eval()(x)
    torch.testing.assert_close(y, y[:1].expand(8, -1), rtol=1e-5, atol=1e-5)


# ---- gradient checkpointing


def test_grad_checkpointing_gives_the_same_gradients():
    model = fill(ConvNeXtV2(**SMALL, num_classes=7, drop_path_rate=0.5), "fill_fcmae")
    x = noise(4, 3, 48, 32, dtype=torch.float32)
    calls = []
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()], len(calls)

    expected, once = gradients()
    model.set_grad_checkpointing()
    actual, twice = gradients()
    assert (once, twice) == (5, 10)  # backward ran every block again
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    model.set_grad_checkpointing(False)
    assert gradients()[1] == 5


# ---- stages


@pytest.mark.parametrize("count", range(5))
def test_frozen_stages(count):
    """They get no gradient, drop no path and recompute nothing; the others' gradients are as without them."""
    x, runs = noise(2, 3, 64, 64), []
    for frozen in (0, count):
        model = fill(ConvNeXtV2(**SMALL, num_classes=7, drop_path_rate=0.5), "fill_fcmae").double()
        model.set_grad_checkpointing()
        model.freeze_stages(frozen)
        model.train()
        for module in model.stages[:count].modules() if not frozen else ():
            module.eval()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        runs.append(model)
    whole, part = runs
    under = tuple(f"{name}.{i}." for name in ("downsample_layers", "stages") for i in range(count))
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert (b.grad is None) == (not b.requires_grad) == name.startswith(under or "none"), name
        assert b.grad is None or torch.equal(a.grad, b.grad)
    assert [stage.training for stage in part.stages] == [i >= count for i in range(4)]
    assert [stage.grad_checkpointing for stage in part.stages] == [i >= count for i in range(4)]
    assert not any(module.training for module in part.eval().modules())


def test_stages_are_called():
    """A hook on a stage sees what the stage gives, of whole images and of visible patches, and may change it."""
    model, seen = small(), []
    x = noise(2, 3, 64, 96)
    expected = model.forward_stages(x)
    for stage in model.stages:
        stage.register_forward_hook(lambda _stage, _inputs, y: seen.append(y))
    model(x)
    assert len(seen) == 4
    for y, wanted in zip(seen, expected, strict=True):
        assert torch.equal(y.permute(0, 3, 1, 2), wanted)
    visible = VisiblePatches(torch.tensor([[0, 1, 1, 0, 1, 1]] * 2), (2, 3))
    *_, last = model.channels_last_stages(x, visible)
    assert torch.equal(seen[-1], last)
    assert last.shape == (2, 2, 1, 24)
    model.stages[-1].register_forward_hook(lambda _stage, _inputs, y: 0 * y)
    assert not model.forward_stages(x)[-1].any()


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_modules_of_one_input_in_place_of_blocks_and_stages():
    model, shorter, x = small(), small(), noise(2, 3, 64, 96)
    shorter.load_state_dict(model.state_dict())
    model.stages[1][1] = nn.Identity()
    del shorter.stages[1][1]
    model.stages[2] = Doubled(model.stages[2])
    shorter.stages[2].register_forward_hook(lambda _stage, _inputs, y: 2 * y)
    assert torch.equal(model(x), shorter(x))


@pytest.mark.slow
def test_export_with_free_height_and_width():
    model, dim = small().eval(), torch.export.Dim
    free = {0: dim("n"), 2: dim("h", min=64, max=512), 3: dim("w", min=64, max=512)}
    exported = torch.export.export(model, (noise(2, 3, 64, 96),), dynamic_shapes=(free,)).module()
    for x in (noise(3, 3, 75, 101), noise(1, 3, 128, 64)):
        torch.testing.assert_close(exported(x), model(x))


# ---- GRN


def test_grn_formula():
    grn = GRN(3).double()
    x = noise(2, 4, 5, 3)
    assert torch.equal(grn(x), x)  # gamma and beta start at zero
    nn.init.normal_(grn.gamma), nn.init.normal_(grn.beta)
    gamma, beta = grn.gamma.detach().numpy().ravel(), grn.beta.detach().numpy().ravel()
    for n in range(2):
        g = [np.sqrt((x[n, :, :, c].numpy() ** 2).sum()) for c in range(3)]
        for c in range(3):
            xc = x[n, :, :, c].numpy()
            expected = gamma[c] * xc * (g[c] / (sum(g) / 3 + 1e-6)) + beta[c] + xc
            np.testing.assert_allclose(grn(x)[n, :, :, c].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grn_statistics_do_not_overflow_in_half_precision(dtype):
    grn = GRN(2).to(dtype)
    nn.init.ones_(grn.gamma)
    x = torch.full((1, 400, 400, 2), 300.0, dtype=dtype)  # norm 120,000: beyond float16
    y = grn(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, 2 * x)  # equal channels: N is 1


# ---- layer ids

ATTO_SINGLE = {
    "downsample_layers.0": 1, "stages.0.0": 1, "stages.0.1": 2,
    "downsample_layers.1": 3, "stages.1.0": 3, "stages.1.1": 4,
    "downsample_layers.2": 5, "stages.2.0": 5, "stages.2.1": 6, "stages.2.2": 7, "stages.2.3": 8, "stages.2.4": 9,
    "stages.2.5": 10,
    "downsample_layers.3": 11, "stages.3.0": 11, "stages.3.1": 12,
    "norm": 13, "head": 13,
}  # fmt: skip
BASE_GROUP = {
    "downsample_layers.0": 0, "downsample_layers.1": 2, "downsample_layers.2": 3, "downsample_layers.3": 12,
    "stages.0.0": 1, "stages.0.1": 1, "stages.0.2": 1, "stages.1.0": 2, "stages.1.1": 2, "stages.1.2": 2,
    "stages.2.0": 3, "stages.2.1": 3, "stages.2.2": 3, "stages.2.3": 4, "stages.2.4": 4, "stages.2.5": 4,
    "stages.2.6": 5, "stages.2.7": 5, "stages.2.8": 5, "stages.2.9": 6, "stages.2.10": 6, "stages.2.11": 6,
    "stages.2.12": 7, "stages.2.13": 7, "stages.2.14": 7, "stages.2.15": 8, "stages.2.16": 8, "stages.2.17": 8,
    "stages.2.18": 9, "stages.2.19": 9, "stages.2.20": 9, "stages.2.21": 10, "stages.2.22": 10, "stages.2.23": 10,
    "stages.2.24": 11, "stages.2.25": 11, "stages.2.26": 11, "stages.3.0": 12, "stages.3.1": 12, "stages.3.2": 12,
    "norm": 13, "head": 13,
}  # fmt: skip


@pytest.mark.parametrize(("size", "kind", "table", "count"), [
    ("convnextv2_atto", "single", ATTO_SINGLE, 12), ("convnextv2_base", "group", BASE_GROUP, 12),
])  # fmt: skip
def test_layer_ids(size, kind, table, count):
    depths = SIZES[size]["depths"]
    with torch.device("meta"):
        names = list(getattr(convnextv2, size)().state_dict())
    seen = set()
    for name in names:
        parts = name.split(".")
        module = ".".join(parts[: {"downsample_layers": 2, "stages": 3}.get(parts[0], 1)])
        seen.add(module)
        assert layer_id(name, depths, kind) == table[module], name
    assert seen == set(table)
    assert num_layer_ids(depths, kind) == count
    assert num_layer_ids((3, 3, 27, 3), "single") == 36


def test_the_default_is_tiny():
    """Names and shapes, without their memory."""
    with torch.device("meta"):
        tiny = convnextv2_tiny()
        models = Encoder(), ConvNeXtV2(), ConvNeXtV2(num_classes=0)
    for model in models:
        names = {name: value.shape for name, value in tiny.state_dict().items() if name in model.state_dict()}
        assert {name: value.shape for name, value in model.state_dict().items()} == names
        assert (model.depths, model.dims) == (tiny.depths, tiny.dims)
    assert models[1].head.out_features == 1000
