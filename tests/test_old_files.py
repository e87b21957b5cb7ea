"""Files that an earlier version wrote still resume, evaluate, export and start a fine-tuning.

tests/golden/checkpoint_*.pth.gz are the first epoch of main_pretrain.py and, from it, of main_finetune.py, as `Scripts`
runs them, with the sizes below, --decoder_embed_dim 8, and --opt sgd --model_ema true --model_ema_decay 0.8.
"""

import gzip
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import main_finetune
from models.convnextv2 import SIZES
from tests import small_runs
from tests.small_runs import STEPS, load, same
from tools import export

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"depths": (1, 1, 2, 1), "dims": (4, 4, 8, 8)}
STILL = ("--warmup_epochs", 0, "--lr", 0, "--min_lr", 0)  # training that changes no weight
ENCODER = ("encoder.", "downsample_layers.", "stages.")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The two files, and the sizes that the scripts build."""
    monkeypatch.setattr(small_runs, "TINY", SMALL)
    monkeypatch.setitem(SIZES, "convnextv2_atto", SMALL)
    paths = {name: tmp_path / f"{name}.pth" for name in ("pretrain", "finetune")}
    for name, path in paths.items():
        path.write_bytes(gzip.decompress((GOLDEN / f"checkpoint_{name}.pth.gz").read_bytes()))
    return paths


def test_pre_training_goes_on(old, scripts, tmp_path):
    flags = ("--decoder_embed_dim", 8, "--epochs", 2, *STILL, "--picture_freq", 0, "--output_dir", tmp_path / "out")
    result = scripts.pretrain("--resume", old["pretrain"], *flags)
    assert result.code == 0, result.err
    before, after = load(old["pretrain"]), load(tmp_path / "out" / "checkpoint-1.pth")
    assert same(before["model"], after["model"])
    states = [(a, after["optimizer"]["state"][i]) for i, a in before["optimizer"]["state"].items()]
    assert all((a["step"], b["step"]) == (STEPS, 2 * STEPS) for a, b in states)
    assert not any(same(a["exp_avg"], b["exp_avg"]) for a, b in states if a["exp_avg"].any())


def test_fine_tuning_goes_on(old, scripts, tmp_path):
    flags = ("--opt", "sgd", "--model_ema", "true", "--model_ema_decay", 0.8, "--epochs", 2, *STILL)
    result = scripts.finetune("--resume", old["finetune"], *flags, "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    before, after = load(old["finetune"]), load(tmp_path / "out" / "checkpoint-1.pth")
    assert same(before["model"], after["model"])
    assert not same(before["optimizer"]["state"], after["optimizer"]["state"])
    for name, average in after["model_ema"].items():  # towards the model in each step
        expected = before["model"][name].lerp(before["model_ema"][name], 0.8**STEPS)
        assert average.allclose(expected, rtol=1e-4, atol=1e-6), name
    assert after["best"]["acc1"] >= before["best"]["acc1"] > 0


def test_evaluation(old, scripts):
    """Needs no flag of the training, and gives what was logged then."""
    flags = ("--data_set", "image_folder", "--eval_data_path", scripts.val, "--num_workers", 0, "--device", "cpu")
    flags += ("--eval", "true", "--model_ema_eval", "true")
    result = scripts.call(main_finetune, *flags, "--resume", old["finetune"])
    assert result.code == 0, result.err
    scores = [tuple(map(float, found)) for found in re.findall(r"acc1 (\S+) .*loss (\S+)", result.out)]
    one = 100 / 22 + 0.01  # image
    assert scores == [(pytest.approx(22.73, abs=one), pytest.approx(1.4007, abs=2e-4)),
                      (pytest.approx(27.27, abs=one), pytest.approx(1.3962, abs=2e-4))]  # fmt: skip


@pytest.mark.slow
def test_export_and_start(old, scripts, tmp_path):
    fine, pre = (load(old[name]) for name in ("finetune", "pretrain"))
    encoder = {name.removeprefix("encoder."): v for name, v in pre["model"].items() if name.startswith("encoder.")}
    for path, flags, expected in (
        (old["finetune"], (), fine["model"]),
        (old["finetune"], ("--ema", "true"), fine["model_ema"]),
        (old["pretrain"], (), encoder),
    ):
        words = ("--checkpoint", path, "--to", "safetensors", "--output", tmp_path / "a", "--tolerance", 0, *flags)
        export.main([str(word) for word in words])
        written = load_file(tmp_path / "a" / "model.safetensors")
        assert same({name: written[name] for name in expected}, expected)
        assert written.keys() - expected.keys() <= {"norm.weight", "norm.bias"}
    for stage, flag in ((scripts.finetune, "--finetune"), (scripts.pretrain, "--initial_checkpoint")):
        out = tmp_path / stage.__name__
        assert stage(flag, old["pretrain"], "--epochs", 1, *STILL, "--output_dir", out).code == 0
        started = load(out / "checkpoint-0.pth")["model"]
        started = {name.removeprefix("encoder."): v for name, v in started.items() if name.startswith(ENCODER)}
        assert same(started, encoder)
