"""The visible patches of a batch as a regular tensor (N, K, s*s, C), and what moves features in and out of it.

Every image keeps the same number K of patches, so a "sparse" network needs no sparse tensors: a patch is s x s
positions of C channels (s halves from stage to stage), and every layer that does not mix positions runs on this tensor
as it is. Only the depthwise convolution sees neighbouring patches. Between `scatter` and `gather` it computes exactly
what a submanifold convolution does: removed positions read as zero, and only visible positions are written.
"""

import math

import torch


def gather_rows(x: torch.Tensor, rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Visible patches of a map, by `VisiblePatches.row_index`: (N, h*s, w*s, C) -> shape, (N, K, s*s, C)."""
    return x.reshape(-1, math.isqrt(shape[2]) * shape[3]).index_select(0, rows).view(shape)


def scatter_rows(x: torch.Tensor, rows: torch.Tensor, maps: list[int]) -> torch.Tensor:
    """The map of size [N, h*s, w*s], with zeros where there is no visible patch: (N, K, s*s, C) -> (*maps, C)."""
    side, c = math.isqrt(x.shape[2]), x.shape[3]
    flat = x.new_zeros(maps[0] * maps[1] * (maps[2] // side), side * c)
    return flat.index_copy(0, rows, x.reshape(-1, side * c)).view(*maps, c)


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
        self._tables: dict[tuple, torch.Tensor] = {}

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Visible patches of a map: (N, h*s, w*s, C) -> (N, K, s*s, C)."""
        side = x.shape[1] // self.grid[0]
        return gather_rows(x, self.row_index(side), (self.batch, self.num_visible, side * side, x.shape[-1]))

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The map with zeros at removed positions: (N, K, s*s, C) -> (N, h*s, w*s, C)."""
        side = math.isqrt(x.shape[2])
        return scatter_rows(x, self.row_index(side), [self.batch, *(side * length for length in self.grid)])

    def crop(self, imgs: torch.Tensor, patch_size: int) -> torch.Tensor:
        """Visible pixels: (N, C, h*p, w*p) -> (N*K, C, p, p), a small image per visible patch."""
        patches = imgs.unflatten(3, (self.grid[1], patch_size)).unflatten(2, (self.grid[0], patch_size))
        sample, row, column = self._coordinates()
        return patches[sample, :, row, :, column]

    # ---- index tables -----------------------------------------------------------------------------------------------

    def _coordinates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample, row and column of every visible patch, each (N*K,)."""
        h, w = self.grid
        return self.keep // (h * w), self.keep // w % h, self.keep % w

    def row_index(self, side: int) -> torch.Tensor:
        """(N*K*s,): where each row of s positions of a visible patch lies in the map read as (N*h*s*w, s*C)."""
        if ("rows", side) not in self._tables:
            n, r, c = self._coordinates()
            first = (n * self.grid[0] + r) * side
            offset = torch.arange(side, device=self.keep.device)
            self._tables["rows", side] = ((first[:, None] + offset) * self.grid[1] + c[:, None]).flatten()
        return self._tables["rows", side]

    def patch_index(self, side: int, halo: int) -> torch.Tensor:
        """(N*K, T, T) int32: which visible patches lie around each, T = 2 * ceil(halo / s) + 1; -1 where there is none.

        The middle one is the patch itself.
        """
        if ("patches", side, halo) not in self._tables:
            reach = -(-halo // side)  # neighbouring patches on each side that a halo touches
            (h, w), device, total = self.grid, self.keep.device, self.keep.numel()
            n, r, c = self._coordinates()
            place = torch.full((self.batch, h + 2 * reach, w + 2 * reach), -1, dtype=torch.int32, device=device)
            place[n, r + reach, c + reach] = torch.arange(total, dtype=torch.int32, device=device)
            offset = torch.arange(2 * reach + 1, device=device)
            rows, columns = (r[:, None] + offset)[:, :, None], (c[:, None] + offset)[:, None, :]
            self._tables["patches", side, halo] = place[n[:, None, None], rows, columns]
        return self._tables["patches", side, halo]

    def window_index(self, side: int, halo: int) -> torch.Tensor:
        """(N*K, s+2*halo, s+2*halo): for each position of a patch's window, its index among the visible positions.

        Positions that are removed or outside the image get the index N*K*s*s, where the caller keeps a zero row.
        """
        if ("windows", side, halo) not in self._tables:
            patches = self.patch_index(side, halo)
            offset = torch.arange(-halo, side + halo, device=patches.device)
            patch, inside = offset.div(side, rounding_mode="floor") + patches.shape[1] // 2, offset % side
            index = patches[:, patch[:, None], patch].long()
            inside = inside[:, None] * side + inside
            self._tables["windows", side, halo] = torch.where(
                index < 0, self.keep.numel() * side**2, index * side**2 + inside
            )
        return self._tables["windows", side, halo]
