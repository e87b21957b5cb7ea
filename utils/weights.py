"""Any checkpoint into a model: read, recognised, loaded, reported, or refused; `load_checkpoint` is the one way."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .checkpoint import read, unfit
from .errors import UsageError, refuse
from .layouts import convert, first_names, recognise
from .sources import local_file

log = logging.getLogger("fcmae")

MODEL_KEY, AVERAGE = "model|module", "model_ema|state_dict_ema"
KEYS = {MODEL_KEY: f"{MODEL_KEY}|state_dict|model_state_dict|{AVERAGE}", "model_ema": AVERAGE}  # of common trainers
ENCODER, DECODER = r"(downsample_layers|stages)\.", r"(proj|decoder|pred)\.|mask_token$"


class BackboneConfig(NamedTuple):
    """What the shapes of a state dict tell about its model, by the names of the constructors' arguments."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    stem_stride: int
    num_classes: int  # 0: no head
    decoder: dict  # decoder_depth and decoder_embed_dim of `FCMAE`; empty: no whole decoder

    def encoder(self) -> dict:
        """The arguments of `Encoder`, and of `ConvNeXtV2` but for num_classes."""
        return {name: getattr(self, name) for name in ("depths", "dims", "in_chans", "stem_stride")}

    def __str__(self):
        return f"depths {self.depths}, dims {self.dims}, {self.in_chans} channels and stem stride {self.stem_stride}"


class Report(NamedTuple):
    """What `load` did, by the names of the model's parameters."""

    layout: str
    loaded: list[str]
    unexpected_keys: list[str]  # the checkpoint's that were dropped
    missing_keys: list[str]  # the model's that stay as they were initialised

    def rows(self) -> dict[str, str]:
        """What to show a person, by its label."""
        own = self.loaded + self.missing_keys
        return {
            "loaded": summarise_names(self.loaded, own),
            "dropped": summarise_names(self.unexpected_keys, self.loaded + self.unexpected_keys),
            "fresh": summarise_names(self.missing_keys, own),
            "layout": self.layout,
        }


class Loaded(NamedTuple):
    """What `load_checkpoint` gives; config and content are the file's."""

    model: nn.Module
    report: Report
    config: BackboneConfig
    content: dict


def load_checkpoint(
    path: str | os.PathLike, model: nn.Module | Callable[[BackboneConfig], nn.Module], flag: str = "", *,
    model_key: str = MODEL_KEY, model_prefix: str = "", stem_average: bool = False, fresh_head: bool = False,
    whole: bool = False,
) -> Loaded:  # fmt: skip
    """Load a file of any layout, or what else `sources.local_file` takes, into a model.

    Args:
        model: the model, then the report is logged; or a function that builds it from the file's `BackboneConfig`.
        flag: what names the file on the command line, for messages.
        model_key, model_prefix: where in the file the weights are, see `unwrap`.
        stem_average, fresh_head: see `load`.
        whole: refuse a file that leaves a parameter of the model fresh.

    Raises UsageError: a file that cannot be read, or is not for the model.
    """
    content, source, given = read(local_file(flag, path)), f"{flag} {path}".lstrip(), isinstance(model, nn.Module)
    try:
        state_dict = unwrap(content, model_key, model_prefix)
        config = infer_config(state_dict)
        model = model if given else model(config)
        report = load(model, state_dict, stem_average, fresh_head)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    names = content.pop("classes", None)  # of other trainers, their number or something else
    if isinstance(names, list) and len(names) == config.num_classes:
        content["classes"] = list(map(str, names))
    rows = report.rows()
    refuse(whole and report.missing_keys, f"{source}: has nothing that fits for {rows['fresh']} of the model")
    if given:
        log.info("%s: %d of %d tensors", source, len(report.loaded), len(report.loaded + report.missing_keys))
        for label, names in rows.items():
            log.info("  %s: %s", label, names)
    return Loaded(model, report, config, content)


