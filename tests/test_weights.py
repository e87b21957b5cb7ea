"""utils/weights.py, layouts.py: every layout in and out, against the reference's golden outputs and timm's models."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from models import convnextv2
from models.convnextv2 import SIZES, ConvNeXtV2, convnextv2_atto, convnextv2_tiny
from models.fcmae import FCMAE
from models.linear_probe import LinearProbe
from tests.small_runs import TINY
from tests.small_runs import load as load_file
from utils.errors import UsageError
from utils.layouts import convert, recognise, to_backbone, to_huggingface, to_timm
from utils.weights import infer_config, load, load_checkpoint, unwrap

GOLDEN = Path(__file__).parent / "golden"
fill_dense = runpy.run_path(str(GOLDEN / "fill.py"))["fill_dense"]


def golden_json(name):
    return json.loads((GOLDEN / name).read_text())


def filled(shapes):
    return {name: torch.from_numpy(fill_dense(name, shape)) for name, shape in shapes.items()}


def to_fcmae(state_dict):
    """By the names of `FCMAE`."""
    names = {n: re.sub(r"^(?=downsample_layers|stages)", "encoder.", n) for n in convert(state_dict)}
    return {names[n]: v for n, v in convert(state_dict).items() if not n.startswith(("norm.", "head."))}


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


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("headless", [False, True])
def test_to_timm_has_the_names_and_shapes_of_timm(name, headless):
    classes = 0 if headless else 1000
    with torch.device("meta"):
        ours = getattr(convnextv2, name)(num_classes=classes).state_dict()
        try:
            theirs = timm.create_model(name, num_classes=classes).state_dict()
        except (NotImplementedError, RuntimeError):
            pytest.skip("this timm computes while it builds a model")
    assert shapes_of(to_timm(ours)) == shapes_of(theirs)
    assert shapes_of(to_backbone(to_timm(ours))) == shapes_of(ours)


@pytest.mark.parametrize("factory", [convnextv2_atto, convnextv2_tiny])
def test_to_timm_round_trips(factory):
    ours = randomised(factory(num_classes=7)).state_dict()
    assert_same(to_backbone(to_timm(ours)), ours)
    theirs = randomised(timm.create_model(factory.__name__, num_classes=7)).state_dict()
    assert_same(to_timm(theirs), theirs)


# ---- Hugging Face

TO_HUGGINGFACE = {
    "downsample_layers.0.0.weight": "embeddings.patch_embeddings.weight",
    "downsample_layers.0.1.bias": "embeddings.layernorm.bias",
    "downsample_layers.2.0.weight": "encoder.stages.2.downsampling_layer.0.weight",
    "downsample_layers.2.1.bias": "encoder.stages.2.downsampling_layer.1.bias",
    "stages.2.5.dwconv.weight": "encoder.stages.2.layers.5.dwconv.weight",
    "stages.2.5.norm.weight": "encoder.stages.2.layers.5.layernorm.weight",
    "stages.2.5.pwconv1.bias": "encoder.stages.2.layers.5.pwconv1.bias",
    "stages.2.5.grn.gamma": "encoder.stages.2.layers.5.grn.weight",
    "stages.2.5.grn.beta": "encoder.stages.2.layers.5.grn.bias",
    "stages.2.5.pwconv2.weight": "encoder.stages.2.layers.5.pwconv2.weight",
    "norm.weight": "layernorm.weight",
    "head.weight": "classifier.weight",
}


def test_to_huggingface(dense):
    theirs = to_huggingface(dense)
    assert recognise(theirs) == ("huggingface", "")
    assert len(theirs) == len(dense)
    for our_name, their_name in TO_HUGGINGFACE.items():
        prefix = "" if our_name.startswith("head.") else "convnextv2."
        assert torch.equal(theirs[prefix + their_name], dense[our_name])
    assert_same(to_backbone(theirs), dense)


def test_to_huggingface_without_a_head(dense):
    encoder = {name: value for name, value in dense.items() if not name.startswith("head.")}
    theirs = to_huggingface(encoder)
    assert all(torch.equal(theirs[name], encoder[ours]) for ours, name in TO_HUGGINGFACE.items() if ours in encoder)
    theirs["hidden_states_norms.stage4.weight"] = torch.ones(320)  # of their backbone class; no part of ours
    assert_same(to_backbone(theirs), encoder)


# ---- wrappers, recognition, sizes

WRAPPERS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
    "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s, "arch": "convnextv2_atto"},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 3},
    "model_ema": lambda s: {"model": None, "model_ema": s},
    "state_dict_ema": lambda s: {"epoch": 3, "state_dict_ema": s},
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


def test_the_average_beside_the_model():
    a, b = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}
    for name in ("model", "state_dict"):
        assert_same(unwrap({name: a, "state_dict_ema": b}), a)
        assert_same(unwrap({name: a, "state_dict_ema": b}, "model_ema"), b)


@pytest.mark.parametrize("kind", ["backbone", "fcmae", "timm", "huggingface", "reference_sparse"])
@pytest.mark.parametrize("prefix", ["model.", "net.module.backbone."])
def test_a_prefix_of_all_names_is_taken_off(prefix, kind, dense, fcmae, sparse):
    """As Lightning writes it; what stands beside it is dropped, a head of something else too."""
    layouts = {"backbone": dense, "fcmae": fcmae, "timm": to_timm(dense), "huggingface": to_huggingface(dense)}
    state = (layouts | {"reference_sparse": sparse})[kind]
    wrapped = {f"{prefix}{name}": v for name, v in state.items()} | {"head.weight": torch.ones(1000, 320)}
    assert recognise(wrapped) == (kind, prefix)
    assert_same(convert(wrapped), convert(state))
    report = load(model := convnextv2_atto(), unwrap({"state_dict": wrapped, "hyper_parameters": {}}))
    assert report.layout == f"{kind}, under {prefix}*"
    assert "head.weight" in report.unexpected_keys
    own = model.state_dict()
    assert_same({n: own[n] for n in report.loaded}, {n: to_backbone(state)[n] for n in report.loaded})


def test_two_models_in_one_file_are_told(dense):
    both = {f"{prefix}.{name}": v for prefix in ("student", "teacher") for name, v in dense.items()}
    with pytest.raises(ValueError, match=r"under 'student.' and 'teacher.'"):
        recognise(both)
    assert_same(unwrap(both, model_prefix="teacher."), dense)


def test_older_names_of_transformers(dense):
    older = {n.replace("grn.weight", "grn.gamma").replace("grn.bias", "grn.beta"): v
             for n, v in to_huggingface(dense).items()}  # fmt: skip
    assert_same(to_backbone(older), dense)


def test_a_key_that_is_named_is_the_one_taken():
    weight = {"weight": torch.zeros(1)}
    for content in (weight, {"model": weight}, {"state_dict": weight}):
        with pytest.raises(ValueError, match=f"holds no state dict under teacher; it has {next(iter(content))}"):
            unwrap(content, "teacher")
        with pytest.raises(ValueError, match="holds no state dict under model_ema, state_dict_ema; it has"):
            unwrap(content, "model_ema")
    assert_same(unwrap(weight, "model"), weight)  # by itself it is a model's


def test_unwrap_takes_the_names_under_a_prefix():
    a, b = torch.zeros(1), torch.ones(1)
    assert_same(unwrap({"module.net.weight": a, "module.head.weight": b}, model_prefix="net."), {"weight": a})
    with pytest.raises(ValueError, match=r"--model_prefix back: no name begins so; it has net\.\*"):
        unwrap({"net.weight": a}, model_prefix="back")


@pytest.mark.parametrize("nothing", [{}, {"epoch": 1, "optimizer": {"lr": 0.1}}, {"epoch": 1, "model": {}}])
def test_unwrap_without_a_state_dict(nothing):
    found = next(iter(nothing), "none")
    with pytest.raises(ValueError, match=f"no state dict under model, module.* it has {found}"):
        unwrap(nothing)


def test_layout(sparse, fcmae, dense):
    of_timm = timm.create_model("convnextv2_atto").state_dict()
    kinds = {"reference_sparse": sparse, "fcmae": fcmae, "backbone": dense, "timm": of_timm}
    assert {kind: recognise(state_dict) for kind, state_dict in kinds.items()} == {kind: (kind, "") for kind in kinds}


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])  # ConvNeXt V1: no GRN
def test_layout_of_something_else(name):
    state_dict = timm.create_model(name).state_dict()
    for function in (recognise, to_backbone, infer_config):
        with pytest.raises(ValueError, match=f"not a ConvNeXt V2.*{next(iter(state_dict))}"):
            function(state_dict)


def test_infer_config(sparse, dense):
    atto = (2, 2, 6, 2), (40, 80, 160, 320), 3, 4
    assert infer_config(dense) == infer_config(to_timm(dense)) == infer_config(to_huggingface(dense))
    assert infer_config(dense) == (*atto, 1000, {})
    assert infer_config(dict(reversed(to_backbone(sparse).items()))) == (*atto, 0, {})
    assert infer_config(sparse) == (*atto, 0, {"decoder_depth": 1, "decoder_embed_dim": 512})
    for part in ("downsample_layers.0.0.weight", "downsample_layers.2.1.weight"):
        with pytest.raises(ValueError, match=f"^not a whole backbone: missing is {part}$"):
            infer_config({name: value for name, value in dense.items() if name != part})


def test_a_model_is_built_to_the_sizes_of_its_state_dict():
    other = {"depths": (1, 2, 1, 1), "dims": (8, 8, 8, 24), "in_chans": 2}
    for stride in (1, 2, 4):
        model = ConvNeXtV2(**other, stem_stride=stride, num_classes=5)
        config = infer_config(model.state_dict())
        rebuilt = ConvNeXtV2(**config.encoder(), num_classes=config.num_classes)
        assert shapes_of(rebuilt.state_dict()) == shapes_of(model.state_dict())
        model = FCMAE(**other, patch_size=8 * stride, decoder_depth=3, decoder_embed_dim=12)
        config = infer_config(model.state_dict())
        assert config.encoder() == other | {"stem_stride": stride}
        assert config.decoder == {"decoder_depth": 3, "decoder_embed_dim": 12}
    assert infer_config(FCMAE(**TINY, decoder_depth=0).state_dict()).decoder["decoder_depth"] == 0
    assert infer_config(FCMAE(depths=(0, 0, 1, 0), dims=(8, 4, 8, 6)).state_dict())[:2] == ((0, 0, 1, 0), (8, 4, 8, 6))


# ---- into a model


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def classifier(seed_values=True, **kwargs):
    model = ConvNeXtV2(**{**TINY, "stem_stride": 1, "num_classes": 4, **kwargs})
    return randomised(model) if seed_values else model


def autoencoder(**kwargs):
    return randomised(FCMAE(**{**TINY, "patch_size": 8, "decoder_embed_dim": 16, **kwargs}))


def names_below(state_dict, *prefixes):
    return [name for name in state_dict if name.startswith(prefixes)]


DENSE = {  # a classifier's weights as different people's files have them
    "ours": lambda s: s,
    "compiled": lambda s: {"model": {f"_orig_mod.{name}": v for name, v in s.items()}},
    "average": lambda s: {"model_ema": {f"module.{name}": v for name, v in s.items()}},
    "with encoder prefix": lambda s: {"model": {re.sub(r"^(?=down|stages)", "encoder.", name): s[name] for name in s}},
    "timm": to_timm,
    "timm features_only": lambda s: {re.sub(r"^(stem|stages)\.", r"\1_", n): v for n, v in to_timm(s).items()},
    "huggingface": to_huggingface,
}


@pytest.mark.parametrize("kind", DENSE)
def test_every_layout_gives_the_golden_weights(kind, dense):
    """Whose outputs tests/test_convnextv2.py compares."""
    model = convnextv2_atto()
    report = load(model, unwrap(DENSE[kind](dense)))
    assert (report.loaded, report.unexpected_keys, report.missing_keys) == (list(model.state_dict()), [], [])
    assert_same(model.state_dict(), dense)


def test_the_references_sparse_file_gives_the_golden_features(sparse):
    model, golden = convnextv2_atto().eval(), np.load(GOLDEN / "remap_dense_forward.npz")
    report = load(model, unwrap({"model": sparse}))
    assert report.layout == "reference_sparse"
    assert report.missing_keys == names_below(model.state_dict(), "norm.", "head.")
    assert report.unexpected_keys == names_below(to_fcmae(sparse), "mask_token", "proj.", "decoder.", "pred.")
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        pooled = model.forward_stages(x)[-1].mean((2, 3))
    np.testing.assert_allclose(pooled, golden["pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [4, 10, 0])
def test_a_head_is_taken_where_it_fits(classes):
    source, model = classifier(num_classes=classes), classifier(False)
    before = model.head.weight.clone()
    report = load(model, source.state_dict())
    head = ["head.weight", "head.bias"]
    assert report.unexpected_keys == (head if classes == 10 else [])
    assert report.missing_keys == ([] if classes == 4 else head)
    assert torch.equal(model.head.weight, source.head.weight if classes == 4 else before)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_an_encoder_alone_leaves_the_norm_fresh():
    source, model = autoencoder(), classifier(False, num_classes=0)
    report = load(model, source.state_dict())
    assert report.missing_keys == ["norm.weight", "norm.bias"]
    assert set(report.loaded) == set(model.state_dict()) - set(report.missing_keys)
    assert_same({n: model.state_dict()[n] for n in report.loaded}, to_backbone(source.state_dict()))
    assert report.rows() == {
        "loaded": "downsample_layers.*, stages.*",
        "dropped": "mask_token, proj.*, decoder.*, pred.*",
        "fresh": "norm.*",
        "layout": "fcmae",
    }


@pytest.mark.parametrize("change", [{}, {"decoder_embed_dim": 8}, {"decoder_depth": 2}, {"decoder_depth": 0}])
def test_a_decoder_is_taken_whole_or_not_at_all(change):
    source, model = autoencoder(**change).state_dict(), FCMAE(**TINY, patch_size=8, decoder_embed_dim=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load(model, source)
    decoder, theirs = (names_below(s, "mask_token", "proj.", "decoder.", "pred.") for s in (before, source))
    assert report.missing_keys == (decoder if change else [])
    assert report.unexpected_keys == (theirs if change else [])
    expected = {name: before[name] if change and name in decoder else source[name] for name in before}
    assert_same(model.state_dict(), expected)


@pytest.mark.parametrize("kind", [*DENSE, "sparse"])
def test_every_layout_into_an_autoencoder(kind, dense, sparse):
    model = FCMAE(**SIZES["convnextv2_atto"])
    source = sparse if kind == "sparse" else unwrap(DENSE[kind](dense))
    report = load(model, source)
    assert_same({n: v for n, v in model.state_dict().items() if n in report.loaded}, {
        name: v for name, v in to_fcmae(source).items() if name in report.loaded
    })  # fmt: skip
    encoder = names_below(model.state_dict(), "encoder.")
    if kind == "sparse":
        assert report.loaded == list(model.state_dict())
        assert (report.unexpected_keys, report.missing_keys) == ([], [])
    else:
        assert report.loaded == encoder
        assert sorted(report.unexpected_keys) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, r"depths \(1, 1, 1, 1\), .* the model has depths \(1, 1, 2, 1\)"),
        ({"depths": (1, 1, 3, 1)}, r"depths \(1, 1, 3, 1\)"),
        ({"dims": (8, 8, 16, 24)}, r"dims \(8, 8, 16, 24\)"),
        ({"in_chans": 1}, "1 channels and stem stride 1, the model has .* 3 channels"),
        ({"stem_stride": 2}, "stem stride 2"),
    ],
)
@pytest.mark.parametrize("target", [classifier, autoencoder])
def test_another_size_is_refused_and_changes_nothing(change, message, target):
    model = target()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = {name: value + 1 for name, value in classifier(**change).state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load(model, source)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["stages.2.1.grn.gamma", "downsample_layers.3.1.weight", "stages.0.0.dwconv.bias"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_incomplete_backbone_is_refused(name, damage):
    model, source = classifier(), classifier().state_dict()
    value = source.pop(name)
    if damage == "cut":
        source[name] = value[..., :-1]
    with pytest.raises(ValueError, match=f"not a whole backbone: .* {name}$"):
        load(model, source)


@pytest.mark.parametrize("name", [
    "downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.2.1.pwconv1.weight",
    "head.batch_norm.running_var", "head.batch_norm.running_mean",
])  # fmt: skip
def test_an_impossible_shape_is_refused(name, tmp_path):
    """Where arithmetic or a view of the tensor fails."""
    value = torch.ones(3) if name == "head.batch_norm.running_var" else torch.tensor(1.0)  # which divides anything
    torch.save(LinearProbe(4, **TINY, stem_stride=1).state_dict() | {name: value}, tmp_path / "odd.pth")
    fault = r"a parameter has an impossible shape \(|missing, unknown or of another shape are stages.0.0.dwconv.weight"
    with pytest.raises(UsageError, match=f"odd.pth: not a whole backbone: ({fault})"):
        load_checkpoint(tmp_path / "odd.pth", classifier())


def test_averaging_the_stem():
    """A grey image gives the same features; everything else is the file's, to the last bit."""
    for source_chans, chans in ((3, 1), (3, 4), (1, 3), (4, 3)):
        source = classifier(in_chans=source_chans).eval().double()
        model = classifier(False, in_chans=chans).eval().double()
        with pytest.raises(ValueError, match="--in_chans"):
            load(model, source.state_dict())
        report = load(model, source.state_dict(), stem_average=True)
        assert (report.missing_keys, report.unexpected_keys) == ([], [])
        assert report.rows()["layout"] == f"backbone, its stem averaged over {source_chans} channels"
        grey = torch.rand(2, 1, 16, 16, dtype=torch.float64)
        with torch.inference_mode():
            torch.testing.assert_close(
                model(grey.expand(-1, chans, -1, -1)), source(grey.expand(-1, source_chans, -1, -1)),
                rtol=0, atol=1e-12,
            )  # fmt: skip
        stem = "downsample_layers.0.0.weight"
        assert model.state_dict()[stem].std(dim=1, correction=0).max() == 0
        source, model = source.state_dict(), model.state_dict()
        assert_same({n: v for n, v in model.items() if n != stem}, {n: v for n, v in source.items() if n != stem})


