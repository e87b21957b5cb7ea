"""The dense half of probe.py: batch norm and one 1x1 convolution on the frozen stages label every pixel.

DINOv2's linear segmentation (arXiv 2304.07193, section 7.4), with the four stages in place of the last layers.
"""

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import draw_segmentation_masks

import datasets
from models.convnextv2 import Encoder
from utils.amp import Amp
from utils.data.files import ImageTree
from utils.data.formats import check_png, check_size
from utils.data.images import BadImage, Reading, reason_of
from utils.data.sampling import random_subset
from utils.data.shapes import CLASSES, Shapes
from utils.data.transforms import eval_transform
from utils.errors import UsageError, refuse
from utils.pictures import tile

log = logging.getLogger("fcmae")

IGNORED = 255  # the label of pixels that do not count
MOST_CLASSES = 4096  # the head has a channel of the mask's size for each
BATCH_SIZE, LEARNING_RATE = 16, 1e-2
COLOURS = ("black", "red", "lime", "blue", "yellow", "cyan", "magenta", "orange", "white", "purple", "green", "brown")


class MaskedImages(Dataset):
    """Images with a mask of the same name below `masks`: float (C, H, W) and int64 (H, W), both squashed to that size.

    Raises:
        UsageError: an image without mask, a file that cannot be read, or a mask that is not one channel of classes.
    """

    def __init__(self, flags: tuple[str, str], images: str, masks: str, args):
        self.images = ImageTree(images, flags[0], args.in_chans)
        datasets.detect_bit_depth(self.images, args)
        self.masks = [Path(masks, Path(x).relative_to(images)).with_suffix(".png") for x in self.images.paths]
        self.flag, self.size = f"{flags[1]} {masks}", args.input_size
        self.transform = eval_transform(args.input_size, args.in_chans, None, *datasets.mean_std(args))
        missing = [path for path in self.masks if not path.is_file()]
        if missing:
            raise UsageError(f"{self.flag}: {len(missing)} images have no mask; the first would be {missing[0]}")

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            image = self.images[index][0]
            return self.transform(image), self.mask(index, image.shape[1:])
        except BadImage as error:
            raise UsageError(f"{self.images.source}: {error}") from error

    def mask(self, index: int, image: torch.Size | None = None) -> torch.Tensor:
        """The labels (H, W) of an image's pixels; image: its height and width, where known."""
        try:
            content = self.masks[index].read_bytes()
            check_png(content)
            with Image.open(io.BytesIO(content)) as file:
                width, height = file.size
                check_size(width, height, Reading.max_pixels)
                mask = squashed(file, self.size)
                if file.format == "PNG" and content[25] == 0:  # grey, which Pillow widens
                    mask = mask // {2: 85, 4: 17}.get(content[24], 1)
        except (OSError, SyntaxError, ValueError) as error:  # the second of a damaged PNG
            raise UsageError(f"{self.flag}: {BadImage(str(self.masks[index]), reason_of(error))}") from error
        h, w = image or (height, width)
        other = f"{self.masks[index]} is {height} x {width}, its image {h} x {w}; both need the same proportions"
        # a mask of another scale may have a side rounded
        refuse(abs(height * w - width * h) > max(height, width, h, w), f"{self.flag}: {other}")
        if mask.ndim != 2 or mask.dtype.kind not in "bui":
            raise UsageError(f"{self.flag}: {self.masks[index]} is not one channel of whole numbers, the classes")
        many = (
            f"{self.masks[index]} has the class {mask.max()}; at most {MOST_CLASSES - 1}, and {IGNORED} to be ignored"
        )
        refuse(mask.max() >= MOST_CLASSES, f"{self.flag}: {many}")
        return torch.from_numpy(mask.astype(np.int64))


def squashed(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The labels at another height and width, none of them mixed."""
    return np.array(mask.resize(size[::-1], Image.Resampling.NEAREST))


class MaskedShapes(Dataset):
    """The drawn shapes with their masks: 0 is what is not the shape, else 1 + its class."""

    def __init__(self, split: str, args):
        self.images, self.size = Shapes(split, max(args.input_size)), args.input_size
        self.transform = eval_transform(args.input_size, args.in_chans, None, *datasets.mean_std(args))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = squashed(Image.fromarray(self.images.mask(index)), self.size)
        return self.transform(self.images[index][0]), torch.from_numpy(mask).long()


class DenseHead(nn.Module):
    """Batch norm and a 1x1 convolution of each stage, summed at the size of the mask.

    The sum is one convolution of the concatenated stages: interpolation commutes with a 1x1 convolution.
    """

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, num_classes, 1)) for dim in dims)

    def forward(self, stages: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Stages (N, dims[i], H_i, W_i) -> logits (N, num_classes, *size)."""
        logits = [layer(stage.float()) for layer, stage in zip(self.layers, stages, strict=True)]
        return sum(F.interpolate(x, size, mode="bilinear", align_corners=False) for x in logits)


def ious(counts: torch.Tensor) -> torch.Tensor:
    """Intersection over union per class of counts (K, K) of labels and predictions; NaN for what is in neither."""
    shared = counts.diagonal()
    return 100 * shared / (counts.sum(0) + counts.sum(1) - shared)


@torch.no_grad()
def stages_of(encoder: Encoder, imgs: torch.Tensor, amp: Amp) -> list[torch.Tensor]:
    with amp.autocast():
        return encoder.forward_stages(imgs.to(amp.device))


def train_head(encoder: Encoder, data: Dataset, num_classes: int, epochs: int, seed: int, amp: Amp) -> DenseHead:
    """A head trained by AdamW under a cosine schedule, the same bits from the same seed."""
    torch.manual_seed(seed)
    head = DenseHead(encoder.dims, num_classes).to(amp.device)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=len(data) >= BATCH_SIZE)
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        total = 0.0
        for imgs, masks in loader:
            logits = head(stages_of(encoder, imgs, amp), masks.shape[1:])
            loss = F.cross_entropy(logits, masks.to(amp.device), ignore_index=IGNORED, reduction="sum")
            loss = loss / (masks != IGNORED).sum().clamp(min=1).item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        log.info("dense: epoch %d of %d, loss %.4f", epoch, epochs, total)
    return head.eval()


