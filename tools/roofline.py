"""What a pre-training step computes and moves, on paper, and the time a GPU needs for that at 70 % of its peaks.

python tools/roofline.py --model convnextv2_base --batch_size 256
python tools/roofline.py --model mae

Counted on tensors without memory, in bfloat16 under autocast: any machine prints it within a minute. Eager: each
operation reads and writes all it has, and is bound by that or by its arithmetic. Fused: only products, depthwise
convolutions, AdamW and, for GRN, four passes over the wide activations do, and everything else rides with them.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import convnextv2, fcmae, fused, operators
from tools.baselines import MaskedAutoencoderViT
from utils.args import ArgumentParser, positive, whole
from utils.errors import run_cli

SHARE = 0.7  # of the peaks, which long operations reach
FORMULAS = {str(packet).removeprefix("aten."): formula for packet, formula in flop_registry.items()}
CLASSES = {  # of operators; any other is of the last class
    "matrix products": " ".join(FORMULAS),
    "depthwise convolutions": "depthwise depthwise_backward",
    "LayerNorm": "native_layer_norm native_layer_norm_backward",
    "GELU": "gelu gelu_backward",
    "gathering, index tables": "index index_select index_copy gather scatter_ sort argsort index_put_ arange",
    "AdamW": "",
    "GRN, sums, casts, residuals, loss": "",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}
PRODUCTS, DEPTHWISE, _, GELU, _, OPTIMIZER, REST = CLASSES
FREE = "empty empty_like new_empty empty_strided detach alias _unsafe_view lift_fresh"  # and all views
INSIDES = {  # operators of which the insides are counted
    torch.ops.fcmae.grn_mlp.default: operators.grn_mlp_forward,
    torch.ops.fcmae.grn_mlp_backward.default: operators.grn_mlp_backward,
}


class Count(TorchDispatchMode):
    """Under it, operations are counted by class: [FLOP, bytes, operations, seconds]."""

    def __init__(self, flops: float, bandwidth: float):
        super().__init__()
        self.flops, self.bandwidth = flops, bandwidth
        self.classes = defaultdict(lambda: [0, 0, 0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a tensor's device
            return func(*args, **kwargs)
        with self:  # what is made of others is counted as these
            out = INSIDES.get(func, func.decompose)(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out, name = func(*args, **kwargs), func.__name__.split(".")[0]
        if not func.is_view and name not in FREE.split():
            read = [args[name == "copy_" :], {k: v for k, v in kwargs.items() if k != "out"}]
            # of the same class: what is done in place, and a CPU's form of attention
            name, flop = name.replace("_for_cpu", "").replace("addmm_", "addmm"), 0
            if name in FORMULAS:
                flop = FORMULAS[name](*args, **kwargs, out_val=out)
            elif CLASS_OF.get(name) == DEPTHWISE:
                flop = 2 * 49 * args[0].numel() * (1 + name.endswith("backward"))
            self.add(CLASS_OF.get(name, REST), flop, sum(map(size, tree_leaves([read, out]))))
        return out

    def add(self, kind: str, flop: float, moved: float) -> None:
        peak = self.flops if kind == PRODUCTS else self.flops / 15  # float32 outside the tensor cores, as on an H100
        seconds = max(flop / peak, moved / self.bandwidth) / SHARE
        self.classes[kind] = [a + b for a, b in zip(self.classes[kind], (flop, moved, 1, seconds), strict=True)]


def size(x) -> int:
    """Bytes of a tensor, expanded dimensions once; 0 of anything else."""
    if not isinstance(x, torch.Tensor):
        return 0
    lengths = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(lengths).numel() * x.element_size()


def count(model_name: str, batch_size: int, flops: float, bandwidth: float) -> Count:
    """A step of FCMAE, or of MAE ViT-B/16, on images of 224 pixels; peaks in FLOP/s and bytes/s."""
    mae = model_name == "mae"
    with torch.device("cpu" if mae else "meta"):  # timm 1.0.15 reads values while it builds
        model = MaskedAutoencoderViT(224) if mae else getattr(fcmae, model_name)(norm_pix_loss=True)
    fused.enable(model.to("meta"))
    # tensors without memory are of a type of their own, at which fused blocks would step aside
    aside = patch.multiple(fused, _is_watched=lambda *_: False, _is_plain=lambda *_: True)
    # all samples at once, and the norm in one pass
    norm = partial(torch.linalg.vector_norm, keepdim=True, dtype=torch.float32)
    on_gpu = patch.multiple(operators, CACHE=sys.maxsize, spatial_norm=lambda x, dim: norm(x, dim=dim))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")
        imgs, mask = torch.empty(batch_size, 3, 224, 224), torch.empty(batch_size, 49)
    with aside, on_gpu, fake, Count(flops, bandwidth) as counted:
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
    counted = count(args.model, args.batch_size, args.tflops * 1e12, args.bandwidth * 1e12).classes
    print(
        f"{args.model}, batch {args.batch_size}: at {SHARE:.0%} of {args.tflops:g} TFLOP/s, {args.bandwidth:g} TB/s\n"
    )
    print("| class | TFLOP | GB | operations | eager, ms | fused, ms |\n|---|---|---|---|---|---|")
    fused_seconds = {kind: counted[kind][3] for kind in (PRODUCTS, DEPTHWISE, OPTIMIZER)}
    if args.model != "mae":  # GRN's norm needs all positions before any is scaled: 4 wide passes, where GELU takes 5
        fused_seconds[REST] = 4 / 5 * counted[GELU][3]
    rows = []
    for kind in CLASSES:
        flop, moved, operations, seconds = counted[kind]
        rows.append((flop / 1e12, moved / 1e9, operations, 1e3 * seconds, 1e3 * fused_seconds.get(kind, 0.0)))
    rows.append([sum(column) for column in zip(*rows, strict=True)])
    for kind, row in zip((*CLASSES, "all"), rows, strict=True):
        print("| {} | {:.2f} | {:.1f} | {} | {:.1f} | {:.1f} |".format(kind, *row))


if __name__ == "__main__":
    run_cli(main)
