"""Times and memory of a step against the same work done in another way, in pairs.

python tools/benchmark.py                                        encoder: visible patches against the masked dense form
python tools/benchmark.py --what pretrain --compile both         a whole FCMAE step against an MAE ViT-B/16 step
python tools/benchmark.py --what finetune --dtype bfloat16       a fine-tuning step against timm's model
python tools/benchmark.py --what loop                            the engine's steps against a bare loop
python tools/benchmark.py --vary mask_ratio 0.4 0.6 --plot a.png  any comparison over a range of one setting
python tools/benchmark.py --what pretrain --largest_batch true   what fits the GPU
torchrun --nproc_per_node=2 tools/benchmark.py --what pretrain   images/s of all processes together

Steps are timed in turn, in one process, because machines are noisy: the ratios, medians over pairs, are what to quote.
Memory is measured in a process per form.
"""

import copy
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_pretrain
from engine_pretrain import train_one_epoch
from models import convnextv2, fcmae, fused
from models.convnextv2 import SIZES, compile_blocks
from tools.baselines import MaskedAutoencoderViT, masked_dense_features
from utils import distributed
from utils.amp import Amp
from utils.args import ArgumentParser, add_bool
from utils.data.sampling import Batch
from utils.errors import UsageError, run, suggest
from utils.lr_sched import Schedule
from utils.param_groups import param_groups
from utils.run import Run

Step = Callable[[], None]
ENGINE_STEPS = 20  # that one call of the engine takes


# ---- what is compared: (arguments, device, compiled) -> a step -------------------------------------------------------


def images(args, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)


