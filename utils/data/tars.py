"""Images in `.tar` shards, read at random by an index of where each lies, which is made once and kept beside them."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ..distributed import main_process_first
from ..errors import UsageError, refuse
from .files import ImageFiles, T, arrays_beside, extension, is_folder, number_classes, number_labels
from .images import EXTENSIONS, IMAGE_EXTENSIONS, BadImage, hidden
from .splits import NAMES

log = logging.getLogger("fcmae")

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones to be refused by name
SPLITS = {name for names in NAMES.values() for name in names}
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")
opened = lru_cache(256)(partial(open, mode="rb", buffering=0))  # of many shards, not all at a time


def tar_shards(path: str) -> list[str]:
    """The tars that a path means: a file, those of a glob, or of a folder without images and folders; else none."""
    if not os.path.isdir(path):
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        return found or [path] * path.lower().endswith(TARS)
    try:
        entries = [entry for entry in os.scandir(path) if not hidden(entry.name)]
    except OSError:  # told of the folder
        return []
    if any(is_folder(entry) or entry.name.lower().endswith(EXTENSIONS) for entry in entries):
        return []
    return sorted(entry.path for entry in entries if entry.name.lower().endswith(TARS))


class Paths(Sequence):
    """Paths in one block of memory: of a million strings, every loader process would come to own a copy."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return os.fsdecode(self.content[self.ends[i] : self.ends[i + 1]])


class TarFiles(ImageFiles):
    """Image files in tars. places: of each its shard, where it starts there, and its size, int64 (n, 3)."""

    def __init__(self, shards: list[str], names: list[str], places: np.ndarray, *of_files):
        paths = Paths(os.path.join(shards[k], name) for k, name in zip(places[:, 0], names, strict=True))
        super().__init__(paths, [0] * len(names), *of_files)
        self.shards, self.places = shards, places

    def read(self, index: int) -> bytes:
        """A file's content. Loader processes may share an open shard: pread has no position. Raises BadImage."""
        shard, start, size = self.places[index].tolist()
        try:
            content = os.pread(opened(self.shards[shard]).fileno(), size, start)
        except OSError as error:
            raise BadImage(self.paths[index], error.strerror) from error
        if len(content) < size:
            raise BadImage(self.paths[index], "the tar was cut short since the start")
        return content

    def part(self: T, indices: Sequence[int]) -> T:
        part = super().part(indices)
        part.paths, part.places = Paths(part.paths), self.places[np.array(indices, int)]
        return part


def read_index(shards: list[str], flag: str) -> dict:
    """Of some tars: "rows", of each image its name, shard, start, size and `.cls` label or ""; "left_out".

    It is made once and kept beside the first tar, and made anew when one of them has changed. Raises UsageError for a
    file that is no tar, or one that is compressed, cut short or damaged.
    """
    opened.cache_clear()  # of tars that may have been replaced
    try:
        stamps = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, shards)]
    except OSError as error:
        raise UsageError(f"{flag} {error.filename}: {error.strerror}") from error
    names = " ".join(os.path.relpath(shard, os.path.dirname(shards[0])) for shard in shards)
    stamp = json.dumps([5, EXTENSIONS, names, stamps])  # 5: the form of the index
    kept = Path(shards[0]).with_name(f".fcmae-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.json")
    with contextlib.suppress(Exception):  # none yet, or damaged in any way
        if (index := json.loads(kept.read_bytes()))["stamp"] == stamp:
            return index
    log.info("%s: reading the headers of %d tars, once", flag, len(shards))
    if len(shards) == 1:
        found = [_scan(flag, shards[0])]
    else:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            found = list(pool.map(partial(_scan, flag), shards))
    rows = sorted((name, k, *row) for k, (images, _) in enumerate(found) for name, row in images.items())
    index = {"stamp": stamp, "left_out": sum((counts for _, counts in found), Counter()), "rows": rows}
    aside = kept.with_suffix(f".{os.getpid()}")
    try:
        aside.write_text(json.dumps(index))
        os.replace(aside, kept)
    except OSError as error:
        aside.unlink(missing_ok=True)
        log.warning("%s: the index of its tars is made anew at every start, as it cannot be kept (%s)", flag, error)
    return index


def _scan(flag: str, path: str) -> tuple[dict[str, tuple[int, int, str]], Counter]:
    """Of a tar's images, by name: where each starts, its size, its label; and how many other members there are."""
    places, labels, left_out, name = {}, {}, Counter(), "its start"
    try:
        with open(path, "rb") as file:
            if os.pread(file.fileno(), 6, 0).startswith(COMPRESSED):
                raise ValueError("compressed: unpack it, to a folder or to a plain .tar, which is read at random")
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            while (member := _next(tar, name)) is not None:
                tar.members.clear()  # of a million, gigabytes
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if ".." in parts:  # which an unpacking would put elsewhere
                    left_out["names with .."] += 1
                if member.isdir() or any(map(hidden, parts)):
                    continue
                name = "/".join(parts)
                if name.lower().endswith(".cls"):
                    content = os.pread(file.fileno(), min(member.size, 1000), member.offset_data)
                    labels[name[:-4]] = os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).strip()
                elif not name.lower().endswith(EXTENSIONS):
                    left_out[extension(name)] += 1
                elif not member.isreg():
                    left_out["links and devices"] += 1
                elif member.sparse is not None:  # without its holes, an array would hold other numbers
                    raise ValueError(f"{name} is stored as a sparse file: pack without --sparse")
                else:
                    places[name] = (member.offset_data, member.size)  # of two, the later, as when unpacked
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
    except (ValueError, tarfile.TarError) as error:
        raise UsageError(f"{flag} {path}: not a tar of images ({error})") from error
    return {name: (*place, _label(name, labels)) for name, place in places.items()}, left_out


