"""Checkpoints of other code bases as ours: pure functions from state dict to state dict, no file is read here.

A checkpoint goes through two steps, `unwrap` and then `to_backbone` (a classifier or a feature extractor) or
`to_fcmae` (continued pre-training). Both work by tables: a layout is a line in LAYOUTS, an odd shape a line in SHAPES.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# layout -> (a name that only this layout has, its renamings to backbone names, applied in order).
# Each signature is in every block of a ConvNeXt V2 and in no ConvNeXt V1. The first layout that matches is taken:
# reference_sparse has fcmae's signature too, so it comes first.
LAYOUTS = {
    "reference_sparse": (r"\bstages\.\d+\.\d+\.dwconv\.kernel$", (
        (r"^encoder\.", ""),
        (r"\.(ln|linear)\.", "."),
        (r"\.kernel$", ".weight"),
    )),
    "fcmae": (r"^encoder\.stages\.\d+\.\d+\.grn\.gamma$", (
        (r"^encoder\.", ""),
    )),
    "backbone": (r"^stages\.\d+\.\d+\.grn\.gamma$", ()),
    "timm": (r"^stages[._]\d+\.blocks\.\d+\.mlp\.grn\.weight$", (  # stages_0: features_only models
        (r"^stem[._](\d+)\.", r"downsample_layers.0.\1."),
        (r"^stages[._](\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages[._](\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"\.mlp\.grn\.weight$", ".grn.gamma"),
        (r"\.mlp\.grn\.bias$", ".grn.beta"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )),
    "huggingface": (r"^(convnextv2\.)?encoder\.stages\.\d+\.layers\.\d+\.grn\.weight$", (
        (r"^convnextv2\.", ""),
        (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
        (r"\blayernorm\.", "norm."),
        (r"\.grn\.weight$", ".grn.gamma"),
        (r"\.grn\.bias$", ".grn.beta"),
        (r"^classifier\.", "head."),
    )),
}  # fmt: skip


def _dense_kernel(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's kernel, depthwise (k*k, C) or (k*k, in, out), as a conv weight (out, in/groups, k, k)."""
    k = math.isqrt(len(kernel))  # the row offset varies fastest: dims are column, row, in, out
    return kernel.reshape(k, k, -1, kernel.shape[-1]).permute(3, 2, 1, 0).contiguous()


# What to do with a tensor, by its name in the source; the first line that matches, none: as it is.
SHAPES = (
    (r"\.kernel$", _dense_kernel),
    (r"\.grn\.\w+$", lambda v: v.reshape(1, 1, 1, -1)),  # (4C,), (1, 4C), ...
    (r"\.(pwconv\d|pwconv\d\.linear|mlp\.fc\d)\.weight$", lambda v: v.flatten(1)),  # a linear written as a 1x1 conv
    (r"\.bias$", torch.flatten),  # (1, C)
)

ENCODER, BACKBONE = r"(downsample_layers|stages)\.", r"(downsample_layers|stages|norm|head)\."
DECODER = r"(proj|decoder|pred)\.|mask_token$"


class Size(NamedTuple):
    """What the shapes of a backbone tell about the model they belong to."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    stem_stride: int
    num_classes: int | None


def _some(names) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:6]) or "none"
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def unwrap(checkpoint: dict, model_key: str = "model|module") -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of DistributedDataParallel and torch.compile.

    Looks under the keys of `model_key`, separated by `|`, in their order; then under those that common trainers use;
    then takes the dictionary itself. Raises ValueError, naming the keys found, when none of them is a state dict.
    """
    keys = dict.fromkeys([*model_key.split("|"), "state_dict", "model_ema", "module"])  # in order, each once
    candidates = [*(checkpoint.get(key) for key in keys), checkpoint]
    state_dict = next(filter(_is_state_dict, candidates), None)
    if state_dict is None:
        raise ValueError(f"no state dict under {', '.join(keys)} of this checkpoint; it has {_some(checkpoint)}")
    names = (re.sub(r"\b_orig_mod\.", "", name) for name in state_dict)
    return {re.sub(r"^(module\.)+", "", name): v for name, v in zip(names, state_dict.values(), strict=True)}


def layout(state_dict: Mapping[str, Tensor]) -> str:
    """Which of LAYOUTS the names follow, told by the one parameter that no other layout calls so.

    backbone: this project's encoder or classifier and the reference's dense files; fcmae: the same names after
    `encoder.`, with or without a decoder; reference_sparse: what the reference's MinkowskiEngine training saves;
    timm: any ConvNeXt of timm with GRN; huggingface: transformers' ConvNextV2 classes.
    Raises ValueError, naming a few parameters, when it is none (a ConvNeXt V1 for one: it has no GRN).
    """
    for kind, (signature, _) in LAYOUTS.items():
        if any(re.search(signature, name) for name in state_dict):
            return kind
    raise ValueError(f"not a ConvNeXt V2 in a known layout ({', '.join(LAYOUTS)}); its names: {_some(state_dict)}")


def _convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter by its backbone name and shape; what is not of the backbone goes along."""
    _, renames = LAYOUTS[layout(state_dict)]
    converted = {}
    for name, value in state_dict.items():
        reshape = next((f for pattern, f in SHAPES if re.search(pattern, name)), None)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        converted[name] = reshape(value) if reshape else value
    return converted


def to_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any layout by the names and shapes of `ConvNeXtV2`; `norm` and `head` where the source has them.

    What is not of the backbone (decoder, proj, pred, mask_token) is left out. Values may share memory with the source.
    Raises ValueError for an unknown layout.
    """
    return {name: v for name, v in _convert(state_dict).items() if re.match(BACKBONE, name)}


def to_fcmae(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any layout by the names and shapes of `FCMAE`; its decoder where the source has one.

    `norm` and `head`, which FCMAE has not, are left out. Values may share memory with the source.
    Raises ValueError for an unknown layout.
    """
    converted = _convert(state_dict)
    encoder = {f"encoder.{name}": v for name, v in converted.items() if re.match(ENCODER, name)}
    return encoder | {name: v for name, v in converted.items() if re.match(DECODER, name)}


def infer_size(state_dict: Mapping[str, Tensor]) -> Size:
    """The sizes of the model that a backbone state dict was made by, read from its shapes; for error messages.

    num_classes is None without a head. Raises ValueError when the stem or all blocks are missing.
    """
    channels = defaultdict(list)  # stage -> channels of each of its blocks
    for name, value in state_dict.items():
        if found := re.match(r"stages\.(\d+)\.\d+\.dwconv\.weight$", name):
            channels[int(found[1])].append(len(value))
    if not channels or "downsample_layers.0.0.weight" not in state_dict:
        raise ValueError(f"not the state dict of a backbone; its names: {_some(state_dict)}")
    blocks = [channels[stage] for stage in sorted(channels)]
    depths, dims = tuple(len(stage) for stage in blocks), tuple(stage[0] for stage in blocks)
    stem, head = state_dict["downsample_layers.0.0.weight"], state_dict.get("head.weight")
    return Size(depths, dims, stem.shape[1], stem.shape[-1], None if head is None else len(head))
