"""tools/plot.py: what it reads from log.txt, the table, the picture, and mistakes."""

import json
import math
import re
import sys

import pytest

from tools import plot
from utils.errors import run_cli


def write_log(folder, losses, more=lambda epoch: {}):
    folder.mkdir(parents=True)
    lines = [{"train_loss": loss, "epoch": i, "n_parameters": 7, **more(i)} for i, loss in enumerate(losses)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    """a: accuracies every other epoch; b: longer, with a NaN; c: pre-training, without accuracies."""
    accuracy = {1: {"test_acc1": 60.0, "test_loss": 1.5}, 3: {"test_acc1": 55.0, "test_loss": 1.25}}
    write_log(tmp_path / "a", [4.0, 2.0, 1.0, 1.5], lambda epoch: accuracy.get(epoch, {}) | {"train_lr": 0.1})
    write_log(tmp_path / "b", [3.0, None, 2.0, 1.0, 0.5], lambda epoch: {"test_acc1": 10.0 * epoch})
    write_log(tmp_path / "c", [1.0, 0.75])
    return tmp_path


def call(monkeypatch, capsys, *words):
    """As `python tools/plot.py words`: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *(str(word) for word in words)])
    code = 0
    try:
        run_cli(plot.main)
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_the_table(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    code, out, err = call(monkeypatch, capsys, "a", "b", "c", "--output", "")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "key         run  last  best  at epoch",
        "train_loss  a     1.5     1         2",
        "train_loss  b     0.5   0.5         4",
        "train_loss  c    0.75  0.75         1",
        "test_acc1   a      55    60         1",
        "test_acc1   b      40    40         4",
    ]
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "c"]
    code, out, _ = call(monkeypatch, capsys, "a", "--output", "", "--keys", "test_loss", "train_lr", "test_loss")
    assert out.splitlines() == [
        "key        run  last  best  at epoch",
        "test_loss  a    1.25  1.25         3",
        "train_lr   a     0.1",
    ]


def test_points_and_best_values():
    records = [{"epoch": 0, "x": 1.0}, {"epoch": 1}, {"epoch": 2, "x": None}, {"x": 3.0}, {"epoch": 4, "x": "high"}]
    (first, second) = plot.points(records, "epoch", "x")
    assert first == (0, 1.0)
    assert second[0] == 2
    assert math.isnan(second[1])
    nan = math.nan
    assert plot.best_of("train_loss", [(0, nan), (1, 2.0), (2, 2.0), (3, nan)]) == (1, 2.0)
    assert plot.best_of("test_acc1_ema", [(0, nan), (1, 2.0), (2, 3.0), (3, 3.0)]) == (2, 3.0)
    assert plot.best_of("test_f1", [(0, 1.0), (1, 2.0)]) == plot.best_of("test_map", [(1, 2.0)]) == (1, 2.0)
    assert plot.best_of("train_lr", [(0, 1.0)]) is None
    assert plot.best_of("train_loss", [(0, nan)]) is None


def test_damaged_lines_are_reported_and_skipped(tmp_path, monkeypatch, capsys):
    folder = write_log(tmp_path / "a", [2.0, 1.0])
    with open(folder / "log.txt", "a") as file:
        file.write('\n[[1, 2]]\n{"train_loss": 0.5, "epoch": 2}\n{"train_loss": 0.2, "epo')
    code, out, _ = call(monkeypatch, capsys, folder, "--output", "")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [f"{folder}/log.txt: line {number} is damaged, skipped" for number in (4, 6)]
    assert lines[-1].split() == ["train_loss", str(folder), "0.5", "0.5", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "nowhere: holds no log.txt"),
        (".", r"\.: holds no log.txt; give a, b, c"),
        ("empty", "empty: holds no log.txt; give the --output_dir of a run"),
        ("hollow", "hollow/log.txt: holds no records"),
        ("a --keys train_los", r"--keys train_los: in none of the runs \(did you mean train_loss\?\); train_loss, "),
        ("a --x epcoh", r"--x epcoh: in none of the runs \(did you mean epoch\?\); train_loss, epoch, "),
        ("other", "--keys: no loss or accuracy is in most of the runs; give some of speed, epoch"),
        ("", "the following arguments are required: RUN"),
        ("a --key train_loss", r"unknown argument --key \(did you mean --keys\?\)"),
    ],
)
def test_mistakes(words, message, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    for name, text in (("empty", None), ("hollow", "\n3\n"), ("other", '{"speed": 1, "epoch": 0}\n')):
        (runs / name).mkdir()
        if text:
            (runs / name / "log.txt").write_text(text)
    if words == ".":
        for name in ("hollow", "other"):
            (runs / name / "log.txt").unlink()
    code, _, err = call(monkeypatch, capsys, *words.split(), "--output", "")
    assert code == 2
    assert err.count("\n") == 1
    assert re.match(f"error: {message}", err), err


def test_without_matplotlib(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call(monkeypatch, capsys, "a")
    expected = "needs a package more: pip install matplotlib; --output '' prints the table alone"
    assert (code, err) == (2, f"error: --output curves.png: {expected}\n")


# ---- the picture


def test_a_panel_for_each_key_and_a_line_for_each_run(runs):
    pytest.importorskip("matplotlib")
    logs = {name: plot.read_log(runs / name) for name in "abc"}
    keys = ["train_loss", "test_acc1", "test_loss", "train_lr", "n_parameters"]
    figure = plot.draw(plot.choose(logs, keys, "epoch"), "epoch")
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == ["train_loss", "test_acc1", "test_loss", "train_lr", "n_parameters"]
    drawn = {title: {line.get_label(): line for line in panel.lines} for title, panel in panels.items()}
    assert [sorted(lines) for lines in drawn.values()] == [["a", "b", "c"], ["a", "b"], ["a"], ["a"], ["a", "b", "c"]]
    assert list(drawn["train_loss"]["a"].get_xdata()) == [0, 1, 2, 3]
    assert list(drawn["test_acc1"]["a"].get_xdata()) == [1, 3]
    assert list(drawn["test_acc1"]["a"].get_ydata()) == [60.0, 55.0]
    assert math.isnan(drawn["train_loss"]["b"].get_ydata()[1])  # a gap
    for name in "ab":
        assert drawn["test_acc1"][name].get_color() == drawn["train_loss"][name].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert all(panel.get_xlabel() == "epoch" for panel in figure.axes)


def test_many_runs_look_different_and_a_single_point_is_seen(runs):
    pytest.importorskip("matplotlib")
    logs = {f"run{i}": [{"epoch": 0, "train_loss": float(i)}] for i in range(25)}
    lines = plot.draw(plot.choose(logs, ["train_loss"], "epoch"), "epoch").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 25
    assert {line.get_marker() for line in lines} == {"."}


@pytest.mark.parametrize(("given", "name"), [(None, "curves.png"), ("drawn.svg", "drawn.svg"), ("drawn", "drawn.png")])
def test_the_file(given, name, runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(runs)
    (runs / r"lr$\foo$").mkdir()  # no formula
    (runs / r"lr$\foo$/log.txt").write_text((runs / "a/log.txt").read_text())
    flags = ["--output", given] if given else []
    code, out, err = call(monkeypatch, capsys, "a", r"lr$\foo$", *flags)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"curves in {name}"
    assert (runs / name).read_bytes().startswith(b"<?xml" if name == "drawn.svg" else b"\x89PNG")


def test_pictures_that_cannot_be_written(runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(runs)
    (runs / "taken.png").mkdir()
    for output, message in (
        ("x.xyz", "cannot be written .*xyz.* is not supported .*png"),
        ("nowhere/x.png", "cannot be written .*No such file"),
        ("taken.png", "cannot be written .*directory"),
    ):
        code, _, err = call(monkeypatch, capsys, "a", "--output", output)
        assert code == 2
        assert re.match(f"error: --output {output}: {message}", err), err
        assert err.count("\n") == 1
