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

import datasets
import main_pretrain
from utils.args import ArgumentParser
from utils.crops import crop, draw_box
from utils.data.images import load_image, load_tensor
from utils.errors import UsageError, run

CPU = torch.device("cpu")
NAMES = ("Pillow, float32", "torchvision, uint8", "torchvision, normalised on the CPU")


class Usual(Dataset):
    """Images of a folder as MAE and its descendants load them."""

    def __init__(self, paths: list[str], input_size: int, mean_std):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(input_size, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*mean_std),
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


def differences(paths: list[str], size: int, min_crop: float) -> tuple[float, float]:
    """Mean and largest absolute difference of the pixels of the same crops, in levels of 255."""
    means, largest = [], 0.0
    for i, path in enumerate(paths):
        image = load_tensor(path)
        torch.manual_seed(i)
        box = draw_box(*image.shape[1:], min_crop)
        usual = load_image(path).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        usual = pil_to_tensor(usual.resize((size, size), Image.Resampling.BICUBIC))
        difference = (crop(image, box._replace(mirrored=False), size).int() - usual.int()).abs()
        means.append(difference.float().mean().item())
        largest = max(largest, difference.max().item())
    return statistics.mean(means), largest


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Images per second of the pre-training loader, against the usual one.")
    parser.add_argument("--data_path", required=True, help="folder of images, however nested")
    parser.add_argument("--input_size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes")
    parser.add_argument("--repeats", type=int, default=7, help="passes over the folder")
    return parser


def main() -> None:
    flags = get_args_parser().parse_args()
    if flags.repeats < 1:
        raise UsageError(f"--repeats {flags.repeats}: must be at least 1")
    torch.set_num_threads(1)
    args = main_pretrain.get_args_parser().parse_args(
        ["--data_set", "image_folder", "--data_path", flags.data_path, "--pin_mem", "false"]
        + [f"--{name}={getattr(flags, name)}" for name in ("input_size", "batch_size", "num_workers")]
    )
    main_pretrain.check_args(args)
    if not Path(flags.data_path).is_dir():
        raise UsageError(f"--data_path {flags.data_path}: no such folder")
    dataset, mean_std = datasets.build_pretrain_dataset(args), datasets.mean_std(args)
    prepare = datasets.build_prepare(dataset, args, CPU)
    usual = Usual(dataset.paths, flags.input_size, mean_std)

    def usual_batches() -> Iterator[torch.Tensor]:
        loader = DataLoader(usual, flags.batch_size, shuffle=True, num_workers=flags.num_workers)
        return (imgs for imgs, _ in loader)

    def own_batches() -> Iterator[torch.Tensor]:
        args.batch_size = min(flags.batch_size, len(dataset))
        draw = partial(main_pretrain.draw_mask, (args.input_size // 32) ** 2, args.mask_ratio)
        loader = datasets.build_train_loader(dataset, args, draw)
        return (batch.data[0] for step in loader.steps(0) for batch in step)

    pipelines = (usual_batches, own_batches, lambda: (prepare(imgs) for imgs in own_batches()))
    rates: list[list[tuple[float, float]]] = [[], [], []]
    for round_ in range(-1, flags.repeats):  # the first one warms up
        for pipeline, found in zip(pipelines, rates, strict=True):
            rate = measure(pipeline)
            if round_ >= 0:
                found.append(rate)
    mean, largest = differences(dataset.paths, args.input_size, args.min_crop)
    print(
        f"{len(dataset)} images, crops of {flags.input_size} px, {flags.num_workers} workers, "
        f"medians of {flags.repeats} passes, torch {torch.__version__}"
    )
    print("| pipeline | images/s | images/s per core | ratio |\n|---|---|---|---|")
    for name, found in zip(NAMES, rates, strict=True):
        ratio = statistics.median(own[1] / other[1] for own, other in zip(found, rates[0], strict=True))
        wall, core = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"| {name} | {wall:.0f} | {core:.0f} | {ratio:.2f} |")
    print(f"the same crops differ by {mean:.4f} of 255 levels on average, by {largest} at most")


if __name__ == "__main__":
    run(main)
