"""The small layers ConvNeXt V2 needs and neither torch.nn nor timm.layers has, all on channels-last features."""

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
        # a sum of squares over thousands of positions loses digits in bfloat16, which CPU autocast would pick
        statistics = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=statistics)  # (N, 1, 1, C)
        norm = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        # gamma * (x * norm) + beta + x, as one multiply-add with a scale per sample and channel
        return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * norm).to(x.dtype))


class PatchConv(nn.Conv2d):
    """Convolution whose kernel equals its stride, on channels-last features: one reshape and one matrix product.

    (N, H, W, in_channels) -> (N, H // k, W // k, out_channels). Rows and columns beyond a multiple of k are dropped, as
    a strided convolution drops them. The weight keeps Conv2d's shape (out, in, k, k), and so its place in state dicts.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, stride=kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.kernel_size[0]
        n, h, w, c = x.shape
        h, w = h // k, w // k
        if k > 1:
            x = x[:, : h * k, : w * k].reshape(n, h, k, w, k, c).transpose(2, 3).reshape(n, h, w, k * k * c)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def depthwise(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A depthwise convolution on channels-last features: (N, H, W, C) -> (N, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
