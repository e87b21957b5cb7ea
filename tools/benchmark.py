"""Time and memory of a step against the same work done in another way, in pairs.

python tools/benchmark.py                                    encoder: visible patches against the masked dense form
python tools/benchmark.py --what pretrain --compile both     a whole FCMAE step against an MAE ViT-B/16 step
python tools/benchmark.py --what finetune --dtype bfloat16   a fine-tuning step against timm's model
python tools/benchmark.py --what evaluate --compile both     evaluation against timm's model
python tools/benchmark.py --what depthwise --vary stage 0 3  Triton's depthwise convolution, and cuDNN's, or without it
python tools/benchmark.py --what largest                     the largest batch that a GPU holds, beside an estimate
python tools/benchmark.py --what loader --data_path FOLDER   the pre-training loader against Pillow's pipeline
python tools/benchmark.py --vary mask_ratio 0.4 0.6          any comparison over a range of one flag
python tools/benchmark.py --what gpu --minutes 9             what a GPU is to be measured for, see gpu.py

The forms take turns in one process, because machines are noisy: the ratios, medians over pairs, are what to quote.
On the CPU, memory is measured in a process per form. Of the loader, the time is the processor's: images/s per core.
"""

import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import convnextv2, fcmae, fused, kernels
from models.operators import depthwise
from models.visible import VisiblePatches
from tools import gpu
from tools.baselines import MaskedAutoencoderViT, masked_dense_features, own_pass, pillow_pass, sample_mask
from utils.amp import Amp
from utils.args import ArgumentParser, Arguments, add_bool, add_size, device, fraction, positive, whole
from utils.distributed import pick_device
from utils.errors import UsageError, refuse, run_cli
from utils.flags import DEVICE_HELP
from utils.param_groups import param_groups

Step = Callable[[], int]  # does the work and returns of how many images


