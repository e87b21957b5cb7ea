"""FCMAE: fully convolutional masked autoencoder pre-training of ConvNeXt V2 (arXiv 2301.00808, section 3)."""

import torch
from torch import nn

from .convnextv2 import SIZES, STEM_STRIDES, Block, Encoder, init_weights, total_stride
from .layers import PatchConv
from .visible import VisiblePatches


def random_mask(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Masks that keep, of each row, the `int(L * (1 - mask_ratio))` patches with the smallest noise.

    noise: (..., L), independent draws of any continuous distribution -> (..., L) float, 1 = removed, 0 = kept.

    Raises:
        ValueError: mask_ratio would keep no patch, or remove none (the loss would be undefined).
    """
    length = noise.shape[-1]
    len_keep = num_visible(length, mask_ratio)
    mask = torch.ones_like(noise, dtype=torch.float32)
    return mask.scatter_(-1, noise.argsort(dim=-1)[..., :len_keep], 0.0)


def num_visible(length: int, mask_ratio: float) -> int:
    """How many of `length` patches stay visible; see `random_mask` for what is raised."""
    len_keep = int(length * (1 - mask_ratio))
    if not 0 < len_keep < length:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {len_keep} of {length} patches: at least one must stay and one be removed"
        )
    return len_keep


def num_patches(size: tuple[int, int], patch_size: int) -> int:
    """Of an image of (height, width)."""
    return (size[0] // patch_size) * (size[1] // patch_size)


class FCMAE(nn.Module):
    """Masked autoencoder with a ConvNeXt V2 encoder that computes visible patches only, and a one-block decoder.

    Args:
        in_chans: image channels.
        depths, dims: the encoder's blocks and channels.
        mask_ratio: share of patches removed where `forward` is not told otherwise.
        decoder_depth, decoder_embed_dim: blocks and channels of the decoder.
        norm_pix_loss: normalise each target patch by its own mean and variance.
        patch_size: side of a patch in pixels, the encoder's total stride: 32, 16 or 8.
    """

    def __init__(
        self, in_chans=3, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), mask_ratio=0.6, decoder_depth=1,
        decoder_embed_dim=512, norm_pix_loss=False, patch_size=32,
    ):  # fmt: skip
        super().__init__()
        stem_strides = {total_stride(stem_stride): stem_stride for stem_stride in STEM_STRIDES}
        if patch_size not in stem_strides:
            raise ValueError(f"patch_size must be 32, 16 or 8 (8 * stem_stride), got {patch_size}")
        self.in_chans, self.patch_size = in_chans, patch_size
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.encoder = Encoder(in_chans, depths, dims, stem_stride=stem_strides[patch_size])
        self.proj = PatchConv(dims[-1], decoder_embed_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim) for _ in range(decoder_depth)))
        self.pred = PatchConv(decoder_embed_dim, patch_size**2 * in_chans, 1)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Encoder.set_grad_checkpointing`; the decoder is small and stays as it is."""
        self.encoder.set_grad_checkpointing(enable)

    def grid_size(self, imgs: torch.Tensor) -> tuple[int, int]:
        """(h, w) in patches. Raises ValueError where height or width is not a multiple of the patch size."""
        height, width = imgs.shape[-2:]
        p = self.patch_size
        if height % p or width % p or not height or not width:
            raise ValueError(f"image height and width must be multiples of the patch size {p}, got {height} x {width}")
        return height // p, width // p

    def gen_random_mask(
        self, imgs: torch.Tensor, mask_ratio: float, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A uniformly random mask per image: (N, L) float on the images' device, 1 = removed, 0 = kept."""
        h, w = self.grid_size(imgs)
        device = imgs.device if generator is None else generator.device
        noise = torch.rand(imgs.shape[0], h * w, device=device, generator=generator)
        return random_mask(noise, mask_ratio).to(imgs.device)

    def forward_encoder(self, imgs: torch.Tensor, mask: torch.Tensor, len_keep: int | None = None) -> torch.Tensor:
        """Features on the grid, zeros at removed patches: (N, C, H, W), (N, L) -> (N, dims[-1], h, w).

        len_keep: the number of visible patches, where known; see `VisiblePatches` for what it saves and what is raised.
        """
        if len(mask) != len(imgs):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, a batch of {len(imgs)} images needs a row for each")
        visible = VisiblePatches(mask, self.grid_size(imgs), len_keep, device=imgs.device)
        *_, x = self.encoder.channels_last_stages(imgs, visible)  # (N, K, 1, dims[-1])
        return visible.scatter(x).permute(0, 3, 1, 2)

    def forward_decoder(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Predicted pixels of every patch: (N, dims[-1], h, w), (N, L) -> (N, p*p*C, h, w)."""
        n, _, h, w = features.shape
        x = self.proj(features).permute(0, 2, 3, 1)  # (N, h, w, decoder_embed_dim)
        removed = mask.to(x.device, non_blocking=True).reshape(n, h, w, 1) != 0
        x = torch.where(removed, self.mask_token.flatten().to(x.dtype), x)
        x = self.decoder(x)
        return self.pred(x.permute(0, 3, 1, 2))

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, L, p*p*C); within a patch row by row, column by column, the channel fastest."""
        (h, w), p = self.grid_size(imgs), self.patch_size
        x = imgs.reshape(imgs.shape[0], imgs.shape[1], h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(imgs.shape[0], h * w, -1)

    def unpatchify(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """The inverse of `patchify`: (N, L, p*p*C) -> (N, C, H, W). grid: (h, w), by default a square one."""
        h, w = grid or (int(x.shape[1] ** 0.5),) * 2
        if h * w != x.shape[1]:
            raise ValueError(f"{x.shape[1]} patches are not a grid of {h} x {w}: give grid=(h, w)")
        p = self.patch_size
        x = x.reshape(x.shape[0], h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(x.shape[0], -1, h * p, w * p)

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error of removed patches, in float32: (N, C, H, W), (N, p*p*C, h, w), (N, L) -> scalar.

        Pixels without data, NaN, are to be 0; patches of nothing else do not count.
        """
        with torch.autocast(imgs.device.type, enabled=False):
            dtype = torch.promote_types(imgs.dtype, torch.float32)
            target, mask = self.patchify(imgs).to(dtype), mask.to(imgs.device, dtype, non_blocking=True)
            no_data = target.isnan()
            target, mask = target.masked_fill(no_data, 0), mask * ~no_data.all(dim=-1)
            if self.norm_pix_loss:
                var, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (var + 1e-6).sqrt()
            loss = (pred.flatten(2).transpose(1, 2).to(dtype) - target).square().mean(dim=-1)  # (N, L)
            return (loss * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, imgs, labels=None, mask_ratio=None, mask=None):
        """One masked-autoencoding pass.

        Args:
            imgs: (N, C, H, W), H and W multiples of the patch size; NaN where there is no data.
            labels: accepted for loaders that have them, and not used.
            mask_ratio: share of patches to remove; the constructor's (0.6) by default.
            mask: (N, L) to use in place of a random one, every row with the same number of visible patches. It is
                checked, which on an accelerator waits for the device, unless mask_ratio tells what `random_mask` kept.

        Returns:
            loss (scalar, float32), pred (N, p*p*C, h, w), mask (N, L).
        """
        if mask is None:
            mask_ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            mask = self.gen_random_mask(imgs, mask_ratio)
        elif mask_ratio is None and not mask.any():
            raise ValueError("the mask removes no patch, so the loss is undefined")
        len_keep = None if mask_ratio is None else num_visible(mask.shape[1], mask_ratio)
        features = self.forward_encoder(imgs.masked_fill(imgs.isnan(), 0), mask, len_keep)
        pred = self.forward_decoder(features, mask)
        return self.forward_loss(imgs, pred, mask), pred, mask

    @torch.no_grad()
    def reconstruct(self, imgs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For pictures: the visible part, and the prediction pasted into it, each (N, C, H, W) in the images' range.

        With norm_pix_loss the prediction is in units of each patch's own deviation; it is put back with the true
        patch's mean and deviation, as MAE's pictures do. NaN, where there is no data, is shown as 0.
        """
        grid, imgs = self.grid_size(imgs), imgs.masked_fill(imgs.isnan(), 0)
        pred = self.forward_decoder(self.forward_encoder(imgs, mask), mask)
        pred, target = pred.flatten(2).transpose(1, 2).float(), self.patchify(imgs).float()
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        removed = mask.to(imgs.device)[..., None] != 0
        visible, pasted = torch.where(removed, 0.0, target), torch.where(removed, pred, target)
        return self.unpatchify(visible, grid), self.unpatchify(pasted, grid)


def _factory(name: str):
    def build(**kwargs) -> FCMAE:
        return FCMAE(**SIZES[name], **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"FCMAE with a {name} encoder; arguments as `FCMAE`."
    return build


convnextv2_atto = _factory("convnextv2_atto")
convnextv2_femto = _factory("convnextv2_femto")
convnextv2_pico = _factory("convnextv2_pico")
convnextv2_nano = _factory("convnextv2_nano")
convnextv2_tiny = _factory("convnextv2_tiny")
convnextv2_base = _factory("convnextv2_base")
convnextv2_large = _factory("convnextv2_large")
convnextv2_huge = _factory("convnextv2_huge")
