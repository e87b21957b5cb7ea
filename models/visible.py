"""The visible patches of a batch as a regular tensor (N, K, s*s, C), and what moves features in and out of it.

Every image keeps the same number K of patches, so a "sparse" network needs no sparse tensors: a patch is s x s
positions of C channels (s halves from stage to stage), and every layer that does not mix positions runs on this tensor
as it is. Only the depthwise convolution sees neighbouring patches. It computes exactly what a submanifold convolution
does: removed positions read as zero, and only visible positions are written.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels
from .layers import correlate, library_weight_grad


class VisiblePatches:
    """Which patches of a batch are visible, with the index tables of every stage (built on first use, then kept).

    Args:
        mask: (N, L), 1 = removed, 0 = visible, patches in row-major order; L = grid[0] * grid[1].
        grid: (h, w), patches per column and per row.
        num_visible: K, where the caller knows it. Otherwise it is read from the mask, which for a mask on an
            accelerator waits for the device: pass masks on the CPU or pass K.
        device: where the features live; the mask's device by default.

    Raises:
        ValueError: the mask's shape is not (N, h * w), or its rows do not keep one and the same number of patches.
    """

    def __init__(self, mask: torch.Tensor, grid: tuple[int, int], num_visible: int | None = None, device=None):
        if mask.dim() != 2 or mask.shape[1] != grid[0] * grid[1]:
            needed = f"a grid of {grid[0]} x {grid[1]} patches needs (N, {grid[0] * grid[1]})"
            raise ValueError(f"mask has shape {tuple(mask.shape)}, {needed}")
        if num_visible is None:
            counts = (mask == 0).sum(dim=1).unique().tolist()
            if len(counts) != 1 or counts[0] == 0:
                raise ValueError(f"every image of a batch must keep the same number (>= 1) of patches, got {counts}")
            num_visible = counts[0]
        self.batch, self.grid, self.num_visible = mask.shape[0], grid, num_visible
        # a stable sort of 0s and 1s lists the visible patches first, in row-major order
        keep = (mask != 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
        keep = keep + torch.arange(self.batch, device=mask.device)[:, None] * mask.shape[1]
        self.keep = keep.flatten().to(device or mask.device, non_blocking=True)  # (N*K,) into the N*L patches
        self._tables: dict[tuple[str, int], torch.Tensor] = {}

    def gather(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """Visible patches of a map: (N, h*s, w*s, C) -> (N, K, s*s, C), s = side."""
        return _Gather.apply(x, self, side).reshape(self.batch, self.num_visible, side * side, x.shape[-1])

    def scatter(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """The map with zeros at removed positions: (N, K, s*s, C) -> (N, h*s, w*s, C)."""
        return _Scatter.apply(x, self, side)

    def crop(self, imgs: torch.Tensor, patch_size: int) -> torch.Tensor:
        """Visible pixels: (N, C, h*p, w*p) -> (N*K, p, p, C), a small channels-last image per visible patch."""
        patches = imgs.unflatten(3, (self.grid[1], patch_size)).unflatten(2, (self.grid[0], patch_size))
        sample, row, column = self._coordinates()
        return patches[sample, :, row, :, column].permute(0, 2, 3, 1)

    def depthwise(self, x: torch.Tensor, conv: nn.Conv2d, form: str | None = None) -> torch.Tensor:
        """Submanifold depthwise convolution: (N, K, s*s, C) -> (N, K, s*s, C).

        form: 'grid' scatters to the map, convolves and gathers; 'window' convolves each visible patch with its halo;
        'kernel' is Triton's. The default is what was measured to be faster: on CPUs by us, on a GPU in its first call.
        """
        side = int(x.shape[2] ** 0.5)
        weight, bias = conv.weight, conv.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _Depthwise.apply(x, weight, bias, self, side, form or self._fastest_form(x, weight, bias, side))

    def _fastest_form(self, x, weight, bias, side: int) -> str:
        if x.device.type == "cpu":
            return "window" if side >= 4 else "grid"
        if not x.is_cuda or not kernels.available(x):
            return "grid"
        forms = {
            form: kernels.with_gradients(lambda x, w, b, form=form: _Depthwise.apply(x, w, b, self, side, form))
            for form in ("grid", "kernel")
        }
        return kernels.choose(("visible patches", side, x.shape[-1], x.dtype, x.device), forms, x, weight, bias)

    # ---- index tables -----------------------------------------------------------------------------------------------

    def _coordinates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample, row and column of every visible patch, each (N*K,)."""
        h, w = self.grid
        return self.keep // (h * w), self.keep // w % h, self.keep % w

    def rows(self, side: int) -> torch.Tensor:
        """(N*K*s,): where each row of s positions of a visible patch lies in the map read as (N*h*s*w, s*C)."""
        if ("rows", side) not in self._tables:
            n, r, c = self._coordinates()
            first = (n * self.grid[0] + r) * side
            offset = torch.arange(side, device=self.keep.device)
            self._tables["rows", side] = ((first[:, None] + offset) * self.grid[1] + c[:, None]).flatten()
        return self._tables["rows", side]

    def slots(self, side: int, halo: int) -> torch.Tensor:
        """(N*K, T, T) int32: which visible patches lie around each, T = 2 * ceil(halo / s) + 1; -1 where there is none.

        The middle one is the patch itself.
        """
        key = (f"slots with a halo of {halo}", side)
        if key not in self._tables:
            reach = -(-halo // side)  # neighbouring patches on each side that a halo touches
            (h, w), device, total = self.grid, self.keep.device, self.keep.numel()
            n, r, c = self._coordinates()
            slot = torch.full((self.batch, h + 2 * reach, w + 2 * reach), -1, dtype=torch.int32, device=device)
            slot[n, r + reach, c + reach] = torch.arange(total, dtype=torch.int32, device=device)
            offset = torch.arange(2 * reach + 1, device=device)
            rows, columns = (r[:, None] + offset)[:, :, None], (c[:, None] + offset)[:, None, :]
            self._tables[key] = slot[n[:, None, None], rows, columns]
        return self._tables[key]

    def windows(self, side: int, halo: int) -> torch.Tensor:
        """(N*K, s+2*halo, s+2*halo): for each position of a patch's window, its index among the visible positions.

        Positions that are removed or outside the image get the index N*K*s*s, where the caller keeps a zero row.
        """
        key = (f"windows with a halo of {halo}", side)
        if key not in self._tables:
            slots = self.slots(side, halo)
            offset = torch.arange(-halo, side + halo, device=slots.device)
            patch, inside = offset.div(side, rounding_mode="floor") + slots.shape[1] // 2, offset % side
            index = slots[:, patch[:, None], patch].long()
            inside = inside[:, None] * side + inside
            self._tables[key] = torch.where(index < 0, self.keep.numel() * side**2, index * side**2 + inside)
        return self._tables[key]


def _take_windows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of x (P, C) at the table's positions, zeros where it says P: (*table.shape, C)."""
    x = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return x.index_select(0, table.flatten()).view(*table.shape, x.shape[1])


def _scatter(x: torch.Tensor, visible: VisiblePatches, side: int) -> torch.Tensor:
    (h, w), c = visible.grid, x.shape[-1]
    out = x.new_zeros(visible.batch * h * side * w, side * c)
    out.index_copy_(0, visible.rows(side), x.reshape(-1, side * c))
    return out.view(visible.batch, h * side, w * side, c)


def _gather(x: torch.Tensor, visible: VisiblePatches, side: int) -> torch.Tensor:
    c = x.shape[-1]
    rows = x.contiguous().view(-1, side * c).index_select(0, visible.rows(side))
    return rows.view(visible.batch, visible.num_visible, side * side, c)


class _Gather(torch.autograd.Function):
    """Gather and scatter are each other's adjoint; autograd's own gradient of indexing would add up, slowly."""

    @staticmethod
    def forward(ctx, x, visible, side):
        ctx.visible, ctx.side = visible, side
        return _gather(x, visible, side)

    @staticmethod
    def backward(ctx, grad):
        return _scatter(grad, ctx.visible, ctx.side), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, visible, side):
        ctx.visible, ctx.side = visible, side
        return _scatter(x, visible, side)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.visible, ctx.side), None, None


