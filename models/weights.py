"""Checkpoints of other code bases as ours, and ours as theirs: functions of state dicts, no file is read here.

A checkpoint goes through `unwrap` and then `load`, into a `ConvNeXtV2` or an `FCMAE`. What `load` does with the names
is also there by itself: `to_backbone` and `to_fcmae` read any layout, `to_timm` and `to_huggingface` write two of them.
All work by tables: a layout is a line in LAYOUTS, an odd shape a line in SHAPES.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

# How a parameter's name begins there and here, # for a number: read from left to right, written from right to left,
# every row in turn, so none may turn a name into one that a later row would take.
TIMM = (
    ("stem.#.", "downsample_layers.0.#."),
    ("stages.#.downsample.#.", "downsample_layers.#.#."),
    ("stages.#.blocks.#.conv_dw.", "stages.#.#.dwconv."),
    ("stages.#.blocks.#.norm.", "stages.#.#.norm."),
    ("stages.#.blocks.#.mlp.fc1.", "stages.#.#.pwconv1."),
    ("stages.#.blocks.#.mlp.grn.weight", "stages.#.#.grn.gamma"),
    ("stages.#.blocks.#.mlp.grn.bias", "stages.#.#.grn.beta"),
    ("stages.#.blocks.#.mlp.fc2.", "stages.#.#.pwconv2."),
    ("head.fc.", "head."),
    ("head.norm.", "norm."),
)
HUGGINGFACE = (
    ("embeddings.patch_embeddings.", "downsample_layers.0.0."),
    ("embeddings.layernorm.", "downsample_layers.0.1."),
    ("encoder.stages.#.downsampling_layer.#.", "downsample_layers.#.#."),
    ("encoder.stages.#.layers.#.dwconv.", "stages.#.#.dwconv."),
    ("encoder.stages.#.layers.#.layernorm.", "stages.#.#.norm."),
    ("encoder.stages.#.layers.#.pwconv1.", "stages.#.#.pwconv1."),
    ("encoder.stages.#.layers.#.grn.weight", "stages.#.#.grn.gamma"),
    ("encoder.stages.#.layers.#.grn.bias", "stages.#.#.grn.beta"),
    ("encoder.stages.#.layers.#.pwconv2.", "stages.#.#.pwconv2."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)


def _renamings(rows: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Rows of (beginning, its replacement), # for a number, as regular expressions and what to put for them."""
    rules = []
    for old, new in rows:
        group = itertools.count(1)
        pattern = r"(\d+)".join(re.escape(part) for part in old.split("#"))
        rules.append((f"^{pattern}", re.sub("#", lambda _, group=group: rf"\{next(group)}", new)))
    return tuple(rules)


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
    "timm": (r"^stages[._]\d+\.blocks\.\d+\.mlp\.grn\.weight$", (
        (r"^(stem|stages)_(\d+)\.", r"\1.\2."),  # of features_only models
        *_renamings(TIMM),
    )),
    "huggingface": (r"^(convnextv2\.)?encoder\.stages\.\d+\.layers\.\d+\.grn\.weight$", (
        (r"^convnextv2\.", ""),
        *_renamings(HUGGINGFACE),
    )),
}  # fmt: skip
TO_TIMM, TO_HUGGINGFACE = (_renamings((ours, theirs) for theirs, ours in rows) for rows in (TIMM, HUGGINGFACE))


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


class Misfit(ValueError):
    """The backbone is whole, and of another size than the model's: `size` is the checkpoint's."""

    def __init__(self, size: Size, own: Size):
        theirs, ours = (
            f"depths {s.depths}, dims {s.dims}, {s.in_chans} channels and stem stride {s.stem_stride}"
            for s in (size, own)
        )
        super().__init__(f"it has {theirs}, the model has {ours}")
        self.size = size


class Report(NamedTuple):
    """What `load` did, by the names of the model's parameters."""

    layout: str
    averaged: int  # channels that the stem of the checkpoint was averaged over; 0: it fits
    loaded: list[str]
    dropped: list[str]  # the checkpoint's, without a place in the model
    fresh: list[str]  # the model's, which stay as they were initialised

    def rows(self, reinitialised: str = "") -> dict[str, str]:
        """What to show a person, by its label; a module of which all parameters are listed is written once.

        reinitialised: what the caller made anew after loading.
        """
        own, source = self.loaded + self.fresh, self.loaded + self.dropped
        return {
            "loaded": ", ".join(fold(self.loaded, own)),
            "dropped": ", ".join(fold(self.dropped, source)) or "none",
            "missing, so fresh": ", ".join(fold(self.fresh, own)) or "none",
            **({"re-initialised": reinitialised} if reinitialised else {}),
            "layout": self.layout + (f", its stem averaged over {self.averaged} channels" if self.averaged else ""),
        }


def fold(names: Iterable[str], among: Iterable[str], prefix: str = "") -> Iterator[str]:
    """Names for reading: a module of which all of `among` is listed is written once, as `module.*`."""
    names, among = list(names), list(among)
    for child in dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in names):
        path = prefix + child
        listed, below = ([n for n in keys if n.startswith(f"{path}.")] for keys in (names, among))
        if not listed:
            yield path
        elif set(listed) >= set(below):
            yield f"{path}.*"
        else:
            yield from fold(listed, below, f"{path}.")