@pytest.mark.parametrize("model", [classifier, autoencoder])
def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    """But not those of a head that is left out."""
    model, source = model(), classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source.stages[2][0].grn.gamma.data[0, 0, 0, 3] = float("nan")
    torch.save(source.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(UsageError, match=r"^--finetune .*nan.pth: its weights are NaN or infinite"):
        load_checkpoint(tmp_path / "nan.pth", model, "--finetune")
    assert_same(model.state_dict(), before)
    source = classifier()
    source.head.weight.data[0, 0] = float("inf")
    torch.save(source.state_dict(), tmp_path / "head.pth")
    load_checkpoint(tmp_path / "head.pth", model, fresh_head=True)
    assert_same(to_backbone(to_fcmae(model.state_dict())), to_backbone(to_fcmae(source.state_dict())))


def test_a_fresh_head_is_skipped():
    source, model = classifier(), classifier(False)
    before = model.head.weight.clone()
    report = load(model, source.state_dict(), fresh_head=True)
    assert report.missing_keys == report.unexpected_keys == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_whole_leaves_nothing_fresh(tmp_path):
    path = tmp_path / "encoder.pth"
    torch.save(autoencoder().state_dict(), path)
    load_checkpoint(path, lambda config: FCMAE(**TINY, **config.decoder, patch_size=8), whole=True)
    build = lambda config: ConvNeXtV2(**config.encoder(), num_classes=config.num_classes)  # noqa: E731
    assert load_checkpoint(path, build).report.missing_keys == ["norm.weight", "norm.bias"]
    with pytest.raises(UsageError, match=r"encoder.pth: has nothing that fits for norm\.\* of the model"):
        load_checkpoint(path, build, whole=True)


def test_a_probe_is_read_as_the_classifier_with_its_logits(tmp_path):
    """Its features vary so little that the batch norm's epsilon counts."""
    probe = randomised(LinearProbe(4, **TINY, stem_stride=1)).eval().double()
    probe.head.batch_norm.running_var.fill_(1e-6)
    torch.save({"model": probe.state_dict()}, tmp_path / "probe.pth")
    model = classifier().eval().double()
    assert load_checkpoint(tmp_path / "probe.pth", model).report.unexpected_keys == []
    imgs = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(imgs), probe(imgs), rtol=1e-10, atol=0)


