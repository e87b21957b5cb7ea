"""The small layers ConvNeXt V2 needs and neither torch.nn nor timm.layers has."""

import torch
import torch.nn.functional as F
from torch import nn


class GRN(nn.Module):
    """Global response normalisation over a sample's spatial positions (ConvNeXt V2, section 3).

    Input and output: (N, A, B, C), where A x B are the positions of one sample, in whatever layout: (H, W) of a map, or
    (K, s*s) of its visible patches. A position that is not in the tensor takes no part.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = grn_scale(spatial_norm(x, (1, 2)), self.gamma, self.eps)
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


@torch.fx.wrap  # one node of a traced graph: the device and the dtype decide when it runs
def spatial_norm(x: torch.Tensor, dim) -> torch.Tensor:
    """L2 norm over a sample's positions, kept as axes of length 1; in float32 for half-precision features.

    A sum of squares over thousands of positions loses digits in bfloat16, which CPU autocast would pick. A channel that
    is zero everywhere has the gradient 0.
    """
    dtype = statistics_dtype(x)
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    # on the CPU vector_norm over leading dimensions is about ten times slower than this
    square = x.to(dtype).square().sum(dim=dim, keepdim=True)
    alive = square > torch.finfo(dtype).tiny ** (2 / 3)  # below it the root's second derivative overflows
    return torch.where(alive, torch.where(alive, square, 1.0).sqrt(), 0.0)


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grn_scale(norm: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """gamma * (x * N) + beta + x is x * scale + beta: this scale, from the norms of a sample's channels."""
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


def exporting() -> bool:
    """Whether torch.export traces."""
    return getattr(torch.compiler, "_is_exporting_flag", False)  # is_exporting() is true in all graphs of 2.11


class PatchConv(nn.Conv2d):
    """Convolution whose kernel equals its stride, as one matrix product: (N, C, H, W) -> (N, C', H // k, W // k).

    What nn.Conv2d computes, for features that lie channels last in memory, as all of them do here. Rows and columns
    beyond a multiple of k are dropped, as a strided convolution drops them. Made or changed to be no such convolution
    (adapters make their own of its class; dense prediction takes strides away), it computes as nn.Conv2d.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=None, *args, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride or kernel_size, *args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        have = self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        if have != (2 * self.kernel_size[:1], self.kernel_size, (0, 0), (1, 1), 1) or exporting():
            return super().forward(x)  # an export with free height and width cannot tell that the part taken is there
        k, x = self.kernel_size[0], x.permute(0, 2, 3, 1)
        if k == 1:  # through the permutation below, the gradient has strides that make DDP warn and copy it
            return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        n, h, w, c = x.shape
        h, w = h // k, w // k
        x = x[:, : h * k, : w * k].reshape(n, h, k, w, k, c).transpose(2, 3).reshape(n, h, w, k * k * c)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
