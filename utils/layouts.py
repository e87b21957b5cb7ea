"""How other code bases name and shape the parameters of a ConvNeXt V2: theirs as ours, ours as theirs, by tables.

A layout is a line in LAYOUTS, an odd shape a line in SHAPES. What is converted may share memory with its source.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PROBE_EPS = 1e-6  # of the batch norm of models/linear_probe.py

# Each row: how a parameter's name begins here, in timm, in transformers. {} is a number. Rows are applied from top to
# bottom, so no row may produce a name that a later row matches.
NAMES = (
    ("downsample_layers.0.0.", "stem.0.", "embeddings.patch_embeddings."),
    ("downsample_layers.0.1.", "stem.1.", "embeddings.layernorm."),
    ("downsample_layers.{}.{}.", "stages.{}.downsample.{}.", "encoder.stages.{}.downsampling_layer.{}."),
    ("stages.{}.{}.dwconv.", "stages.{}.blocks.{}.conv_dw.", "encoder.stages.{}.layers.{}.dwconv."),
    ("stages.{}.{}.norm.", "stages.{}.blocks.{}.norm.", "encoder.stages.{}.layers.{}.layernorm."),
    ("stages.{}.{}.pwconv1.", "stages.{}.blocks.{}.mlp.fc1.", "encoder.stages.{}.layers.{}.pwconv1."),
    ("stages.{}.{}.grn.gamma", "stages.{}.blocks.{}.mlp.grn.weight", "encoder.stages.{}.layers.{}.grn.weight"),
    ("stages.{}.{}.grn.beta", "stages.{}.blocks.{}.mlp.grn.bias", "encoder.stages.{}.layers.{}.grn.bias"),
    ("stages.{}.{}.pwconv2.", "stages.{}.blocks.{}.mlp.fc2.", "encoder.stages.{}.layers.{}.pwconv2."),
    ("head.", "head.fc.", "classifier."),
    ("norm.", "head.norm.", "layernorm."),
)


def _renamings(source: int, target: int) -> tuple[tuple[str, str], ...]:
    """Two columns of NAMES as regular expressions and what to put for them."""
    patterns = ("^" + row[source].replace(".", r"\.").format(r"(\d+)", r"(\d+)") for row in NAMES)
    return tuple((pattern, row[target].format(r"\1", r"\2")) for pattern, row in zip(patterns, NAMES, strict=True))


# layout: (a pattern that only its names match, renamings to ours in order). Every block of a ConvNeXt V2 has a name
# that matches, no ConvNeXt V1 has one. The first match wins, so reference_sparse, what the reference's MinkowskiEngine
# training saves, comes before fcmae, whose pattern it matches too. fcmae may be without a decoder.
LAYOUTS = {
    "reference_sparse": (r"(encoder\.)?stages\.\d+\.\d+\.dwconv\.kernel", (
        (r"^encoder\.", ""),
        (r"\.(ln|linear)\.", "."),
        (r"\.kernel$", ".weight"),
    )),
    "fcmae": (r"encoder\.stages\.\d+\.\d+\.grn\.gamma", (
        (r"^encoder\.", ""),
    )),
    "backbone": (r"stages\.\d+\.\d+\.grn\.gamma", ()),
    "timm": (r"stages[._]\d+\.blocks\.\d+\.mlp\.grn\.weight", (
        (r"^(stem|stages)_(\d+)\.", r"\1.\2."),  # of features_only models
        *_renamings(1, 0),
    )),
    "huggingface": (r"(convnextv2\.)?encoder\.stages\.\d+\.layers\.\d+\.grn\.(weight|gamma)", (
        (r"^convnextv2\.", ""),
        (r"\.grn\.gamma$", ".grn.weight"),  # older ones
        (r"\.grn\.beta$", ".grn.bias"),
        *_renamings(2, 0),
    )),
}  # fmt: skip
TO_TIMM, TO_HUGGINGFACE = _renamings(0, 1), _renamings(0, 2)


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


def first_names(names: Iterable) -> str:
    """The first few, for a message."""
    names = [str(name) for name in names]
    shown = ", ".join(names[:6]) or "none"
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"


def recognise(state_dict: Mapping[str, Tensor]) -> tuple[str, str]:
    """Which of LAYOUTS the names follow, and the prefix under which they do, such as `model.`, else ''.

    Raises ValueError, naming a few parameters, when it is none (a ConvNeXt V1 for one: it has no GRN), or several.
    """
    for kind, (signature, _) in LAYOUTS.items():
        found = [match[1] for name in state_dict if (match := re.fullmatch(rf"((?:.*?\.)??){signature}", name))]
        if len(prefixes := sorted(set(found))) > 1:
            shown = " and ".join(map(repr, prefixes))
            raise ValueError(f"holds models under {shown}: give main_finetune.py a --model_prefix, or save one alone")
        if prefixes:
            return kind, prefixes[0]
    names = first_names(state_dict)
    raise ValueError(f"not a ConvNeXt V2 in a known layout ({', '.join(LAYOUTS)}); its names: {names}")


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter of any layout by the name and shape in `ConvNeXtV2`; what is not of it, a decoder, goes along.

    Names without the prefix that `recognise` tells are of something else, and left out.
    """
    kind, prefix = recognise(state_dict)
    converted = {}
    for name, value in state_dict.items():
        if name.startswith(prefix):
            reshape = next((f for pattern, f in SHAPES if re.search(pattern, name)), lambda v: v)
            converted[_rename(name.removeprefix(prefix), LAYOUTS[kind][1])] = reshape(value)
    return fold_batch_norm(converted)


def fold_batch_norm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `LinearProbe` as that of the `ConvNeXtV2` with the same logits; others as they are."""
    mean, variance = (state_dict.get(f"head.batch_norm.running_{name}") for name in ("mean", "var"))
    if mean is None or variance is None:
        return state_dict
    weight = state_dict["head.weight"] / (variance + PROBE_EPS).sqrt()
    head = {"head.weight": weight, "head.bias": state_dict["head.bias"] - weight @ mean}
    return {name: v for name, v in state_dict.items() if not name.startswith("head.")} | head


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any layout as a `ConvNeXtV2` has it; `norm` and `head` where the source has them."""
    return {n: v for n, v in convert(state_dict).items() if re.match(r"(downsample_layers|stages|norm|head)\.", n)}


def timm_has_conv_mlp(first_width: int) -> bool:
    """Whether timm's model writes its linears as 1x1 convolutions; of sizes that timm has not, a convention."""
    return first_width < 96


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of any layout by the names and shapes of timm's convnextv2_* models."""
    state, converted = to_backbone(state_dict), {}
    conv_mlp = timm_has_conv_mlp(len(state["downsample_layers.0.0.weight"]))
    for name, value in state.items():
        if ".grn." in name:
            value = value.flatten()
        elif conv_mlp and re.search(r"\.pwconv\d\.weight$", name):
            value = value[..., None, None]
        converted[_rename(name, TO_TIMM)] = value
    return converted


def to_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of any layout as ConvNextV2ForImageClassification has it, or, without a head, ConvNextV2Model."""
    state = to_backbone(state_dict)
    prefix = "convnextv2." if "head.weight" in state else ""
    named = {_rename(name, TO_HUGGINGFACE): value for name, value in state.items()}
    return {name if name.startswith("classifier.") else prefix + name: value for name, value in named.items()}