def images(args, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(args.batch_size, 3, *args.input_size, device=device)


def build(args, device, compiled, room, **kwargs) -> nn.Module:
    """The model of --model in a room, `convnextv2` or `fcmae`."""
    torch.manual_seed(0)
    with device:  # a fraction of the time that the CPU takes
        model = getattr(room, args.model)(**kwargs)
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.fused:
        fused.enable(model, args.kernels == "triton")
    model.compile(disable=not compiled)
    return model


def build_fcmae(args, device, compiled) -> tuple[fcmae.FCMAE, torch.Tensor, torch.Tensor]:
    model = build(args, device, compiled, fcmae, norm_pix_loss=True, mask_ratio=args.mask_ratio)
    return model, images(args, device), sample_mask(args, args.batch_size).to(device)


def amp_of(args, device) -> Amp:
    return Amp(device, args.dtype != "float32", getattr(torch, args.dtype))


def step_of(args, device, model: nn.Module, loss_of: Callable[[], torch.Tensor], ema=None, grad=None) -> Step:
    """Forward, backward, by the output's `grad` where it is no loss, and, of whole models, AdamW and moving average."""
    groups = param_groups(model.named_parameters(), 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    amp = amp_of(args, device)

    def step() -> int:
        with amp.autocast():
            loss = loss_of()
        loss.backward(grad)
        if args.what not in ("encoder", "depthwise"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(model)
        return args.batch_size

    return step


def encoder_step(args, device, compiled, dense: bool) -> Step:
    model, imgs, mask = build_fcmae(args, device, False)
    kept = int((mask[0] == 0).sum())
    forward = partial(masked_dense_features, model.encoder) if dense else partial(model.forward_encoder, len_keep=kept)
    features = torch.compile(lambda imgs, mask: forward(imgs, mask), disable=not compiled)
    return step_of(args, device, model, lambda: features(imgs, mask).float().square().mean())


def fcmae_step(args, device, compiled) -> Step:
    model, imgs, mask = build_fcmae(args, device, compiled)
    return step_of(args, device, model, lambda: model(imgs, mask=mask, mask_ratio=args.mask_ratio)[0])


def mae_step(args, device, compiled) -> Step:
    model, imgs = MaskedAutoencoderViT(args.input_size).to(device), images(args, device)
    model.compile(disable=not compiled)
    return step_of(args, device, model, lambda: model(imgs))


def classifier_step(args, device, compiled, timms: bool, trains: bool = True) -> Step:
    """Fine-tuning with a moving average of the weights, or evaluation; 1000 classes."""
    imgs, labels = images(args, device), torch.arange(args.batch_size, device=device) % 1000
    model = timm.create_model(args.model).to(device) if timms else build(args, device, False, convnextv2)
    if timms:
        model, imgs = (x.to(memory_format=torch.channels_last) for x in (model, imgs))
    if not trains:
        model.eval().compile(disable=not compiled)
        return torch.inference_mode()(amp_of(args, device).autocast()(lambda: len(model(imgs))))
    ema, criterion = ModelEmaV3(model, decay=0.9999), nn.CrossEntropyLoss(label_smoothing=0.1)
    model.compile(disable=not compiled)
    return step_of(args, device, model, lambda: criterion(model(imgs).float(), labels), ema)


def depthwise_step(args, device, compiled, backend: str, cudnn: bool = True) -> Step:
    """One depthwise convolution of visible patches, as in stage --stage, with its gradients."""
    model, imgs, mask = build_fcmae(args, device, False)
    if backend == "kernel" and not kernels.available(device, getattr(torch, args.dtype)):
        print("Triton cannot run here: its row is the library's\n")
    conv, visible = model.encoder.stages[args.stage][0].dwconv, VisiblePatches(mask, model.grid_size(imgs))
    x = imgs.new_empty(args.batch_size, visible.num_visible, 4 ** (3 - args.stage), conv.in_channels).normal_()
    grad, form = torch.randn_like(x, dtype=getattr(torch, args.dtype)), torch.compile(depthwise, disable=not compiled)
    conv.x = nn.Parameter(x.to(grad.dtype))
    step = step_of(args, device, conv, lambda: form(conv.x, conv, visible, backend), grad=grad)
    return torch.backends.cudnn.flags(enabled=cudnn)(step)


FORMS = {  # the last is what the others are measured against
    "encoder": {"visible": partial(encoder_step, dense=False), "masked dense": partial(encoder_step, dense=True)},
    "pretrain": {"FCMAE": fcmae_step, "MAE ViT-B/16": mae_step},
    "finetune": {"here": partial(classifier_step, timms=False), "timm": partial(classifier_step, timms=True)},
    "evaluate": {name: partial(classifier_step, timms=name == "timm", trains=False) for name in ("here", "timm")},
    "step": {"FCMAE": fcmae_step},
    "depthwise": {
        "Triton": partial(depthwise_step, backend="kernel"),
        "without cuDNN": partial(depthwise_step, backend="map", cudnn=False),
        "library": partial(depthwise_step, backend="map"),
    },
    "loader": {
        "here": partial(own_pass, normalise=False), "here, normalised on the CPU": partial(own_pass, normalise=True),
        "Pillow": pillow_pass,
    },
}  # fmt: skip


def variants(args) -> dict[str, tuple[Callable, bool]]:
    """The rows of the table: each form eagerly, compiled, or both."""
    ways = {"no": (False,), "yes": (True,), "both": (False, True)}[args.compile]
    forms = FORMS[args.what].items()
    return {name + ", compiled" * compiled: (form, compiled) for name, form in forms for compiled in ways}


def processor_time() -> float:
    """Seconds, in this process and in its workers that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(args, device: torch.device, step: Step) -> tuple[float, int]:
    """Seconds and images of a step."""
    if device.type == "cuda" and args.what != "loader":
        return gpu.timed(step, asleep=args.what == "depthwise")
    clock = processor_time if args.what == "loader" else time.perf_counter
    begun, count = clock(), step()
    return clock() - begun, count


def peak_memory(step: Step, device: torch.device) -> float:
    """MiB that a step takes above what is there between steps; on the CPU, resident memory as the kernel counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    resident = lambda field: int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # noqa: E731
    gc.collect()
    before = resident("VmRSS")
    step()  # the first one: later ones find memory that the allocator kept
    return (resident("VmHWM") - before) / 1024


def memory_of(form: str, flags: list[str]) -> float:
    """Peak memory of a form, in a process of its own."""
    command = [sys.executable, __file__, *flags, "--memory_of", form]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"measuring the memory of {form} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1])


def measure(args, device: torch.device, flags: list[str]) -> list[dict]:
    """A record per row, after two rounds to warm up; every round runs all rows."""
    names = "what model batch_size input_size mask_ratio kernels stage"
    settings = {name: getattr(args, name) for name in names.split()}
    records = [{"form": form, **settings, "seconds": []} for form in variants(args)]
    steps = [form(args, device, compiled) for form, compiled in variants(args).values()]
    for round_ in range(-2, args.repeats):
        for record, step in zip(records, steps, strict=True):
            seconds, record["images"] = timed(args, device, step)
            record["seconds"] += [seconds] if round_ >= 0 else []
    for record, step in zip(records, steps, strict=True) if args.memory else ():
        on_cuda = device.type == "cuda"  # whose allocator counts; resident memory needs a process that did nothing else
        record["peak_mib"] = peak_memory(step, device) if on_cuda else memory_of(record["form"], flags)
    return records


def print_largest(args, device: torch.device) -> None:
    """How many images a step of FCMAE holds, within 4 %, and how many the first step, of --batch_size, foretells."""
    model, *inputs = build_fcmae(args, device, False)
    batch, moments = list(inputs), 2 * sum(p.nbytes for p in model.parameters())
    step = step_of(args, device, model, lambda: model(batch[0], mask=batch[1], mask_ratio=args.mask_ratio)[0])
    room = 2**29  # of a rehearsal: a CPU's memory has no such end
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1] - torch.cuda.memory_allocated(device) + inputs[0].nbytes
    taken = 2**20 * max(1.0, peak_memory(step, device)) + inputs[0].nbytes
    estimate = int(args.batch_size * (room - moments) / taken)

    def fits(count: int) -> bool:
        try:
            batch[:] = [x[torch.arange(count, device=device) % len(x)] for x in inputs]
            step()
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "find an engine" in str(error)):  # so cuDNN tells it
                raise
            model.zero_grad()
            return False
        return True

    largest = next(filter(fits, range(estimate * 6 // 5, 0, -max(1, estimate // 25))), 0)
    print("| step | largest batch | estimate |\n|---|---|---|")
    print(f"| {args.model} | {largest} | {estimate} |\n", flush=True)


def report(records: list[dict], args) -> None:
    """Print a table; ratios are to the fastest of the rows that the others are measured against."""
    print(f"{args.model}, batch {args.batch_size}, {args.input_size} px, mask ratio {args.mask_ratio}")
    print("| form | ms | images/s | ratio of times | peak MiB | ratio of memory |\n|---|---|---|---|---|---|")
    last = len(records) // len(FORMS[args.what])
    base = min(records[-last:], key=lambda record: statistics.median(record["seconds"]))
    for record in records:
        median = statistics.median(record["seconds"])
        ratio = statistics.median(a / b for a, b in zip(record["seconds"], base["seconds"], strict=True))
        memory = f"{record['peak_mib']:.0f} | {record['peak_mib'] / base['peak_mib']:.2f}x" if args.memory else "- | -"
        print(f"| {record['form']} | {1000 * median:.2f} | {record['images'] / median:.1f} | {ratio:.3f}x | {memory} |")
    print(flush=True)


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add = parser.add_argument
    comparisons = (*FORMS, "largest", "gpu")
    add("--what", choices=comparisons, default="encoder", help="which comparison; see the top of the file")
    add("--model", choices=convnextv2.SIZES, default="convnextv2_atto", metavar="SIZE", help="convnextv2_SIZE")
    add("--batch_size", type=whole(1), default=8, help="images per step")
    add_size(add, "height and width of the images in pixels; one number: a square", least=32)
    add("--stage", type=whole(0, 3), default=0, help="for depthwise: which stage's")
    add("--mask_ratio", type=fraction, default=0.6, help="share of patches that FCMAE removes")
    add("--data_path", help="for the loader: a folder of images, however nested")
    add("--num_workers", type=whole(0, 1024), default=0, help="for the loader: its processes")
    add("--device", type=device, default="auto", help=DEVICE_HELP)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    add("--compile", choices=("no", "yes", "both"), default="no", help="run the forms eagerly, compiled, or both ways")
    add_bool(parser, "--fused", True, "the hand-written gradients of models/fused.py; false: the plain model")
    add("--kernels", choices=("library", "triton"), default="library", help="the depthwise convolutions on a GPU")
    add_bool(parser, "--grad_checkpointing", False, "recompute the encoder's activations in backward")
    add("--repeats", type=whole(1), default=9, help="timed rounds")
    add("--threads", type=whole(1), default=2, help="CPU threads; the loader takes one")
    add("--vary", nargs="+", metavar="WORD", help="a flag and its values, such as mask_ratio 0.4 0.6 0.8")
    add("--json", help="file that gets the measurements as JSON lines as well")
    add("--minutes", type=positive, default=9, help="for gpu: parts that no longer fit are left out")
    add("--output", default="report.json", help="for gpu: a .json file; tables and a picture go beside it")
    add_bool(parser, "--memory", True, "measure memory as well, but not of the loader")
    add("--memory_of", help="print one form's memory and leave: what the other processes are told")
    return parser


def parse(flags: list[str]) -> Arguments:
    """The arguments, checked. Raises UsageError."""
    args = get_args_parser().parse_args(flags)
    multiple = f"--input_size {args.input_size}: must be a multiple of 32"
    refuse(any(side % 32 for side in args.input_size), multiple)
    try:
        fcmae.num_visible(fcmae.num_patches(args.input_size, 32), args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio: {error}") from error
    if args.what == "loader":
        impossible = args.compile != "no" or not args.data_path
        refuse(impossible, "--what loader: needs --data_path, and has nothing to compile")
        args.memory, args.threads = False, 1
    refuse(args.vary and len(args.vary) < 2, f"--vary {' '.join(args.vary or [])}: give its values, too")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        form, compiled = variants(args)[args.memory_of]
        return print(peak_memory(form(args, device, compiled), device))
    name, *values = args.vary or ("model", args.model)
    varied = [[*sys.argv[1:], f"--{name}", value] for value in values]
    runs = list(map(parse, varied))  # all, before the first is measured
    try:
        file = open(args.json or os.devnull, "a", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {args.threads} threads"
    print(f"{args.what}: {args.dtype}, {where}, torch {torch.__version__}; medians of {args.repeats} rounds\n")
    for run, flags in zip(runs, varied, strict=True):
        if run.what == "gpu":
            gpu.run(run.minutes, run.output, str(device), where)
        elif run.what == "largest":
            print_largest(run, device)
        else:
            records = measure(run, device, flags)
            report(records, run)
            file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    run_cli(main)
