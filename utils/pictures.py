"""Reconstructions, a confusion matrix and predictions as pictures."""

import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms.functional import to_pil_image
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
    removed = F.interpolate(mask.view(len(mask), 1, *model.grid_size(imgs)), scale_factor=model.patch_size)
    columns[:, 1] = torch.where(removed > 0, 0.5, columns[:, 1])
    return columns.clamp(0, 1)


def tile(pictures: torch.Tensor, columns: int) -> torch.Tensor:
    """Pictures in rows of so many, small ones enlarged: (N, C, H, W) -> (3, height, width)."""
    pictures = F.interpolate(pictures, scale_factor=max(1, 128 // max(pictures.shape[-2:])))
    return make_grid(pictures, nrow=columns, padding=4, pad_value=1.0)


def confusion_picture(counts: torch.Tensor, names: list[str]) -> Image.Image:
    """Images of each label (row) and prediction (column), (K, K), shaded by their share of the row.

    names: as `shortened` gives them.
    """
    cell = min(max(900 // len(names), 20), 64)
    font = ImageFont.load_default(max(10, cell // 4))
    margin = round(max(*map(font.getlength, names), font.getlength("columns: pred"))) + 34
    picture = Image.new("RGB", (margin + cell * len(names) + 10,) * 2, "white")
    draw = ImageDraw.Draw(picture)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    for i, name in enumerate(names):
        start = margin + cell * i
        draw.text((margin - 6, start + cell / 2), name, "black", font, anchor="rm")
        upright = Image.new("RGB", (margin - 22, cell), "white")
        ImageDraw.Draw(upright).text((0, cell / 2), name, "black", font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (start, 16))
        for j, (share, count) in enumerate(zip(shares[i].tolist(), counts[i].tolist(), strict=True)):
            left, colour = margin + cell * j, tuple(round(255 - share * (255 - end)) for end in (8, 48, 107))
            draw.rectangle((left, start, left + cell - 1, start + cell - 1), colour, "lightgrey")
            if count and font.getlength(str(count)) < cell:
                middle, ink = (left + cell / 2, start + cell / 2), "white" if share > 0.5 else "black"
                draw.text(middle, str(count), ink, font, anchor="mm")
    draw.text((6, 4), "rows: label", "black", font)
    draw.text((6, 20), "columns: prediction", "black", font)
    return picture


def shortened(name: str, number: int, most: int = 24) -> str:
    """A class name for a picture, on one line, without accents; its number where the font lacks its letters."""
    name = " ".join(name.encode(errors="replace").decode().split())
    name = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    font = ImageFont.load_default(10)
    missing, *letters = (bytes(font.getmask(letter)) for letter in "\uffff" + name)
    if missing in letters:
        return f"class {number}"
    # both ends: names of many classes differ in one of them alone
    return name if len(name) <= most else f"{name[: most // 2 - 1]}...{name[2 - most // 2 :]}"


def captioned(pictures: torch.Tensor, captions: list[list[str]]) -> Image.Image:
    """Pictures (N, C, H, W) in 0..1 in rows of eight, each above its lines of text."""
    side, font, (h, w) = 160, ImageFont.load_default(13), pictures.shape[-2:]
    drawn = round(side * min(1, h / w))
    height, columns = drawn + 16 * max(map(len, captions)) + 10, min(8, len(pictures))
    page = Image.new("RGB", (columns * (side + 8), -(-len(pictures) // columns) * height), "white")
    for i, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
        left, top = i % columns * (side + 8) + 4, i // columns * height + 4
        image = to_pil_image(picture[: shown(pictures)]).convert("RGB")
        page.paste(ImageOps.contain(image, (side, side)), (left, top))
        ImageDraw.Draw(page).text((left, top + drawn + 2), "\n".join(texts), "black", font)
    return page
