"""tools/benchmark.py: comparisons run and say what they measured; the times are not judged."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor

import models.convnextv2
from tools import baselines, benchmark, gpu
from utils.data.files import ImageTree
from utils.data.images import load_image
from utils.data.shapes import draw
from utils.data.transforms import pretrain_transform, sample_box
from utils.errors import run_cli

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
SMALL = ("--device", "cpu", "--batch_size", 2, "--input_size", 64, "--repeats", 1, "--threads", 1, "--memory", "false")
CPU = torch.device("cpu")


@pytest.fixture
def call(monkeypatch, capsys):
    """The benchmark of a shrunk atto: what it printed, or the error it ended with."""
    monkeypatch.setitem(models.convnextv2.SIZES, "convnextv2_atto", TINY)

    def call(*flags):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, flags)])
        threads = torch.get_num_threads()
        with contextlib.suppress(SystemExit):
            run_cli(benchmark.main)
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return captured.err or captured.out

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    for i in range(12):
        Image.fromarray(draw(i, 0, 96)).save(folder / f"{i}.jpg")
    return folder


def rows(text: str) -> dict[str, list[float]]:
    """Milliseconds, images/s and ratio of each row."""
    found = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)x \|", text, flags=re.MULTILINE)
    return {form: [float(x) for x in numbers] for form, *numbers in found}


@pytest.mark.parametrize("what", ["encoder", "finetune", "evaluate", "step", "depthwise", "loader"])
def test_prints_a_table_of_the_forms(call, folder, what):
    found = rows(call("--what", what, "--data_path", folder, *SMALL))
    assert list(found) == list(benchmark.FORMS[what])
    images = 12 if what == "loader" else 2
    for milliseconds, rate, _ in found.values():
        assert rate == pytest.approx(1000 * images / milliseconds, rel=0.05)
    *_, last = found.values()
    assert last[2] == 1


def test_ratios_are_to_the_fastest_baseline(capsys):
    args = benchmark.parse(["--compile", "both", "--memory", "false"])
    seconds = dict(zip(benchmark.variants(args), ([3.0, 3.0], [2.0, 4.0], [8.0, 8.0], [4.0, 4.0]), strict=True))
    benchmark.report([{"form": form, "seconds": s, "images": 8} for form, s in seconds.items()], args)
    ratios = {form: numbers[2] for form, numbers in rows(capsys.readouterr().out).items()}
    assert ratios == {"visible": 0.75, "visible, compiled": 0.75, "masked dense": 2, "masked dense, compiled": 1}


def test_varies_one_flag_and_records_it(call, tmp_path):
    file = tmp_path / "measured.json"
    text = call(*SMALL, "--vary", "mask_ratio", 0.5, 0.7, "--json", file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    forms = [(r["form"], r["mask_ratio"], len(r["seconds"])) for r in records]
    assert forms == [(form, ratio, 1) for ratio in (0.5, 0.7) for form in ("visible", "masked dense")]
    assert "mask ratio 0.7" in text


def test_depthwise_with_and_without_cudnn(monkeypatch):
    """Forward and backward of the row of that name run with cuDNN switched off; the others' with it."""
    seen = {}
    monkeypatch.setitem(models.convnextv2.SIZES, "convnextv2_atto", TINY)
    args = benchmark.parse(["--what", "depthwise", *map(str, SMALL)])
    for name, form in benchmark.FORMS["depthwise"].items():
        found = seen[name] = []

        def depthwise(x, *_, found=found):
            found.append(torch.backends.cudnn.enabled)
            x.register_hook(lambda _: found.append(torch.backends.cudnn.enabled))
            return x

        monkeypatch.setattr(benchmark, "depthwise", depthwise)
        assert form(args, CPU, False)() == 2
    assert seen == {"Triton": [True] * 2, "without cuDNN": [False] * 2, "library": [True] * 2}
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("fitting", [55, 44, 0])
def test_the_largest_batch_and_the_estimate(call, monkeypatch, fitting):
    """Memory ends above so many images; a step with two takes 20 MiB of 512."""
    monkeypatch.setattr(benchmark, "peak_memory", lambda step, device: (step(), 20.0)[1])
    forward, tried = benchmark.fcmae.FCMAE.forward, []

    def limited(model, imgs, **kwargs):
        tried.append(len(imgs))
        if len(imgs) > max(fitting, 2 if len(tried) == 1 else 0):
            full = "unable to find an engine to execute this computation"
            raise torch.OutOfMemoryError if len(tried) % 2 else RuntimeError(full)
        return forward(model, imgs, **kwargs)

    monkeypatch.setattr(benchmark.fcmae.FCMAE, "forward", limited)
    text = call("--what", "largest", *SMALL)
    (row,) = re.findall(r"^\| convnextv2_atto \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    largest, estimate = map(int, row)
    moments = 8 * sum(p.numel() for p in benchmark.fcmae.FCMAE(**TINY).parameters())
    assert estimate == 2 * (2**29 - moments) // (20 * 2**20 + 2 * 3 * 64 * 64 * 4)
    assert tried[:2] == [2, estimate * 6 // 5]
    assert fitting - 2 < largest <= fitting or fitting == largest == 0


def test_what_cannot_be_written_or_varied_is_refused_before_anything_is_measured(call, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    for flags in (("--json", "/nowhere/x"), ("--json", tmp_path), ("--vary", "batch_size", 1, "two")):
        assert call(*SMALL, *flags).splitlines()[-1].startswith("error: --")
    assert (
        call(*SMALL, "--json", "/nowhere/x")
        == "error: --json /nowhere/x: cannot be written (No such file or directory)\n"
    )


@pytest.fixture
def gpu_parts(monkeypatch, tmp_path):
    """A run of the GPU's parts that do nothing for 30 seconds: flags, seconds it may take, and the report before."""
    path, ran, clock = tmp_path / "report.json", [], [0.0]

    def run_part(flags, left):
        ran.append((flags, left, json.loads(path.read_text()) if path.exists() else {"parts": []}))
        clock[0] += 30
        record = {"what": "step", "model": "convnextv2_base", "batch_size": 4, "form": "a", "images": 4, "seconds": [1]}
        return "done", f"table {len(ran)}", [record]

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def run(minutes, device):
        gpu.run(minutes, str(path), device, "a processor")
        return ran, json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return run


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_gpus_parts_are_flags_that_the_benchmark_takes(gpu_parts, device):
    ran, *_ = gpu_parts(60, device)
    sizes, compared = set(), set()
    for flags, *_ in ran:
        args = benchmark.parse(flags.split())
        assert args.device == device
        name, *values = args.vary or ("model", args.model)
        each = [benchmark.parse([*flags.split(), f"--{name}", value]) for value in values]
        assert [str(getattr(args, name)) for args in each] == values
        sizes |= {args.model for args in each}
        compared.add(args.what)
        assert {args.input_size for args in each} == {(64, 64) if device == "cpu" else (224, 224)}
    assert compared == {"pretrain", "encoder", "depthwise", "step", "finetune", "largest"}
    assert sizes == (set(models.convnextv2.SIZES) if device == "cuda" else {"convnextv2_atto"})
    assert benchmark.parse(ran[0][0].split()).compile == "no"  # figures, should the compiler fail or never end


def test_the_gpus_report_grows_and_leaves_out_what_does_not_fit(gpu_parts, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", (("--what encoder", 60), ("--what step", 61), ("--what finetune", 15)))
    ran, report, tables = gpu_parts(1.5, "cuda")
    assert [(benchmark.parse(flags.split()).what, left) for flags, left, _ in ran] == [
        ("encoder", 90),
        ("finetune", 45),
    ]
    assert [len(before["parts"]) for *_, before in ran] == [0, 2]
    assert [part["status"] for part in report["parts"]] == ["done", "left out: no time", "done"]
    assert re.findall("table .", tables) == ["table 1", "table 2"]


@pytest.mark.slow
def test_shares_of_the_peak(monkeypatch):
    record = {"form": "FCMAE, compiled", "model": "convnextv2_atto", "batch_size": 4, "input_size": [224, 224]}
    flop = sum(kind[0] for kind in gpu.roofline.count("convnextv2_atto", 4, 1, 1).classes.values())
    counted, count = [], gpu.roofline.count
    monkeypatch.setattr(gpu.roofline, "count", lambda *step: counted.append(step) or count(*step))
    table = gpu.shares([record | {"seconds": [flop / 99e12] * 3}] * 2 + [record | {"form": "MAE ViT-B/16"}])
    assert table.splitlines()[3:] == ["| convnextv2_atto, FCMAE, compiled | 4 | 99.0 | 10.0% |"] * 2
    assert len(counted) == 1  # it takes seconds


def test_what_fails_tells_its_error_though_advice_follows(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout=b"", stderr=b"OutOfMemoryError \xff" + 1000 * b".")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: failed)
    assert "OutOfMemoryError" in gpu.run_part("", 1)[0]


def test_a_layers_kernels_are_timed_once_all_are_launched(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append(self)

        def elapsed_time(self, end):
            return 1000 * (done.index(end) - done.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: done.append(name))
    assert gpu.timed(lambda: done.append("step"), asleep=True) == (2, None)
    assert [done[i] for i in (0, 2, 4)] == ["_sleep", "step", "synchronize"]
    assert gpu.timed(lambda: 8, asleep=False)[1] == 8
    assert done.count("_sleep") == 1


@pytest.mark.slow
def test_a_part_that_fails_says_why():
    status, *_ = gpu.run_part("--what nothing", 500)
    assert "nothing" in status
    assert gpu.run_part("--what nothing", 0.01) == ("out of time", "", [])


@pytest.mark.slow
def test_the_gpus_table_is_rehearsed(tmp_path, script):
    output = tmp_path / "report.json"
    done = script("tools/benchmark.py", "--what", "gpu", "--device", "cpu", "--minutes", 9, "--output", output)
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text())["parts"]
    assert {part["status"] for part in parts} == {"done"}
    found = [record for part in parts for record in part["records"]]
    text = output.with_suffix(".md").read_text()
    assert len(re.findall(r"^\| [^|]+ \| [\d.]+ \| [\d.]+ \| [\d.]+x", text, flags=re.MULTILINE)) == len(found) > 12
    assert re.search(r"^\| convnextv2_atto \| [1-9]\d* \| [1-9]\d* \|$", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_memory_is_that_of_one_form_in_its_own_process():
    """Of real sizes: a process does not know the shrunk one."""
    small, large = (
        benchmark.memory_of("visible", ["--device", "cpu", "--input_size", str(size)]) for size in (64, 224)
    )
    assert large > 2 * small > 0


def test_the_visible_form_does_a_share_of_the_dense_forms_work():
    args = benchmark.parse([*map(str, SMALL), "--mask_ratio", "0.5"])
    flops = []
    for form in benchmark.FORMS["encoder"].values():
        step = form(args, CPU, False)
        with FlopCounterMode(display=False) as counter:
            step()
        counts = counter.get_flop_counts()["Global"].items()
        flops.append(sum(n for operator, n in counts if "convolution" not in str(operator)))  # miscounts depthwise ones
    assert 0.4 < flops[0] / flops[1] < 0.6


def test_the_loaders_crops_are_pillows(folder):
    """Of the same boxes, to a fraction of a level of 255 on average."""
    images = ImageTree(str(folder), "--data_path")
    images.transform = pretrain_transform((64, 64), 3, baselines.MIN_CROP)
    for i, path in enumerate(images.paths):
        image = load_image(path)
        torch.manual_seed(i)
        own, _ = images[i]
        torch.manual_seed(i)
        top, left, height, width, mirrored = sample_box(image.height, image.width, baselines.MIN_CROP)
        usual = image.resize((64, 64), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        own = own.flip(-1) if mirrored else own
        assert own.dtype == torch.uint8
        assert (own.int() - pil_to_tensor(usual).int()).abs().float().mean() < 0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model convnextv2_atta", "argument --model: invalid choice: 'convnextv2_atta'"),
        ("--input_size 100", "--input_size 100: must be a multiple of 32"),
        ("--repeats 0", "--repeats 0: must be a whole number from 1"),
        ("--mask_ratio 1", "--mask_ratio: mask_ratio 1.0 keeps 0 of 49"),
        ("--what loader", "--what loader: needs --data_path"),
        ("--what loader --data_path nowhere", "--data_path nowhere: no such folder"),
        ("--vary colour 1 2", "unknown argument --colour"),
        ("--what gpu --output nowhere/report.json", "--output nowhere/report.json: must be a .json file in a folder"),
        ("--vary batch_size", "--vary batch_size: give its values"),
        ("--vary batch_size two", "--batch_size two: must be a whole number from 1"),
    ],
)
def test_mistakes_are_one_line(call, flags, message):
    text = call("--device", "cpu", *flags.split())
    error = text.splitlines()[-1]
    assert error.startswith("error: " + message)