def test_a_stem_that_fits_is_not_averaged():
    source, model = classifier().state_dict(), classifier(False)
    assert load(model, source, stem_average=True).layout == "backbone"
    assert_same(model.state_dict(), source)


# ---- main_pretrain.py --initial_checkpoint, main_finetune.py --finetune

STILL = ("--warmup_epochs", 0, "--lr", 0, "--min_lr", 0)  # training that changes no weight
FILES = {  # a classifier as a file: its ending, the layout that is recognised, what is in it
    "dense": (".pth", "backbone", lambda s: {"model": s, "epoch": 3}),
    "compiled": (".pt", "backbone", lambda s: {"state_dict": {f"module._orig_mod.{name}": s[name] for name in s}}),
    "timm": (".safetensors", "timm", to_timm),
    "timm fcmae": (".bin", "timm", lambda s: {n: v for n, v in to_timm(s).items() if not n.startswith("head.fc.")}),
    "huggingface": (".safetensors", "huggingface", to_huggingface),
}


def write(state_dict, path):
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("kind", FILES)
def test_pretraining_starts_from_a_classifier_of_any_layout(kind, scripts, tmp_path):
    """With a learning rate of 0 the encoder that the first epoch saves is the file's, to the last bit."""
    ending, name, wrap = FILES[kind]
    source = classifier().state_dict()
    path = write(wrap(source), tmp_path / f"source{ending}")
    flags = (*STILL, "--epochs", 1, "--vis_freq", 0, "--output_dir", tmp_path / "out")
    result = scripts.pretrain("--initial_checkpoint", path, *flags)
    assert result.code == 0, result.err
    saved = load_file(tmp_path / "out" / "checkpoint-0.pth")["model"]
    assert_same({n: v for n, v in saved.items() if n.startswith("encoder.")}, to_fcmae(source))
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("--initial_checkpoint"))
    dropped = "norm.*" if kind == "timm fcmae" else "norm.*, head.*"
    if ending == ".safetensors":  # which sorts
        dropped = "head.*, norm.*"
    assert lines[start : start + 5] == [
        f"--initial_checkpoint {path}: {len(to_fcmae(source))} of {len(saved)} tensors",
        "  loaded: encoder.*",
        f"  dropped: {dropped}",
        "  fresh: mask_token, proj.*, decoder.*, pred.*",
        f"  layout: {name}",
    ]


