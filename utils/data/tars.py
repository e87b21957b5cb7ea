"""Images in `.tar` shards, read at random by an index of where each lies, which is made once and kept."""

import glob
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ..distributed import main_process_first
from ..errors import UsageError
from .files import ImageFiles, ImageTree, number_classes, number_labels
from .images import ARRAY_EXTENSIONS, EXTENSIONS, BadImage, hidden

log = logging.getLogger("fcmae")

TARS = (".tar", ".tar.gz", ".tgz")  # compressed ones to be refused by name
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
ROW = [("shard", "i4"), ("start", "i8"), ("size", "i8"), ("group", "i4"), ("name", "i8"), ("length", "i4")]
opened = lru_cache(256)(partial(open, mode="rb", buffering=0))  # of many shards, not all at a time


def tar_shards(path: str) -> list[str]:
    """The tars that a path means: a file, those of a glob, or of a folder without images and folders; else none."""
    if not os.path.isdir(path):
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        return found or [path] * path.endswith(TARS)
    found = []
    for entry in os.scandir(path):
        if not hidden(entry.name):
            if entry.is_dir() or entry.name.lower().endswith(EXTENSIONS):
                return []
            found += [entry.path] * entry.name.endswith(TARS)
    return sorted(found)


class TarIndex(Sequence):
    """The images of some tars: index[i] is the path of one, `index.read(i)` its content.

    Attributes:
        groups: what images have in common: their folder; their label, from the `.cls` file of the same key, as in a
            WebDataset, or ""; whether they are arrays.
        rows: a `ROW` for each image: what loader processes hold in place of a million objects. Its name is a part of
            names, the rest lies in its shard.
    """

    def __init__(self, shards: list[str], groups: list[tuple[str, str, bool]], rows: np.ndarray, names: np.ndarray):
        self.shards, self.groups, self.rows, self.names = shards, groups, rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> str:
        shard, *_, start, length = self.rows[i].item()
        return os.path.join(self.shards[shard], os.fsdecode(self.names[start : start + length].tobytes()))

    def read(self, i: int) -> bytes:
        """A file's content. Loader processes may share an open shard: pread has no position. Raises BadImage."""
        shard, start, size, *_ = self.rows[i].item()
        try:
            content = os.pread(opened(self.shards[shard]).fileno(), size, start)
        except OSError as error:
            raise BadImage(self[i], error.strerror) from error
        if len(content) < size:
            raise BadImage(self[i], "the tar was cut short since the start")
        return content


def open_index(shards: list[str], flag: str) -> TarIndex:
    """The images of some tars, sorted by name. Their index is kept, while no tar changes, beside the first.

    Where that folder cannot be written, it is kept below $XDG_CACHE_HOME (~/.cache).

    Raises:
        UsageError: a file that is no tar, or one that is compressed, cut short or damaged.
    """
    shards = [os.path.abspath(shard) for shard in shards]
    folder = os.path.dirname(shards[0])
    names = [os.path.relpath(shard, folder) for shard in shards]
    try:
        stamps = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, shards)]
    except OSError as error:
        raise UsageError(f"{flag} {error.filename}: {error.strerror}") from error
    opened.cache_clear()  # of tars that may have been replaced
    stamp = json.dumps([1, EXTENSIONS, names, stamps])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kept = [Path(folder, f".fcmae-{_digest(names)}.npz"), Path(cache, "fcmae", f"{_digest([folder, *names])}.npz")]
    for path in kept:
        try:
            with np.load(path) as content:
                head = json.loads(content["head"].tobytes())
                if head["stamp"] == stamp:
                    return TarIndex(shards, list(map(tuple, head["groups"])), content["rows"], content["names"])
        except Exception:  # none yet, or damaged in any way: it is made anew
            continue
    log.info("%s: reading the headers of %d tars, once", flag, len(shards))
    index = _build(shards, flag)
    head = np.frombuffer(json.dumps({"stamp": stamp, "groups": index.groups}).encode(), np.uint8)
    for path in kept:
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                np.savez(file, head=head, rows=index.rows, names=index.names)
            os.replace(aside, path)
            return index
        except OSError as error:
            reason = error
            if os.path.exists(aside):
                os.unlink(aside)
    log.warning("%s: the index of its tars is made anew at every start, as it cannot be kept (%s)", flag, reason)
    return index


def _digest(names: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def _build(shards: list[str], flag: str) -> TarIndex:
    if len(shards) == 1:
        found = [_scan(flag, shards[0])]
    else:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            found = list(pool.map(partial(_scan, flag), shards))
    names, keys = ([x for part in found for x in part[i]] for i in (0, 1))
    order = sorted(range(len(names)), key=names.__getitem__)
    groups = sorted(set(keys))
    numbers = {key: i for i, key in enumerate(groups)}
    rows = np.zeros(len(names), ROW)
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(part[0]) for part in found])
    rows["start"], rows["size"] = np.concatenate([part[2] for part in found]).T
    rows["group"] = [numbers[key] for key in keys]
    rows["length"] = [len(os.fsencode(name)) for name in names]
    rows = rows[order]
    rows["name"] = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
    return TarIndex(shards, groups, rows, np.frombuffer(os.fsencode("".join(names[i] for i in order)), np.uint8))