def mask_of(args) -> torch.Tensor:
    """(N, L) on the CPU, as the loader gives it."""
    noise = torch.rand(args.batch_size, (args.input_size // 32) ** 2, generator=torch.Generator().manual_seed(0))
    return fcmae.random_mask(noise, args.mask_ratio)


def autocast(args, device: torch.device):
    dtype = getattr(torch, args.dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model.named_parameters(), 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)


def build_fcmae(args, device: torch.device, compiled: bool) -> fcmae.FCMAE:
    torch.manual_seed(0)
    model = getattr(fcmae, args.model)(norm_pix_loss=True).to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.fused:
        fused.enable(model)
    if compiled:
        compile_blocks(model)
    return model


def encoder_step(args, device, compiled, dense: bool) -> Step:
    """Forward and backward pass of the encoder."""
    model, imgs, mask = build_fcmae(args, device, compiled and not dense), images(args, device), mask_of(args)
    encode = model.forward_encoder
    if dense:
        features = torch.compile(masked_dense_features) if compiled else masked_dense_features
        encode, mask = (lambda imgs, mask: features(model.encoder, imgs, mask)), mask.to(device)

    def step():
        model.zero_grad(set_to_none=True)
        with autocast(args, device):
            features = encode(imgs, mask)
        features.float().square().mean().backward()

    return step


def training_step(args, device, model: nn.Module, loss_of: Callable, ema: ModelEmaV3 | None = None) -> Step:
    """Forward, backward, AdamW and, where given, the moving average."""
    wrapped, optimizer = distributed.data_parallel(model), adamw(model)

    def step():
        with autocast(args, device):
            loss = loss_of(wrapped)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(model)

    return step


def fcmae_step(args, device, compiled) -> Step:
    imgs, mask = images(args, device), mask_of(args)
    return training_step(args, device, build_fcmae(args, device, compiled), lambda model: model(imgs, mask=mask)[0])


def mae_step(args, device, compiled) -> Step:
    """MAE with a ViT-B/16, 75 % masked, a decoder of 8 blocks and 512 channels."""
    torch.manual_seed(0)
    model, imgs = MaskedAutoencoderViT(args.input_size).to(device), images(args, device)
    if compiled:
        model.compile()
    return training_step(args, device, model, lambda model: model(imgs))


def classifier_step(args, device, compiled, timms: bool) -> Step:
    """One step of fine-tuning with a moving average of the weights, 1000 classes."""
    torch.manual_seed(0)
    imgs, labels = images(args, device), torch.arange(args.batch_size, device=device) % 1000
    if timms:
        model = timm.create_model(args.model).to(device, memory_format=torch.channels_last)
        imgs = imgs.contiguous(memory_format=torch.channels_last)
    else:
        model = getattr(convnextv2, args.model)().to(device)
        if args.fused:
            fused.enable(model)
    ema = ModelEmaV3(model, decay=0.9999)
    if compiled:
        model.compile() if timms else compile_blocks(model)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return training_step(args, device, model, lambda model: criterion(model(imgs).float(), labels), ema)


class SameBatch:
    """A loader that gives the same batch again and again."""

    def __init__(self, data: list, steps: int):
        self.data, self.length = data, steps

    def __len__(self) -> int:
        return self.length

    def batch_transform(self, imgs: torch.Tensor) -> torch.Tensor:
        return imgs

    def steps(self, epoch: int, start_step: int):
        return ([Batch(self.data, 1.0, True)] for _ in range(self.length))


def engine_steps(args, device, compiled) -> Step:
    """An epoch of `engine_pretrain`, all that it does between two steps included."""
    model = distributed.data_parallel(build_fcmae(args, device, compiled))
    loader = SameBatch([images(args, device), torch.zeros(args.batch_size), mask_of(args)], ENGINE_STEPS)
    optimizer, schedule = adamw(model), Schedule(1e-4, 0.0, 1, 10)
    amp = Amp(device, args.dtype != "float32", getattr(torch, args.dtype))
    training_run = Run(vars(main_pretrain.get_args_parser().parse_args([])), amp)
    return lambda: train_one_epoch(model, loader, optimizer, schedule, training_run, 0)


def bare_steps(args, device, compiled) -> Step:
    step = fcmae_step(args, device, compiled)
    return lambda: [step() for _ in range(ENGINE_STEPS)]


FORMS = {
    "encoder": {
        "visible": lambda *args: encoder_step(*args, dense=False),
        "masked dense": lambda *args: encoder_step(*args, dense=True),
    },
    "pretrain": {"FCMAE": fcmae_step, "MAE ViT-B/16": mae_step},
    "finetune": {
        "here": lambda *args: classifier_step(*args, timms=False),
        "timm": lambda *args: classifier_step(*args, timms=True),
    },
    "loop": {"engine": engine_steps, "bare": bare_steps},
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(steps: list[Step], repeats: int, device: torch.device) -> list[list[float]]:
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


def peak_memory(step: Step, device: torch.device) -> float:
    """MiB that a step takes above what is there between steps; on the CPU, resident memory as the kernel counts it."""
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    before = resident("VmRSS")
    step()  # the first one: later ones find memory that the allocator kept
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise UsageError(f"{field} is not in /proc/self/status: memory on the CPU is measured on Linux only")


def matmul_peak(args, device: torch.device) -> float:
    """TFLOP/s of a large matrix product in --dtype: the best of a few."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(getattr(torch, args.dtype))
    seconds = min(time_in_turn([lambda: x @ x], 7, device)[0])
    return 2 * size**3 / seconds / 1e12


def count_flops(step: Step) -> int:
    """Floating-point operations of the matrix products and attentions in a step.

    Convolutions are left out: those with a kernel over neighbours are depthwise here, a few percent of the work, and
    PyTorch's counter multiplies the gradient of a depthwise weight by the number of channels.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "convolution" not in str(operator))


def largest_batch(build: Callable, args, device: torch.device, compiled: bool) -> int:
    """The largest batch whose step fits the GPU's memory, or --memory_gb of it, to within 2 %."""
    if device.type != "cuda":
        raise UsageError("--largest_batch true: needs --device cuda; a CPU's memory has no such edge")
    if args.memory_gb:
        share = args.memory_gb * 2**30 / torch.cuda.get_device_properties(device).total_memory
        if share > 1:
            raise UsageError(f"--memory_gb {args.memory_gb}: the GPU has {args.memory_gb / share:.0f}")
        torch.cuda.set_per_process_memory_fraction(share, device)

    def fits(batch_size: int) -> bool:
        sized = copy.copy(args)
        sized.batch_size = batch_size
        try:
            step = build(sized, device, compiled)
            step()
            step()  # the optimizer's state is there from now on
            synchronize(device)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            step = None
            gc.collect()
            torch.cuda.empty_cache()

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- the command -----------------------------------------------------------------------------------------------------


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Times and memory of a step against the same work done in another way.")
    parser.add_argument("--what", choices=FORMS, default="encoder", help="which comparison; see the top of the file")
    parser.add_argument("--model", default="convnextv2_atto", help="one of the eight sizes")
    parser.add_argument("--batch_size", type=int, default=8, help="images per process and step")
    parser.add_argument("--input_size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of patches that FCMAE removes")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument(
        "--compile", choices=("no", "yes", "both"), default="no",
        help="run the forms eagerly, compiled, or each both ways, which compares the better of each",
    )  # fmt: skip
    add_bool(parser, "--fused", True, "the hand-written gradients of models/fused.py; false: the plain model")
    add_bool(parser, "--grad_checkpointing", False, "recompute the encoder's activations in backward")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--vary", nargs="+", help="a setting and its values, such as mask_ratio 0.4 0.6 0.8")
    parser.add_argument("--json", help="file that gets the measurements as JSON lines as well")
    parser.add_argument("--plot", help="PNG of time and memory over what --vary varies; needs matplotlib")
    add_bool(parser, "--memory", True, "measure memory as well")
    add_bool(parser, "--largest_batch", False, "find the largest batch of each form instead")
    parser.add_argument("--memory_gb", type=float, help="with --largest_batch: use only so much of the GPU")
    parser.add_argument("--memory_of", help="print one form's memory and leave: what the other processes are told")
    return parser


def check_args(args) -> None:
    if args.model not in SIZES:
        raise UsageError(f"--model {args.model}: unknown{suggest(args.model, SIZES)}; one of {', '.join(SIZES)}")
    if args.input_size % 32:
        raise UsageError(f"--input_size {args.input_size}: must be a multiple of 32")
    try:
        fcmae.num_visible((args.input_size // 32) ** 2, args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio: {error}") from error
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: draws with matplotlib, which is missing: pip install matplotlib")
    if args.vary:
        name, *values = args.vary
        kinds = {"mask_ratio": float, "batch_size": int, "input_size": int, "model": str}
        if name not in kinds or not values:
            raise UsageError(f"--vary {' '.join(args.vary)}: give one of {', '.join(kinds)} and its values")
        try:
            args.vary = [name, *map(kinds[name], values)]
        except ValueError as error:
            raise UsageError(f"--vary {' '.join(args.vary)}: {error}") from error


def variants(args) -> dict[str, tuple[Callable, bool]]:
    """The rows of the table: each form eagerly, compiled, or both."""
    rows = {}
    for name, build in FORMS[args.what].items():
        if args.compile != "yes":
            rows[name] = build, False
        if args.compile != "no":
            rows[f"{name}, compiled"] = build, True
    return rows


def memory_of(name: str, args) -> float:
    """Peak memory of a row, in a process of its own."""
    words = ["--memory_of", name, "--memory", "false"]
    for flag in ("what", "model", "batch_size", "input_size", "mask_ratio", "device", "dtype", "compile", "threads"):
        words += [f"--{flag}", str(getattr(args, flag))]
    words += ["--grad_checkpointing", str(args.grad_checkpointing), "--fused", str(args.fused)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1])


def measure(args, device: torch.device, peak: float) -> list[dict]:
    """A record per row."""
    rows = variants(args)
    steps = [build(args, device, compiled) for build, compiled in rows.values()]
    times = time_in_turn(steps, args.repeats, device)
    ours = next(iter(FORMS[args.what]))
    images_per_step = args.batch_size * distributed.get_world_size() * (ENGINE_STEPS if args.what == "loop" else 1)
    records = []
    for name, (_, compiled), step, seconds in zip(rows, rows.values(), steps, times, strict=True):
        flops = None if compiled or args.grad_checkpointing else count_flops(step)
        median = statistics.median(seconds)
        records.append({
            "what": args.what, "form": name, "ours": name.startswith(ours), "model": args.model,
            "batch_size": args.batch_size, "input_size": args.input_size, "mask_ratio": args.mask_ratio,
            "processes": distributed.get_world_size(), "seconds": seconds,
            "images_per_second": images_per_step / median,
            "tflops": flops and flops / median / 1e12, "share": flops and flops / median / 1e12 / peak,
        })  # fmt: skip
    if args.memory and distributed.is_main_process():
        for record in records:
            record["peak_mib"] = memory_of(record["form"], args)
    return records


def report(records: list[dict], args) -> None:
    print(f"{args.model}, batch {args.batch_size}, {args.input_size} px, mask ratio {args.mask_ratio}")
    print("| form | ms | images/s | TFLOP/s | of matmul peak | peak MiB |\n|---|---|---|---|---|---|")
    for record in records:
        speed = f"{record['tflops']:.2f} | {record['share']:.0%}" if record["tflops"] else "- | -"
        memory = f"{record['peak_mib']:.0f}" if "peak_mib" in record else "-"
        milliseconds = 1000 * statistics.median(record["seconds"])
        print(f"| {record['form']} | {milliseconds:.1f} | {record['images_per_second']:.1f} | {speed} | {memory} |")
    best = {}
    for mine in (True, False):
        best[mine] = min((r for r in records if r["ours"] == mine), key=lambda r: statistics.median(r["seconds"]))
    pairs = zip(best[True]["seconds"], best[False]["seconds"], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    line = f"{best[True]['form']} takes {ratio:.3f}x the time of {best[False]['form']} ({1 / ratio:.2f}x as fast)"
    if "peak_mib" in records[0]:
        line += f" and {best[True]['peak_mib'] / best[False]['peak_mib']:.2f}x its memory"
    print(f"{line}; median of {args.repeats} pairs\n", flush=True)


def plot(records: list[dict], name: str, path: str) -> None:
    """A curve per form: milliseconds and, where measured, MiB per image."""
    from matplotlib.figure import Figure  # not pyplot, which may look for a screen

    panels = {"ms per image": lambda r: 1000 / r["images_per_second"]}
    if "peak_mib" in records[0]:
        panels["peak MiB per image"] = lambda r: r["peak_mib"] / r["batch_size"]
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for form in dict.fromkeys(r["form"] for r in records):
            own = [r for r in records if r["form"] == form]
            settings = [str(r[name]).removeprefix("convnextv2_") for r in own]  # whole, models' names overlap
            axes.plot(settings, [value(r) for r in own], marker="o", label=form)
        axes.set(title=title, xlabel=name, ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    torch.set_num_threads(args.threads)
    args.world_size, args.local_rank, args.dist_on_itp, args.dist_url = 1, -1, False, "env://"
    if args.memory_of:
        device = distributed.pick_device(args.device)
        build, compiled = variants(args)[args.memory_of]
        print(peak_memory(build(args, device, compiled), device))
        return
    with distributed.process_group(args) as device:
        if args.largest_batch:
            for name, (build, compiled) in variants(args).items():
                print(f"{name}: {largest_batch(build, args, device, compiled)} images", flush=True)
            return
        talks = distributed.is_main_process()
        distributed.log.setLevel("WARNING")  # the engine's lines would fall between the table's
        peak = matmul_peak(args, device)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} threads"
        if talks:
            processes = f", {distributed.get_world_size()} processes" if distributed.get_world_size() > 1 else ""
            print(f"{args.what}: {args.dtype}, {where}{processes}, torch {torch.__version__}; ", end="")
            print(f"matmul peak {peak:.2f} TFLOP/s; medians of {args.repeats} rounds\n")
        name, *values = args.vary or ["model", args.model]
        measured = []
        for value in values:
            setattr(args, name, value)
            check_args(args)
            records = measure(args, device, peak)
            if not talks:
                continue
            report(records, args)
            measured += records
            if args.json:
                with open(args.json, "a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
        if talks and args.plot:
            plot(measured, name, args.plot)


if __name__ == "__main__":
    run(main)