def _next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    """The next member; None at the end. Raises ValueError where what follows the member `name` is damaged."""
    file, size, reason = tar.fileobj, os.fstat(tar.fileobj.fileno()).st_size, "no end of the tar"
    try:
        if (member := tar.next()) is not None:
            return member
        file.seek(tar.offset)  # at damaged headers and at zeros, tarfile ends without a word
        rest = iter(lambda: file.read(2**20), b"")
        if size >= tar.offset + tarfile.BLOCKSIZE and not any(chunk.strip(b"\0") for chunk in rest):
            return None
    except Exception as error:  # on damaged headers, tarfile raises whatever it runs into
        reason = error
    where = f"cut short or damaged at byte {min(tar.offset, size):,} of {size:,}"
    raise ValueError(f"{where}: all that follows {name} is lost; pack it anew ({reason})")


def _label(name: str, labels: dict[str, str]) -> str:
    """What NAME.cls says of an image NAME.jpg; else, as in a WebDataset, of NAME.left.jpg; "" where there is none."""
    folder, file = os.path.split(name)
    sample = os.path.join(folder, file.split(".")[0])
    return labels.get(os.path.splitext(name)[0], labels.get(sample, ""))


def open_tar(
    path: str, flag: str, in_chans: int, classes: list[str] | None = None, labelled: bool = True,
    nb_classes: int | None = None,
) -> TarFiles:  # fmt: skip
    """The images of a tar, or of all tars of a folder or glob, in the order of the same tree on disk.

    Classes are the folders below the root, which is the folder that holds all others, if there is one; or what the
    `.cls` files of a WebDataset say, as `number_labels` has it; not labelled: all labels are 0. Raises UsageError for a
    file that is no tar, no images, no labels, or a class that is not among `classes`.
    """
    source, shards = f"{flag} {path}", [os.path.abspath(shard) for shard in tar_shards(path) or [path]]
    splits = {name[0] for shard in shards if (name := SPLIT.search(os.path.basename(shard).lower()))}
    globs = " or ".join(f"'{os.path.dirname(shards[0])}/*{split}*.tar'" for split in sorted(splits))
    refuse(len(splits) > 1, f"{source}: its tars are of several splits; give those of one: {globs}")
    with main_process_first():
        index = read_index(shards, flag)
    rows, left_out = index["rows"], Counter(index["left_out"])
    refuse(not rows, f"{source}: not a tar of images (holds no {', '.join(EXTENSIONS)}; unpack tars in it)")
    if arrays_beside([row[0] for row in rows], in_chans):
        images = [row for row in rows if row[0].lower().endswith(IMAGE_EXTENSIONS)]
        left_out += Counter({".npy, .npz": len(rows) - len(images)})
        rows = images
    by_label = any(row[4] for row in rows)
    if not by_label:
        folders = _class_folders([row[0] for row in rows], classes or [])
        if len(found := {*folders} - {""}) > 1 and {name.lower() for name in found} <= SPLITS:
            raise UsageError(f"{source}: its folders {', '.join(sorted(found))} are no classes; make a tar of each")
    if labelled and not by_label:
        left_out.update(extension(row[0]) for row, folder in zip(rows, folders, strict=True) if not folder)
        rows = [(*row[:4], folder) for row, folder in zip(rows, folders, strict=True) if folder]
    if labelled:
        rows.sort(key=lambda row: (row[4], os.path.dirname(row[0])))
    names, labels = [row[0] for row in rows], [row[4] for row in rows]
    places = np.array([row[1:4] for row in rows], np.int64).reshape(-1, 3)
    dataset = TarFiles(shards, names, places, in_chans, source, left_out)
    if not labelled:
        return dataset
    refuse(not names, f"{source}: holds no labels; a labelled image is CLASS/NAME.jpg, or NAME.jpg beside NAME.cls")
    if not by_label:
        dataset.classes, dataset.targets = number_classes(labels, classes or sorted({*labels}), f"{source}: class")
    elif "" in labels:
        raise UsageError(f"{source}: {dataset.paths[labels.index('')]} has no .cls file, as others have")
    else:
        dataset.classes, dataset.targets = number_labels(labels, dataset.paths, source, classes or [], nb_classes)
    return dataset


def _class_folders(names: list[str], classes: list[str]) -> list[str]:
    """Of each image the folder below the root of all; "" where it lies in none."""
    folders = {os.path.dirname(name) for name in names}
    parts = [folder.split("/") if folder else [] for folder in folders]
    while all(len(x) > 1 and x[0] == parts[0][0] and x[0] not in classes for x in parts):
        parts = [x[1:] for x in parts]
    found = {folder: x[0] if x else "" for folder, x in zip(folders, parts, strict=True)}
    return [found[os.path.dirname(name)] for name in names]