def test_pretraining_takes_a_decoder_that_fits_and_a_resume_comes_first(scripts, tmp_path):
    source, other = autoencoder(), autoencoder()
    torch.nn.init.zeros_(other.mask_token)
    paths = [write({"model": m.state_dict()}, tmp_path / f"{i}.pth") for i, m in enumerate((source, other))]
    flags = (*STILL, "--vis_freq", 0, "--output_dir", tmp_path / "out")
    for epochs, path in enumerate(paths, 1):
        result = scripts.pretrain("--initial_checkpoint", path, "--epochs", epochs, *flags)
        assert result.code == 0, result.err
        assert_same(load_file(tmp_path / "out" / f"checkpoint-{epochs - 1}.pth")["model"], source.state_dict())
        told = f"--initial_checkpoint {path}: no effect on what goes on from"
        assert (told in result.out) == (epochs == 2)


def test_finetuning_loads_timm_and_hugging_face_files(scripts, tmp_path):
    source = classifier(num_classes=9).state_dict()
    for kind, rename in (("timm", to_timm), ("huggingface", to_huggingface)):
        path = write(rename(source), tmp_path / f"{kind}.safetensors")
        flags = ("--epochs", 1, *STILL, "--output_dir", tmp_path / kind)
        result = scripts.finetune("--finetune", path, *flags)
        assert result.code == 0, result.err
        saved = load_file(tmp_path / kind / "checkpoint-0.pth")["model"]
        heads = {"head.weight", "head.bias"}
        assert_same(*({n: v for n, v in state.items() if n not in heads} for state in (saved, source)))
        assert f"  layout: {kind}\n" in result.out
        assert "  dropped: head.*\n" in result.out


