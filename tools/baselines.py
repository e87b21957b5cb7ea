"""Other ways to do the same work, to measure against and to check against: none of it is used for training."""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from models.convnextv2 import Encoder


def masked_dense_features(encoder: Encoder, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The encoder as a dense network with masks: what an FCMAE without sparse tensors computes.

    The library's dense layers on channels-last maps, with as few multiplications by the visibility map as give the same
    features: after the stem, before GRN (so that its norm sees visible positions only), at each block's end (so that
    the next depthwise convolution reads zeros) and, with the last of these, before every downsampling convolution.
    GRN itself is the model's own.

    imgs (N, C, H, W), mask (N, L) with 1 = removed -> (N, dims[-1], h, w), zeros at removed patches.
    """
    p = encoder.patch_size
    grid = (mask == 0).to(imgs).view(-1, 1, imgs.shape[2] // p, imgs.shape[3] // p)

    def layer_norm(x, norm):
        x = F.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
        return x.permute(0, 3, 1, 2)

    x = imgs.contiguous(memory_format=torch.channels_last)
    for i, (downsample, blocks) in enumerate(zip(encoder.downsample_layers, encoder.stages, strict=True)):
        visible = grid.repeat_interleave(2 ** (3 - i), 2).repeat_interleave(2 ** (3 - i), 3)
        if torch.is_autocast_enabled(x.device.type):
            visible = visible.to(torch.get_autocast_dtype(x.device.type))
        conv, norm = downsample if i == 0 else reversed(downsample)
        if i > 0:
            x = layer_norm(x, norm)
        x = F.conv2d(x, conv.weight, conv.bias, stride=conv.stride)
        if i == 0:
            x = layer_norm(x, norm)
        x = x * visible
        for block in blocks:
            y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=x.shape[1])
            y = layer_norm(y, block.norm).permute(0, 2, 3, 1)
            y = F.gelu(F.linear(y, block.pwconv1.weight, block.pwconv1.bias))
            y = block.grn(y * visible.permute(0, 2, 3, 1))
            y = F.linear(y, block.pwconv2.weight, block.pwconv2.bias).permute(0, 3, 1, 2)
            x = x + y * visible
    return x


class MaskedAutoencoderViT(nn.Module):
    """MAE with a ViT encoder (arXiv 2111.06377) from timm's layers: patches of 16 pixels, fixed positions left out.

    The step whose time is to be beaten: the encoder on the visible quarter of the tokens, a decoder of full length,
    the loss on normalised pixels of the removed patches. Position embeddings are learnt, which costs nothing.
    """

    def __init__(self, input_size=224, dim=768, depth=12, heads=12, decoder_dim=512, decoder_depth=8, decoder_heads=16):
        super().__init__()
        self.patch_embed = PatchEmbed(input_size, 16, 3, dim)
        length = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, length + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, length + 1, decoder_dim) * 0.02)
        self.decoder = nn.Sequential(*(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.pred = nn.Linear(decoder_dim, 16 * 16 * 3)

    def forward(self, imgs: torch.Tensor, mask_ratio: float = 0.75) -> torch.Tensor:
        """The loss of one pass: (N, 3, H, W) -> scalar."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        n, length, dim = x.shape
        order = torch.rand(n, length, device=x.device).argsort(dim=1)
        back, keep = order.argsort(dim=1), int(length * (1 - mask_ratio))
        x = x.gather(1, order[:, :keep, None].expand(-1, -1, dim))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1).to(x.dtype), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        tokens = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(n, length - keep, -1)], dim=1)
        tokens = tokens.gather(1, back[:, :, None].expand(-1, -1, tokens.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        pred = self.pred(self.decoder_norm(self.decoder(x)))[:, 1:].float()
        side = imgs.shape[2] // 16
        target = imgs.reshape(n, 3, side, 16, side, 16).permute(0, 2, 4, 3, 5, 1).reshape(n, length, -1)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        loss = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
        removed = (back >= keep).float()
        return (loss * removed).sum() / removed.sum()
