"""What a GPU is to be measured for, in order of importance, until the time is used up: `benchmark.py --what gpu`."""

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from tools import roofline
from utils.errors import UsageError

SMALL, LARGE, HUGE = "atto femto pico nano tiny base", "--batch_size 128 --model large", "--batch_size 64 --model huge"
PARTS = (  # flags, and seconds, a guess: with less it is not begun, after three times that it is ended
    (f"--what step --vary model {SMALL}", 30),
    ("--what depthwise --model base --vary stage 0 1 2 3", 20),
    ("--what pretrain --model base --compile yes", 100),
    ("--what encoder --model base --compile both", 100),
    ("--what step --model base --vary kernels library triton", 20),
    ("--what finetune --model base --compile yes", 100),
    (f"--what step {LARGE}", 20),
    (f"--what step {HUGE}", 20),
    (f"--what step {LARGE} --compile yes", 80),
    ("--what step --model base --batch_size 64 --compile both", 60),
    ("--what pretrain --model base", 20),
    ("--what finetune --model base", 20),
    (f"--what step --compile yes --vary model {SMALL}", 80),
    (f"--what step {HUGE} --compile yes", 80),
    (f"--what largest --batch_size 64 --vary model base large huge {SMALL.replace(' base', '')}", 40),
)
TINY = "--batch_size 2 --input_size 64 --repeats 1 --threads 1 --memory false --compile no"  # on the CPU: a rehearsal


def commands(rehearsal: bool) -> dict[str, int]:
    """The flags of each part, and its seconds; in a rehearsal, on tiny inputs, each comparison once."""
    found = {}
    for flags, seconds in PARTS:
        words = re.sub(r"\b(atto|femto|pico|nano|tiny|base|large|huge)\b", r"convnextv2_\1", flags)
        if rehearsal:
            words = " ".join([*re.findall(r"--what \w+|--vary [ks]\w+(?: \w+)*", flags), TINY])
        found[f"--batch_size 256 --dtype bfloat16 {words}"] = seconds
    return found


def run(minutes: float, output: str, device: str, name: str) -> None:
    """Run the parts, each in a process of its own, and write report, tables and picture after each of them."""
    path, until, parts, records, rehearsal = Path(output), time.monotonic() + 60 * minutes, [], [], device == "cpu"
    if path.suffix != ".json" or not path.parent.is_dir():
        raise UsageError(f"--output {output}: must be a .json file in a folder that is there")
    for flags, seconds in commands(rehearsal).items():
        left = until - time.monotonic()
        part = f"{flags} --device {device}", left if rehearsal else min(left, 3 * seconds)
        status, table, found = run_part(*part) if left > seconds else ("left out: no time", "", [])
        print(f"{flags}: {status}\n{table}", flush=True)
        parts.append({"flags": flags, "status": status, "table": table, "records": found})
        records += found
        path.write_text(json.dumps({"device": name, "torch": torch.__version__, "parts": parts}, indent=1))
        path.with_suffix(".md").write_text("\n".join(f"`{p['flags']}`: {p['status']}\n\n{p['table']}" for p in parts))
        draw(records, path.with_suffix(".png"))
    with path.with_suffix(".md").open("a") as file:
        file.write(shares(records))


def timed(step: Callable[[], int], asleep: bool) -> tuple[float, int]:
    """Seconds and result of a step; asleep: of its kernels alone, which wait on the GPU until all are launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if asleep:
        torch.cuda._sleep(10**7)  # cycles, some 5 ms
    begin.record()
    count = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, count


def shares(records: list[dict]) -> str:
    """A table of FCMAE's steps at 224 px: the share of an H100's peak, 990 TFLOP/s, that their arithmetic takes."""
    flop_of = functools.cache(lambda *step: sum(kind[0] for kind in roofline.count(*step, 1, 1).classes.values()))
    lines = ["\n| FCMAE step | batch | TFLOP/s | of 990 |\n|---|---|---|---|"]
    for r in records:
        if r["form"].startswith("FCMAE") and r["input_size"] == [224, 224]:
            rate = flop_of(r["model"], r["batch_size"]) / median(r["seconds"]) / 1e12
            lines.append(f"| {r['model']}, {r['form']} | {r['batch_size']} | {rate:.1f} | {rate / 990:.1%} |")
    return "\n".join(lines) + "\n"


def run_part(flags: str, seconds: float) -> tuple[str, str, list[dict]]:
    """What became of it, the tables it printed and its records; of one that runs out of time, what it had by then."""
    with tempfile.NamedTemporaryFile("r") as file:
        command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), *flags.split(), "--json", file.name]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
            status = f"failed: {done.stderr.decode(errors='replace').strip()[-3000:]}" if done.returncode else "done"
        except subprocess.TimeoutExpired as error:
            done, status = error, "out of time"
        return status, (done.stdout or b"").decode(), [json.loads(line) for line in file if line.endswith("}\n")]


def draw(records: list[dict], path: Path) -> None:
    """Images per second of each form as bars; without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [f"{r['what']} {r['model'].split('_')[1]}, {r['batch_size']}: {r['form']}" for r in records]
    figure = Figure(figsize=(8, 1 + len(records) / 4), layout="constrained")
    panel = figure.add_subplot(xlabel="images/s", xscale="log")
    panel.barh(range(len(records)), [r["images"] / median(r["seconds"]) for r in records])
    panel.set_yticks(range(len(records)), names)
    panel.invert_yaxis()
    figure.savefig(path, dpi=120)
