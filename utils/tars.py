"""Images in `.tar` shards, read at random by an index of where each lies, which is made once and kept."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from .errors import UsageError
from .images import ARRAY_EXTENSIONS, BadImage, hidden

log = logging.getLogger("fcmae")

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")  # the compressed ones to be refused by name
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
VERSION = 1
OPEN_SHARDS = 256  # of a process, at a time


def tar_shards(path: str, extensions: tuple[str, ...]) -> list[str]:
    """The tars that a path means: a file, those of a glob, or of a folder without images and folders; else none."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        return found or [path] * path.endswith(TAR_EXTENSIONS)
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not hidden(entry.name):
                if entry.is_dir() or entry.name.lower().endswith(extensions):
                    return []
                if entry.name.endswith(TAR_EXTENSIONS):
                    found.append(entry.path)
    return sorted(found)


class TarIndex(Sequence):
    """The images of some tars: index[i] is the path of one, `index.read(i)` its content.

    NumPy arrays alone, about 60 bytes an image, since every loader process holds them.

    Attributes:
        groups: what images have in common, as (folder, label, is_array): the label is the content of the `.cls` file of
            the same key, as WebDataset has it, or "".
        group: the number of each image's group.
    """

    def __init__(self, shards: list[str], groups: list[tuple[str, str, bool]], arrays: dict[str, np.ndarray]):
        self.shards, self.groups, self.arrays, self.group = shards, groups, arrays, arrays["group"]
        self._open = {}

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, i: int) -> str:
        start, length = self.arrays["name"][i]
        name = os.fsdecode(self.arrays["names"][start : start + length].tobytes())
        return os.path.join(self.shards[self.arrays["place"][i, 0]], name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def take(self, order: np.ndarray) -> "TarIndex":
        """Some of the images, in an order of their own."""
        kept = {key: self.arrays[key][order] for key in ("group", "name", "place")}
        return TarIndex(self.shards, self.groups, {**kept, "names": self.arrays["names"]})

    def read(self, i: int) -> bytes:
        """A file's content. Loader processes may share an open shard: pread has no position. Raises BadImage."""
        shard, start, size = self.arrays["place"][i].tolist()
        try:
            if shard not in self._open:
                if len(self._open) == OPEN_SHARDS:
                    self._open.popitem()
                self._open[shard] = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115
            content = os.pread(self._open[shard].fileno(), size, start)
        except OSError as error:
            raise BadImage(f"{self[i]}: {error.strerror}") from error
        if len(content) < size:
            raise BadImage(f"{self[i]}: the tar was cut short since the start")
        return content


def open_index(shards: list[str], flag: str, extensions: tuple[str, ...]) -> TarIndex:
    """The index of some tars, sorted by the names of the images: kept, while no tar changes, beside the first.

    Where that folder cannot be written, it is kept below $XDG_CACHE_HOME (~/.cache).

    Raises:
        UsageError: a file that is no tar, or one that is compressed, cut short or damaged.
    """
    shards = [os.path.abspath(shard) for shard in shards]
    folder = os.path.dirname(shards[0])
    names = [os.path.relpath(shard, folder) for shard in shards]
    try:
        stamp = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, shards)]
    except OSError as error:
        raise UsageError(f"{flag} {error.filename}: {error.strerror}") from error
    stamp = json.dumps([VERSION, extensions, names, stamp])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kept = [Path(folder, f".fcmae-{_digest(names)}.npz"), Path(cache, "fcmae", f"{_digest([folder, *names])}.npz")]
    for path in kept:
        try:
            with np.load(path) as arrays:
                arrays = dict(arrays)
            head = json.loads(arrays.pop("head").tobytes())
            if head["stamp"] == stamp:
                return TarIndex(shards, list(map(tuple, head["groups"])), arrays)
        except Exception:  # none yet, or damaged in any way: it is made anew
            continue
    log.info("%s: reading the headers of %d tars, once", flag, len(shards))
    groups, arrays = _build(shards, flag, extensions)
    head = np.frombuffer(json.dumps({"stamp": stamp, "groups": groups}).encode(), np.uint8)
    for path in kept:
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                np.savez(file, head=head, **arrays)
            os.replace(aside, path)
            break
        except OSError as error:
            reason = error
            with contextlib.suppress(OSError):
                aside.unlink()
    else:
        log.warning("%s: their index is made anew at every start, as it cannot be kept (%s)", flag, reason)
    return TarIndex(shards, groups, arrays)


def _digest(names: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def _build(shards: list[str], flag: str, extensions: tuple[str, ...]) -> tuple[list, dict[str, np.ndarray]]:
    """Groups and arrays as `TarIndex` has them; place is (shard, first byte, bytes), name (first byte, bytes)."""
    scan = partial(_scan, flag=flag, extensions=extensions)
    if len(shards) == 1:
        found = [scan(shards[0])]
    else:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            found = list(pool.map(scan, shards))
    names = [name for names, *_ in found for name in names]
    group = [group for _, groups, _ in found for group in groups]
    place = [np.insert(place, 0, shard, axis=1) for shard, (*_, place) in enumerate(found)]
    order = sorted(range(len(names)), key=names.__getitem__)
    groups = sorted(set(group))
    numbers = {key: i for i, key in enumerate(groups)}
    lengths = np.array([len(os.fsencode(names[i])) for i in order], np.int64)
    return groups, {
        "group": np.array([numbers[group[i]] for i in order], np.int32),
        "place": np.concatenate(place)[order],
        "name": np.stack([lengths.cumsum() - lengths, lengths], axis=1),
        "names": np.frombuffer(os.fsencode("".join(names[i] for i in order)), np.uint8),
    }


def _scan(path: str, flag: str, extensions: tuple[str, ...]) -> tuple[list[str], list[tuple], np.ndarray]:
    """Names of a tar's images, their groups, and their (first byte, bytes), int64 (n, 2)."""
    places, labels = {}, {}
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise ValueError("compressed: unpack it to a plain .tar, whose images can be read at random")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # of a million, gigabytes
                    parts = [part for part in member.name.split("/") if part not in ("", ".")]
                    name = "/".join(parts)
                    if not member.isreg() or any(map(hidden, parts)):
                        continue
                    if name.lower().endswith(extensions):
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
    groups = [
        (os.path.dirname(name), labels.get(_key(name), ""), name.lower().endswith(ARRAY_EXTENSIONS)) for name in places
    ]
    return list(places), groups, np.array(list(places.values()), np.int64).reshape(-1, 2)


def _key(name: str) -> str:
    folder, file = os.path.split(name)
    return f"{folder}/{file.split('.')[0]}"
