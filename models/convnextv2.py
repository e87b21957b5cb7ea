"""ConvNeXt V2 (arXiv 2301.00808): one set of parameters, one Block and one forward for dense and for masked input."""

import itertools
import math
from collections.abc import Iterator

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import GRN, PatchConv
from .visible import VisiblePatches

# name: depths, dims                                                     parameters with 1000 classes
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "convnextv2_atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},  # 3.71 M
    "convnextv2_femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},  # 5.23 M
    "convnextv2_pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},  # 9.07 M
    "convnextv2_nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},  # 15.62 M
    "convnextv2_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},  # 28.64 M
    "convnextv2_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},  # 88.72 M
    "convnextv2_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},  # 197.96 M
    "convnextv2_huge": {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)},  # 660.29 M
}


class Block(nn.Module):
    """Depthwise 7x7 -> LayerNorm -> linear C->4C -> GELU -> GRN -> linear 4C->C -> drop path, added to the input.

    Input and output: (N, H, W, C), or, with `visible`, (N, K, s*s, C). The depthwise convolution alone sees the
    difference.
    """

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, visible: VisiblePatches | None = None) -> torch.Tensor:
        maps = (x if visible is None else visible.scatter(x)).permute(0, 3, 1, 2)
        y = self.dwconv(maps).permute(0, 2, 3, 1)
        if visible is not None:
            return self.pointwise(x, visible.gather(y))
        return self.pointwise(maps.permute(0, 2, 3, 1), y)  # of x, used in two layouts, torch.compile makes a copy

    def pointwise(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """All but the depthwise convolution, whose output is y: what both layouts share."""
        y = self.norm(y)
        positions = y.shape[:3]
        y = self.pwconv1(y.flatten(0, 2)).unflatten(0, positions)  # as rows: what counts operations expects them so
        y = self.act(y)
        y = self.grn(y)
        y = self.pwconv2(y.flatten(0, 2)).unflatten(0, positions)
        return x + self.drop_path(y)


class Stage(nn.Sequential):
    """Blocks of one width, one after the other: (N, H, W, C), or, with `visible`, (N, K, s*s, C), in and out."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor, visible: VisiblePatches | None = None) -> torch.Tensor:
        recomputed = self.grad_checkpointing and torch.is_grad_enabled()
        if recomputed and visible is not None:  # a compiled graph does not let what is recomputed build its tables
            visible.row_index(side := math.isqrt(x.shape[2])), visible.window_index(side, 3)
        masked = () if visible is None else (visible,)  # or no module of one input could stand in a block's place
        for block in self:
            x = checkpoint(block, x, *masked, use_reentrant=False) if recomputed else block(x, *masked)
        return x


def init_weights(module: nn.Module) -> None:
    """Conv and linear weights truncated normal with std 0.02, biases zero; for `Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


STEM_STRIDES = (4, 2, 1)


def total_stride(stem_stride: int) -> int:
    """Pixels per position of the last stage, which is the side of a mask's patch: three downsamplers halve the map."""
    return 8 * stem_stride


class Encoder(nn.Module):
    """Stem and four stages, on whole images or on their visible patches alone.

    Args:
        stem_stride: kernel and stride of the stem; 4 in the paper, 2 or 1 for small images.
    """

    frozen_stages = 0

    def __init__(self, in_chans=3, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), drop_path_rate=0.0, stem_stride=4):
        super().__init__()
        if stem_stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride must be 4, 2 or 1, got {stem_stride}")
        self.in_chans, self.depths, self.dims = in_chans, tuple(depths), tuple(dims)
        self.stem_stride, self.patch_size = stem_stride, total_stride(stem_stride)
        stem = nn.Sequential(PatchConv(in_chans, dims[0], stem_stride), LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, wider in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(dim, eps=1e-6), PatchConv(dim, wider, 2)))
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            Stage(*(Block(dim, next(rates)) for _ in range(depth))) for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward: about a third more time for a fraction of the memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def freeze_stages(self, count: int) -> None:
        """From now on, the stem and the first `count` stages, with what leads into them, compute as in evaluation and
        get no gradient.
        """
        self.frozen_stages = count
        for part in (*self.downsample_layers[:count], *self.stages[:count]):
            part.requires_grad_(False)
        for stage in self.stages[:count]:
            stage.grad_checkpointing = False  # it keeps nothing
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        self.stages[: self.frozen_stages].train(False)
        return self

    def channels_last_stages(self, imgs: torch.Tensor, visible: VisiblePatches | None = None) -> Iterator[torch.Tensor]:
        """Yield the four stages' features: (N, H_i, W_i, dims[i]), or, with `visible`, (N, K, s_i*s_i, dims[i])."""
        check_images(imgs, self.in_chans, self.patch_size)
        x = imgs if visible is None else visible.crop(imgs, self.patch_size)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x).permute(0, 2, 3, 1)
            maps = x.shape
            if visible is not None:  # to the downsamplers each patch is a small map, to the blocks a part of its image
                x = x.reshape(visible.batch, visible.num_visible, -1, maps[-1])
            x = stage(x) if visible is None else stage(x, visible)
            yield x
            x = x.reshape(maps).permute(0, 3, 1, 2)

    def forward_stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The four feature maps of a dense input, for detection and segmentation: (N, dims[i], H / s_i, W / s_i).

        Raises:
            ValueError: an image smaller than the total stride, or of another number of channels.
        """
        return [y.permute(0, 3, 1, 2) for y in self.channels_last_stages(x)]


@torch.fx.wrap  # one node of a traced graph, which checks when it runs
def check_images(imgs: torch.Tensor, in_chans: int, least: int) -> None:
    channels, height, width = imgs.shape[1:]
    if channels != in_chans:
        raise ValueError(f"the images have {channels} channels, the model has in_chans={in_chans}")
    if min(height, width) < least:
        raise ValueError(
            f"images of {height} x {width} are too small: height and width must be at least {least}, the total stride; "
            "a smaller stem_stride takes smaller images"
        )


class ConvNeXtV2(Encoder):
    """ConvNeXt V2 classifier; with num_classes=0 the encoder with its final norm, and forward returns features.

    Args:
        in_chans: image channels.
        num_classes: classes of the head, 0 for none.
        depths, dims: blocks and channels of the four stages.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        head_init_scale: factor on the head's initial weights.
        stem_stride: 4 (the paper), 2 or 1.
    """

    def __init__(
        self, in_chans=3, num_classes=1000, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), drop_path_rate=0.0,
        head_init_scale=1.0, stem_stride=4,
    ):  # fmt: skip
        super().__init__(in_chans, depths, dims, drop_path_rate, stem_stride)
        self.num_classes = num_classes
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        if num_classes > 0:
            init_weights(self.head)
            self.head.weight.data.mul_(head_init_scale)
            self.head.bias.data.mul_(head_init_scale)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled and normalised features: (N, C, H, W) -> (N, dims[-1])."""
        return self.norm(self.forward_stages(x)[-1].mean(dim=(2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits: (N, C, H, W) -> (N, num_classes)."""
        return self.head(self.forward_features(x))


def name_of(model) -> str | None:
    """Which of the published sizes a model, or a checkpoint's `BackboneConfig`, has."""
    return next((name for name in SIZES if SIZES[name] == {"depths": model.depths, "dims": model.dims}), None)


def num_layer_ids(depths: tuple[int, ...], layer_decay_type: str = "single") -> int:
    """Layer ids below the head's; layer-wise decay scales by layer_decay ** (num_layer_ids + 1 - layer_id)."""
    return sum(depths) if layer_decay_type == "single" else 12


def layer_id(name: str, depths: tuple[int, ...], layer_decay_type: str = "single") -> int:
    """Depth of a parameter, by its name, for layer-wise learning-rate decay.

    'single' counts blocks: a downsampling layer shares the id of the first block it feeds, and the head comes after the
    last block. 'group' is the paper's coarser counting for depths (3, 3, 27, 3): three blocks of the third stage share
    an id.
    """
    parts = name.split(".")
    if layer_decay_type == "group":
        if parts[0] == "downsample_layers":
            return (0, 2, 3, 12)[int(parts[1])]
        if parts[0] == "stages":
            stage, block = int(parts[1]), int(parts[2])
            return (1, 2, 3 + block // 3, 12)[stage]
        return num_layer_ids(depths, "group") + 1
    if parts[0] in ("downsample_layers", "stages"):
        stage = int(parts[1])
        return sum(depths[:stage]) + (int(parts[2]) if parts[0] == "stages" else 0) + 1
    return num_layer_ids(depths) + 1


def _factory(name: str):
    def build(**kwargs) -> ConvNeXtV2:
        return ConvNeXtV2(**SIZES[name], **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: depths {SIZES[name]['depths']}, dims {SIZES[name]['dims']}; arguments as `ConvNeXtV2`."
    return build


convnextv2_atto = _factory("convnextv2_atto")
convnextv2_femto = _factory("convnextv2_femto")
convnextv2_pico = _factory("convnextv2_pico")
convnextv2_nano = _factory("convnextv2_nano")
convnextv2_tiny = _factory("convnextv2_tiny")
convnextv2_base = _factory("convnextv2_base")
convnextv2_large = _factory("convnextv2_large")
convnextv2_huge = _factory("convnextv2_huge")
