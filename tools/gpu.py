"""The table of a GPU within minutes: what `tools/benchmark.py --what gpu` runs, most important first."""

import json
import subprocess
import sys
import time
from pathlib import Path

SIZES = {"base": 256, "tiny": 256, "atto": 256, "large": 128, "huge": 64, "nano": 256, "pico": 256, "femto": 256}
BOTH = "--compile both"
PARTS = [  # comparison, sizes, flags
    ("pretrain", ["base"], BOTH),
    ("encoder", ["base", "tiny"], BOTH),
    ("finetune", ["base", "tiny"], BOTH),
    ("pretrain", ["large", "tiny", "atto", "huge", "nano", "pico", "femto"], BOTH),
    ("pretrain", ["base", "large"], "--grad_checkpointing true"),
]


def parts(rehearsal: bool) -> list[list[str]]:
    """The flags of each run; of a rehearsal, atto on two small images, eagerly."""
    if rehearsal:
        small = "--model convnextv2_atto --batch_size 2 --input_size 64 --repeats 1 --threads 1 --memory false"
        return [f"--what {what} {small}".split() for what in dict.fromkeys(what for what, *_ in PARTS)]
    return [
        f"--what {what} --model convnextv2_{size} --batch_size {SIZES[size]} --dtype bfloat16 {flags}".split()
        for what, sizes, flags in PARTS
        for size in sizes
    ]


def run(minutes: float, output: str, device: str, name: str) -> None:
    """Run the parts in turn, each in a process of its own, until the time is over.

    After each, `output` is written anew: the device, and of each part its flags with the records, or with why there
    are none. Beside it, as .md, the tables.
    """
    end, report, tables = time.monotonic() + 60 * minutes, {"device": name, "parts": []}, []
    for flags in parts(device.startswith("cpu")):
        left, measured = end - time.monotonic(), Path(f"{output}.part")
        measured.unlink(missing_ok=True)
        part = {"flags": flags}
        command = [sys.executable, Path(__file__).with_name("benchmark.py"), *flags, "--device", device]
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(command, 0)
            done = subprocess.run(
                [*command, "--json", measured], capture_output=True, text=True, timeout=left, check=True
            )
            part["records"] = [json.loads(line) for line in measured.read_text().splitlines()]
            tables.append(done.stdout)
        except subprocess.TimeoutExpired:
            part["left_out"] = "no time was left"
        except subprocess.CalledProcessError as error:
            part["left_out"] = (error.stderr.strip().splitlines() or ["it failed"])[-1]
        measured.unlink(missing_ok=True)
        report["parts"].append(part)
        Path(output).write_text(json.dumps(report, indent=1))
        Path(output).with_suffix(".md").write_text("\n".join(tables))
        print(*flags[:4], part.get("left_out", "measured"), flush=True)
