"""Which optimizers there are; which parameters decay, and at what share of the learning rate they are trained."""

from collections.abc import Callable, Iterable

import torch
from timm.optim import OptimInfo, get_optimizer_info, list_optimizers

from .errors import refuse, suggest


def optimizer_info(opt: str) -> OptimInfo:
    """What timm knows of an optimizer. Raises UsageError if nothing."""
    name, known = opt.lower().removeprefix("lookahead_"), list_optimizers()
    refuse(name not in known, f"--opt {opt}: unknown to timm{suggest(name, known)}")
    return get_optimizer_info(name)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay is for kernels and matrices: not for 1-D parameters, biases, GRN, the mask token."""
    return parameter.ndim > 1 and not name.endswith((".bias", "grn.gamma", "grn.beta", "mask_token"))


def param_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_id: Callable[[str], int] | None = None,
    num_layer_ids: int = 0,
) -> list[dict]:
    """Optimizer groups: one for every (layer id, decays or not), in order of first appearance.

    A group's `lr_scale` is layer_decay ** (num_layer_ids + 1 - layer_id), or 1 where layer_id is None; schedules
    multiply the learning rate by it. Parameters that do not require a gradient are left out.

    Returns:
        dictionaries with params, names, name, lr_scale, weight_decay, decays.
    """
    groups: dict[str, dict] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        kind = "decay" if decays(name, parameter) else "no_decay"
        label, scale = kind, 1.0
        if layer_id is not None:
            label = f"layer_{layer_id(name)}_{kind}"
            scale = layer_decay ** (num_layer_ids + 1 - layer_id(name))
        group = groups.setdefault(
            label,
            {
                "params": [],
                "names": [],
                "name": label,
                "lr_scale": scale,
                "weight_decay": weight_decay if kind == "decay" else 0.0,
                "decays": kind == "decay",
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
