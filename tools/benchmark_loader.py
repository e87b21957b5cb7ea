"""How fast the pre-training images are loaded, against the usual pipeline of Pillow and torchvision.

python tools/benchmark_loader.py --data_path FOLDER
python tools/benchmark_loader.py --data_path FOLDER --num_workers 8 --batch_size 256

Both pipelines go through a DataLoader and crop, resize (bicubic) and mirror alike. They take turns, pass by pass,
because machines are noisy. A core's rate is images per second of processor time, of this process and its workers. The
usual pipeline normalises in the loader, this one on the training device; the third row does that on the CPU as well.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.fcmae import random_mask
from utils.args import ArgumentParser
from utils.data.files import ImageTree
from utils.data.images import load_image
from utils.data.sampling import StepLoader, StepSampler, TrainSamples
from utils.data.transforms import Normalise, mean_std, pretrain_transform, sample_box
from utils.errors import UsageError, run

NAMES = ("Pillow, float32", "this project's, uint8", "this project's, normalised on the CPU")
MIN_CROP, MASK_RATIO = 0.2, 0.6


class Usual(Dataset):
    """Images of a folder as MAE and its descendants load them."""

    def __init__(self, paths: list[str], input_size: int):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(input_size, (MIN_CROP, 1.0), interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*mean_std(3)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.transform(load_image(self.paths[index])), 0


def processor_seconds() -> float:
    """Of this process and of those of its workers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(batches: Callable[[], Iterator[torch.Tensor]]) -> tuple[float, float]:
    """Images per second, and per second of processor time, of one pass."""
    wall, processor = time.perf_counter(), processor_seconds()
    count = sum(len(imgs) for imgs in batches())
    return count / (time.perf_counter() - wall), count / (processor_seconds() - processor)


def differences(dataset: ImageTree) -> tuple[float, float]:
    """Mean and largest absolute difference of the pixels of the same crops, in levels of 255."""
    means, largest = [], 0.0
    for i, path in enumerate(dataset.paths):
        torch.manual_seed(i)
        own, _ = dataset[i]
        torch.manual_seed(i)
        image = load_image(path)
        top, left, height, width, mirrored = sample_box(image.height, image.width, MIN_CROP)
        usual = image.resize(own.shape[1:], Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        usual = pil_to_tensor(usual)
        difference = ((own.flip(-1) if mirrored else own).int() - usual.int()).abs()
        means.append(difference.float().mean().item())
        largest = max(largest, difference.max().item())
    return statistics.mean(means), largest


def sample_mask(num_patches: int) -> torch.Tensor:
    return random_mask(torch.rand(num_patches), MASK_RATIO)


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Images per second of the pre-training loader, against the usual one.")
    parser.add_argument("--data_path", required=True, help="folder of images, however nested")
    parser.add_argument("--input_size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes")
    parser.add_argument("--repeats", type=int, default=7, help="passes over the folder")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    for name, least in {"repeats": 1, "input_size": 32, "batch_size": 1, "num_workers": 0}.items():
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {least}")
    torch.set_num_threads(1)
    dataset = ImageTree(args.data_path, "--data_path")
    dataset.transform = pretrain_transform(args.input_size, 3, MIN_CROP)
    usual, normalise = Usual(dataset.paths, args.input_size), Normalise(*mean_std(3))

    def usual_batches() -> Iterator[torch.Tensor]:
        loader = DataLoader(usual, args.batch_size, shuffle=True, num_workers=args.num_workers)
        return (imgs for imgs, _ in loader)

    def own_batches() -> Iterator[torch.Tensor]:
        sampler = StepSampler(len(dataset), min(args.batch_size, len(dataset)))
        samples = TrainSamples(dataset, 0, partial(sample_mask, (args.input_size // 32) ** 2))
        loader = StepLoader(DataLoader(samples, batch_sampler=sampler, num_workers=args.num_workers), sampler)
        return (batch.data[0] for step in loader.steps(0) for batch in step)

    pipelines = (usual_batches, own_batches, lambda: (normalise(imgs) for imgs in own_batches()))
    rates: list[list[tuple[float, float]]] = [[], [], []]
    for round_ in range(-1, args.repeats):  # the first one warms up
        for pipeline, found in zip(pipelines, rates, strict=True):
            rate = measure(pipeline)
            if round_ >= 0:
                found.append(rate)
    mean, largest = differences(dataset)
    print(
        f"{len(dataset)} images, crops of {args.input_size} px, {args.num_workers} workers, "
        f"medians of {args.repeats} passes, torch {torch.__version__}"
    )
    print("| pipeline | images/s | images/s per core | ratio |\n|---|---|---|---|")
    for name, found in zip(NAMES, rates, strict=True):
        ratio = statistics.median(own[1] / other[1] for own, other in zip(found, rates[0], strict=True))
        wall, core = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"| {name} | {wall:.0f} | {core:.0f} | {ratio:.2f} |")
    print(f"the same crops differ by {mean:.4f} of 255 levels on average, by {largest} at most")


if __name__ == "__main__":
    run(main)