@torch.no_grad()
def confusion(encoder: Encoder, head: DenseHead, data: Dataset, num_classes: int, amp: Amp) -> torch.Tensor:
    """Pixels of each label (row) and prediction (column): (K, K), those to be ignored left out."""
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    for imgs, masks in DataLoader(data, BATCH_SIZE):
        predictions = head(stages_of(encoder, imgs, amp), masks.shape[1:]).argmax(1).cpu()
        counted = masks != IGNORED
        counts += torch.bincount(masks[counted] * num_classes + predictions[counted], minlength=len(counts))
    return counts.view(num_classes, num_classes).double()


def load_pairs(args) -> tuple[Dataset, Dataset, list[str]]:
    """Training and test pairs, at most --max_images of each, and the names of the classes."""
    folders = f"--data_set {args.data_set}: --dense true labels shapes, or an image_folder with --masks"
    refuse(args.data_set not in ("shapes", "image_folder"), folders)
    if args.data_set == "shapes":
        pairs, names = [MaskedShapes(split, args) for split in ("train", "val")], ["background", *CLASSES]
    else:
        places = {("--data_path", "--masks"): (args.data_path, args.masks)}
        places["--eval_data_path", "--eval_masks"] = args.eval_data_path, args.eval_masks
        for flags, given in places.items():
            if None in given:
                raise UsageError(f"{flags[given.index(None)]}: --dense true needs it, a folder of images or masks")
        pairs = [MaskedImages(flags, *given, args) for flags, given in places.items()]
        for data in pairs:
            data[0]  # what is wrong with all test pairs is told before training, not after it
        seen = set().union(*(data.mask(i).unique().tolist() for data in pairs for i in range(len(data)))) - {IGNORED}
        names = [str(i) for i in range(max(seen, default=0) + 1)]
    if len(names) < 2:
        raise UsageError(f"--masks {args.masks}: hold one class alone")
    refuse(len(pairs[0]) < 2, f"--data_path {args.data_path}: holds one image alone; batch norm needs two")
    train, test = (random_subset(data, args.max_images) for data in pairs)
    return train, test, names


@torch.no_grad()
def picture(encoder: Encoder, head: DenseHead, data: Dataset, num_classes: int, args, amp: Amp) -> torch.Tensor:
    """Eight test images, their masks and the predictions, laid over them: (3, height, width) in 0..1."""
    imgs, masks = zip(*(data[i] for i in range(min(8, len(data)))), strict=True)
    imgs, masks = torch.stack(imgs), torch.stack(masks)
    predictions = head(stages_of(encoder, imgs, amp), masks.shape[1:]).argmax(1).cpu()
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in datasets.picture_mean_std(args))
    seen = (imgs * std + mean)[:, :3].clamp(0, 1)
    seen = seen if seen.shape[1] == 3 else seen[:, :1].expand(-1, 3, -1, -1)
    colours = [COLOURS[i % len(COLOURS)] for i in range(num_classes)]
    rows = []
    for image, *labels in zip(seen, masks, predictions, strict=True):
        shown = [torch.stack([label == i for i in range(num_classes)]) for label in labels]
        rows += [image, *(draw_segmentation_masks(image, x, alpha=0.6, colors=colours) for x in shown)]
    return tile(torch.stack(rows), 6)


def dense_probe(encoders: dict[str, Encoder], args, amp: Amp) -> tuple[list[list[str]], torch.Tensor]:
    """A table, IoU per class and mean, of each encoder and of chance, and the picture of the first encoder."""
    train, test, names = load_pairs(args)
    columns, drawn = {}, None
    for name, encoder in encoders.items():
        encoder = encoder.to(amp.device)
        head = train_head(encoder, train, len(names), args.epochs, args.seed, amp)
        counts = confusion(encoder, head, test, len(names), amp)
        columns[name] = ious(counts)
        drawn = picture(encoder, head, test, len(names), args, amp) if drawn is None else drawn
    most = counts.sum(1).argmax()  # chance: the most frequent class everywhere
    guess = torch.zeros_like(counts)
    guess[:, most] = counts.sum(1)
    columns["chance"] = ious(guess)
    rows = [["class", *columns], ["---"] * (1 + len(columns))]
    for i, name in enumerate([*names, "mean"]):
        values = [column[i] if i < len(names) else column[~column.isnan()].mean() for column in columns.values()]
        rows.append([name, *("" if math.isnan(value) else f"{value:.2f}" for value in values)])
    return rows, drawn