def _some(names) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:6]) or "none"
    return shown if len(names) <= 6 else f"{shown}, ... ({len(names)} in all)"


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


MODEL_KEY = "model|module"


def unwrap(checkpoint: dict, model_key: str = MODEL_KEY) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of DistributedDataParallel and torch.compile.

    Looks under the keys of `model_key`, separated by `|`, in their order; then under those that common trainers use;
    then takes the dictionary itself. Before MODEL_KEY comes the key that the checkpoint has under "scored": a moving
    average that was the best so far. Raises ValueError, naming the keys found, when none of them is a state dict.
    """
    scored = [str(checkpoint["scored"])] if model_key == MODEL_KEY and "scored" in checkpoint else []
    keys = dict.fromkeys([*scored, *model_key.split("|"), "state_dict", "model_ema", "module"])  # in order, each once
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
        converted[_rename(name, renames)] = reshape(value) if reshape else value
    return converted


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


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
    """The sizes of the model that a backbone state dict was made by, read from its shapes.

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


def load(model: nn.Module, state_dict: Mapping[str, Tensor], stem_average: bool = False) -> Report:
    """Load a state dict of any layout into a `ConvNeXtV2` or an `FCMAE`, and tell what was done.

    The encoder must be there whole. The final norm, the head and FCMAE's decoder are each taken where the state dict
    has one that fits, and stay as they are where it has not; the model's initialisation is the caller's business.

    Args:
        stem_average: give a stem of another number of channels the model's, see `average_stem`.

    Raises:
        ValueError: an unknown layout, an incomplete encoder, or (`Misfit`) one of another size; nothing is loaded then.
    """
    own = model.state_dict()
    prefix = "encoder." if any(name.startswith("encoder.") for name in own) else ""
    source = {f"{prefix}{n}" if re.match(ENCODER, n) else n: v for n, v in _convert(state_dict).items()}
    stem, averaged = f"{prefix}downsample_layers.0.0.weight", 0
    if stem_average and stem in source and source[stem].shape[1] != own[stem].shape[1]:
        averaged = source[stem].shape[1]
        source[stem] = average_stem(source[stem], own[stem].shape[1])
    loaded = {}
    for part in (prefix + ENCODER, r"norm\.", r"head\.", DECODER):
        found = {name: v for name, v in source.items() if re.match(part, name)}
        ours, theirs = ({n: v.shape for n, v in state.items() if re.match(part, n)} for state in (own, found))
        if ours == theirs:
            loaded |= found
        elif part == prefix + ENCODER:
            size, needed = infer_size(to_backbone(source)), infer_size(to_backbone(own))
            if size[:4] != needed[:4]:
                raise Misfit(size, needed)
            wrong = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
            raise ValueError(f"not a whole backbone: missing, unknown or of another shape are {_some(wrong)}")
    model.load_state_dict(loaded, strict=False)
    dropped, fresh = ([name for name in names if name not in loaded] for names in (source, own))
    return Report(layout(state_dict), averaged, [name for name in own if name in loaded], dropped, fresh)


def average_stem(weight: Tensor, in_chans: int) -> Tensor:
    """A stem's weight for another number of channels: (out, C, k, k) -> (out, in_chans, k, k).

    Every channel gets the mean over C times C / in_chans, so that an image whose channels are all the same, such as a
    grey one, gives the features that it gave.
    """
    return (weight.sum(dim=1, keepdim=True) / in_chans).repeat(1, in_chans, 1, 1)


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of any layout by the names and shapes of timm's convnextv2_* models; the inverse of `to_backbone`.

    timm writes the linears of its sizes below tiny, told here by their first width, as 1x1 convolutions (`conv_mlp`).
    Values may share memory with the source. Raises ValueError for an unknown layout.
    """
    state = to_backbone(state_dict)
    conv_mlp = timm_has_conv_mlp(infer_size(state).dims)
    converted = {}
    for name, value in state.items():
        if ".grn." in name:
            value = value.flatten()
        elif conv_mlp and re.search(r"\.pwconv\d\.weight$", name):
            value = value[..., None, None]
        converted[_rename(name, TO_TIMM)] = value
    return converted


def timm_has_conv_mlp(dims: tuple[int, ...]) -> bool:
    """Whether timm's model of these widths writes its linears as 1x1 convolutions; with other widths, a convention."""
    return dims[0] < 96


def to_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of any layout by the names and shapes of transformers; the inverse of `to_backbone`.

    With a head those of ConvNextV2ForImageClassification, without one those of ConvNextV2Model. Values may share memory
    with the source. Raises ValueError for an unknown layout.
    """
    state = to_backbone(state_dict)
    prefix = "convnextv2." if "head.weight" in state else ""
    return {
        (prefix if not name.startswith("head.") else "") + _rename(name, TO_HUGGINGFACE): value
        for name, value in state.items()
    }
