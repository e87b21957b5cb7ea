"""Other ways to do the same work, to measure against and to check against: none of it is used for training."""

import torch
import torch.nn.functional as F

from models.convnextv2 import Encoder


def masked_dense_features(encoder: Encoder, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The encoder as a dense network with masks: what an FCMAE without sparse tensors computes.

    The library's dense layers on channels-last maps, with as few multiplications by the visibility map as give the same
    features: after the stem, at each block's end (so that the next depthwise convolution reads zeros), before every
    downsampling convolution and inside GRN's norm.

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
            statistics = torch.promote_types(y.dtype, torch.float32)
            # as in GRN: the fastest form there is on the CPU
            norm = (y * visible.permute(0, 2, 3, 1)).to(statistics).square().sum(dim=(1, 2), keepdim=True)
            norm = (norm + torch.finfo(statistics).tiny).sqrt()  # its gradient at 0 would be infinite
            norm = (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)).to(y.dtype)
            y = block.grn.gamma * (y * norm) + block.grn.beta + y
            y = F.linear(y, block.pwconv2.weight, block.pwconv2.bias).permute(0, 3, 1, 2)
            x = x + y * visible
    return x