class _Depthwise(torch.autograd.Function):
    """The depthwise convolution on visible patches; keeps x (N, K, s*s, C) alone for backward, and remakes the rest.

    The gradient of the input is the same convolution with the kernel turned by 180 degrees. The gradient of the weight
    correlates each patch's window with that patch's gradient, on the CPU as `correlate` does.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, visible, side, form):
        ctx.save_for_backward(x, weight)
        ctx.visible, ctx.side, ctx.form = visible, side, form
        return _convolve(x, weight, bias, visible, side, form)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        visible, side, form = ctx.visible, ctx.side, ctx.form
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight.flip(2, 3), None, visible, side, form)
        if form == "kernel":
            slots = visible.slots(side, weight.shape[-1] // 2)
            grads = kernels.depthwise_weight_grad(x, grad, slots, side, weight.shape[-1])
            return grad_x, *(g.to(weight.dtype) for g in grads), None, None, None
        if ctx.needs_input_grad[1]:
            correlate = _weight_grad_window if x.device.type == "cpu" else _weight_grad_grid
            grad_weight = correlate(x, grad, weight, visible, side)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 1, 2))
        return grad_x, grad_weight, grad_bias, None, None, None


def _convolve(x, weight, bias, visible, side, form):
    c, halo = x.shape[-1], weight.shape[-1] // 2
    if form == "kernel":
        return kernels.depthwise(x, weight, bias, visible.slots(side, halo), side)
    if form == "grid":
        y = _scatter(x, visible, side).permute(0, 3, 1, 2)
        return _gather(F.conv2d(y, weight, bias, padding=halo, groups=c).permute(0, 2, 3, 1), visible, side)
    windows = _take_windows(x.reshape(-1, c), visible.windows(side, halo)).permute(0, 3, 1, 2)  # (N*K, C, s+2h, s+2h)
    return F.conv2d(windows, weight, bias, groups=c).permute(0, 2, 3, 1).reshape(x.shape)


def _weight_grad_window(x, grad, weight, visible, side):
    """In pieces of patches whose windows stay in the cache: several times faster than all at once."""
    c, k, patches = x.shape[-1], weight.shape[-1], visible.keep.numel()
    x = torch.cat([x.reshape(-1, c), x.new_zeros(1, c)])  # the table says row P*s*s where there is nothing
    table, grad = visible.windows(side, k // 2), grad.view(patches, side, side, c)
    total = x.new_zeros(c, 1, k, k, dtype=torch.promote_types(x.dtype, torch.float32))
    piece = max(1, (2 << 20) * torch.get_num_threads() // (table[0].numel() * c * x.element_size()))
    for i in range(0, patches, piece):
        rows, g = table[i : i + piece], grad[i : i + piece]
        if side == 1:  # a 1x1 kernel is a product
            windows = x.index_select(0, rows.flatten()).view(-1, k * k, c)
            total += (windows * g.view(-1, 1, c)).sum(dim=0).t().reshape(c, 1, k, k)
        else:
            windows = x.index_select(0, rows.permute(1, 2, 0).flatten()).view(*rows.shape[1:], -1, c)
            total += correlate(windows, g.permute(1, 2, 0, 3))
    return total.to(x.dtype)


def _weight_grad_grid(x, grad, weight, visible, side):
    return library_weight_grad(_scatter(x, visible, side), _scatter(grad, visible, side), weight)