class Payload:
    """Runs when it is unpickled by a reader that lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_end_in_one_line(scripts, tmp_path):
    states = {
        "wide": classifier(dims=(8, 8, 16, 24)).state_dict(),
        "grey": classifier(in_chans=1).state_dict(),
        "part": {n: v for n, v in classifier().state_dict().items() if n != "stages.2.1.grn.gamma"},
        "resnet": timm.create_model("resnet10t").state_dict(),
        "convnext": timm.create_model("convnext_atto").state_dict(),
        "code": {"model": classifier().state_dict(), "extra": Payload(tmp_path / "ran")},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pth")
    save_file(states["grey"], tmp_path / "grey.safetensors")
    for ending in (".pth", ".safetensors"):
        whole = (tmp_path / f"grey{ending}").read_bytes()
        (tmp_path / f"half{ending}").write_bytes(whole[: len(whole) // 2])
    messages = {
        "wide.pth": r"not for this --model or --stem_stride: it has .*dims \(8, 8, 16, 24\)",
        "grey.pth": "not for this --model .* it has .* 1 channels .*; give --in_chans 1 or --stem_average true",
        "part.pth": "not a whole backbone: .*stages.2.1.grn.gamma",
        "resnet.pth": "not a ConvNeXt V2",
        "convnext.pth": "not a ConvNeXt V2",
        "code.pth": "not a checkpoint of tensors and plain values",
        "half.pth": "cannot be read, truncated or damaged",
        "half.safetensors": "cannot be read, truncated or damaged",
        "absent.pth": "no such file",
    }
    for run, flag in ((scripts.pretrain, "--initial_checkpoint"), (scripts.finetune, "--finetune")):
        for name, message in messages.items():
            result = run(flag, tmp_path / name)
            assert result.code == 2, name
            assert re.fullmatch(f"error: .*{name}: {message}.*\n", result.err), result.err
    assert not (tmp_path / "ran").exists()
    result = scripts.pretrain("--initial_checkpoint", tmp_path / "grey.pth", "--resume", tmp_path / "grey.pth")
    assert result.code == 2
    assert "--initial_checkpoint and --resume: give one" in result.err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_stem_average(stage, scripts, tmp_path):
    source = classifier().state_dict()
    path = write(source, tmp_path / "rgb.pth")
    flags = ("--in_chans", 1, "--initial_checkpoint" if stage == "pretrain" else "--finetune", path)
    flags += (*STILL, "--epochs", 1, "--output_dir", tmp_path / "out")
    result = getattr(scripts, stage)(*flags)
    assert result.code == 2
    assert result.err.endswith("; give --in_chans 3 or --stem_average true\n")
    result = getattr(scripts, stage)(*flags, "--stem_average", "true")
    assert result.code == 0, result.err
    assert "  layout: backbone, its stem averaged over 3 channels\n" in result.out
    stem = to_backbone(load_file(tmp_path / "out" / "checkpoint-0.pth")["model"])["downsample_layers.0.0.weight"]
    assert torch.equal(stem, source["downsample_layers.0.0.weight"].sum(dim=1, keepdim=True))
