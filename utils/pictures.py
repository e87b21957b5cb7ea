"""Reconstructions as pictures."""

import torch
from torch import nn
from torchvision.utils import make_grid

from .amp import Amp


def shown(imgs: torch.Tensor) -> int:
    """How many of the channels of (N, C, H, W) a picture has room for: three, else one."""
    return 3 if imgs.shape[1] >= 3 else 1


def reconstructions(
    model: nn.Module, imgs: torch.Tensor, amp: Amp, mean, std, mask_ratio: float, seed: int = 0
) -> torch.Tensor:
    """Input, visible part and prediction pasted into it: (N, C, H, W) -> (N, 3, 3 or 1, H, W) in 0..1."""
    mask = model.gen_random_mask(imgs, mask_ratio, torch.Generator().manual_seed(seed))
    with amp.autocast():
        visible, pasted = model.reconstruct(imgs.to(amp.device), mask)
    columns = torch.stack([imgs, visible.cpu(), pasted.float().cpu()], dim=1)[:, :, : shown(imgs)]
    mean, std = (torch.tensor(x[: columns.shape[2]]).view(-1, 1, 1) for x in (mean, std))
    columns = columns * std + mean
    removed = mask.view(len(mask), 1, *model.grid_size(imgs)).repeat_interleave(model.patch_size, 2)
    columns[:, 1] = torch.where(removed.repeat_interleave(model.patch_size, 3) > 0, 0.5, columns[:, 1])
    return columns.clamp(0, 1)


def tile(pictures: torch.Tensor, columns: int) -> torch.Tensor:
    """Pictures in rows of so many, small ones enlarged: (N, C, H, W) -> (3, height, width)."""
    enlarge = max(1, 128 // pictures.shape[-1])
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(pictures, nrow=columns, padding=4, pad_value=1.0)


def reconstruction_grid(model: nn.Module, imgs: torch.Tensor, amp: Amp, mean, std, seed: int = 0) -> torch.Tensor:
    """Input, visible part and prediction pasted into it, two images a row: a picture (C, H, W) in 0..1."""
    return tile(reconstructions(model, imgs, amp, mean, std, model.mask_ratio, seed).flatten(0, 1), 6)
