"""What a pre-training step computes and moves, on paper, and the time a GPU needs for that at 70 % of its peaks.

python tools/roofline.py --model convnextv2_base --batch_size 256
python tools/roofline.py --model mae

Counted on tensors without memory, in bfloat16 under autocast: any machine prints it within a minute. Eager: each
operation reads and writes all it has, and is bound by that or by its arithmetic. Fused: only products, depthwise
convolutions, AdamW and, for GRN, four passes over the wide activations do, and everything else rides with them.
"""

import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import convnextv2, fcmae, fused, operators
from tools.baselines import MaskedAutoencoderViT
from utils.args import ArgumentParser, positive, whole
from utils.errors import run_cli

SHARE = 0.7  # of the peaks, which long operations reach
CLASSES = {  # of operators; any other is of the last class
    "matrix products": "mm addmm bmm baddbmm addmm_ matmul convolution convolution_backward "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward",
    "depthwise convolutions": "depthwise depthwise_backward",
    "LayerNorm": "native_layer_norm native_layer_norm_backward",
    "GELU": "gelu gelu_backward",
    "gathering, index tables": "index index_select index_copy gather scatter_ sort argsort index_put_ arange",
    "AdamW": "",
    "GRN, sums, casts, residuals, loss": "",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}
PRODUCTS, DEPTHWISE, *_, OPTIMIZER, REST = CLASSES
FREE = "empty empty_like new_empty empty_strided detach alias _unsafe_view lift_fresh"  # and all views


class Count(TorchDispatchMode):
    """Under it, operations are counted by class: [FLOP, bytes, operations, seconds]."""

    def __init__(self, flops: float, bandwidth: float):
        super().__init__()
        self.flops, self.bandwidth, self.wide = flops, bandwidth, 0
        self.classes = defaultdict(lambda: [0, 0, 0, 0.0])
        whole = operators._grn_mlp, operators._grn_mlp_backward  # of which the insides are counted
        self.insides = {operator._opoverload: operator._init_fn for operator in whole}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.insides:
            with self:
                return self.insides[func](*args, **kwargs)
        out, name = func(*args, **kwargs), func._overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and name not in FREE.split():
            written = tree_leaves(out)
            read = tree_leaves([args[name == "copy_" :], {k: v for k, v in kwargs.items() if k != "out"}])
            moved = sum(size(x) for x in (*read, *written))
            self.wide += size(out) if name == "gelu" else 0
            self.add(CLASS_OF.get(name, REST), flop(name, args, written), moved)
        return out

    def add(self, kind: str, flop: float, moved: float) -> None:
        peak = self.flops if kind == PRODUCTS else self.flops / 15  # float32 outside the tensor cores, as on an H100
        seconds = max(flop / peak, moved / self.bandwidth) / SHARE
        for i, value in enumerate((flop, moved, 1, seconds)):
            self.classes[kind][i] += value


def size(x) -> int:
    """Bytes of a tensor, expanded dimensions once; 0 of anything else."""
    if not isinstance(x, torch.Tensor):
        return 0
    lengths = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(lengths).numel() * x.element_size()


def flop(name: str, args: tuple, written: list) -> int:
    """Floating-point operations of products and depthwise convolutions; the rest is bound by memory."""
    if CLASS_OF.get(name) == DEPTHWISE:
        return 2 * 49 * args[0].numel() * (1 + name.endswith("backward"))
    if "attention" in name:
        n, heads, length, dim = args[name.endswith("backward")].shape
        return n * heads * length**2 * dim * (10 if name.endswith("backward") else 4)
    if "convolution" in name:  # of patches that do not overlap, the first layer's: no gradient of the images
        return (
            2
            * (args[0] if name.endswith("backward") else written[0]).numel()
            * args[2 if name.endswith("backward") else 1].shape[1:].numel()
        )
    if CLASS_OF.get(name) != PRODUCTS:
        return 0
    x, y = args[:2] if name in ("mm", "bmm", "matmul") else args[1:3]
    return 2 * x.numel() * y.shape[-1]


def count(model_name: str, batch_size: int, flops: float, bandwidth: float) -> Count:
    """A step of FCMAE, or of MAE ViT-B/16, on images of 224 pixels; peaks in FLOP/s and bytes/s."""
    mae = model_name == "mae"
    with torch.device("cpu" if mae else "meta"):  # timm 1.0.15 reads values while it builds
        model = MaskedAutoencoderViT(224) if mae else getattr(fcmae, model_name)(norm_pix_loss=True)
    fused.enable(model.to("meta"))
    # tensors without memory are of a type of their own, at which fused blocks would step aside
    aside = patch.multiple(fused, _is_watched=lambda *_: False, _is_plain=lambda *_: True)
    at_once = patch.object(operators, "CACHE", sys.maxsize)  # all samples, as on a GPU
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")
        imgs, mask = torch.empty(batch_size, 3, 224, 224), torch.empty(batch_size, 49)
    with aside, at_once, fake, Count(flops, bandwidth) as counted:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(imgs) if mae else model(imgs, mask=mask, mask_ratio=0.6)[0]
        loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    counted.add(OPTIMIZER, 0, 28 * parameters)  # float32: weight and two moments read and written, gradient read
    return counted


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=(*convnextv2.SIZES, "mae"), default="convnextv2_base", metavar="SIZE", help="or mae")
    add("--batch_size", type=whole(1), default=256, help="images per step")
    add("--tflops", type=positive, default=990, help="peak of dense bfloat16 products; an H100's")
    add("--bandwidth", type=positive, default=3.35, help="of the memory, in TB/s")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    counted = count(args.model, args.batch_size, args.tflops * 1e12, args.bandwidth * 1e12)
    print(
        f"{args.model}, batch {args.batch_size}: at {SHARE:.0%} of {args.tflops:g} TFLOP/s, {args.bandwidth:g} TB/s\n"
    )
    print("| class | TFLOP | GB | operations | eager, ms | fused, ms |\n|---|---|---|---|---|---|")
    alone = {PRODUCTS, DEPTHWISE, OPTIMIZER}
    totals = [0.0] * 5
    for kind in CLASSES:
        flop, moved, operations, seconds = counted.classes[kind]
        left = seconds if kind in alone else 0.0
        if kind == REST and args.model != "mae":  # GRN's norm needs all positions before any is scaled: 4 wide passes
            left = 4 * counted.wide / (args.bandwidth * 1e12 * SHARE)
        row = flop / 1e12, moved / 1e9, operations, 1e3 * seconds, 1e3 * left
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        print(f"| {kind} | {row[0]:.2f} | {row[1]:.1f} | {row[2]} | {row[3]:.1f} | {row[4]:.1f} |")
    print(f"| all | {totals[0]:.2f} | {totals[1]:.1f} | {totals[2]:.0f} | {totals[3]:.1f} | {totals[4]:.1f} |")


if __name__ == "__main__":
    run_cli(main)
