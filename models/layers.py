"""The small layers ConvNeXt V2 needs and neither torch.nn nor timm.layers has, all on channels-last features."""

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels


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
        scale = _grn_scale(_spatial_norm(x, (1, 2)), self.gamma, self.eps)
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


def _spatial_norm(x: torch.Tensor, dim) -> torch.Tensor:
    """L2 norm over a sample's positions, kept as axes of length 1; in float32 for half-precision features.

    A sum of squares over thousands of positions loses digits in bfloat16, which CPU autocast would pick.
    """
    dtype = _statistics_dtype(x)
    if x.device.type == "cpu":  # there vector_norm over leading dimensions is about ten times slower than this
        # the smallest normal number keeps the gradient of a channel that is zero everywhere at 0
        return (x.to(dtype).square().sum(dim=dim, keepdim=True) + torch.finfo(dtype).tiny).sqrt()
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grn_scale(norm: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """gamma * (x * N) + beta + x is x * scale + beta: this scale, from the norms of a sample's channels."""
    return 1 + gamma * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


def grn_mlp(x: torch.Tensor, fc1: nn.Linear, grn: GRN, fc2: nn.Linear) -> torch.Tensor:
    """fc2(grn(gelu(fc1(x)))) in training, with a gradient written by hand: (N, A, B, C) -> (N, A, B, C).

    The modules called one after the other compute the same, and are what torch.compile should see. Run eagerly, they
    move the wide activations (4C) through memory some twenty times; see `_GRNMLP` for what is saved.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        y = _GRNMLP.apply(
            x.flatten(1, 2), fc1.weight, fc1.bias, grn.gamma.flatten(), grn.beta.flatten(), fc2.weight, fc2.bias,
            grn.eps,
        )  # fmt: skip
    return y.view(x.shape)


class _GRNMLP(torch.autograd.Function):
    """fc1 -> GELU -> GRN -> fc2 on (N, R, C), R positions per sample; keeps x and two tensors of width 4C.

    - Samples are independent of each other, so on the CPU they are taken in pieces whose activations fit the cache.
    - GRN scales each sample's channels. Where R is large against C it is cheaper to scale fc2's weight for each sample
      (`fold`). The gradient of that scale then falls out of the gradient of the weight, and GRN costs no pass over the
      activations but for its norm.
    - GRN's output, for the gradient of fc2, is otherwise made again: one multiplication and addition.
    """

    CACHE = 4 << 20  # bytes of one wide activation per piece and thread; with less, the matrix products slow down

    @staticmethod
    def forward(ctx, x, w1, b1, gamma, beta, w2, b2, eps):
        (n, r, c), hidden, dtype = x.shape, w1.shape[0], x.dtype
        x = x.contiguous()
        fold = r >= 2 * c
        piece = n
        if x.device.type == "cpu":
            piece = max(1, _GRNMLP.CACHE * torch.get_num_threads() // (r * hidden * x.element_size()))
        v1, v2, beta_cast = w1.to(dtype), w2.to(dtype), beta.to(dtype)
        bias1, bias2 = b1.to(dtype), (b2 + w2 @ beta if fold else b2).to(dtype)
        h, a, out = x.new_empty(n, r, hidden), x.new_empty(n, r, hidden), torch.empty_like(x)
        norm = x.new_empty(n, 1, hidden, dtype=_statistics_dtype(x))
        for i in range(0, n, piece):
            rows = slice(i, i + piece)
            torch.addmm(bias1, x[rows].view(-1, c), v1.t(), out=h[rows].view(-1, hidden))
            y = torch.ops.aten.gelu.out(h[rows], out=a[rows])
            norm[rows] = _spatial_norm(y, 1)
            scale = _grn_scale(norm[rows], gamma, eps)
            if fold:
                torch.baddbmm(bias2, y, (w2 * scale).to(dtype).transpose(1, 2), out=out[rows])
            else:
                y = torch.addcmul(beta_cast, y, scale.to(dtype))
                torch.addmm(bias2, y.view(-1, hidden), v2.t(), out=out[rows].view(-1, c))
        ctx.save_for_backward(x, h, a, norm, w1, gamma, beta, w2)
        ctx.eps, ctx.fold, ctx.piece = eps, fold, piece
        return out

    @staticmethod
    def backward(ctx, grad):
        x, h, a, norm, w1, gamma, beta, w2 = ctx.saved_tensors
        (n, _, c), hidden, dtype, statistics = x.shape, w1.shape[0], x.dtype, norm.dtype
        grad = grad.contiguous()
        v1, v2, beta_cast = w1.to(dtype), w2.to(dtype), beta.to(dtype)
        mean = norm.mean(dim=-1, keepdim=True) + ctx.eps
        scale = 1 + gamma * (norm / mean)
        grad_scale, grad_x = torch.empty_like(norm), torch.empty_like(x)
        grad_w1 = grad_w2 = None
        grad_b1 = w1.new_zeros(hidden)
        for i in range(0, n, ctx.piece):
            rows = slice(i, i + ctx.piece)
            g, y, s = grad[rows], a[rows], scale[rows]
            if ctx.fold:
                per_sample = torch.bmm(g.transpose(1, 2), y)  # (n, C, 4C)
                grad_scale[rows] = (per_sample * w2).sum(dim=1, keepdim=True)
                per_sample = (per_sample * s).sum(dim=0)
                grad_w2 = per_sample if grad_w2 is None else grad_w2.add_(per_sample)
                grad_y = torch.bmm(g, (w2 * s).to(dtype))
            else:
                g, s = g.view(-1, c), s.to(dtype)
                grad_w2 = _plus_product(grad_w2, g.t(), torch.addcmul(beta_cast, y, s).view(-1, hidden), w2.dtype)
                grad_y = torch.mm(g, v2).view(y.shape)
                grad_scale[rows] = (grad_y * y).sum(dim=1, keepdim=True, dtype=statistics)
                grad_y *= s
            # through the norm; d norm / d y = y / norm, and a channel that is zero everywhere has the subgradient 0
            grad_ratio = grad_scale[rows] * gamma
            through_mean = (grad_ratio * norm[rows]).mean(dim=-1, keepdim=True) / mean[rows] ** 2
            slope = (grad_ratio / mean[rows] - through_mean) / norm[rows]
            slope = torch.where(norm[rows] > 2 * torch.finfo(statistics).tiny ** 0.5, slope, 0.0)  # see _spatial_norm
            grad_y.addcmul_(y, slope.to(dtype))
            grad_h = torch.ops.aten.gelu_backward(grad_y, h[rows]).view(-1, hidden)
            grad_w1 = _plus_product(grad_w1, grad_h.t(), x[rows].view(-1, c), w1.dtype)
            grad_b1 += grad_h.sum(dim=0, dtype=statistics)
            torch.mm(grad_h, v1, out=grad_x[rows].view(-1, c))
        grad_gamma = (grad_scale * norm / mean).sum(dim=(0, 1))
        grad_b2 = grad.sum(dim=(0, 1), dtype=statistics)
        grad_beta = grad_b2 @ w2.to(statistics)  # beta is added at every position alike
        if ctx.fold:
            grad_w2.addr_(grad_b2, beta)
        return grad_x, grad_w1, grad_b1, grad_gamma, grad_beta, grad_w2, grad_b2, None


def _plus_product(total: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total, in place where there is one, plus x @ y, whose factors may be of less precision than the total's dtype."""
    if total is None:
        return (x @ y).to(dtype)
    return total.addmm_(x, y) if x.dtype == dtype else total.add_(x @ y)


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
        if k == 1:  # through the permutation below, the gradient has strides that make DDP warn and copy it
            return F.linear(x, self.weight.flatten(1), self.bias)
        h, w = h // k, w // k
        x = x[:, : h * k, : w * k].reshape(n, h, k, w, k, c).transpose(2, 3).reshape(n, h, w, k * k * c)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def depthwise(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A stride-1 depthwise convolution on channels-last features: (N, H, W, C) -> (N, H, W, C)."""
    device = x.device.type
    by_hand = device == "cpu" or (x.is_cuda and kernels.available(x))
    if not by_hand or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    weight, bias = conv.weight, conv.bias
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.autocast(device, enabled=False):
        form = "library"
        if x.is_cuda:
            forms = {
                name: kernels.with_gradients(lambda x, w, b, name=name: _Depthwise.apply(x, w, b, name))
                for name in ("library", "kernel")
            }
            form = kernels.choose(("maps", x.shape[1:], x.dtype, x.device), forms, x, weight, bias)
        return _Depthwise.apply(x, weight, bias, form)


class _Depthwise(torch.autograd.Function):
    """The library's convolution, on the CPU with another gradient of the weight (see `correlate`), or Triton's."""

    @staticmethod
    def forward(ctx, x, weight, bias, form):
        ctx.save_for_backward(x, weight)
        ctx.form = form
        if form == "kernel":
            return kernels.depthwise(x, weight, bias)
        return _library_depthwise(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        halo = weight.shape[-1] // 2
        grad_x = grad_weight = grad_bias = None
        if ctx.form == "kernel":
            if ctx.needs_input_grad[0]:
                grad_x = kernels.depthwise(grad, weight, None, flip=True)
            grads = kernels.depthwise_weight_grad(x, grad, kernel_size=weight.shape[-1])
            return grad_x, *(g.to(weight.dtype) for g in grads), None
        if ctx.needs_input_grad[0]:
            grad_x = _library_depthwise(grad, weight.flip(2, 3), None)
        if ctx.needs_input_grad[1]:
            if x.device.type == "cpu":
                padded = F.pad(x, (0, 0, halo, halo, halo, halo))
                grad_weight = correlate(padded.permute(1, 2, 0, 3), grad.permute(1, 2, 0, 3))
            else:
                grad_weight = library_weight_grad(x, grad, weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 1, 2))
        return grad_x, grad_weight, grad_bias, None


def _library_depthwise(x, weight, bias):
    padding, groups = weight.shape[-1] // 2, x.shape[-1]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)


def library_weight_grad(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The library's gradient of a depthwise weight (C, 1, k, k), from maps (N, H, W, C)."""
    halo, c = weight.shape[-1] // 2, weight.shape[0]
    x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (halo, halo), (1, 1), False, (0, 0), c, (False, True, False)
    )[1]


def correlate(windows: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Gradient of a depthwise weight: (s + k - 1, t + k - 1, P, C), (s, t, P, C) -> (C, 1, k, k).

    P windows of the input, halo included, with the gradients of the s x t outputs that each of them gave. This is
    again a depthwise convolution: each (window, channel) is a channel, and the gradients are its kernel. On the CPU the
    library computes it 1.3 (float32, large maps) to 18 times (bfloat16) faster than its own gradient of the weight.
    """
    (s, t, p, c), k = grads.shape, windows.shape[0] - grads.shape[0] + 1
    windows = windows.reshape(1, *windows.shape[:2], p * c).permute(0, 3, 1, 2)
    kernels = grads.reshape(s, t, p * c).permute(2, 0, 1)[:, None]
    y = F.conv2d(windows, kernels, groups=p * c)  # (1, P*C, k, k), in memory (k, k, P*C)
    return y.permute(0, 2, 3, 1).reshape(k * k, p, c).sum(dim=1).t().reshape(c, 1, k, k)
