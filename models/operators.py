"""A block's layers as operators of `torch.library`, with gradients written by hand: compiled models stay one graph."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels
from .layers import GRN, grn_scale, spatial_norm, statistics_dtype
from .visible import VisiblePatches, gather_rows, scatter_rows


def _gradients(plain, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, needed: tuple[bool, ...]) -> tuple:
    """For a backward pass that is itself differentiated: the inputs' gradients by autograd, through the plain form."""
    # views, for an input that is itself of the weights, as where two blocks share them, leads to them by a second way
    inputs = tuple(x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True))
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    with torch.autocast(grad.device.type, enabled=False):
        grads = iter(torch.autograd.grad(plain(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if need else None for need in needed)


# ---- linear -> GELU -> GRN -> linear ---------------------------------------------------------------------------------

CACHE = 4 << 20  # bytes of one wide activation per piece and thread; with less, the matrix products slow down
MLP = "Tensor x, Tensor w1, Tensor b1, Tensor gamma, Tensor beta, Tensor w2, Tensor b2"


def grn_mlp(x: torch.Tensor, fc1: nn.Linear, grn: GRN, fc2: nn.Linear) -> torch.Tensor:
    """fc2(grn(gelu(fc1(x)))) in training: (N, A, B, C) -> (N, A, B, C).

    The modules, called one after the other, move the wide activations (4C) through memory some twenty times. Here

    - samples, which are independent of each other, are taken on the CPU in pieces whose activations fit the cache;
    - GRN scales each sample's channels. Where a sample's positions are many against C it is cheaper to scale fc2's
      weight for each sample. The gradient of that scale then falls out of the gradient of the weight, and GRN costs no
      pass over the activations but for its norm;
    - GRN's output, for the gradient of fc2, is otherwise made again: one multiplication and addition.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        parameters = fc1.weight, fc1.bias, grn.gamma.flatten(), grn.beta.flatten(), fc2.weight, fc2.bias
        return _grn_mlp(x.flatten(1, 2), *parameters, grn.eps)[0].view(x.shape)


def _plain_grn_mlp(eps, x, *parameters):  # see _gradients
    w1, b1, gamma, beta, w2, b2 = (p.to(x.dtype) for p in parameters)
    y = F.gelu(F.linear(x, w1, b1))
    scale = grn_scale(spatial_norm(y, 1), gamma, eps).to(x.dtype)
    return F.linear(torch.addcmul(beta, y, scale), w2, b2)


def _plan(x: torch.Tensor, hidden: int) -> tuple[bool, int]:
    """Whether GRN scales the weight, and how many samples are taken at a time."""
    n, r, c = x.shape
    fitting = CACHE * torch.get_num_threads() // (r * hidden * x.element_size())
    return r >= 2 * c, max(1, fitting) if x.device.type == "cpu" else n


def grn_mlp_forward(x, w1, b1, gamma, beta, w2, b2, eps):
    """(N, R, C) -> the same, and what backward takes: fc1's output, GELU's, and the norms of GELU's."""
    out, h, a, norm = _empty_results(x, w1)
    (n, _, c), hidden, dtype = x.shape, w1.shape[0], x.dtype
    x, (scale_weight, piece) = x.contiguous(), _plan(x, hidden)
    v1, v2, beta_cast = w1.to(dtype), w2.to(dtype), beta.to(dtype)
    bias1, bias2 = b1.to(dtype), (b2 + w2 @ beta if scale_weight else b2).to(dtype)
    for i in range(0, n, piece):
        rows = slice(i, i + piece)
        torch.addmm(bias1, x[rows].view(-1, c), v1.t(), out=h[rows].view(-1, hidden))
        y = torch.ops.aten.gelu.out(h[rows], out=a[rows])
        norm[rows] = spatial_norm(y, 1)
        scale = grn_scale(norm[rows], gamma, eps)
        if scale_weight:
            torch.baddbmm(bias2, y, (w2 * scale).to(dtype).transpose(1, 2), out=out[rows])
        else:
            y = torch.addcmul(beta_cast, y, scale.to(dtype))
            torch.addmm(bias2, y.view(-1, hidden), v2.t(), out=out[rows].view(-1, c))
    return out, h, a, norm


_grn_mlp = torch.library.custom_op(  # a list, Tensor[], would be flattened in Python, at each call
    "fcmae::grn_mlp", grn_mlp_forward, mutates_args=(), schema=f"({MLP}, float eps) -> ({', '.join(4 * ['Tensor'])})"
)


@_grn_mlp.register_fake
def _empty_results(x, w1, *_):
    n, r, c, hidden = *x.shape, w1.shape[0]
    return *(x.new_empty(n, r, d) for d in (c, hidden, hidden)), x.new_empty(n, 1, hidden, dtype=statistics_dtype(x))


def grn_mlp_backward(grad, *inputs):
    x, w1, _, gamma, beta, w2, _, h, a, norm, eps = inputs
    (n, _, c), hidden, dtype, statistics = x.shape, w1.shape[0], x.dtype, norm.dtype
    grad, x, (scale_weight, piece) = grad.contiguous(), x.contiguous(), _plan(x, hidden)
    v1, v2, beta_cast = w1.to(dtype), w2.to(dtype), beta.to(dtype)
    mean = norm.mean(dim=-1, keepdim=True) + eps
    scale = 1 + gamma * (norm / mean)
    grad_scale, grad_x = torch.empty_like(norm), torch.empty_like(x)
    grad_w1 = grad_w2 = None
    grad_b1 = w1.new_zeros(hidden)
    for i in range(0, max(n, 1), piece):  # once without samples, whose products are the zeros that weights get
        rows = slice(i, i + piece)
        g, y, s = grad[rows], a[rows], scale[rows]
        if scale_weight:
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
        grad_y.addcmul_(y, _norm_slope(grad_scale[rows] * gamma, norm[rows], mean[rows]).to(dtype))
        grad_h = torch.ops.aten.gelu_backward(grad_y, h[rows]).view(-1, hidden)
        grad_w1 = _plus_product(grad_w1, grad_h.t(), x[rows].view(-1, c), w1.dtype)
        grad_b1 += grad_h.sum(dim=0, dtype=statistics)
        torch.mm(grad_h, v1, out=grad_x[rows].view(-1, c))
    grad_gamma = (grad_scale * norm / mean).sum(dim=(0, 1))
    grad_b2 = grad.sum(dim=(0, 1), dtype=statistics)
    grad_beta = grad_b2 @ w2.to(statistics)  # beta is added at every position alike
    if scale_weight:
        grad_w2.addr_(grad_b2, beta)
    return grad_x, grad_w1, grad_b1, grad_gamma, grad_beta, grad_w2, grad_b2


_grn_mlp_backward = torch.library.custom_op(
    "fcmae::grn_mlp_backward", grn_mlp_backward, mutates_args=(),
    schema=f"(Tensor grad, {MLP}, Tensor h, Tensor a, Tensor norm, float eps) -> ({', '.join(7 * ['Tensor'])})",
)  # fmt: skip


@_grn_mlp_backward.register_fake
def _(grad, *tensors):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors[:7])


def _keep_of_grn_mlp(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # or wide zeros would come as the gradients of what is kept


def _differentiate_grn_mlp(ctx, grad, *_):
    if torch.is_grad_enabled():
        plain, inputs = partial(_plain_grn_mlp, ctx.eps), ctx.saved_tensors[:7]
        return *_gradients(plain, inputs, grad, ctx.needs_input_grad[:-1]), None
    return *_grn_mlp_backward(grad, *ctx.saved_tensors, ctx.eps), None


_grn_mlp.register_autograd(_differentiate_grn_mlp, setup_context=_keep_of_grn_mlp)


def _norm_slope(grad_ratio: torch.Tensor, norm: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """A channel's gradient through its norm, by its activations (d norm / d y = y / norm); 0 if they are all zero."""
    through_mean = (grad_ratio * norm).mean(dim=-1, keepdim=True) / mean**2
    return torch.where(norm > 0, (grad_ratio / mean - through_mean) / norm, 0.0)


def _plus_product(total: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total, in place where there is one, plus x @ y, whose factors may be of less precision than the total's dtype."""
    if total is None:
        return (x @ y).to(dtype)
    return total.addmm_(x, y) if x.dtype == dtype else total.add_(x @ y)


# ---- depthwise convolution -------------------------------------------------------------------------------------------


def depthwise(
    x: torch.Tensor, conv: nn.Conv2d, visible: VisiblePatches | None = None, backend: str | None = None
) -> torch.Tensor:
    """A depthwise convolution on maps (N, H, W, C) or, with `visible`, visible patches (N, K, s*s, C); shaped as x.

    It keeps its input alone for backward, and makes scattered maps and windows again. The gradient of the input is the
    same convolution with the kernel turned by 180 degrees.

    backend: 'map' is the library's convolution, of patches after they are scattered to the map; 'window' convolves each
    visible patch with its halo; 'kernel' is Triton's, where it can run. The default is the faster one of the first two,
    on CPUs as we measured it.
    """
    device = x.device.type
    tensors = x, conv.weight, conv.bias
    if torch.is_autocast_enabled(device):
        tensors = [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    if backend is None or (backend == "kernel" and not kernels.available(x.device, tensors[0].dtype)):
        backend = _fastest_backend(x, visible)
    rows, table, maps = None, None, []
    if visible is not None:
        side, halo = math.isqrt(x.shape[2]), conv.kernel_size[0] // 2
        rows, maps = visible.row_index(side), [visible.batch, *(side * length for length in visible.grid)]
        if backend == "kernel":
            table = visible.patch_index(side, halo)
        elif device == "cpu":
            table = visible.window_index(side, halo)
    with torch.autocast(device, enabled=False):
        return _depthwise(*tensors, rows, table, maps, backend)


def _fastest_backend(x: torch.Tensor, visible: VisiblePatches | None) -> str:
    return "window" if x.device.type == "cpu" and visible is not None and x.shape[2] >= 4 * 4 else "map"


DEPTHWISE = "Tensor? rows, Tensor? table, SymInt[] maps, str backend"  # where visible patches lie: see scatter_rows


@torch.library.custom_op(
    "fcmae::depthwise", mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {DEPTHWISE}) -> Tensor"
)
def _depthwise(*inputs):
    return _convolved(*inputs).contiguous()


@_depthwise.register_fake
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "fcmae::depthwise_backward", mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor weight, {DEPTHWISE}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _depthwise_backward(grad, x, weight, rows, table, maps, backend):
    grad = grad.contiguous()
    grad_x = _convolved(grad, weight.flip(2, 3), None, rows, table, maps, backend).contiguous()
    if backend == "kernel":
        sums = kernels.weight_grad(x, grad, weight.shape[-1], table, math.isqrt(x.shape[2]))
        return grad_x, *(g.to(weight.dtype) for g in sums)
    return grad_x, _weight_grad(x, grad, weight, rows, table, maps).contiguous(), grad.sum(dim=(0, 1, 2))


@_depthwise_backward.register_fake
def _(grad, x, weight, *_):
    like = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    return *like, weight.new_empty(weight.shape[0])


def _keep_of_depthwise(ctx, inputs, output):
    *tensors, ctx.maps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_depthwise(ctx, grad):
    x, weight, bias, *where = *ctx.saved_tensors, ctx.maps, ctx.backend
    if torch.is_grad_enabled():
        where[-1] = "map" if where[-1] == "kernel" else where[-1]
        plain = lambda *inputs: _convolved(*inputs, *where)  # noqa: E731
        grads = _gradients(plain, (x, weight, bias), grad, ctx.needs_input_grad[:3])
    else:
        grads = _depthwise_backward(grad, x, weight, *where)
    return *grads, None, None, None, None


_depthwise.register_autograd(_differentiate_depthwise, setup_context=_keep_of_depthwise)


def _convolved(x, weight, bias, rows, table, maps, backend: str) -> torch.Tensor:
    if backend == "kernel":
        return kernels.convolve(x, weight, bias, table, math.isqrt(x.shape[2]))
    c, halo = x.shape[-1], weight.shape[-1] // 2
    if backend == "window":
        windows = _with_zero_row(x).index_select(0, table.flatten()).view(*table.shape, c)  # (N*K, s+2h, s+2h, C)
        y = F.conv2d(windows.permute(0, 3, 1, 2), weight, bias, groups=c)
        return y.permute(0, 2, 3, 1).reshape(x.shape)
    y = x if rows is None else scatter_rows(x, rows, maps)
    y = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=halo, groups=c).permute(0, 2, 3, 1)
    return y if rows is None else gather_rows(y, rows, x.shape)


def _with_zero_row(x: torch.Tensor) -> torch.Tensor:
    """(N, K, s*s, C) -> (N*K*s*s + 1, C): the last row is where `window_index` points to where there is nothing."""
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _weight_grad(x, grad, weight, rows, table, maps) -> torch.Tensor:
    """The gradient of a depthwise weight (C, 1, k, k), of maps or visible patches."""
    if x.device.type != "cpu" or not len(x):
        return _weight_grad_by_map(x, grad, weight, rows, maps)
    if rows is not None:
        return _weight_grad_by_window(x, grad, weight, table)
    padded = F.pad(x, (0, 0, *4 * [weight.shape[-1] // 2]))
    return depthwise_weight_grad(padded.permute(1, 2, 0, 3), grad.permute(1, 2, 0, 3))


def _weight_grad_by_map(x, grad, weight, rows, maps) -> torch.Tensor:
    """As the library computes it."""
    c, halo = weight.shape[0], weight.shape[-1] // 2
    x, grad = (t if rows is None else scatter_rows(t, rows, maps) for t in (x, grad))
    x, grad = (t.permute(0, 3, 1, 2) for t in (x, grad))
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (halo, halo), (1, 1), False, (0, 0), c, (False, True, False)
    )[1]


def _weight_grad_by_window(x, grad, weight, index) -> torch.Tensor:
    """In pieces of patches whose windows stay in the cache: several times faster than all at once."""
    c, k, patches, side = x.shape[-1], weight.shape[-1], len(index), math.isqrt(x.shape[2])
    x, grad = _with_zero_row(x), grad.view(patches, side, side, c)
    total = x.new_zeros(c, 1, k, k, dtype=statistics_dtype(x))
    piece = max(1, (2 << 20) * torch.get_num_threads() // (index[0].numel() * c * x.element_size()))
    for i in range(0, patches, piece):
        rows, g = index[i : i + piece], grad[i : i + piece]
        if side == 1:  # a 1x1 kernel is a product
            windows = x.index_select(0, rows.flatten()).view(-1, k * k, c)
            total += (windows * g.view(-1, 1, c)).sum(dim=0).t().reshape(c, 1, k, k)
        else:
            windows = x.index_select(0, rows.permute(1, 2, 0).flatten()).view(*rows.shape[1:], -1, c)
            total += depthwise_weight_grad(windows, g.permute(1, 2, 0, 3))
    return total.to(x.dtype)


def depthwise_weight_grad(windows: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Gradient of a depthwise weight: (s + k - 1, t + k - 1, P, C), (s, t, P, C) -> (C, 1, k, k).

    P windows of the input, halo included, with the gradients of the s x t outputs that each of them gave. This is
    again a depthwise convolution: each (window, channel) is a channel, and the gradients are its kernel. On the CPU the
    library computes it 1.3 (float32, large maps) to 18 times (bfloat16) faster than its own gradient of the weight.
    """
    (s, t, p, c), k = grads.shape, windows.shape[0] - grads.shape[0] + 1
    windows = windows.reshape(1, *windows.shape[:2], p * c).permute(0, 3, 1, 2)
    grads = grads.reshape(s, t, p * c).permute(2, 0, 1)[:, None]
    y = F.conv2d(windows, grads, groups=p * c)  # (1, P*C, k, k), in memory (k, k, P*C)
    return y.permute(0, 2, 3, 1).reshape(k * k, p, c).sum(dim=1).t().reshape(c, 1, k, k)
