"""Images made smaller, in one tar: `--data_path FILE.tar` then loads them several times as fast.

The short side becomes --size, the names of folders stay, so classes do, but `.cls` labels do not. Files are read and
left out as in training; an image that is no larger stays as it is, byte for byte. The same command, started again,
goes on with a tar that was not finished.
"""

import io
import json
import os
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import ArgumentParser, whole
from utils.data.files import ImageFiles, ImageTree
from utils.data.images import ARRAY_EXTENSIONS, BadImage, decode, reason_of, survey
from utils.data.splits import split_folders
from utils.data.tars import open_tar, tar_shards
from utils.errors import UsageError, refuse, run_cli

SETTINGS = ".shrink.json"  # first in the tar; its readers pass over hidden files
SUFFIXES = {"jpeg": (".jpg", ".jpeg"), "webp": (".webp",)}


def shrunk(images: ImageFiles, size: int, kind: str, quality: int, index: int) -> tuple[bytes, bool, str]:
    """A file's content, whether it was made smaller, and "", or what is wrong with it."""
    path, buffer = images.paths[index], io.BytesIO()
    try:
        content = images.read(index)
        pixels = decode(content, path, images.reading)  # a damaged file is told now, not in training
        scale = size / min(pixels.shape[1:])
        if scale >= 1:
            return content, False, ""
        refuse(path.lower().endswith(ARRAY_EXTENSIONS), "is an array")
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        sides = [max(size, round(side * scale)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=2)
        grey = len({band.tobytes() for band in image.split()}) == 1
        (image.getchannel(0) if grey else image).save(buffer, kind, quality=quality)
        return buffer.getvalue(), True, ""
    except Exception as error:  # also of an encoder, to which a side may be too long
        return b"", False, str(BadImage(path, getattr(error, "reason", reason_of(error))))


def member(name: str, content: bytes) -> bytes:
    """A file as it lies in a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def whole_members(path: Path, first: bytes) -> set[str]:
    """Names of the files that an unfinished tar holds whole; what follows them is cut off."""
    path.touch()
    names, end, size = set(), 0, path.stat().st_size
    with open(path, "rb") as file:
        other = f"{path}: was begun with other flags, or is another file; delete it, or give another --output"
        refuse(not first.startswith(file.read(len(first))), other)
        file.seek(0)
        with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:") as tar:
            for found in tar:
                after = found.offset_data + -(-found.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if after > size:
                    break
                names.add(found.name)
                end = after
    os.truncate(path, end)
    return names


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Make images smaller and put them in one tar, which --data_path reads.")
    add = parser.add_argument
    add("--data_path", required=True, help="folder of images, however nested, or tars")
    add("--output", required=True, help="the tar to write")
    add("--size", type=whole(1), default=256, help="short side in pixels; 292 leaves crops more detail")
    add("--format", choices=SUFFIXES, default="jpeg", help="WebP is smaller, and slower to decode")
    add("--quality", type=whole(1, 100), default=90, help="of JPEG or WebP")
    add("--num_workers", type=whole(0, 1024), default=os.cpu_count() or 1, help="processes")
    return parser


def write(part: Path, images: ImageFiles, names: list[tuple[str, str]], args) -> None:
    """Write what the tar lacks. names: of each image, as it is and made smaller."""
    settings = member(SETTINGS, json.dumps([args.data_path, args.size, args.format, args.quality]).encode())
    done = whole_members(part, settings)
    left = [i for i, pair in enumerate(names) if not done.intersection(pair)]
    shrink = partial(shrunk, images, args.size, args.format, args.quality)
    loader = DataLoader(left, batch_size=None, collate_fn=shrink, num_workers=args.num_workers)
    begun, bad = time.perf_counter(), 0
    with open(part, "ab") as file:
        file.write(b"" if done else settings)
        for index, (content, smaller, fault) in zip(left, loader, strict=True):
            if fault:
                bad += 1
                print(f"left out: {fault}", file=sys.stderr)
            else:
                file.write(member(names[index][smaller], content))
        file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
    rate = len(left) / (time.perf_counter() - begun) / max(args.num_workers, 1)
    print(f"{args.output}: {len(names) - bad} images, {bad} left out, {rate:.0f} images/s per process")


def main() -> None:
    args = get_args_parser().parse_args()
    output, part, data_path = Path(args.output), Path(f"{args.output}.part"), f"--data_path {args.data_path}"
    refuse(output.suffix != ".tar", f"--output {output}: must end in .tar")
    refuse(output.exists(), f"--output {output}: is there already")
    refuse("val" in split_folders(args.data_path), f"{data_path}: holds a folder for each split; make a tar of each")
    if tar_shards(args.data_path):
        images = open_tar(args.data_path, "--data_path", 3, labelled=False)
        roots = [images.shards[k] for k in images.places[:, 0]]
    else:
        images = ImageTree(args.data_path, "--data_path")
        roots = [args.data_path] * len(images)
    images.reading = survey(images, images.reading, data_path).reading
    deep = "most of its files have more than 8 bits, or pixels without data, and are to be trained on as they are"
    refuse(images.reading.depth != 8, f"{data_path}: {deep}")
    names = [os.path.relpath(path, root) for path, root in zip(images.paths, roots, strict=True)]
    suffixes = SUFFIXES[args.format]
    smaller = [name if name.lower().endswith(suffixes) else name + suffixes[0] for name in names]
    ((name, count),) = Counter(smaller).most_common(1)
    refuse(count > 1, f"{data_path}: two of its files would be {name} in the tar; rename one")
    try:
        write(part, images, list(zip(names, smaller, strict=True)), args)
        os.replace(part, output)
    except OSError as error:
        raise UsageError(f"--output: {part}: {error.strerror}; with that mended, the same command goes on") from error


if __name__ == "__main__":
    run_cli(main)
