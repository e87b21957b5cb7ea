"""How fast, and in how much memory: the encoder on visible patches against the same network as a masked dense one.

python tools/benchmark.py --model convnextv2_atto --batch_size 8
python tools/benchmark.py --model convnextv2_base --batch_size 256 --device cuda --dtype bfloat16

Both forms hold the same parameters and give the same features. They are timed in turn, pair by pair, in one process,
because machines are noisy: the ratios, and not the times, are what to quote. Memory is measured in a process per form.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import fcmae
from models.convnextv2 import SIZES
from tools.baselines import masked_dense_features
from utils.distributed import pick_device
from utils.errors import UsageError, run, suggest

FORMS = ("visible", "masked dense")


def build_step(form: str, args, device: torch.device) -> Callable[[], None]:
    """One forward and backward pass of the encoder, as a function without arguments."""
    torch.manual_seed(0)
    model = getattr(fcmae, args.model)().to(device)
    imgs = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    mask = model.gen_random_mask(imgs.cpu(), args.mask_ratio)
    dtype = getattr(torch, args.dtype)
    if form == "visible":

        def encode():
            return model.forward_encoder(imgs, mask)
    else:
        mask = mask.to(device)

        def encode():
            return masked_dense_features(model.encoder, imgs, mask)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features = encode()
        features.float().square().mean().backward()

    return step


def time_in_turn(steps: list[Callable[[], None]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each step in `repeats` rounds, after two rounds to warm up; every round runs all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(-2, repeats):
        for step, seconds in zip(steps, times, strict=True):
            synchronize(device)
            begun = time.perf_counter()
            step()
            synchronize(device)
            if round_ >= 0:
                seconds.append(time.perf_counter() - begun)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(form: str, args, device: torch.device) -> float:
    """MiB that one step takes above what model and images take; on the CPU, resident memory as the kernel counts it."""
    step = build_step(form, args, device)
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise UsageError(f"{field} is not in /proc/self/status: memory on the CPU is measured on Linux only")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_atto", help="one of the eight sizes")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--mask_ratio", type=float, default=0.6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--memory_of", choices=FORMS, help=argparse.SUPPRESS)  # one form in its own process
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.model not in SIZES:
        raise UsageError(f"--model {args.model}: unknown{suggest(args.model, SIZES)}; one of {', '.join(SIZES)}")
    if args.input_size % 32:
        raise UsageError(f"--input_size {args.input_size}: must be a multiple of 32")
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if args.memory_of:
        print(peak_memory(args.memory_of, args, device))
        return
    times = time_in_turn([build_step(form, args, device) for form in FORMS], args.repeats, device)
    memory = []
    for form in FORMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", form]
        memory.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{args.model}, {args.input_size} px, batch {args.batch_size}, mask ratio {args.mask_ratio}, {args.dtype}, "
        f"{where}, torch {torch.__version__}: encoder forward + backward, medians of {args.repeats} rounds"
    )
    print("| form | ms | images/s | peak MiB |\n|---|---|---|---|")
    for form, seconds, mib in zip(FORMS, times, memory, strict=True):
        median = statistics.median(seconds)
        print(f"| {form} | {1000 * median:.1f} | {args.batch_size / median:.1f} | {mib:.0f} |")
    ratio = statistics.median(dense / ours for ours, dense in zip(*times, strict=True))
    print(f"visible patches: {ratio:.2f}x faster (median of pairs), {memory[0] / memory[1]:.2f}x the memory")


if __name__ == "__main__":
    run(main)
