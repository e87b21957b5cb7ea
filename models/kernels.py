"""Triton kernels of the depthwise convolution: on visible patches and on channels-last maps, with their gradients.

A library's convolution knows only maps, and so computes removed positions too. Here a program computes R output rows of
BM columns for BLOCK_C channels. It walks the K columns of the kernel, and for each reads every input row once that its
output rows need: one row read serves up to min(K, R) of them. A position that is removed or outside is not read. Sums
are in float32, and an output's terms always come in the same order.

Both layouts are the same kernel. A "lane" is one column of R rows: a column of a visible patch (R is the patch's side),
or of a strip of R rows of a map; `_place` alone knows where its positions lie.

The module imports without Triton; ask `available`.
"""
# ruff: noqa: RUF005 (Triton takes no unpacking inside a tuple)

from __future__ import annotations

import contextlib

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, CPU-only wheels
    triton = tl = None

_jit = triton.jit if triton is not None else lambda function: function


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can run on a device in this precision, by a Triton that can compile them.

    With TRITON_INTERPRET=1, which must be set before Triton is first imported, they also run on the CPU, slowly.
    """
    if triton is None or not hasattr(tl, "tuple") or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if _INTERPRETED:
        return device.type == "cpu"
    least = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= least


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_index: torch.Tensor | None = None,
    side: int | None = None,
) -> torch.Tensor:
    """Depthwise convolution with stride 1 and zero padding k // 2; output shaped and typed as x.

    Args:
        x: visible patches (N, K, s*s, C) with `patch_index` and `side`, or, without them, maps (N, H, W, C).
        weight, bias: (C, 1, k, k) with odd k, and (C,) or None.
        patch_index: (N*K, T, T) int32, T = 2 * reach + 1, reach = ceil((k // 2) / s): which of the N*K patches lies
            there, -1 where it is removed or outside.
        side: s.
    """
    c, k = weight.shape[0], weight.shape[-1]
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    taps = weight.reshape(c, k * k).t().contiguous()  # channels last, as everything else
    layout, lanes, rows = _layout(x, patch_index, side, k)
    # R accumulators of this many values per thread, up to 64 registers in all
    block_c, lanes_per_program = _tile(c, values=8 if rows > 4 else 16)
    grid = (triton.cdiv(lanes, lanes_per_program), triton.cdiv(c, block_c))
    with _on(x):
        _convolve_kernel[grid](
            x, taps, taps if bias is None else bias, y, *layout, lanes,
            C=c, K=k, R=rows, MAP=patch_index is None, BIAS=bias is not None,
            BM=lanes_per_program, BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip
    return y


def weight_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: int,
    patch_index: torch.Tensor | None = None,
    side: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `convolve`'s weight (C, 1, k, k) and bias (C,) in float32, from x and the output's gradient.

    Each program writes the sum over its share of the positions, and a second pass adds the shares up: no atomics, so
    equal inputs give equal bits.
    """
    c, k = x.shape[-1], kernel_size
    x, grad = x.contiguous(), grad.contiguous()
    layout, lanes, rows = _layout(x, patch_index, side, k)
    block_c, lanes_per_step = _tile(c, values=8)  # k + 1 accumulators
    steps = triton.cdiv(lanes, lanes_per_step)
    columns = triton.cdiv(c, block_c)
    shares = min(steps, max(1, _PROGRAMS // (k * columns)))
    steps_per_share = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, steps_per_share)
    partial = x.new_empty(shares, k * k + 1, c, dtype=torch.float32)  # the taps' sums, then the bias's
    with _on(x):
        _weight_grad_kernel[(k, columns, shares)](
            x, grad, partial, *layout, lanes, steps_per_share,
            C=c, K=k, R=rows, MAP=patch_index is None, BM=lanes_per_step, BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip
    total = partial.sum(dim=0)
    return total[:-1].t().reshape(c, 1, k, k).clone(memory_format=torch.contiguous_format), total[-1]


_WARPS = 4
_PROGRAMS = 2048  # of the weight's gradient: several per multiprocessor of the largest devices


def _tile(channels: int, values: int) -> tuple[int, int]:
    """Channels and lanes of a program in which each thread holds `values` elements of a row."""
    block_c = 64 if channels % 64 == 0 else 32
    return block_c, 32 * _WARPS * values // block_c


def _layout(x, patch_index, side, kernel_size):
    """What `_place` needs to know (table, height, width), the number of lanes, and the rows R of a lane."""
    if patch_index is not None:
        reach = -(-(kernel_size // 2) // side)
        expected = (x.shape[0] * x.shape[1], 2 * reach + 1, 2 * reach + 1)
        if tuple(patch_index.shape) != expected or patch_index.dtype != torch.int32 or x.shape[2] != side * side:
            raise ValueError(
                f"patch_index is {patch_index.dtype} of shape {tuple(patch_index.shape)}; visible patches of shape "
                f"{tuple(x.shape)} with side {side} and a kernel of {kernel_size} need torch.int32 of shape {expected}"
            )
        return (patch_index.contiguous(), side, side), expected[0] * side, side
    n, h, w, _ = x.shape
    strips = triton.cdiv(h, 8)
    rows = triton.cdiv(h, strips)
    return (x, h, w), n * triton.cdiv(h, rows) * w, rows


def _on(x: torch.Tensor):
    """Kernels are launched on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@_jit
def _place(
    index_ptr, height, width, lanes, lane, dx, dy: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr
):
    """The position dy rows below each lane's first row and dx columns to its right: its index, and whether it exists.

    Where it does not exist the index means nothing.
    """
    live = lane < lanes
    if MAP:
        strips = (height + R - 1) // R
        strip = lane // width
        row = strip % strips * R + dy
        column = lane % width + dx
        index = ((strip // strips).to(tl.int64) * height + row) * width + column
        exists = live & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    else:
        reach: tl.constexpr = (K // 2 + R - 1) // R
        size: tl.constexpr = 2 * reach + 1
        down: tl.constexpr = dy + reach * R  # from the first row of the first patch in the table, as `right` is
        right = lane % R + dx + reach * R
        patch = tl.load(index_ptr + lane // R * (size * size) + down // R * size + right // R, mask=live, other=-1)
        index = patch.to(tl.int64) * (R * R) + down % R * R + right % R
        exists = patch >= 0
    return index, exists


@_jit
def _load(x_ptr, position, exists, channel, C: tl.constexpr):
    """Rows of x (positions, C) in float32, zero where they do not exist: (BM, BLOCK_C)."""
    mask = exists[:, None] & (channel < C)[None, :]
    return tl.load(x_ptr + position[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@_jit
def _replace(values, i: tl.constexpr, value):
    return values[:i] + (value,) + values[i + 1 :]


# asked once, as torch.compile cannot trace what is asked about a kernel
_INTERPRETED = triton is not None and not isinstance(_replace, triton.JITFunction)


@_jit
def _convolve_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr, index_ptr, height, width, lanes,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[i] = bias + sum over taps (ky, kx) of x[i + (ky, kx) - K // 2] * taps[ky, kx], taps (K*K, C)."""
    halo: tl.constexpr = K // 2
    lane = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.zeros((BM, BLOCK_C), tl.float32)
    if BIAS:
        start += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    sums = ()  # one per output row
    for _ in tl.static_range(R):
        sums = sums + (start,)
    for kx in range(K):
        taps = ()  # of this column
        for ky in tl.static_range(K):
            w = tl.load(taps_ptr + (ky * K + kx) * C + channel, mask=channel < C, other=0.0).to(tl.float32)
            taps = taps + (tl.broadcast_to(w[None, :], (BM, BLOCK_C)),)
        for dy in tl.static_range(-halo, R + halo):
            position, exists = _place(index_ptr, height, width, lanes, lane, kx - halo, dy, K, R, MAP)
            x = _load(x_ptr, position, exists, channel, C)
            for r in tl.static_range(R):
                if dy - r >= -halo and dy - r <= halo:
                    sums = _replace(sums, r, tl.fma(x, taps[dy - r + halo], sums[r]))
    for r in tl.static_range(R):
        position, exists = _place(index_ptr, height, width, lanes, lane, 0, r, K, R, MAP)
        mask = exists[:, None] & (channel < C)[None, :]
        tl.store(y_ptr + position[:, None] * C + channel[None, :], sums[r].to(y_ptr.dtype.element_ty), mask=mask)


@_jit
def _weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, index_ptr, height, width, lanes, steps,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr, BM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One column kx of the taps' gradient: sum of grad[i] * x[i + (ky, kx) - K // 2] over a share of the lanes."""
    halo: tl.constexpr = K // 2
    kx = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    share = tl.program_id(2)
    sums = ()  # one per row of the kernel, and one for the bias
    for _ in tl.static_range(K + 1):
        sums = sums + (tl.zeros((BM, BLOCK_C), tl.float32),)
    step = share * steps
    while step < (share + 1) * steps:  # a range with such bounds trips some versions of the interpreter
        lane = step * BM + tl.arange(0, BM)
        rows = ()
        for r in tl.static_range(R):
            position, exists = _place(index_ptr, height, width, lanes, lane, 0, r, K, R, MAP)
            rows = rows + (_load(grad_ptr, position, exists, channel, C),)
            sums = _replace(sums, K, sums[K] + rows[r])
        for dy in tl.static_range(-halo, R + halo):
            position, exists = _place(index_ptr, height, width, lanes, lane, kx - halo, dy, K, R, MAP)
            x = _load(x_ptr, position, exists, channel, C)
            for r in tl.static_range(R):
                if dy - r >= -halo and dy - r <= halo:
                    sums = _replace(sums, dy - r + halo, tl.fma(x, rows[r], sums[dy - r + halo]))
        step += 1
    partial_ptr += share.to(tl.int64) * ((K * K + 1) * C) + channel
    for ky in tl.static_range(K):
        tl.store(partial_ptr + (ky * K + kx) * C, tl.sum(sums[ky], axis=0), mask=channel < C)
    if kx == 0:
        tl.store(partial_ptr + K * K * C, tl.sum(sums[K], axis=0), mask=channel < C)
