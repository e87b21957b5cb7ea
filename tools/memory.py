"""Which batch of pre-training fits a GPU, worked out without one.

python tools/memory.py --model convnextv2_tiny convnextv2_base --memory_gb 24 80 141

Counts the bytes of all tensors that are alive at the worst moment of a bfloat16 training step, at two small batches on
the CPU, in the forms that a GPU takes. What grows with the batch, and what does not (weights, gradients, AdamW's two
averages), gives the batch. A tenth of the memory is left to the allocator and the CUDA context. With the GPU at hand,
`tools/benchmark.py --what pretrain --largest_batch true` tries it.
"""

import sys
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import fcmae, layers
from models.convnextv2 import SIZES
from models.visible import VisiblePatches
from utils.args import ArgumentParser
from utils.errors import UsageError, run, suggest

BATCHES = (2, 6)
USABLE = 0.9
PER_PARAMETER = 4 * 4  # bytes: weight, gradient and AdamW's two averages


def step_bytes(name: str, batch_size: int, args, grad_checkpointing: bool) -> int:
    """Bytes alive at the worst moment of a step, the images and all that AdamW keeps included."""
    model = getattr(fcmae, name)(norm_pix_loss=True)
    model.set_grad_checkpointing(grad_checkpointing)
    for parameter in model.parameters():
        # a gradient that stayed would move the worst moment of a small batch to the end of the step
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    imgs = torch.randn(batch_size, 3, args.input_size, args.input_size)
    tracker = MemTracker()
    with tracker:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(imgs, mask_ratio=args.mask_ratio)[0]
        loss.backward()
    alive = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return alive + imgs.nbytes + PER_PARAMETER * sum(p.numel() for p in model.parameters())


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Which batch of pre-training fits a GPU, worked out without one.")
    parser.add_argument("--model", nargs="+", default=["convnextv2_atto"], help="sizes, each a line of the table")
    parser.add_argument("--memory_gb", nargs="+", type=float, default=[24, 80, 141], help="GPUs, each a column")
    parser.add_argument("--input_size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of patches removed")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    for name in args.model:
        if name not in SIZES:
            raise UsageError(f"--model {name}: unknown{suggest(name, SIZES)}; one of {', '.join(SIZES)}")
    if args.input_size % 32:
        raise UsageError(f"--input_size {args.input_size}: must be a multiple of 32")
    # as on a GPU: the whole batch in one piece, and maps where no kernel is there
    layers._GRNMLP.CACHE = sys.maxsize
    VisiblePatches._fastest_form = lambda *_: "grid"
    print("| model | checkpointing | fixed GiB | MiB per image |", *(f"{gb:g} GB |" for gb in args.memory_gb))
    print("|---|---|---|---|" + "---|" * len(args.memory_gb))
    for name in args.model:
        for grad_checkpointing in (False, True):
            small, large = (step_bytes(name, n, args, grad_checkpointing) for n in BATCHES)
            each = (large - small) / (BATCHES[1] - BATCHES[0])
            fixed = small - BATCHES[0] * each
            fitting = [max(0, int((gb * 2**30 * USABLE - fixed) / each)) for gb in args.memory_gb]
            print(
                f"| {name} | {'yes' if grad_checkpointing else 'no'} | {fixed / 2**30:.2f} | {each / 2**20:.1f} |",
                *(f"{n} |" for n in fitting), flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    run(main)
