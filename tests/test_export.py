"""tools/export.py and hubconf.py: what the target's own library makes of the files, and what happens to mistakes."""

import contextlib
import io
import json
import re
import resource
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data.readers.class_map import load_class_map

from models.convnextv2 import SIZES, ConvNeXtV2
from models.fcmae import FCMAE
from models.linear_probe import LinearProbe
from tests.small_runs import TINY, Result
from tools import export, targets
from utils import checkpoint, layouts, weights
from utils.data.shapes import draw
from utils.data.transforms import eval_crop, eval_transform, mean_std
from utils.errors import run_cli

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["circle", "square", "star", "moon"]


def randomised(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def classifier(seed=0, **kwargs):
    return randomised(ConvNeXtV2(**{**TINY, "num_classes": 4, "stem_stride": 1, **kwargs}), seed)


def tool(*flags) -> Result:
    """As `python tools/export.py flags`, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(lambda: export.main([str(flag) for flag in flags]))
        except SystemExit as error:
            code = error.code
    return Result(code, out.getvalue(), err.getvalue())


def exported(path, target, output, *flags) -> str:
    result = tool("--checkpoint", path, "--to", target, "--output", output, *flags)
    assert result.code == 0, result.err
    return result.out


@pytest.fixture
def fine(tmp_path):
    """A fine-tuning checkpoint, its model and its moving average."""
    model, average = classifier(), classifier(seed=1)
    content = {
        "model": model.state_dict(), "model_ema": average.state_dict(), "optimizer": {"state": {}}, "epoch": 3,
        "classes": CLASSES, "args": {"input_size": 24, "crop_pct": None, "imagenet_default_mean_and_std": False},
    }  # fmt: skip
    torch.save(content, tmp_path / "fine.pth")
    return tmp_path / "fine.pth", model, average


@pytest.fixture
def pre(tmp_path):
    """A pre-training checkpoint, and its encoder with the norm that it has not got."""
    autoencoder = randomised(FCMAE(**TINY, patch_size=8, decoder_embed_dim=16))
    torch.save({"model": autoencoder.state_dict(), "args": {"input_size": 16}}, tmp_path / "pre.pth")
    encoder = ConvNeXtV2(**TINY, num_classes=0, stem_stride=1).eval()
    weights.load(encoder, autoencoder.state_dict())
    return tmp_path / "pre.pth", encoder


def hub(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "convnextv2_atto", TINY)


def images(model, batch=2, side=24):
    return torch.randn(batch, model.in_chans, side, side, generator=torch.Generator().manual_seed(5))


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- timm

READS_FOLDERS = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26)


def recipes(out):
    """The calls that the tool prints, made."""
    calls = re.findall(r"timm\.create_model\(.*\)", out)
    return [eval(call, {"timm": timm}).eval() for call in calls]


@torch.no_grad()
@pytest.mark.parametrize("output", ["folder", "folder/weights.safetensors", "weights.pth"])
def test_timm(output, fine, tmp_path):
    path, model, _ = fine
    out = exported(path, "timm", tmp_path / output)
    file = tmp_path / output / "model.safetensors" if output == "folder" else tmp_path / output
    assert_same_state(layouts.to_backbone(checkpoint.read(file)), model.state_dict())
    whole, features = recipes(out)
    x = images(model)
    close(whole(x), model(x))
    for theirs, ours in zip(features(x), model.forward_stages(x), strict=True):
        close(theirs, ours)
    config_file = file.with_name("config.json") if output == "folder" else file.with_suffix(".json")
    config = json.loads(config_file.read_text())
    assert config["num_classes"] == 4
    assert config["pretrained_cfg"] == {
        "input_size": [3, 24, 24], "pool_size": [3, 3], "interpolation": "bicubic", "crop_pct": 1.0,
        "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 4, "first_conv": "stem.0",
        "classifier": "head.fc",
    }  # fmt: skip
    assert config["label_names"] == CLASSES
    class_map = file.with_name("class_map.txt" if output == "folder" else f"{file.stem}.class_map.txt")
    assert class_map.read_text().split() == CLASSES
    assert f"--class-map {class_map}" in out
    told = timm.data.resolve_model_data_config(whole)
    assert [list(told[name]) for name in ("input_size", "mean")] == [[3, 24, 24], [0.5] * 3]
    assert ("local-dir:" in out) == (output == "folder" and READS_FOLDERS)
    assert re.search(r"verified +largest absolute difference \S+ with timm \S+, below", out)


@torch.no_grad()
def test_timm_reads_the_folder_by_itself(fine, tmp_path):
    if not READS_FOLDERS:
        pytest.skip("this timm cannot load from a folder")
    path, model, _ = fine
    exported(path, "timm", tmp_path / "folder")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    close(theirs(images(model)), model(images(model)))
    assert theirs.pretrained_cfg["label_names"] == CLASSES


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [{"in_chans": 1}, {"in_chans": 5}, {"stem_stride": 1}, {"stem_stride": 4}, {"dims": (96, 8, 16, 16)}]
)
def test_timm_builds_what_is_not_the_default(change, tmp_path):
    model = classifier(**change)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    whole, features = recipes(exported(tmp_path / "bare.pth", "timm", tmp_path, "--input_size", 64))
    x = images(model, side=64)
    close(whole(x), model(x))
    close(features(x)[3], model.forward_stages(x)[3])
    if READS_FOLDERS:
        close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_pct"] == 224 / 256
    known = {1: pytest.approx([0.449], abs=1e-3), 3: [0.485, 0.456, 0.406]}  # five channels have no convention
    assert config.get("mean") == known.get(model.in_chans)


@pytest.mark.parametrize("name", ["café", "caf\udce9", " a", "a ", "a\nb", "two words"])
def test_timm_reads_every_name_of_a_class(name, tmp_path):
    state = ConvNeXtV2(**TINY, num_classes=2).state_dict()
    torch.save({"model": state, "classes": ["a", name]}, tmp_path / "a.pth")
    found = re.search(r"--class-map (\S+)", exported(tmp_path / "a.pth", "timm", tmp_path / "out"))[1]
    assert load_class_map(found) == {"a": 0, name: 1}


@torch.no_grad()
def test_timm_by_its_name(tmp_path):
    source = randomised(timm.create_model("convnextv2_atto", num_classes=3))
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    out = exported(tmp_path / "theirs.pth", "timm", tmp_path / "again.safetensors", "--input_size", 384)
    assert_same_state(load_file(tmp_path / "again.safetensors"), source.state_dict())
    assert "timm.create_model('convnextv2_atto', num_classes=3, pretrained=True, pretrained_cfg_overlay={" in out
    config = json.loads((tmp_path / "again.json").read_text())
    assert (config["architecture"], config["model_args"]) == ("convnextv2_atto", {})
    assert config["pretrained_cfg"]["crop_mode"] == "squash"  # as evaluation at 384 and above warps
    assert config["pretrained_cfg"]["crop_pct"] == 1.0


@torch.no_grad()
def test_a_pre_training_checkpoint_gives_its_encoder(pre, tmp_path):
    path, encoder = pre
    out = exported(path, "timm", tmp_path / "timm")
    whole, features = recipes(out)
    x = images(encoder)
    close(whole(x), encoder(x))
    close(features(x)[2], encoder.forward_stages(x)[2])
    assert re.search(r"dropped +mask_token, proj\.\*, decoder\.\*, pred\.\*\n", out)
    assert re.search(r"fresh +norm\.\*\n", out)
    assert re.search(r"layout +fcmae\n", out)


@torch.no_grad()
def test_ema_and_num_classes(fine, tmp_path):
    path, model, average = fine
    exported(path, "safetensors", tmp_path / "ema", "--ema", "true")
    assert_same_state(load_file(tmp_path / "ema" / "model.safetensors"), average.state_dict())
    out = exported(path, "safetensors", tmp_path / "encoder.safetensors", "--num_classes", 0)
    expected = {name: v for name, v in model.state_dict().items() if not name.startswith("head.")}
    assert_same_state(load_file(tmp_path / "encoder.safetensors"), expected)
    assert re.search(r"dropped +head\.\*\n", out)
    torch.save(average.state_dict(), tmp_path / "bare.pth")
    exported(tmp_path / "bare.pth", "safetensors", tmp_path / "bare", "--ema", "false")
    assert_same_state(load_file(tmp_path / "bare" / "model.safetensors"), average.state_dict())
    exported(path, "safetensors", tmp_path / "same", "--num_classes", 4)
    assert_same_state(load_file(tmp_path / "same" / "model.safetensors"), model.state_dict())


@torch.no_grad()
def test_a_linear_probe_gives_a_classifier(tmp_path, monkeypatch):
    probe = LinearProbe(4, **TINY, stem_stride=1)
    randomised(probe).head.batch_norm.running_mean.normal_()
    probe.head.batch_norm.running_var.uniform_(0.5, 2)
    torch.save({"model": probe.state_dict()}, tmp_path / "probe.pth")
    whole, _ = recipes(exported(tmp_path / "probe.pth", "timm", tmp_path / "timm"))
    x = images(probe)
    close(whole(x), probe(x))
    monkeypatch.setitem(SIZES, "convnextv2_atto", TINY)
    close(hub("convnextv2_atto", checkpoint=tmp_path / "probe.pth").eval()(x), probe(x))


# ---- Hugging Face


def test_hf_files(fine, tmp_path):
    path, model, _ = fine
    exported(path, "hf", tmp_path / "hf")
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert_same_state(layouts.to_backbone(load_file(tmp_path / "hf" / "model.safetensors")), model.state_dict())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["ConvNextV2ForImageClassification"]
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert config["label2id"] == {name: i for i, name in enumerate(CLASSES)}
    facts = ("image_size", "num_channels", "patch_size", "depths", "hidden_sizes", "layer_norm_eps")
    assert [config[fact] for fact in facts] == [24, 3, 1, list(TINY["depths"]), list(TINY["dims"]), 1e-6]
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (preprocessor["size"], preprocessor["crop_size"]) == ({"shortest_edge": 24}, {"height": 24, "width": 24})
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0.5] * 3, [0.5] * 3)


def test_hf_without_transformers_says_that_it_could_not_verify(fine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = exported(fine[0], "hf", tmp_path / "hf")
    assert re.search(r"verified +NOT verified, transformers is not installed: pip install transformers\n", out)


@torch.no_grad()
def test_transformers_reads_a_classifier(fine, tmp_path):
    transformers = pytest.importorskip("transformers")
    path, model, _ = fine
    out = exported(path, "hf", tmp_path / "hf")
    assert re.search(r"verified +largest absolute difference \S+ with transformers", out)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    x = images(model)
    close(theirs(x).logits, model(x))
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    close(encoder(x).pooler_output, model.forward_features(x))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.image_size == 24


@torch.no_grad()
def test_transformers_reads_an_encoder_and_other_sizes(pre, tmp_path):
    transformers = pytest.importorskip("transformers")
    path, encoder = pre
    exported(path, "hf", tmp_path / "hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    close(theirs(images(encoder)).pooler_output, encoder(images(encoder)))
    model = classifier(in_chans=2, stem_stride=2, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    exported(tmp_path / "bare.pth", "hf", tmp_path / "other", "--input_size", 32)
    theirs = transformers.ConvNextV2ForImageClassification.from_pretrained(tmp_path / "other").eval()
    close(theirs(images(model)).logits, model(images(model)))
    assert theirs.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_what_transformers_saves_is_read(head, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(
        depths=TINY["depths"], hidden_sizes=TINY["dims"], patch_size=2, num_labels=5, layer_norm_eps=1e-6
    )
    kind = transformers.ConvNextV2ForImageClassification if head else transformers.ConvNextV2Model
    theirs = randomised(kind(config))
    theirs.save_pretrained(tmp_path)
    model = ConvNeXtV2(**TINY, num_classes=5 if head else 0, stem_stride=2).eval()
    state = checkpoint.read(tmp_path / "model.safetensors")
    report = weights.load(model, weights.unwrap(state))
    assert (report.unexpected_keys, report.missing_keys) == ([], [])
    x = images(model)
    close(model(x), theirs(x).logits if head else theirs(x).pooler_output)
    assert_same_state(layouts.to_huggingface(state), state)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "flags"), [(56, ()), (32, ()), (400, ()), (400, ("--crop_pct", 0.8))])
def test_transformers_prepares_images_as_the_evaluation_does(side, flags, fine, tmp_path):
    transformers = pytest.importorskip("transformers")
    told = exported(fine[0], "hf", tmp_path / "hf", "--input_size", side, *flags)
    assert ("where its crop has no exact centre" in told) == (side < 384 or bool(flags)), "what is squashed has"
    image = torch.from_numpy(draw(0, 0, 96)).permute(2, 0, 1)[:, :80]
    ours = eval_transform((side, side), 3, eval_crop((side, side), *flags[1:]), *mean_std(3, of_imagenet=False))(image)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")
    assert theirs["pixel_values"][0].shape == ours.shape
    assert (theirs["pixel_values"][0] - ours).abs().max() <= 1.01 * 2 / 255  # a level of 0..255


@pytest.mark.parametrize(("depth", "values"), [(8, ""), (16, ", 8 bits / 255, 16 bits / 65535"), (32, ", numbers as")])
def test_how_values_are_scaled_that_no_library_opens_is_told(depth, values, tmp_path):
    model = ConvNeXtV2(in_chans=5, num_classes=4, stem_stride=1, **TINY)
    trained = {"input_size": 24, "depth": depth, "mean": [0.5] * 5, "std": [0.2] * 5}
    torch.save({"model": model.state_dict(), "args": trained}, tmp_path / "a.pth")
    assert f"float tensors (C, H, W){values or ', bytes / 255'}" in exported(tmp_path / "a.pth", "timm", tmp_path / "b")
    assert f"pipelines tensors (C, H, W){values or ' (from'}" in exported(tmp_path / "a.pth", "hf", tmp_path / "c")


# ---- ONNX


def import_onnx():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("the exporter of torch 2.6 fails on a variable number of images")
    return [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")]


@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False])
def test_onnx(head, fine, pre, tmp_path):
    onnx, _, runtime = import_onnx()
    path, model = fine[:2] if head else pre
    out = exported(path, "onnx", tmp_path / "onnx", "--input_size", 24, 16)
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for batch in (1, 5):
        (found,) = session.run(["logits" if head else "features"], {"images": images(model, batch).numpy()})
        close(torch.from_numpy(found), model(images(model, batch)).detach())
    for x in (images(model, 1, 8), images(model, 1, 40), images(model, 2, 40)[:, :, :16]):
        (found,) = session.run(None, {"images": x.numpy()})
        close(torch.from_numpy(found), model(x).detach())
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == (CLASSES if head else [])
    assert told["depth"] == "8"
    assert (json.loads(told["input_size"]), len(json.loads(told["mean"]))) == ([24, 16], 3)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [18]
    assert "any N, H and W from 8 on; opset 18" in out
    assert re.search(r"verified +largest absolute difference \S+ with onnxruntime", out)


@pytest.mark.slow
def test_large_onnx_models_keep_their_weights_beside_them(fine, tmp_path, monkeypatch):
    import_onnx()
    monkeypatch.setattr(targets, "ONE_FILE", 0)
    out = exported(fine[0], "onnx", tmp_path / "large.onnx")
    assert f"{tmp_path}/large.onnx, {tmp_path}/large.onnx.data\n" in out
    assert (tmp_path / "large.onnx.data").stat().st_size > 10_000


@pytest.mark.parametrize("absent", ["onnx", "onnxscript"])
def test_onnx_without_its_packages_is_refused(absent, fine, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.0")
    monkeypatch.setitem(sys.modules, "onnx", sys)  # stands for an installed package
    monkeypatch.setitem(sys.modules, absent, None)
    result = tool("--checkpoint", fine[0], "--to", "onnx", "--output", tmp_path / "out")
    assert result.code == 2
    needs = "pip install onnx onnxscript onnxruntime"
    assert result.err == f"error: --to onnx: {absent} is not installed; {needs}\n"
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    result = tool("--checkpoint", fine[0], "--to", "onnx", "--output", tmp_path / "out")
    assert (result.code, result.err) == (2, "error: --to onnx: needs torch 2.7 or newer, this is 2.6.0+cu124\n")
    assert not (tmp_path / "out").exists()


# ---- verification and mistakes


def test_a_wrong_file_is_found_out(fine, tmp_path, monkeypatch):
    true = layouts.to_timm

    def wrong(state_dict):
        converted = true(state_dict)
        return converted | {"stages.2.blocks.1.mlp.grn.bias": 1.01 * converted["stages.2.blocks.1.mlp.grn.bias"]}

    monkeypatch.setattr(layouts, "to_timm", wrong)
    result = tool("--checkpoint", fine[0], "--to", "timm", "--output", tmp_path / "timm")
    assert result.code == 2
    assert re.fullmatch(
        r"error: .*model.safetensors: largest absolute difference \S+ with timm \S+, above --tolerance 0.0001 x the "
        r"largest output; do not use it\n", result.err,
    )  # fmt: skip
    assert result.out == ""
    assert tool("--checkpoint", fine[0], "--to", "timm", "--output", tmp_path / "timm", "--tolerance", 1).code == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


MISTAKES = [
    ("--checkpoint $absent", "absent: no such file"),
    ("--checkpoint $half", "half.pth: cannot be read, truncated or damaged"),
    ("--checkpoint $resnet", "--checkpoint .*resnet.pth: not a ConvNeXt V2"),
    ("--checkpoint $code", "code.pth: not a checkpoint of tensors and plain values"),
    ("--checkpoint $part", "--checkpoint .*part.pth: not a whole backbone: .*stages.2.1.grn.gamma"),
    ("--checkpoint $stem", "--checkpoint .*stem.pth: stem_stride must be 4, 2 or 1, got 3"),
    ("--checkpoint $stem2", "--to timm: after a stem of stride 2.* hf can have it"),
    ("--checkpoint $mlp", "--checkpoint .*mlp.pth: its head is more than a linear layer; give --num_classes 0"),
    ("--checkpoint $pre --ema true", "--ema true: .*pre.pth: holds no state dict under model_ema"),
    ("--checkpoint $pre --num_classes 10", "--num_classes 10: .*pre.pth has no head; 0 leaves a head out"),
    ("--checkpoint $fine --num_classes 10", "--num_classes 10: .*fine.pth has a head of 4 classes"),
    ("--checkpoint $fine --input_size 7", "--input_size 7: must be at least the model's total stride 8"),
    ("--checkpoint $fine --output $out.onnx", "--output .*out.onnx: --to timm takes a folder, or a file .*ends in "),
    ("--checkpoint $fine --to hf --output $out.safetensors", "--output .*: --to hf takes a folder$"),
    ("--checkpoint $fine --output $half/x", "--output .*half.pth/x: cannot be written"),
    ("--checkpoint $fine --to tensorflow", "--to"),
    ("--checkpoint $fine --imput_size 3", r"--imput_size \(did you mean --input_size\?\)"),
    ("", "--checkpoint"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistakes(flags, message, fine, pre, tmp_path):
    state = classifier().state_dict()
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    torch.save({"model": state, "extra": Payload(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save({name: v for name, v in state.items() if name != "stages.2.1.grn.gamma"}, tmp_path / "part.pth")
    torch.save(state | {"downsample_layers.0.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "stem.pth")
    torch.save(state | {"head.extra": torch.zeros(1)}, tmp_path / "mlp.pth")
    torch.save(classifier(stem_stride=2).state_dict(), tmp_path / "stem2.pth")
    content = fine[0].read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    paths = {file.stem: file for file in tmp_path.iterdir()} | {n: tmp_path / n for n in ("absent", "out")}
    before = set(tmp_path.rglob("*"))
    flags = re.sub(r"\$(\w+)", lambda match: str(paths[match[1]]), flags).split()
    result = tool("--to", "timm", "--output", tmp_path / "new", *flags)
    assert result.code == 2, result.out
    assert re.match("error: ", result.err)
    assert result.err.count("\n") == 1
    assert re.search(message, result.err), result.err
    assert set(tmp_path.rglob("*")) == before
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", ["timm", "hf", "safetensors", "timm --output $/x.pth"])
def test_a_disk_that_fills_leaves_no_half_a_file(words, fine, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file of this process grows beyond that
    try:
        words = words.replace("$", str(tmp_path / "out")).split()
        result = tool("--checkpoint", fine[0], "--output", tmp_path / "out", "--to", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 2
    assert re.fullmatch(r"error: .*: cannot be written \(File too large\)\n", result.err), result.err
    assert not list((tmp_path / "out").iterdir())


# ---- torch.hub


@pytest.mark.slow
def test_hub_from_another_folder(tmp_path, script):
    model = randomised(ConvNeXtV2(**SIZES["convnextv2_atto"], num_classes=7))
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    code = (
        "import torch; m = torch.hub.load(%r, 'convnextv2_atto', source='local', checkpoint='file.pth').eval(); "
        "torch.save(m(torch.ones(1, 3, 32, 32)), 'out.pth')"
    )
    result = script("-c", code % str(ROOT), cwd=tmp_path, env={"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "out.pth"), model(torch.ones(1, 3, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["own", "hub"])
def test_hub_beside_packages_of_the_same_names(tmp_path, script, first):
    """A program's own `models` and `utils` stay its own; the hub's model can be copied, pickled and compiled."""
    for name in ("models", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    own = "import models, utils; assert models.MINE and utils.MINE"
    load = (
        f"import torch, copy, pickle; m = torch.hub.load({str(ROOT)!r}, 'convnextv2_atto', source='local').eval();"
        f"x = torch.ones(1, 3, 32, 32); y = m(x); same = lambda f: torch.testing.assert_close(f(x), y);"
        f"same(copy.deepcopy(m)); same(pickle.loads(pickle.dumps(m))); same(torch.compile(m, backend='eager'))"
    )
    result = script("-c", "\n".join([own, load] if first == "own" else [load, own]), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_hub_lists_the_eight_sizes_of_both_models():
    import hubconf

    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert entries == {*SIZES, *(name.replace("convnextv2", "fcmae") for name in SIZES)}
    for name in entries:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name
        assert "checkpoint" in entry.__doc__


def test_hub_classifiers(small, fine, pre, caplog):
    path, model, average = fine
    caplog.set_level("WARNING", "fcmae")
    assert_same_state(hub("convnextv2_atto", checkpoint=path).state_dict(), model.state_dict())
    model = hub("convnextv2_atto", checkpoint=str(path), model_key="model_ema")
    assert_same_state(model.state_dict(), average.state_dict())
    assert caplog.text == ""
    assert_same_state(hub("convnextv2_atto", checkpoint=pre[0]).state_dict(), pre[1].state_dict())
    assert "pre.pth has nothing that fits for norm.*: fresh" in caplog.text
    other = hub("convnextv2_atto", checkpoint=path, num_classes=9, drop_path_rate=0.1)
    assert other.head.weight.shape == (9, 16)
    assert "fine.pth has nothing that fits for head.*: fresh" in caplog.text
    assert hub("convnextv2_atto", num_classes=3, in_chans=1).num_classes == 3


def test_hub_autoencoders(small, pre, fine):
    path, source = pre[0], fine[1].state_dict()
    model = hub("fcmae_atto", checkpoint=path, norm_pix_loss=True)
    assert_same_state(model.state_dict(), torch.load(path)["model"])
    assert model.norm_pix_loss
    assert len(model.decoder) == 1
    model = hub("fcmae_atto", checkpoint=fine[0], decoder_depth=2)
    encoder = {n: v for n, v in source.items() if not n.startswith(("norm.", "head."))}
    assert_same_state(layouts.to_backbone(model.state_dict()), encoder)
    assert len(model.decoder) == 2


def test_hub_refuses_what_does_not_fit(small, fine, tmp_path):
    with pytest.raises(ValueError, match=r"convnextv2_tiny from .*fine.pth: .* it has depths \(1, 1, 2, 1\)"):
        hub("convnextv2_tiny", checkpoint=fine[0])
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="not a ConvNeXt V2"):
        hub("convnextv2_atto", checkpoint=tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"fine.pth: holds no state dict under teacher; it has model"):
        hub("convnextv2_atto", checkpoint=fine[0], model_key="teacher")
    with pytest.raises(ValueError, match="no such file"):
        hub("convnextv2_atto", checkpoint=tmp_path / "absent.pth")