def _scan(flag: str, path: str) -> tuple[list[str], list[tuple[str, str, bool]], np.ndarray]:
    """Names of a tar's images, the groups they are in, and where each starts and its size, int64 (n, 2)."""
    places, labels = {}, {}
    try:
        with open(path, "rb") as file:
            if os.pread(file.fileno(), 6, 0).startswith(COMPRESSED):
                raise ValueError("compressed: unpack it to a plain .tar, whose images can be read at random")
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            while member := tar.next():
                tar.members.clear()  # of a million, gigabytes
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                name = "/".join(parts)
                if not member.isreg() or any(map(hidden, parts)):
                    continue
                if name.lower().endswith(EXTENSIONS):
                    if member.sparse is not None:
                        raise ValueError(f"{name} is stored as a sparse file: pack without --sparse")
                    places[name] = (member.offset_data, member.size)  # of two, the later, as when unpacked
                elif name.endswith(".cls"):
                    content = os.pread(file.fileno(), min(member.size, 1000), member.offset_data)
                    labels[_key(name)] = os.fsdecode(content).strip()
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):  # tarfile ends there without a word
                raise ValueError(f"cut short or damaged at byte {tar.offset}")
    except Exception as error:  # on damaged headers, tarfile raises whatever it runs into
        raise UsageError(f"{flag} {path}: not a tar of images ({error})") from error
    groups = [(os.path.dirname(x), labels.get(_key(x), ""), x.lower().endswith(ARRAY_EXTENSIONS)) for x in places]
    return list(places), groups, np.array(list(places.values()), np.int64).reshape(-1, 2)


def _key(name: str) -> str:
    folder, file = os.path.split(name)
    return f"{folder}/{file.split('.')[0]}"


class TarFiles(ImageFiles):
    """Image files in tars, `paths` being their index."""

    def read(self, index: int) -> bytes:
        return self.paths.read(index)


def open_tar(
    path: str, flag: str, in_chans: int, classes: list[str] | None = None, labelled: bool = True,
    nb_classes: int | None = None,
) -> TarFiles:  # fmt: skip
    """The images of a tar, or of all tars of a folder or glob, in the order of the same tree on disk.

    Args:
        classes, nb_classes: as for `ClassFolders`, and `number_labels`.
        labelled: classes are the folders below the root, which is the folder that holds all others, if there is one;
            or what the `.cls` files of a WebDataset say, as `number_labels` has it. Else all labels are 0.

    Raises:
        UsageError: a file that is no tar, no images, no labels, or a class that is not among `classes`.
    """
    source = f"{flag} {path}"
    with main_process_first():
        index = open_index(tar_shards(path) or [path], flag)
    if not index.groups:
        raise UsageError(f"{source}: not a tar of images (holds no {', '.join(EXTENSIONS)}; unpack tars in it)")
    names, rows, by_label = _by_class(index, in_chans, classes, labelled)
    images = TarIndex(index.shards, index.groups, rows, index.names)
    dataset = TarFiles(images, [0] * len(images), in_chans)
    if not labelled:
        return dataset
    if not images:
        raise UsageError(f"{source}: holds no labels; a labelled image is CLASS/NAME.jpg, or NAME.jpg beside NAME.cls")
    names = [names[group] for group in rows["group"].tolist()]
    if by_label:
        if "" in names:
            raise UsageError(f"{source}: {images[names.index('')]} has no .cls file, as others have")
        dataset.classes, dataset.targets = number_labels(names, images, source, classes or [], nb_classes)
    else:
        dataset.classes = sorted(set(names)) if classes is None else classes
        numbers = number_classes(sorted(set(names)), dataset.classes, f"{source}: class")
        dataset.targets = [numbers[name] for name in names]
    return dataset


def open_unlabelled(root: str, flag: str, in_chans: int) -> ImageFiles:
    """All images of a folder, however nested, or of tars, as `tar_shards` finds them, each with the label 0."""
    return open_tar(root, flag, in_chans, labelled=False) if tar_shards(root) else ImageTree(root, flag, in_chans)


def _by_class(index: TarIndex, in_chans: int, classes: list[str] | None, labelled: bool):
    """Of each group, the name of its class; the rows that count, sorted by class and folder; whether labels name it."""
    folders = [folder.split("/") if folder else [] for folder, *_ in index.groups]
    while labelled and all(len(x) > 1 and x[0] == folders[0][0] and x[0] not in (classes or ()) for x in folders):
        folders = [parts[1:] for parts in folders]
    by_label = any(label for _, label, _ in index.groups)
    without_arrays = in_chans == 3 and not all(is_array for *_, is_array in index.groups)
    names, keys = [], []  # of each group: its class, and what it is sorted by; None: it does not count
    for (folder, label, is_array), parts in zip(index.groups, folders, strict=True):
        names.append(label if by_label else parts[0] if parts else None)
        skipped = (is_array and without_arrays) or (labelled and names[-1] is None)
        keys.append(None if skipped else (names[-1], folder) if labelled else ())
    ranks = {key: i for i, key in enumerate(sorted(set(keys) - {None}))}
    ranks = np.array([ranks.get(key, -1) for key in keys])[index.rows["group"]]
    rows = index.rows[np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]]
    return names, rows, by_label
