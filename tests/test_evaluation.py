"""What is evaluated, and as it was trained: a checkpoint's settings, its moving average, flags that do nothing."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from timm.optim import list_optimizers
from torchvision.transforms.v2.functional import to_pil_image

import datasets
import engine_finetune
import hubconf
import main_finetune
import main_pretrain
from models.convnextv2 import SIZES, ConvNeXtV2
from models.linear_probe import LinearProbe
from tests.small_runs import TINY, Scripts, load, records, same
from tools import export, probe, visualize
from utils import weights
from utils.amp import Amp
from utils.args import tell_idle
from utils.data.shapes import draw
from utils.data.transforms import eval_crop, eval_transform, mean_std
from utils.errors import UsageError
from utils.settings import as_trained
from utils.slurm import add_slurm_arguments

ROOT = Path(__file__).resolve().parent.parent
WIDE = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24)}  # another model than atto, which tests make TINY
CONFIG = weights.BackboneConfig(TINY["depths"], TINY["dims"], 3, 1, 4, {})
TRAINING = "--epochs 1 --warmup_epochs 0 --lr 2e-3 --num_workers 0 --device cpu --batch_size 8"
EVAL = ("--eval", "true", "--num_workers", 0, "--device", "cpu")


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "convnextv2_femto", WIDE)


def finetuned(scripts: Scripts, out: Path, flags: str) -> dict:
    """The last record of one epoch with these flags, of which none is a default here."""
    data = [] if "--data_set" in flags else f"--data_path {scripts.train} --eval_data_path {scripts.val}".split()
    data = [] if not data else ["--data_set", "image_folder", *data]
    result = scripts.call(main_finetune, *TRAINING.split(), *data, "--output_dir", out, *flags.split())
    assert result.code == 0, result.err
    return records(out)[-1]


def scored(record: dict, suffix: str = "") -> str:
    acc1, acc5, loss = (record[f"test_{name}{suffix}"] for name in ("acc1", "acc5", "loss"))
    return f"acc1 {acc1:.2f}  acc5 {acc5:.2f}  loss {loss:.4f}"


# ---- settings of a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--model convnextv2_atto --input_size 40",
        "--model convnextv2_femto --input_size 32",
        "--model convnextv2_atto --input_size 16 --stem_stride 2",
        "--model convnextv2_atto --input_size 16 --stem_stride 1 --in_chans 1",
        "--model convnextv2_atto --input_size 32 --imagenet_default_mean_and_std false",
        "--model convnextv2_atto --input_size 32 --mean 0.1 0.5 0.9 --std 1 0.5 0.1",
        "--model convnextv2_atto --input_size 32 --crop_pct 0.5",
        "--model convnextv2_atto --input_size 40 --eval_resize 53",
        "--model convnextv2_atto --input_size 32 --linear_probe true --lr 0.05",
        "--model convnextv2_atto --input_size 24 --stem_stride 1 --data_set shapes",
    ],
)
def test_evaluation_needs_no_flag_of_the_training(flags, scripts, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.shapes.NUM_SAMPLES", {"train": 16, "val": 12})
    record = finetuned(scripts, tmp_path, flags)
    data = "--data_set shapes" if "shapes" in flags else f"--data_set image_folder --eval_data_path {scripts.val}"
    result = scripts.call(main_finetune, *EVAL, *data.split(), "--resume", tmp_path / "checkpoint-0.pth")
    assert result.code == 0, result.err
    assert scored(record) in result.out
    assert "was trained with" not in result.out + result.err


@pytest.mark.slow
def test_flags_that_are_given_win_and_are_told(scripts, tmp_path):
    """By the same evaluation of a file without arguments, which takes all from flags."""
    mine = ("--data_set", "image_folder", "--eval_data_path", scripts.val)
    flags = "--model convnextv2_atto --input_size 32 --crop_pct 0.5 --mean 0 0 0 --std 1 1 1"
    finetuned(scripts, tmp_path / "run", flags)
    trained, bare = tmp_path / "run/checkpoint-0.pth", tmp_path / "bare.pth"
    torch.save({**load(trained), "args": None}, bare)
    kept = {"--input_size": "32", "--crop_pct": "0.5", "--mean": "0 0 0", "--std": "1 1 1"}
    for flags, drops in (
        ({"--input_size": "64"}, ()),
        ({"--crop_pct": "1"}, ()),
        ({"--eval_resize": "40"}, ("--crop_pct",)),
        ({"--mean": "0.5 0.5 0.5", "--std": "1 1 1"}, ()),
        ({"--imagenet_default_mean_and_std": "false"}, ("--mean", "--std")),
        ({"--imagenet_default_mean_and_std": "true"}, ("--mean", "--std")),
    ):
        whole = {name: value for name, value in (kept | flags).items() if name not in drops}
        mixed, plain = (
            scripts.call(main_finetune, *EVAL, *mine, "--resume", path, *" ".join(map(" ".join, words.items())).split())
            for path, words in ((trained, flags), (bare, whole))
        )
        assert mixed.out.split("acc1")[1] == plain.out.split("acc1")[1]
        warned = [line for line in mixed.out.splitlines() if "was trained with" in line]
        assert all(f"{name} " in "".join(warned) for name in flags)
        if "--eval_resize" in flags:
            assert warned == [f"--eval_resize 40: {trained} was trained with --crop_pct 0.5"]
        assert "was trained with" not in plain.out
    for crop in (("--crop_pct", 0.5), ("--eval_resize", 64)):
        same_crop = scripts.call(main_finetune, *EVAL, *mine, "--resume", trained, *crop, "--input_size", 32)
        assert "was trained with" not in same_crop.out


def test_a_default_said_aloud_is_no_difference(caplog):
    """0.875 is what training did where no crop_pct was given; the Inception constants are 0.5."""
    caplog.set_level("WARNING", "fcmae")
    content = {"args": {"input_size": 64, "crop_pct": None, "imagenet_default_mean_and_std": False}}
    flags = "--crop_pct 0.875 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    as_trained(main_finetune.get_args_parser().parse_args(flags.split()), "x.pth", content, CONFIG)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--in_chans 1", ".*last.pth: a checkpoint of another model, with --in_chans 3, not 1"),
        ("--stem_stride 4", ".*last.pth: .* with --stem_stride 1, not 4"),
        ("--model convnextv2_femto", ".*last.pth: .* with --model convnextv2_atto, not convnextv2_femto"),
        ("--nb_classes 7", ".*last.pth: .* with --nb_classes 4, not 7"),
        ("--input_size 7", "--input_size 7: must be at least the model's total stride 8"),
        ("--mean 1 2 3", "--mean: give --mean and --std, or neither"),
        ("--mean 1 --std 1", "--mean: has 1 numbers"),
        ("--crop_pct 2", "--crop_pct 2: must be a number above 0"),
        ("--crop_pct 1e-9", "--crop_pct 1e-09: must be at least 0.0034"),
        ("--eval_resize 256 --crop_pct 1", "--eval_resize 256: beside --crop_pct, .*; give one"),
        ("--eval_resize 200", "--eval_resize 200: must be at least 224, as --input_size 224 is"),
    ],
)
def test_flags_that_contradict_the_weights(flags, message, scripts, sizes, tmp_path):
    model = ConvNeXtV2(num_classes=4, **TINY, stem_stride=1)
    torch.save({"model": model.state_dict(), "classes": ["c0", "c1", "c2", "c3"]}, tmp_path / "last.pth")
    data = ("--data_set", "image_folder", "--eval_data_path", scripts.val, "--resume", tmp_path / "last.pth")
    result = scripts.call(main_finetune, *EVAL, *data, *flags.split())
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert re.search(f"^error: {message}", result.err), result.err


@pytest.mark.slow
def test_evaluation_of_a_size_that_is_not_published(scripts, tmp_path):
    torch.save(ConvNeXtV2(num_classes=4, **WIDE, stem_stride=1).state_dict(), tmp_path / "wide.pth")
    flags = (*EVAL, "--data_set", "image_folder", "--eval_data_path", scripts.val, "--resume", tmp_path / "wide.pth")
    assert scripts.call(main_finetune, *flags).code == 0
    result = scripts.call(main_finetune, *flags, "--model", "convnextv2_atto")
    assert result.code == 2
    assert re.search("wide.pth: a checkpoint of another model, with --model .of no published size", result.err)


@pytest.mark.parametrize("part", ["norm", "head"])
def test_a_classifier_that_is_not_whole_is_not_evaluated(part, scripts, tmp_path):
    """Its random part would give numbers that mean nothing."""
    state = ConvNeXtV2(num_classes=4, **TINY, stem_stride=1).state_dict()
    torch.save({name: v for name, v in state.items() if name != f"{part}.bias"}, tmp_path / "part.pth")
    flags = (*EVAL, "--data_set", "image_folder", "--eval_data_path", scripts.val, "--resume", tmp_path / "part.pth")
    result = scripts.call(main_finetune, *flags)
    assert result.code == 2
    assert f"part.pth: has nothing that fits for {part}.* of the model" in result.err


TOLD = {"input_size": 48, "crop_pct": 0.5, "mean": [0.1] * 3, "std": [0.2] * 3, "imagenet_default_mean_and_std": False}


def settings(content: dict, *flags: str) -> dict:
    args = main_finetune.get_args_parser().parse_args(flags)
    as_trained(args, "x.pth", content, CONFIG)
    return {name: getattr(args, name) for name in (*TOLD, "in_chans", "stem_stride")}


def test_arguments_of_any_trainer():
    shapes = {"in_chans": 3, "stem_stride": 1}
    defaults = {
        "input_size": (224, 224),
        "crop_pct": None,
        "mean": None,
        "std": None,
        "imagenet_default_mean_and_std": True,
    }
    assert settings({"args": TOLD}) == TOLD | {"input_size": (48, 48)} | shapes  # as older files have it
    assert settings({"args": TOLD | {"input_size": [32, 48]}}) == TOLD | {"input_size": (32, 48)} | shapes
    for content in ({}, {"args": {}}, {"args": {"lr": 1, "input_size": [3, 224, 224]}}):
        assert settings(content) == defaults | shapes, content
    for odd in ({"input_size": "48"}, {"input_size": None}, {"input_size": [48, "x"]}, {"input_size": [48]}):
        assert settings({"args": TOLD | odd}) == TOLD | {"input_size": (224, 224)} | shapes
    for odd in (
        {"input_size": 7}, {"input_size": [48, 7]}, {"input_size": True}, {"crop_pct": 0.0}, {"crop_pct": 90},
        {"mean": None}, {"std": None},
        {"mean": [0.1] * 4}, {"std": [0.1, 0.1, 0.0]}, {"mean": ["a", "b", "c"]}, {"std": ["a", "b", "c"]},
        {"mean": [math.nan] * 3}, {"mean": [1e300] * 3}, {"std": [math.inf] * 3}, {"crop_pct": 1e-9}, {"depth": 7},
        {"input_size": 10**6}, {"max_pixels": 0}, {"val_split": math.nan}, {"nodata": math.nan}, {"split_seed": -1},
    ):  # fmt: skip
        assert settings({"args": TOLD | odd}) == defaults | shapes, odd
    assert settings({"args": TOLD}, "--input_size", "64")["input_size"] == (64, 64)


def test_the_tools_take_the_same_settings(tmp_path):
    model = ConvNeXtV2(num_classes=4, **TINY, stem_stride=1)
    torch.save({"model": model.state_dict(), "args": TOLD | {"norm_pix_loss": False}}, tmp_path / "a.pth")
    for tool in (probe, visualize):
        args = tool.get_args_parser().parse_args(["--checkpoint", str(tmp_path / "a.pth")])
        probe.load_encoder(args)
        assert {name: getattr(args, name) for name in TOLD} == TOLD | {"input_size": (48, 48)}
    assert args.norm_pix_loss is False
    words = ["--checkpoint", str(tmp_path / "a.pth"), "--to", "timm", "--output", "x"]
    source, _ = export.read_source(export.get_args_parser().parse_args(words))
    assert (source.input_size, source.crop_pct) == ((48, 48), 0.5)
    assert source.normalisation == {"mean": (0.1,) * 3, "std": (0.2,) * 3}


@pytest.mark.parametrize(
    ("crop_pct", "mode", "share"), [(None, "squash", 1.0), (0.5, "center", 0.5), (1.0, "center", 1.0)]
)
def test_timm_crops_at_384_as_the_evaluation_does(crop_pct, mode, share, tmp_path):
    model, image = ConvNeXtV2(num_classes=4, **TINY), torch.from_numpy(draw(0, 0, 500)).permute(2, 0, 1)[..., :400]
    trained = {"input_size": 384, "crop_pct": crop_pct}
    torch.save({"model": model.state_dict(), "args": trained}, tmp_path / "a.pth")
    export.main(["--checkpoint", str(tmp_path / "a.pth"), "--to", "timm", "--output", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]
    assert (config["crop_mode"], config["crop_pct"]) == (mode, share)
    theirs = timm.data.create_transform((3, 384, 384), interpolation="bicubic", crop_pct=share, crop_mode=mode)
    ours = eval_transform((384, 384), 3, eval_crop((384, 384), crop_pct), *mean_std(3))(image)
    difference = (theirs(to_pil_image(image)) - ours).abs()
    assert difference.max() <= 2.01 / 255 / 0.224  # two levels of 0..255


def test_the_head_tells_how_many_classes_a_data_set_has(scripts, tmp_path, monkeypatch):
    """Where that does not tell, as a stream."""
    monkeypatch.setattr("utils.data.shapes.NUM_SAMPLES", {"train": 16, "val": 12})
    record = finetuned(scripts, tmp_path, "--model convnextv2_atto --input_size 32 --data_set shapes")
    monkeypatch.setattr(datasets, "_class_names", lambda dataset: [])
    result = scripts.call(main_finetune, *EVAL, "--data_set", "shapes", "--resume", tmp_path / "checkpoint-0.pth")
    assert scored(record) in result.out


def test_a_data_set_of_other_classes_is_refused(scripts, tmp_path, monkeypatch):
    """That has as many: its numbers would mean others."""
    monkeypatch.setattr("utils.data.shapes.NUM_SAMPLES", {"train": 16, "val": 12})
    finetuned(scripts, tmp_path, "--model convnextv2_atto --input_size 32 --data_set shapes")
    content = load(tmp_path / "checkpoint-0.pth")
    known, file = content["classes"], tmp_path / "other.pth"
    swapped, folders = [*known[:-2], known[-1], known[-2]], sorted(map(str, range(1, 11)))  # 1, 10, 2: no positions
    for names, code in ((known, 0), (swapped, 2), (list("0123456789"), 0), (folders, 2)):
        torch.save(content | {"classes": names}, file)
        result = scripts.call(main_finetune, *EVAL, "--data_set", "shapes", "--resume", file)
        assert result.code == code, result.err
        i = 8 if names is swapped else 0
        said = f"error: --data_set shapes: its class {i} is {known[i]!r}, {names[i]!r} was trained on; give images of"
        assert result.err == (f"{said} the same classes\n" if code else "")


# ---- the best moving average


@pytest.fixture(scope="module")
def averaged(scripts, tmp_path_factory):
    """A run whose average is far from the model: its folder, the record of the best average and that file's content."""
    out = tmp_path_factory.mktemp("averaged")
    flags = "--model convnextv2_atto --input_size 16 --stem_stride 1 --epochs 2 --model_ema true --model_ema_eval true"
    finetuned(scripts, out, f"{flags} --model_ema_decay 0.8")
    content = load(out / "checkpoint-best-ema.pth")
    assert not same(content["model"], content["model_ema"])
    return out, records(out)[content["epoch"]], content