def summarise_names(names: list[str], among: list[str], prefix: str = "") -> str:
    """Names for reading: a module of which all of `among` is listed is written once, as `module.*`."""
    shown = []
    for child in dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in names):
        path = prefix + child
        listed, below = ([name for name in keys if name.startswith(f"{path}.")] for keys in (names, among))
        part = f"{path}.*" if set(listed) >= set(below) else summarise_names(listed, among, f"{path}.")
        shown.append(part if listed else path)
    return ", ".join(shown) or "none"


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def unwrap(checkpoint: dict, model_key: str = MODEL_KEY, model_prefix: str = "") -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of DistributedDataParallel and torch.compile.

    Looks under the keys of `model_key`, separated by `|`, in their order; a state dict by itself counts as "model".
    With MODEL_KEY, the key that the checkpoint has under "scored" comes first, a moving average that was the best so
    far; and the keys of common trainers come last. Of the names only those under `model_prefix` are taken, without it.

    Raises ValueError: none of the keys has a state dict, or no name has the prefix.
    """
    keys = KEYS.get(model_key, model_key).split("|")
    best = str(checkpoint.get("scored")) if model_key == MODEL_KEY else ""
    candidates = {"model": checkpoint} if _is_state_dict(checkpoint) else checkpoint
    state_dict = next(filter(_is_state_dict, map(candidates.get, [best, *keys])), None)
    if state_dict is None:
        raise ValueError(f"holds no state dict under {', '.join(keys)}; it has {first_names(checkpoint)}")
    if wrong := unfit(state_dict):
        raise ValueError(wrong)
    plain = {re.sub(r"^(_orig_mod\.|module\.)+|\b_orig_mod\.", "", name): v for name, v in state_dict.items()}
    found = {name.removeprefix(model_prefix): v for name, v in plain.items() if name.startswith(model_prefix)}
    if not found:
        names = summarise_names(list(plain), list(plain))
        raise ValueError(f"--model_prefix {model_prefix}: no name begins so; it has {names}")
    return found


def infer_config(state_dict: Mapping[str, Tensor]) -> BackboneConfig:
    """What the shapes of a state dict of any layout tell about its model.

    Raises ValueError: an unknown layout, or one of the stem and the downsamplers is missing or has an impossible shape.
    """
    try:
        state = convert(state_dict)
        matches = (re.fullmatch(r"(stages\.\d|decoder)\.\d+\.dwconv\.weight", name) for name in state)
        blocks, decoder = Counter(match[1] for match in matches if match), {}
        convs = [state[f"downsample_layers.{i}.{min(i, 1)}.weight"] for i in range(4)]
        if {"mask_token", "proj.weight", "pred.weight"} <= state.keys():
            decoder = {"decoder_depth": blocks["decoder"], "decoder_embed_dim": state["mask_token"].shape[1]}
        depths, dims = (blocks[f"stages.{i}"] for i in range(4)), map(len, convs)
        in_chans, stem_stride, num_classes = convs[0].shape[1], convs[0].shape[-1], len(state.get("head.weight", ()))
        return BackboneConfig(tuple(depths), tuple(dims), in_chans, stem_stride, num_classes, decoder)
    except KeyError as error:
        raise ValueError(f"not a whole backbone: missing is {error.args[0]}") from error
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a whole backbone: a parameter has an impossible shape ({error})") from error


def load(
    model: nn.Module, state_dict: Mapping[str, Tensor], stem_average: bool = False, fresh_head: bool = False
) -> Report:
    """Load a state dict of any layout into a `ConvNeXtV2` or an `FCMAE`, and tell what was done.

    The encoder must be there whole. The final norm, the head and FCMAE's decoder are each taken where the state dict
    has one that fits, and stay as they are where it has not; the model's initialisation is the caller's business.

    Args:
        stem_average: give a stem of another number of channels the model's. Each gets the mean times their ratio, so
            that an image whose channels are all the same, such as a grey one, gives the features that it gave.
        fresh_head: leave the head as it is, even if the state dict has one that fits.

    Raises ValueError: an unknown layout, weights that are NaN or infinite, an encoder that is incomplete or of another
    size; nothing is loaded then.
    """
    own, (layout, under) = model.state_dict(), recognise(state_dict)
    prefix = "encoder." if any(name.startswith("encoder.") for name in own) else ""
    source = {f"{prefix}{n}" if re.match(ENCODER, n) else n: v for n, v in convert(state_dict).items()}
    layout += f", under {under}*" if under else ""
    stem = f"{prefix}downsample_layers.0.0.weight"
    if stem_average and stem in source and source[stem].shape[1] != own[stem].shape[1]:
        layout += f", its stem averaged over {source[stem].shape[1]} channels"
        mean = source[stem].sum(dim=1, keepdim=True) / own[stem].shape[1]
        source[stem] = mean.expand(-1, own[stem].shape[1], -1, -1)
    loaded = {}
    for part in (prefix + ENCODER, r"norm\.", DECODER, *([] if fresh_head else [r"head\."])):
        ours, theirs = ({n: v.shape for n, v in state.items() if re.match(part, n)} for state in (own, source))
        if ours == theirs:
            loaded |= {name: source[name] for name in theirs}
        elif part == prefix + ENCODER:
            has, needs = infer_config(source), infer_config(own)
            if has.encoder() != needs.encoder():
                hint = f"; give --in_chans {has.in_chans} or --stem_average true" * (has.in_chans != needs.in_chans)
                raise ValueError(f"not for this --model or --stem_stride: it has {has}, the model has {needs}{hint}")
            wrong = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
            raise ValueError(f"not a whole backbone: missing, unknown or of another shape are {first_names(wrong)}")
    if wrong := unfit(loaded, own):
        raise ValueError(wrong)
    model.load_state_dict(loaded, strict=False)
    beside = [name for name in state_dict if not name.startswith(under)]  # of something else
    unexpected = [name for name in source if name not in loaded] + beside
    return Report(layout, [n for n in own if n in loaded], unexpected, [n for n in own if n not in loaded])
