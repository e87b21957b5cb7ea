"""Blocks that compute by `operators`: `enable` puts them in a model that is to be trained.

What `convnextv2.Block` computes by calling its modules is the definition; these compute the same in less time and space
than autograd takes. They do not call the modules, so whoever looks at, replaces or adapts one must get the plain form:
each call asks whether anybody does (13 microseconds per block), and steps aside.

In a compiled model they stay on the CPU, where they are faster than what the compiler makes of the plain layers; on a
GPU it gets the plain layers to fuse, but for the kernels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .convnextv2 import Block
from .layers import GRN, exporting
from .operators import depthwise, grn_mlp
from .visible import VisiblePatches


def enable(model: nn.Module, triton: bool = False) -> int:
    """Let every plain `Block` of a model compute fast; how many there are.

    triton: the depthwise convolutions are those of `kernels` where they can run, not the library's.

    Parameters, their names, and the results up to rounding stay the same. Subclasses of Block are left alone; what is
    done to a block's layers before or afterwards (hooks, adapters, other modules) takes effect all the same.
    """
    blocks = [module for module in model.modules() if type(module) is Block]
    for block in blocks:
        block.__class__, block.triton = FusedBlock, triton
    return len(blocks)


class FusedBlock(Block):
    """A Block of which the depthwise convolution, and in training what lies between the linear layers, is fast."""

    triton = False

    def forward(self, x: torch.Tensor, visible: VisiblePatches | None = None) -> torch.Tensor:
        # on maps the library is slow in its gradients alone
        useful = visible is not None or torch.is_grad_enabled() or self.triton
        if not useful or _is_watched(x, self.triton) or not _is_depthwise(self.dwconv, x):
            return super().forward(x, visible)
        return self.pointwise(x, depthwise(x, self.dwconv, visible, "kernel" if self.triton else None))

    def pointwise(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if _is_watched(x) or not torch.is_grad_enabled() or not self._is_plain_mlp(x):
            return super().pointwise(x, y)
        return x + self.drop_path(grn_mlp(self._normed(y), self.pwconv1, self.grn, self.pwconv2))

    def _normed(self, y: torch.Tensor) -> torch.Tensor:
        """norm(y) without CUDA autocast's way through float32, five times the bytes; its statistics are float32."""
        norm, device = self.norm, y.device.type
        if device == "cpu" or not torch.is_autocast_enabled(device) or not _is_plain(norm, nn.LayerNorm, y):
            return norm(y)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)

    def _is_plain_mlp(self, x: torch.Tensor) -> bool:
        layers = (self.pwconv1, nn.Linear), (self.act, nn.GELU), (self.grn, GRN), (self.pwconv2, nn.Linear)
        return all(_is_plain(layer, kind, x) for layer, kind in layers) and self.act.approximate == "none"


# ---- when to step aside ----------------------------------------------------------------------------------------------

HOOKS = "forward", "forward_pre", "backward", "backward_pre"  # the kinds of which torch keeps a global dict


def _is_watched(x: torch.Tensor, triton: bool = False) -> bool:
    """Whether single operations are traced or transformed (exports, torch.func, forward mode) or hooks are global."""
    if torch.compiler.is_compiling():
        return exporting() or type(x) is not torch.Tensor or not (triton or x.device.type == "cpu")
    return (
        type(x) is not torch.Tensor
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in HOOKS)
    )


def _is_plain(module: nn.Module, kind: type, x: torch.Tensor) -> bool:
    """Whether nobody sees that a module is not called: it is of just this class, without hooks, a forward of its own or
    parameters of another type than its input's. Adapters, quantisation, pruning and sharding each change one of these.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not kind or hooks or "forward" in module.__dict__:
        return False
    params, casts = module._parameters.values(), torch.is_autocast_enabled(x.device.type)
    if x.dtype == torch.float64 and casts:
        return False  # autocast leaves it as it is
    return all(type(p) is nn.Parameter and p.is_floating_point() and (casts or p.dtype == x.dtype) for p in params)


def _is_depthwise(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether this is a plain depthwise convolution that keeps the map's size, on a device that has a form."""
    if not _is_plain(conv, nn.Conv2d, x) or x.device.type not in ("cpu", "cuda"):
        return False
    k, c = conv.kernel_size[0], conv.out_channels
    have = conv.kernel_size, conv.padding, conv.padding_mode, conv.stride, conv.dilation, conv.groups, conv.in_channels
    return bool(k % 2) and have == ((k, k), (k // 2, k // 2), "zeros", (1, 1), (1, 1), c, c)
