"""Mean and standard deviation of each channel of a folder of images, as the flags --mean and --std.

python tools/mean_std.py --data_path FOLDER --in_chans 13
python main_pretrain.py --data_set image_folder --data_path FOLDER --in_chans 13 $(python tools/mean_std.py ...)

Values are scaled as they are in training: 8-bit ones by 1/255, unsigned 16-bit ones by 1/65535, others not at all.
Every image counts the same, whatever its size. The flags go to stdout, all else to stderr.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import ArgumentParser
from utils.data.images import BadImage
from utils.data.sampling import shuffled_indices
from utils.data.tars import open_unlabelled
from utils.errors import UsageError, run_cli


class Moments(Dataset):
    """Of each image, mean and mean square per channel: (2, C) in float64; what is wrong with an unreadable one."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            pixels, _ = self.images[index]
        except BadImage as error:
            return str(error)
        values = pixels.contiguous().flatten(1).double()
        scale = 255 if pixels.dtype == torch.uint8 else 1
        return torch.stack([values.mean(1) / scale, values.square().mean(1) / scale**2])


def mean_std(images: Dataset, num_workers: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and standard deviation per channel, (C,) each, and of how many images.

    Raises:
        UsageError: no image can be read, or a channel is the same everywhere.
    """
    total, count = 0, 0
    for moments in DataLoader(Moments(images), batch_size=None, num_workers=num_workers):
        if isinstance(moments, str):
            print(f"unreadable image, left out: {moments}", file=sys.stderr)
            continue
        total, count = total + moments, count + 1
    if not count:
        raise UsageError("--data_path: none of its images can be read")
    mean, square = total / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    if constant := (std <= 1e-7 * mean.abs()).nonzero().flatten().tolist():
        raise UsageError(f"--data_path: channel {constant[0]} (of 0 to {len(std) - 1}) is the same everywhere")
    return mean, std, count


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Mean and standard deviation of each channel, as the flags --mean and --std.")
    parser.add_argument("--data_path", required=True, help="folder of images, however nested")
    parser.add_argument("--in_chans", type=int, default=3, help="channels of the images")
    parser.add_argument("--max_images", type=int, default=10000, help="so many, drawn at random, are enough; 0: all")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    for name in ("in_chans", "max_images", "num_workers"):
        if getattr(args, name) < (name == "in_chans"):
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {int(name == 'in_chans')}")
    images = open_unlabelled(args.data_path, "--data_path", args.in_chans)
    if 0 < args.max_images < len(images):
        images = Subset(images, shuffled_indices(images)[: args.max_images].tolist())
    mean, std, count = mean_std(images, args.num_workers)
    print(f"{count} images", file=sys.stderr)
    words = (f"--{name} " + " ".join(f"{x:.6g}" for x in xs.tolist()) for name, xs in (("mean", mean), ("std", std)))
    print(*words)


if __name__ == "__main__":
    run_cli(main)