@pytest.mark.slow
def test_the_best_average_is_what_is_evaluated(scripts, averaged, tmp_path):
    """Also under another name, and, of files that do not say so themselves, by their name."""
    out, record, content = averaged
    assert "scored" not in load(out / "checkpoint-best.pth")
    older = {name: value for name, value in content.items() if name != "scored"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shutil.copy(out / "checkpoint-best-ema.pth", tmp_path / "a/copy.pth")
    torch.save(older, tmp_path / "a/checkpoint-best-ema.pth")
    torch.save(older, tmp_path / "b/older.pth")
    torch.save(older | {"model_ema": None}, tmp_path / "b/checkpoint-best-ema.pth")
    data = ("--data_set", "image_folder", "--eval_data_path", scripts.val)
    for path in (out / "checkpoint-best-ema.pth", *tmp_path.rglob("*.pth")):
        for key in (), ("--model_key", "model"), ("--model_key", "model_ema") if path.parent.name != "b" else ():
            result = scripts.call(main_finetune, *EVAL, *data, "--resume", path, *key)
            raw = "model" in key or (not key and path.parent.name == "b")
            assert scored(record, "" if raw else "_ema") in result.out, (path, key)


def test_the_best_average_is_read_everywhere(scripts, averaged, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "convnextv2_atto", TINY)
    path, average, raw = averaged[0] / "checkpoint-best-ema.pth", averaged[2]["model_ema"], averaged[2]["model"]
    args = probe.get_args_parser().parse_args(["--checkpoint", str(path)])
    encoder = {name: value for name, value in average.items() if not name.startswith(("norm.", "head."))}
    assert same(probe.load_encoder(args).state_dict(), encoder)
    for flags, state in (((), average), (("--ema", "true"), average), (("--ema", "false"), raw)):
        words = ["--checkpoint", str(path), "--to", "safetensors", "--output", str(tmp_path / "a"), *flags]
        assert same(export.read_source(export.get_args_parser().parse_args(words))[0].model.state_dict(), state)
    assert same(hubconf.convnextv2_atto(checkpoint=path).state_dict(), average)
    model = ConvNeXtV2(num_classes=2, **TINY, stem_stride=1)
    weights.load_checkpoint(path, model, fresh_head=True)
    assert same({k: v for k, v in model.state_dict().items() if k in encoder}, encoder)
    autoencoder = main_pretrain.fcmae.FCMAE(**TINY, patch_size=8)
    weights.load_checkpoint(path, autoencoder)
    assert same(autoencoder.encoder.state_dict(), encoder)


def test_a_resume_from_the_best_average_takes_up_both(scripts, averaged, tmp_path):
    """As from the numbered checkpoint of that epoch, but for the optimizer; files of later epochs are plain again."""
    out, _, content = averaged
    flags = "--model convnextv2_atto --input_size 16 --stem_stride 1 --model_ema true --model_ema_decay 0.8"
    flags += f" --lr 0 --min_lr 0 --epochs {content['epoch'] + 2}"
    for name in ("checkpoint-best-ema", f"checkpoint-{content['epoch']}"):
        finetuned(scripts, tmp_path / name, f"{flags} --resume {out / name}.pth")
    a, b = (load(folder / f"checkpoint-{content['epoch'] + 1}.pth") for folder in tmp_path.iterdir())
    assert all(same(a[key], b[key]) for key in ("model", "model_ema"))
    assert same(a["model"], content["model"])
    assert not same(a["model_ema"], content["model_ema"])
    assert "scored" not in a | b


# ---- the head, and the statistics of a probe


def tied() -> ConvNeXtV2:
    """Logits of 10 and, for the second class, 0.01 more: one number in bfloat16."""
    model = ConvNeXtV2(num_classes=2, **TINY, stem_stride=1)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([10.0, 10.01])
    return model


@pytest.mark.parametrize("kind", ["classifier", "probe"])
def test_top_1_has_no_ties_of_bfloat16(kind):
    model = tied()
    if kind == "probe":
        state, model = model.state_dict(), LinearProbe(2, **TINY, stem_stride=1)
        model.load_state_dict(state, strict=False)
    loader = torch.utils.data.DataLoader([(torch.randn(3, 16, 16), 1)] * 6, batch_size=4)
    for use_amp in (False, True):
        stats = engine_finetune.evaluate(model, loader, Amp(torch.device("cpu"), use_amp, torch.bfloat16))
        assert stats["acc1"] == 100
    assert stats["loss"] == pytest.approx(torch.nn.functional.softplus(torch.tensor(-0.01)).item(), rel=1e-4)


@pytest.mark.slow
def test_a_small_last_batch_weighs_by_its_images():
    """Mean and variance of the features in float64, after an epoch that ends with an eighth of a batch.

    By chance alone the mean is off by 0.23 / sqrt(256) of a deviation: what an average with weights 0.1 * 0.9^k keeps.
    """
    torch.manual_seed(0)
    errors = {}
    for full_batch in (256, 1):
        head = main_finetune.LinearProbe(4, full_batch, **TINY, stem_stride=1).head.train()
        off = []
        for _ in range(50):
            features = torch.randn(100 * 256 + 32, TINY["dims"][-1]) * 3 + 5
            for batch in features.split(256):
                head(batch)
            exact = features.double()
            off.append((head.batch_norm.running_mean - exact.mean(0)) / exact.std(0))
        errors[full_batch] = torch.stack(off).square().mean().sqrt().item() * 16
        assert head.batch_norm.running_var.mean().item() == pytest.approx(9, rel=0.05)
    assert errors[256] == pytest.approx(0.23, abs=0.03)
    assert errors[1] > 0.31


def test_a_full_batch_has_the_usual_momentum():
    model, plain = LinearProbe(4, 8, **TINY, stem_stride=1).train(), torch.nn.BatchNorm1d(16, affine=False, eps=1e-6)
    features = torch.randn(8, 16)
    assert torch.equal(model.head(features), torch.nn.functional.linear(plain(features), *model.head.parameters()))
    assert same(model.head.batch_norm.state_dict(), plain.state_dict())
    before = model.head.batch_norm.running_mean.clone()
    model.head(features[:2])
    moved = model.head.batch_norm.running_mean - before
    assert torch.allclose(moved, 0.025 * (features[:2].mean(0) - before), atol=1e-6)


def test_the_probe_knows_its_batch():
    args = main_finetune.get_args_parser().parse_args(["--linear_probe", "true", "--batch_size", "48"])
    args.model = "convnextv2_atto"
    assert main_finetune.build_model(args, 3).head.full_batch == 48


# ---- flags that were given, and flags that do nothing


def test_given_flags_are_known_and_are_no_argument(tmp_path):
    (tmp_path / "x.args").write_text("--lr 0.1\n--epochs 100 # the default\n")
    parser = main_finetune.get_args_parser()
    args = parser.parse_args([f"@{tmp_path}/x.args", "--eval", "--mean", "1", "2", "3"])
    assert args.given == {"lr", "epochs", "eval", "mean"}
    assert "given" not in vars(args)
    assert pickle.loads(pickle.dumps(args)).given == args.given
    assert parser.parse_args([]).given == set()
    add_slurm_arguments(parser)
    args = parser.parse_args(["--setup", "a", "--setup", "b"])
    assert (args.setup, args.given) == (["a", "b"], {"setup"})


def told(script, *flags: str, use_amp: bool = False) -> str:
    """The lines of `tell_idle` for flags that are accepted."""
    lines, args = [], script.get_args_parser().parse_args(flags)
    script.check_args(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.args.log", SimpleNamespace(warning=lambda line, *words: lines.append(line % words)))
        tell_idle(args, script.idle_flags(args, use_amp))
    return "\n".join(lines)


BOTH = [  # the flag that does nothing, what makes it so, and what gives it an effect
    ("--blr 1e-3", "--lr 0.1", ""),
    ("--start_epoch 2", "--resume $file", ""),
    ("--save_ckpt_freq 2", "", "--output_dir x"),
    ("--save_ckpt_steps 2", "--save_ckpt false --output_dir x", "--output_dir x"),
    ("--auto_resume false", "", "--output_dir x"),
    ("--data_path $dir", "--data_set shapes", "--data_set image_folder"),
    ("--kernels library", "--fused false", ""),
    ("--eval_data_path $dir", "--data_set CIFAR10", None),
]
PRETRAIN = [
    ("--vis_freq 3", "", "--output_dir x"),
    ("--knn_images 9", "", "--knn_freq 1"),
    ("--knn_images 9", "", "--health_freq 1"),
    ("--crop_pct 0.5", "", "--health_freq 1"),
    ("--resize_mode pad", "", "--health_freq 1"),
    ("--nb_classes 9", "", "--knn_freq 1"),
    ("--multi_label", "", "--knn_freq 1"),
    ("--multi_label", "", "--val_split 0.1"),
    ("--eval_data_path $dir", "", "--knn_freq 1"),
    ("--eval_list $file", "", "--knn_freq 1"),
    ("--crop_pct 0.5", "", "--log_dir x"),
    ("--eval_resize 256", "", "--log_dir x"),
    ("--crop_pct 0.5", "--vis_freq 0 --output_dir x", "--knn_freq 1"),
    ("--stem_average true", "", "--initial_checkpoint $file"),
]
FINETUNE = [
    ("--depth 8", "--data_set CIFAR", ""),
    ("--nodata 8", "--data_set shapes", ""),
    ("--max_bad_images 0.5", "--eval true", ""),
    ("--warmup_epochs 2", "--warmup_steps 3", ""),
    ("--model_key x", "", "--finetune $file"),
    ("--model_prefix x", "", "--finetune $file"),
    ("--stem_average true", "", "--finetune $file"),
    ("--head_init_scale 1", "--linear_probe true", ""),
    ("--layer_decay_type group", "", "--layer_decay 0.9"),
    ("--min_crop 0.5", "--resize_mode squash", ""),
    ("--train_interpolation bilinear", "--resize_mode pad", ""),
    ("--layer_decay 0.9", "--freeze_stages 4", "--freeze_stages 3"),
    ("--freeze_stages 2", "--eval true", ""),
    ("--opt_betas 0.9 0.95", "--opt sgd", ""),
    ("--momentum 0.8", "", "--opt sgd"),
    ("--opt_eps 1e-6", "--opt lion", ""),
    ("--opt_betas 0.9 0.95", "--opt lookahead_sgd", "--opt lookahead_adam"),
    ("--color_jitter 0.4", "", "--aa="),
    ("--color_jitter 0.4", "--aa rand-m9", "--aa 3a"),
    ("--remode rand", "--reprob 0", ""),
    ("--recount 2", "--reprob 0", "--reprob 0.1"),
    ("--resplit true", "--reprob 0", ""),
    ("--cutmix 0.3", "--cutmix_minmax 0.2 0.8", ""),
    ("--mixup_prob 0.3", "", "--mixup 0.8"),
    ("--smoothing 0.3", "--multi_label true", ""),
    ("--bce_target_thresh 0.3", "--multi_label true", "--multi_label true --mixup 0.8"),
    ("--bce_target_thresh 0.3", "--mixup 0.8", "--multi_label true --cutmix 0.8"),
    ("--mixup_mode elem", "", "--cutmix 0.8"),
    ("--mixup_switch_prob 0.3", "--mixup 0.8", "--mixup 0.8 --cutmix 1"),
    ("--mixup_switch_prob 0.3", "--cutmix_minmax 0.1 0.9", "--mixup 1 --cutmix_minmax 0.1 0.9"),
    ("--model_ema_decay 0.9", "", "--model_ema true"),
    ("--model_ema_force_cpu true", "", "--model_ema true"),
    ("--dist_eval false", "", None),
    ("--eval_freq 2", "--disable_eval true", ""),
    ("--eval_data_path $dir", "--disable_eval true", ""),
    ("--eval_list $file", "--disable_eval true", ""),
    ("--crop_pct 0.9", "--disable_eval true", ""),
    ("--eval_resize 256", "--disable_eval true", ""),
    ("--model_ema_eval true", "--model_ema true --disable_eval true", "--model_ema true"),
    ("--lr 0.1", "--eval true", ""),
    ("--fused false", "--eval true", ""),
    ("--smoothing 0.2", "--eval true", "--mixup 0.8"),
    ("--auto_resume false", "--eval true --output_dir x --resume $file", "--eval true --output_dir x"),
    ("--predictions x.csv", "--disable_eval true", ""),
    ("--best_metric f1", "--disable_eval true", ""),
    ("--patience 3", "--disable_eval true", ""),
    ("--patience 3", "--eval true", ""),
    ("--patience 3", "--epochs 40 --eval_freq 10", "--epochs 40 --eval_freq 9"),
]
ROWS = [(main_pretrain, *row) for row in BOTH + PRETRAIN] + [(main_finetune, *row) for row in BOTH + FINETUNE]


@pytest.mark.parametrize(("script", "flag", "idle", "at_work"), ROWS)
def test_a_flag_without_effect_is_told(script, flag, idle, at_work, tmp_path):
    (tmp_path / "file").touch()
    words = [text and text.replace("$file", f"{tmp_path}/file").replace("$dir", str(tmp_path)).split()
             for text in (flag, idle, at_work)]  # fmt: skip
    name = flag.split()[0]
    assert re.search(f"^{name}(, .*)?: no effect", told(script, *words[1], *words[0]), re.M)
    assert name not in told(script, *words[1]), "it was not given"
    if at_work is not None:
        assert name not in told(script, *words[2], *words[0])


def test_precision_and_one_process(monkeypatch):
    for script in (main_pretrain, main_finetune):
        assert told(script, "--amp_dtype", "float16") == "--amp_dtype: no effect without mixed precision"
        assert told(script, "--amp_dtype", "float16", use_amp=True) == ""
    assert told(main_finetune, "--dist_eval", "true") == "--dist_eval: no effect on one process"
    monkeypatch.setattr(main_finetune.distributed, "get_world_size", lambda: 2)
    assert told(main_finetune, "--dist_eval", "true") == ""


def test_a_flag_is_told_once():
    flags = "--eval true --mixup_prob 1 --save_ckpt_freq 3 --blr 1 --lr 1"
    line = "--lr, --blr, --save_ckpt_freq, --mixup_prob: no effect with --eval true"
    assert told(main_finetune, *flags.split()) == line


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.args")))
def test_recipes_have_no_idle_flags(recipe, tmp_path):
    (tmp_path / "file").touch()
    script = main_pretrain if "pretrain" in recipe or recipe == "adapt.args" else main_finetune
    start = ("--output_dir", "x", *(("--finetune", f"{tmp_path}/file") if script is main_finetune else ()))
    assert told(script, f"@{ROOT}/recipes/{recipe}", *start, use_amp=True) == ""


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_every_idle_flag_is_one(script):
    args = script.get_args_parser().parse_args([])
    assert {name for names, *_ in script.idle_flags(args, True) for name in names.split()} <= vars(args).keys()


@pytest.mark.parametrize("opt", [o for o in list_optimizers() if not o.startswith(("bnb", "fused"))])
def test_what_an_optimizer_has_is_not_told(opt):
    """By what the optimizer that is built has in its groups."""
    info = timm.optim.get_optimizer_info(opt)
    if info.second_order:
        pytest.skip("refused")
    flags = {"--opt_eps": ["1e-3"], "--momentum": ["0.5"], "--opt_betas": ["0.5", "0.6", "0.7"][: info.num_betas or 2]}
    parser, model = main_finetune.get_args_parser(), torch.nn.Linear(4, 4)

    def groups(*words: str) -> list:
        optimizer = built(model, parser.parse_args(["--opt", opt, *words]))
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    for name, values in flags.items():
        assert (name in told(main_finetune, "--opt", opt, name, *values)) == (groups() == groups(name, *values)), name


def built(model: torch.nn.Module, args) -> torch.optim.Optimizer:
    try:
        return main_finetune.build_optimizer(model, args, 0.1)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input_size 32 --min_crop 0.5", "--min_crop: has no effect at --input_size 32 and below"),
        ("--input_size 32 --train_interpolation random", "--train_interpolation: has no effect at"),
        ("--mean 0 0 0 --std 1 1 1 --imagenet_default_mean_and_std false", "--imagenet_default_mean_and_std: has no"),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        told(main_finetune, *flags.split())
    flags = flags.replace("32", "40").replace("--imagenet_default_mean_and_std false", "")
    assert told(main_finetune, *flags.split()) == ""


def test_runs_tell_of_idle_flags(scripts, tmp_path):
    for run in (scripts.pretrain, scripts.finetune):
        result = run("--epochs", 1, "--warmup_epochs", 0, "--blr", 1e-3)
        assert "--blr: no effect beside --lr" in result.out
