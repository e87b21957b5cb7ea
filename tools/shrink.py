"""Images made smaller, in one tar: `--data_path FILE.tar` then loads them several times as fast.

The short side becomes --size, the names of folders stay, so classes do, but `.cls` labels do not. An image that is no
larger stays as it is, byte for byte. The same command, started again, goes on with a tar that was not finished.
"""

import io
import json
import os
import sys
import tarfile
import time
from contextlib import suppress
from itertools import repeat
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args import ArgumentParser, whole
from utils.data.files import ImageFiles, ImageTree
from utils.data.formats import GDAL_NODATA, deep_colour
from utils.data.splits import split_folders
from utils.data.tars import TarFiles, open_tar, tar_shards
from utils.errors import UsageError, refuse, run_cli

SETTINGS = ".shrink.json"  # first in the tar; its readers pass over hidden files
SUFFIXES = {"jpeg": (".jpg", ".jpeg"), "webp": (".webp",)}


class Shrunk(Dataset):
    """Of each image, the ending that its name gets, its content, and "", or what is wrong with it."""

    def __init__(self, images: ImageFiles, size: int, kind: str, quality: int):
        self.images, self.size, self.kind, self.quality = images, size, kind, quality

    def __getitem__(self, index: int) -> tuple[str, bytes, str]:
        path = self.images.paths[index]
        try:
            content = self.images.read(index)
            with Image.open(io.BytesIO(content)) as image:
                scale, buffer = self.size / min(image.size), io.BytesIO()
                deep = image.mode[0] in "IF" or deep_colour(content, image)
                size = [max(self.size, round(side * scale)) for side in image.size]
                if scale < 1:  # a JPEG at a half, quarter or eighth, where that is still twice as large
                    image.draft(None, [2 * side for side in size])
                image.load()  # a damaged file is told now, not in training
                if scale >= 1:
                    return "", content, ""
                if deep:
                    return "", b"", f"{path}: has more than 8 bits"
                if GDAL_NODATA in getattr(image, "tag_v2", ()):  # which resizing would mix with data
                    return "", b"", f"{path}: names a value for no data"
                image = image.convert("L" if image.mode in ("1", "L") else "RGB")
                image.resize(size, Image.Resampling.BICUBIC).save(buffer, self.kind, quality=self.quality)
        except Exception as error:  # on damaged files, Pillow's decoders raise whatever they run into
            return "", b"", f"{path}: {error or type(error).__name__}"
        return "" if path.lower().endswith(SUFFIXES[self.kind]) else SUFFIXES[self.kind][0], buffer.getvalue(), ""


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def whole_members(path: Path, settings: bytes) -> list[str]:
    """Names of the files that an unfinished tar holds whole; what follows them is cut off."""
    other = f"{path}: was begun with other flags, or is another file; delete it, or give another --output"
    try:
        path.touch()
    except OSError as error:
        raise UsageError(f"--output: {path}: {error.strerror}") from error
    names, end, size = [], 0, path.stat().st_size
    if size:
        with open(path, "rb") as file:
            refuse(file.read(len(SETTINGS)) != SETTINGS[:size].encode(), other)
        with suppress(tarfile.TarError), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                after = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if after > size:
                    break
                refuse(not names and tar.extractfile(member).read() != settings, other)
                names.append(member.name)
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


def main() -> None:
    args = get_args_parser().parse_args()
    output, part = Path(args.output), Path(f"{args.output}.part")
    if output.suffix != ".tar" or output.exists():
        raise UsageError(f"--output {output}: {'is there already' if output.exists() else 'must end in .tar'}")
    if "val" in split_folders(args.data_path):
        raise UsageError(f"--data_path {args.data_path}: holds a folder for each split; make a tar of each")
    source = args.data_path, "--data_path", 3
    images = open_tar(*source, labelled=False) if tar_shards(args.data_path) else ImageTree(*source)
    roots = [images.shards[k] for k in images.places[:, 0]] if isinstance(images, TarFiles) else repeat(args.data_path)
    names = [os.path.relpath(path, root) for path, root in zip(images.paths, roots)]  # noqa: B905 (one root for all)
    if len(set(names)) < len(names):
        raise UsageError(f"--data_path {args.data_path}: two of its tars hold a file of the same name")
    settings = json.dumps([args.data_path, args.size, args.format, args.quality]).encode()
    done = set(whole_members(part, settings))
    left = [i for i, name in enumerate(names) if not {name, name + SUFFIXES[args.format][0]} & done]
    begun, bad = time.perf_counter(), 0
    shrunk = Shrunk(images, args.size, args.format, args.quality)
    loader = DataLoader(Subset(shrunk, left), batch_size=None, num_workers=args.num_workers)
    with open(part, "r+b") as file:
        file.seek(0, os.SEEK_END)
        with tarfile.open(fileobj=file, mode="w") as tar:
            if not done:
                add_file(tar, SETTINGS, settings)
            for index, (ending, content, fault) in zip(left, loader, strict=True):
                if fault:
                    bad += 1
                    print(f"left out: {fault}", file=sys.stderr)
                else:
                    add_file(tar, names[index] + ending, content)
                tar.members.clear()  # of a million, gigabytes
    os.replace(part, output)
    rate = len(left) / (time.perf_counter() - begun) / max(args.num_workers, 1)
    print(f"{output}: {len(names) - bad} images, {bad} left out, {rate:.0f} images/s per process")


if __name__ == "__main__":
    run_cli(main)
