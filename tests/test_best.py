"""The best epoch by --best_metric, and runs that --patience ends."""

import json
import math
import re

import pytest

import engine_finetune
from tests.small_runs import STEPS, killed_after, load, records, same, snapshot
from tests.test_distributed import launch
from utils.best import Best

STILL = ("--lr", 0, "--min_lr", 0, "--epochs", 9, "--save_ckpt_freq", 4, "--patience", 2)  # no epoch is better


@pytest.mark.parametrize(("metric", "values", "better"), [
    ("acc1", (0.0, 3.0, 3.0, 2.0, 4.0), (0, 1, 4)), ("loss", (3.0, 4.0, math.nan, 2.0, -math.inf), (0, 3)),
])  # fmt: skip
def test_what_is_better(metric, values, better):
    best = Best(metric)
    assert [epoch for epoch, value in enumerate(values) if best.update(epoch, {metric: value})] == list(better)
    assert best.found == {metric: values[better[-1]], "epoch": better[-1]}
    assert str(best).endswith(f"in epoch {better[-1]}")


def test_patience_counts_evaluations_that_better_neither_model_nor_average():
    best = Best("f1", 2)
    for epoch, (f1, average, waited) in enumerate([(1, 1, 0), (0, 2, 0), (0, 0, 1), (2, 0, 0), (0, 0, 1), (2, 2, 2)]):
        assert not best.out_of_patience()
        best.update(2 * epoch, {"f1": f1, "f1_ema": average, "acc1": epoch})
        best.update(2 * epoch + 1, {})  # not evaluated
        assert best.found["waited"] == waited
    assert best.out_of_patience().startswith("no better f1 in 2 evaluations, best f1 2.00 in epoch 6, best f1_ema 2.00")


def test_patience_is_taken_up(logs):
    """Also where no evaluation was finite yet; a run without it does not keep what was waited before it."""
    best, resumed, without = Best("f1", 3), Best("f1", 3), Best("f1")
    best.update(0, {"f1": math.nan})
    resumed.load(best.found, "it")
    assert (resumed.found, logs.text) == ({"waited": 1}, "")
    resumed.update(1, {"f1": 2.0})
    resumed.update(2, {"f1": 1.0})
    without.load(resumed.found, "it")
    without.update(3, {"f1": 3.0})
    assert without.found == {"f1": 3.0, "epoch": 3}


def content(path):
    return {key: value for key, value in load(path).items() if key not in ("args", "run")}


@pytest.mark.slow
def test_a_run_out_of_patience_ends_whole(scripts, tmp_path):
    """With its report and checkpoint, killed or not; started again it has nothing to do but for more patience."""
    for name, steps in (("whole", None), ("killed", 2 * STEPS + 2)):
        if steps:
            with killed_after(steps):
                scripts.finetune("--output_dir", tmp_path / name, *STILL, "--save_ckpt_steps", 1)
        more = ("--save_ckpt_steps", 1) if steps else ()
        result = scripts.finetune("--output_dir", tmp_path / name, *STILL, *more)
        assert result.code == 0, result.err
        line = "the run ends early, after epoch 2: no better acc1 in 2 evaluations, best acc1 .* in epoch 0; a larger"
        assert re.search(line, result.out)
        assert result.out.splitlines()[-1].startswith("done: ")
        assert json.loads((tmp_path / name / "report.json").read_text())["evaluated"] == "epoch 2"
        assert (tmp_path / name / "confusion.png").exists()
        assert result.out.count("balanced accuracy") == 1
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert records(whole) == records(killed)
    assert [line["epoch"] for line in records(whole)] == [0, 1, 2]
    assert "test_f1" not in records(whole)[0]
    assert same(content(whole / "checkpoint-2.pth"), content(killed / "checkpoint-2.pth"))
    before = snapshot(whole)
    again = scripts.finetune("--output_dir", whole, *STILL)
    assert again.code == 0
    assert again.out.splitlines()[-1].startswith("nothing to do: no better acc1 in 2 evaluations, best acc1")
    assert snapshot(whole) == before
    assert scripts.finetune("--output_dir", whole, *STILL[:-1], 3).code == 0
    assert [line["epoch"] for line in records(whole)] == [0, 1, 2, 3]


def test_the_last_epoch_is_not_told_as_early(scripts):
    result = scripts.finetune("--lr", 0, "--min_lr", 0, "--patience", 3)
    assert result.code == 0
    assert "ends early" not in result.out


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["balanced_acc", "f1", "loss"])
def test_the_best_by_another_metric(metric, scripts, tmp_path):
    """It is a curve, the report's in percent, and decides on checkpoint-best.pth."""
    result = scripts.finetune("--output_dir", tmp_path, "--best_metric", metric, "--eval_freq", 2, "--epochs", 5)
    assert result.code == 0, result.err
    scores = {line["epoch"]: line[f"test_{metric}"] for line in records(tmp_path) if f"test_{metric}" in line}
    assert list(scores) == [1, 3, 4]
    report = json.loads((tmp_path / "report.json").read_text())
    last = {
        "balanced_acc": 100 * report["balanced_accuracy"],
        "f1": 100 * report["macro"]["f1"],
        "loss": report["loss"],
    }
    assert scores[4] == last[metric]
    found = (min if metric == "loss" else max)(scores, key=scores.get)
    state = load(tmp_path / "checkpoint-best.pth")
    assert (state["epoch"], state["best"]) == (found, {metric: scores[found], "epoch": found})
    assert f"best {metric} {scores[found]:.2f}"[:-1] in result.out.splitlines()[-1]


@pytest.mark.slow
def test_another_metric_from_here_on(scripts, tmp_path, monkeypatch):
    table = iter([(60.0, 3.0), (50.0, 2.0), (40.0, 1.0), (30.0, 2.0)])
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: dict(zip(("acc1", "loss"), next(table), strict=True)))
    assert scripts.finetune("--output_dir", tmp_path, "--epochs", 2).code == 0
    result = scripts.finetune("--output_dir", tmp_path, "--epochs", 4, "--best_metric", "loss", "--patience", 1)
    last = f"--best_metric loss: {tmp_path}/checkpoint-1.pth has the best by another metric; from here on, anew"
    assert last in result.out
    assert load(tmp_path / "checkpoint-3.pth")["best"] == {"loss": 1.0, "epoch": 2, "waited": 1}


def test_no_metric_of_ours(scripts):
    refused = scripts.finetune("--best_metric", "top1")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--best_metric" in refused.err


@pytest.mark.slow
def test_the_first_process_tells_what_is_best(scripts, tmp_path):
    """Of each that evaluates all images, whose scores then differ by rounding: here in their sign."""
    flags = ("--dist_eval", "false", "--patience", 1, "--epochs", 6, "--dist_timeout", 30, "--batch_size", 4)
    done = launch(scripts, "main_finetune", 2, tmp_path, *flags, OTHER_SCORES_ON_RANK="1")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = [line["test_acc1"] for line in records(tmp_path)]
    assert load(tmp_path / "checkpoint-best.pth")["best"]["acc1"] == max(scores) > 0
    assert scores[-1] <= scores[-2]
