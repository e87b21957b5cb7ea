"""Mean and standard deviation of each channel of a data set, as the flags --mean and --std.

python tools/mean_std.py --data_path FOLDER --in_chans 13
python main_pretrain.py --data_set image_folder --data_path FOLDER --in_chans 13 $(python tools/mean_std.py ...)

Images are read and values scaled as in training; pixels without data do not count. Every image counts the same,
whatever its size. The flags go to stdout, all else to stderr.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from utils.args import ArgumentParser, whole
from utils.data.sampling import EvalLoader, random_subset, with_transform
from utils.errors import refuse, run_cli
from utils.flags import add_file_arguments
from utils.metrics import Progress

log = logging.getLogger("fcmae")


def moments(pixels: torch.Tensor) -> torch.Tensor:
    """Mean and mean square per channel: (C, H, W) -> (2, C), float64; NaN for a channel without data."""
    values = pixels.flatten(1).double() / (255 if pixels.dtype == torch.uint8 else 1)
    return torch.stack([values.nanmean(1), values.square().nanmean(1)])


def mean_std(images: Dataset, num_workers: int = 0, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and standard deviation per channel, (C,) each, and of how many images: at most so many, drawn at random.

    Raises:
        UsageError: no image can be read, or a channel is the same everywhere.
    """
    sample = random_subset(with_transform(images, moments), most)
    loader = EvalLoader(sample, batch_size=32, num_workers=num_workers)
    progress = Progress("mean and std", len(loader), torch.device("cpu"))
    rows = []
    for step, (found, _) in progress(loader):
        rows.append(found)
        progress.samples += len(found)
        if progress.due(step):
            progress.line(step)
    found = torch.cat(rows) if rows else torch.full((1, 2, 1), torch.nan)  # (N, 2, C)
    mean, square = found.nanmean(0)
    refuse(mean.isnan().any(), "--data_path: none of its images can be read, or a channel has no data")
    std = (square - mean.square()).clamp(min=0).sqrt()
    same = std <= 1e-7 * mean.abs()
    where = f"channel {int(same.int().argmax())} (of 0 to {len(std) - 1})"
    refuse(same.any(), f"--data_path: {where} is the same everywhere")
    return mean, std, len(found)


def plain(number: float) -> str:
    """Six digits, without an exponent: argparse would take -3e-05 for a flag."""
    return np.format_float_positional(number, 6, unique=False, fractional=False, trim="-")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True, help="folder of images, however nested, or of .tar shards")
    add("--train_list", default=None, help="list of images below --data_path")
    add("--in_chans", type=whole(1), default=3, help="channels of the images")
    enough = "so many, drawn at random, are enough; 0: all"
    add("--images", "--max_images", type=whole(0), default=10000, help=enough)
    add("--num_workers", type=whole(0, 1024), default=0, help="loader processes")
    add_file_arguments(add)
    parser.set_defaults(data_set="image_folder")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    log.handlers[:] = [logging.StreamHandler()]
    log.setLevel(logging.INFO)
    images = datasets.unlabelled_files(args)
    datasets.read_alike(images, args)
    mean, std, count = mean_std(images, args.num_workers, args.images or None)
    log.info("%d images", count)
    print("--mean", *map(plain, mean.tolist()), "--std", *map(plain, std.tolist()))


if __name__ == "__main__":
    run_cli(main)
