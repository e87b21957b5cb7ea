"""tools/benchmark.py: comparisons run and say what they measured; the times are not judged."""

import contextlib
import json
import re

import pytest
import torch

import models.convnextv2
from tools import benchmark
from utils.errors import run

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


@pytest.fixture
def call(monkeypatch, capsys):
    """A tool on a shrunk atto: what it printed, or the error it ended with."""
    monkeypatch.setitem(models.convnextv2.SIZES, "convnextv2_atto", TINY)

    def call(tool, *flags):
        monkeypatch.setattr("sys.argv", [tool.__name__, *map(str, flags)])
        threads = torch.get_num_threads()
        with contextlib.suppress(SystemExit):
            run(tool.main)
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return captured.err or captured.out

    return call


SMALL = ("--device", "cpu", "--batch_size", 2, "--input_size", 64, "--repeats", 1, "--threads", 1, "--memory", "false")


@pytest.mark.parametrize("what", ["encoder", "loop"])
def test_prints_a_table_of_both_forms(call, what):
    text = call(benchmark, "--what", what, *SMALL)
    for form in benchmark.FORMS[what]:
        assert re.search(rf"\| {form} \| [\d.]+ \| [\d.]+ \|", text)
    assert re.search(r"takes [\d.]+x the time of .*; median of 1 pairs", text)


def test_varies_one_setting_and_records_it(call, tmp_path):
    file = tmp_path / "measured.json"
    text = call(benchmark, *SMALL, "--vary", "mask_ratio", 0.5, 0.7, "--json", file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["form"], r["mask_ratio"]) for r in records] == [
        ("visible", 0.5), ("masked dense", 0.5), ("visible", 0.7), ("masked dense", 0.7),
    ]  # fmt: skip
    assert "mask ratio 0.7" in text
    for record in records:
        assert len(record["seconds"]) == 1
        assert record["images_per_second"] == pytest.approx(2 / record["seconds"][0])


def test_both_forms_of_the_encoder_do_the_same_work(call):
    """The visible form's matrix products are len_keep / L of the dense form's."""
    args = benchmark.get_args_parser().parse_args([*map(str, SMALL), "--mask_ratio", "0.5"])
    cpu = torch.device("cpu")
    visible, dense = (
        benchmark.count_flops(benchmark.encoder_step(args, cpu, False, dense=dense)) for dense in (False, True)
    )
    # the dense form's stem and downsampling are convolutions, which are not counted
    assert visible < 0.75 * dense


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        (benchmark, "--model convnextv2_atta", "--model convnextv2_atta: unknown (did you mean convnextv2_atto?)"),
        (benchmark, "--input_size 100", "--input_size 100: must be a multiple of 32"),
        (benchmark, "--mask_ratio 1", "--mask_ratio: mask_ratio 1.0 keeps 0 of 49"),
        (benchmark, "--vary colour 1 2", "--vary colour 1 2: give one of mask_ratio"),
        (benchmark, "--vary batch_size two", "--vary batch_size two: invalid literal"),
        (benchmark, "--device cpu --largest_batch true", "--largest_batch true: needs --device cuda"),
    ],
)
def test_mistakes_are_one_line(call, tool, flags, message):
    text = call(tool, *flags.split())
    assert text.startswith("error: " + message)
    assert text.count("\n") == 1
