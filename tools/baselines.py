"""What the benchmark measures against, and tests compare with; and a pass by the loader, beside such a one."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from models import fcmae
from models.convnextv2 import Encoder
from utils.data.files import ImageTree
from utils.data.images import load_image
from utils.data.sampling import StepLoader, StepSampler, TrainSamples, collate
from utils.data.transforms import BICUBIC, Normalise, mean_std, pretrain_transform

MIN_CROP = 0.2  # of pre-training


def masked_dense_features(encoder: Encoder, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The encoder as a dense network with masks: what an FCMAE without sparse tensors computes.

    On channels-last maps, multiplied by the mask no more often than the same features need.
    imgs (N, C, H, W), mask (N, L) with 1 = removed -> (N, dims[-1], h, w), zeros at removed patches.
    """
    p = encoder.patch_size
    grid = (mask == 0).view(-1, imgs.shape[2] // p, imgs.shape[3] // p, 1)
    x = imgs.contiguous(memory_format=torch.channels_last)
    for i, (downsample, blocks) in enumerate(zip(encoder.downsample_layers, encoder.stages, strict=True)):
        x = downsample(x).permute(0, 2, 3, 1)
        visible = grid.repeat_interleave(2 ** (3 - i), 1).repeat_interleave(2 ** (3 - i), 2).to(x.dtype)
        x = x * visible
        for block in blocks:
            y = block.norm(block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            y = block.act(block.pwconv1(y))
            y = block.grn(y * visible.to(y.dtype))
            y = block.pwconv2(y)
            x = x + y * visible.to(y.dtype)
        x = x.permute(0, 3, 1, 2)
    return x


class MaskedAutoencoderViT(nn.Module):
    """MAE (arXiv 2111.06377) from timm's parts: ViT-B/16, 75 % masked, a decoder of 8 blocks and 512 channels."""

    def __init__(self, input_size: int | tuple[int, int]):
        super().__init__()
        self.encoder = timm.create_model("vit_base_patch16_224", img_size=input_size, num_classes=0)
        self.embed = nn.Linear(768, 512)
        self.decoder = VisionTransformer(input_size, embed_dim=512, depth=8, num_heads=16, num_classes=16 * 16 * 3)

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """The loss of one pass: (N, 3, H, W) -> scalar."""
        encoder, decoder, (h, w) = self.encoder, self.decoder, (side // 16 for side in imgs.shape[2:])
        x = encoder.patch_embed(imgs) + encoder.pos_embed[:, 1:]
        n, length, dim = x.shape
        order = torch.rand(n, length, device=x.device).argsort(dim=1)
        back, keep = order.argsort(dim=1), length // 4
        x = x.gather(1, order[:, :keep, None].expand(-1, -1, dim))
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(n, -1, -1).to(x.dtype), x], dim=1)
        x = self.embed(encoder.norm(encoder.blocks(x)))
        mask_tokens = decoder.cls_token.to(x.dtype).expand(n, length - keep, -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1).gather(1, back[:, :, None].expand(-1, -1, 512))
        x = torch.cat([x[:, :1], tokens], dim=1) + decoder.pos_embed
        pred = decoder.head(decoder.norm(decoder.blocks(x)))[:, 1:].float()
        target = imgs.reshape(n, 3, h, 16, w, 16).permute(0, 2, 4, 3, 5, 1).reshape(n, length, -1)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        loss = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
        removed = (back >= keep).float()
        return (loss * removed).sum() / removed.sum()


def sample_mask(args, *shape: int) -> torch.Tensor:
    """(*shape, L) on the CPU, as the loader gives it."""
    return fcmae.random_mask(torch.rand(*shape, fcmae.num_patches(args.input_size, 32)), args.mask_ratio)


def own_pass(args, device, compiled, normalise: bool) -> Callable[[], int]:
    """A pass over a folder by this project's loader, which normalises on the training device, or here on the CPU."""
    dataset = ImageTree(args.data_path, "--data_path")
    dataset.transform = pretrain_transform(args.input_size, 3, MIN_CROP)
    sampler = StepSampler(len(dataset), min(args.batch_size, len(dataset)))
    samples = TrainSamples(dataset, 0, partial(sample_mask, args))
    loader = DataLoader(samples, batch_sampler=sampler, num_workers=args.num_workers, collate_fn=collate)
    loader = StepLoader(loader, sampler)
    transform = Normalise(*mean_std(3)) if normalise else nn.Identity()
    return lambda: sum(len(transform(batch.data[0])) for step in loader.steps(0) for batch in step)


def pillow_pass(args, device, compiled) -> Callable[[], int]:
    """A pass over the folder --data_path as MAE and its descendants load it."""
    crop = transforms.RandomResizedCrop(args.input_size, (MIN_CROP, 1.0), interpolation=BICUBIC)
    rest = transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*mean_std(3))
    load = transforms.Compose([load_image, crop, *rest])
    paths = ImageTree(args.data_path, "--data_path").paths
    stack = transforms.Compose([partial(map, load), list, torch.stack])
    loader = DataLoader(paths, args.batch_size, shuffle=True, num_workers=args.num_workers, collate_fn=stack)
    return lambda: sum(len(imgs) for imgs in loader)
