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
        return _GRNFunction.apply(x, self.gamma, self.beta, self.eps)


def _spatial_norm(x: torch.Tensor) -> torch.Tensor:
    """L2 norm over a sample's positions, (N, A, B, C) -> (N, 1, 1, C), in float32 for half-precision features.

    A sum of squares over thousands of positions loses digits in bfloat16, which CPU autocast would pick.
    """
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    if x.device.type == "cpu":  # there vector_norm over leading dimensions is about ten times slower than this
        return x.to(dtype).square().sum(dim=(1, 2), keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)


class _GRNFunction(torch.autograd.Function):
    """gamma * (x * N) + beta + x, as x times a scale per sample and channel, plus beta.

    The gradient is written out because autograd's takes some five more passes over x, the widest tensor of a block.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        norm = _spatial_norm(x)  # (N, 1, 1, C)
        mean = norm.mean(dim=-1, keepdim=True) + eps  # (N, 1, 1, 1)
        scale = 1 + gamma * (norm / mean)
        ctx.save_for_backward(x, gamma, norm, mean, scale)
        ctx.beta_dtype = beta.dtype
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, norm, mean, scale = ctx.saved_tensors
        grad_scale = (grad * x).sum(dim=(1, 2), keepdim=True, dtype=norm.dtype)
        grad_gamma = (grad_scale * norm / mean).sum(dim=0, keepdim=True).to(gamma.dtype)
        grad_beta = grad.sum(dim=(0, 1, 2), dtype=norm.dtype)[None, None, None].to(ctx.beta_dtype)
        grad_ratio = grad_scale * gamma  # of norm / mean
        through_mean = (grad_ratio * norm).mean(dim=-1, keepdim=True) / mean**2
        # d norm / d x = x / norm; a channel that is zero everywhere has the subgradient 0
        slope = torch.where(norm > 0, (grad_ratio / mean - through_mean) / norm, 0.0)
        grad_x = torch.addcmul(grad * scale.to(x.dtype), x, slope.to(x.dtype))
        return grad_x, grad_gamma, grad_beta, None


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
