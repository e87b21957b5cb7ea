"""models/weights.py: every layout, against the reference's golden outputs and against timm's own forward."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from models.convnextv2 import convnextv2_atto, convnextv2_tiny
from models.weights import infer_size, layout, to_backbone, to_fcmae, unwrap

GOLDEN = Path(__file__).parent / "golden"
fill_dense = runpy.run_path(str(GOLDEN / "fill.py"))["fill_dense"]


def golden_json(name):
    return json.loads((GOLDEN / name).read_text())


def filled(shapes):
    return {name: torch.from_numpy(fill_dense(name, shape)) for name, shape in shapes.items()}


def shapes_of(state_dict):
    return {name: list(value.shape) for name, value in state_dict.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def sparse():
    return filled(golden_json("remap_input_keys.json"))


@pytest.fixture(scope="module")
def dense():
    return filled(golden_json("dense_atto.state_dict.json"))


@pytest.fixture(scope="module")
def fcmae(sparse):
    return to_fcmae(sparse)


# ---- the reference's sparse training files


def test_sparse_to_backbone_has_the_dense_names_and_shapes(sparse):
    expected = golden_json("dense_atto.state_dict.json")
    expected = {name: shape for name, shape in expected.items() if not name.startswith(("norm.", "head."))}
    assert shapes_of(to_backbone(sparse)) == expected


def test_sparse_kernels_have_the_row_offset_fastest(sparse):
    backbone = to_backbone(sparse)
    depthwise, dense = backbone["stages.0.0.dwconv.weight"], backbone["downsample_layers.1.1.weight"]
    assert depthwise[5, 0, 2, 6] == sparse["encoder.stages.0.0.dwconv.kernel"][2 + 7 * 6, 5]
    assert dense[9, 4, 1, 0] == sparse["encoder.downsample_layers.1.1.kernel"][1 + 2 * 0, 4, 9]


def test_sparse_encoder_reproduces_the_golden_forward(sparse, dense):
    golden = np.load(GOLDEN / "remap_dense_forward.npz")
    model = convnextv2_atto().eval()
    head = {name: value for name, value in dense.items() if name.startswith(("norm.", "head."))}
    model.load_state_dict(to_backbone(sparse) | head)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        out = {
            "pooled": model.forward_stages(x)[-1].mean((2, 3)),
            "forward_features": model.forward_features(x),
            "logits": model(x),
        }
    for name, value in out.items():
        np.testing.assert_allclose(value, golden[name], rtol=0, atol=1e-5, err_msg=name)


def test_sparse_to_fcmae_has_the_dense_fcmae_names(sparse, fcmae):
    assert set(fcmae) == set(np.load(GOLDEN / "fcmae_sparse_atto_224.npz")["grad_names"].tolist())
    decoder, expected = ({n: v for n, v in s.items() if not n.startswith("encoder.")} for s in (fcmae, sparse))
    assert_same(decoder, expected)


def test_grn_gets_its_shape_everywhere(sparse, fcmae):
    flat = {name: value.reshape(1, -1) if ".grn." in name else value for name, value in sparse.items()}
    assert_same(to_fcmae(flat), fcmae)
    six_dims = {name: value[None, None] if ".grn." in name else value for name, value in fcmae.items()}
    assert_same(to_fcmae(six_dims), fcmae)


# ---- ours and the reference's dense files


def test_fcmae_and_backbone_round_trip(fcmae, dense):
    backbone = to_backbone(fcmae)
    assert all(name.startswith(("downsample_layers.", "stages.")) for name in backbone)  # the decoder is left out
    assert_same(to_backbone(to_fcmae(backbone)), backbone)
    assert_same(to_fcmae(fcmae), fcmae)
    assert_same(to_backbone(dense), dense)
    assert set(to_fcmae(dense)) == {f"encoder.{name}" for name in backbone}  # norm and head are left out


# ---- timm


# timm's atto has its linears as 1x1 convolutions, its tiny as linears
@pytest.mark.parametrize("factory", [convnextv2_atto, convnextv2_tiny])
def test_timm_logits(factory):
    torch.manual_seed(0)
    source, model = timm.create_model(factory.__name__).eval(), factory().eval()
    for parameter in source.parameters():  # GRN, biases and norms too: all off their neutral values
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    model.load_state_dict(to_backbone(source.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = source(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_timm_without_head_and_features_only():
    headless = timm.create_model("convnextv2_atto", num_classes=0).state_dict()
    features = timm.create_model("convnextv2_atto", features_only=True)
    renamed = {re.sub(r"^(stem|stages)\.", r"\1_", name): value for name, value in headless.items()}
    features.load_state_dict({name: value for name, value in renamed.items() if not name.startswith("head.")})
    backbone = to_backbone(headless)
    assert {"norm.weight", "norm.bias"} <= set(backbone)
    assert "head.weight" not in backbone
    assert_same(to_fcmae(features.state_dict()), to_fcmae(backbone))


# ---- Hugging Face

TO_HUGGINGFACE = (
    (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
    (r"^downsample_layers\.(\d)\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d)\.", r"encoder.stages.\1.layers."),
    (r"\bnorm\.", "layernorm."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^head\.", "classifier."),
)


@pytest.mark.parametrize("prefix", ["convnextv2.", ""])
def test_huggingface(dense, prefix):
    theirs = {}
    for name, value in dense.items():
        for ours, their in TO_HUGGINGFACE:
            name = re.sub(ours, their, name)
        theirs[name if name.startswith("classifier.") else prefix + name] = value
    theirs["hidden_states_norms.stage4.weight"] = torch.ones(320)  # of their backbone class; no part of ours
    assert f"{prefix}encoder.stages.2.layers.5.grn.weight" in theirs
    assert layout(theirs) == "huggingface"
    assert_same(to_backbone(theirs), dense)


# ---- wrappers, recognition, sizes

WRAPPERS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
    "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s, "arch": "convnextv2_atto"},
    "model_ema": lambda s: {"model": None, "model_ema": s},
    "ddp": lambda s: {f"module.{name}": value for name, value in s.items()},
    "ddp twice, compiled": lambda s: {"model": {f"_orig_mod.module.module.{name}": s[name] for name in s}},
    "compiled, ddp": lambda s: {f"module._orig_mod.{name}": value for name, value in s.items()},
    "compiled encoder": lambda s: {name.replace("encoder.", "encoder._orig_mod."): s[name] for name in s},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_unwrap(fcmae, wrap):
    assert_same(unwrap(wrap(fcmae)), fcmae)


def test_unwrap_takes_the_first_key_present():
    a, b = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}
    assert_same(unwrap({"model": a, "model_ema": b}), a)
    assert_same(unwrap({"model": a, "model_ema": b}, model_key="absent|model_ema|model"), b)


@pytest.mark.parametrize("nothing", [{}, {"epoch": 1, "optimizer": {"lr": 0.1}}, {"epoch": 1, "model": {}}])
def test_unwrap_without_a_state_dict(nothing):
    found = next(iter(nothing), "none")
    with pytest.raises(ValueError, match=f"no state dict under model, module.* it has {found}"):
        unwrap(nothing)


def test_layout(sparse, fcmae, dense):
    of_timm = timm.create_model("convnextv2_atto").state_dict()
    kinds = {"reference_sparse": sparse, "fcmae": fcmae, "backbone": dense, "timm": of_timm}
    assert {kind: layout(state_dict) for kind, state_dict in kinds.items()} == {kind: kind for kind in kinds}


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])  # ConvNeXt V1: no GRN
def test_layout_of_something_else(name):
    state_dict = timm.create_model(name).state_dict()
    for function in (layout, to_backbone, to_fcmae):
        with pytest.raises(ValueError, match=f"not a ConvNeXt V2.*{next(iter(state_dict))}"):
            function(state_dict)


def test_infer_size(sparse, dense):
    assert infer_size(dense) == ((2, 2, 6, 2), (40, 80, 160, 320), 3, 4, 1000)
    assert infer_size(dict(reversed(to_backbone(sparse).items()))) == ((2, 2, 6, 2), (40, 80, 160, 320), 3, 4, None)
    with pytest.raises(ValueError, match="not the state dict of a backbone"):
        infer_size(sparse)
