"""Data sets of image files: folders of any depth, class folders, lists of files, tars.

Before a transform is set, an image is a tensor as `utils.data.images.load_tensor` has it.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm.data
import torch
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..distributed import main_process_first
from ..errors import UsageError, suggest
from ..index import list_files
from .images import EXTENSIONS, BadImage, decode, hidden, load_tensor
from .tars import TarIndex, open_index, tar_shards

log = logging.getLogger("fcmae")

MANY_CLASSES = 1000  # beyond which a list of fewer images holds ids, not numbers of classes
LINE = "a line is the path of an image, then, after a tab, a space or a comma, its label"


class ImageFiles(Dataset):
    """Image files with their labels.

    Attributes:
        paths, targets: a file and a label for each sample.
        in_chans, eight_bit: what `load_tensor` is told of all of them.
    """

    def __init__(self, paths: list[str], targets: list[int], transform: Callable | None, in_chans: int):
        self.paths, self.targets, self.transform = paths, targets, transform
        self.in_chans, self.eight_bit = in_chans, None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = self._load(index)
        return image if self.transform is None else self.transform(image), self.targets[index]

    def _load(self, index: int) -> torch.Tensor:
        return load_tensor(self.paths[index], self.in_chans, self.eight_bit)


class ImageTree(ImageFiles):
    """All images below a folder, however nested, each with the label 0.

    Raises:
        UsageError: no such folder, or no images in it.
    """

    def __init__(
        self, root: str, flag: str, transform: Callable | None = None, in_chans: int = 3, index_cache: bool = True
    ):
        folders = _image_names(root, flag, in_chans, index_cache)
        paths = sorted(os.path.join(root, folder, name) for folder, names in folders.items() for name in names)
        if not paths:
            raise UsageError(f"{flag} {root}: holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, [0] * len(paths), transform, in_chans)


class ClassFolders(ImageFiles):
    """Images in one folder per class, however nested in there.

    Labels follow the sorted folder names, or `classes` where given.

    Raises:
        UsageError: no such folder, no class folders, a class that has no images or is not among `classes`.
    """

    def __init__(
        self, root: str, flag: str, transform: Callable | None = None, classes: list[str] | None = None,
        in_chans: int = 3, index_cache: bool = True,
    ):  # fmt: skip
        folders = _image_names(root, flag, in_chans, index_cache)
        found = sorted(folder for folder in folders if folder and os.sep not in folder)
        if not found:
            raise UsageError(_no_class_folders(root, flag))
        self.classes = found if classes is None else classes
        self.class_to_idx = _numbered(found, self.classes, f"{flag} {root}: class folder")
        paths, targets = [], []
        for folder in sorted(folders.keys() - {""}, key=lambda folder: (folder.split(os.sep)[0], folder)):
            paths += [os.path.join(root, folder, name) for name in folders[folder]]
            targets += [self.class_to_idx[folder.split(os.sep)[0]]] * len(folders[folder])
        empty = sorted(set(found) - {self.classes[label] for label in set(targets)})
        if empty and (classes is None or not paths):
            raise UsageError(f"{flag} {root}: class folder {empty[0]!r} holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, targets, transform, in_chans)


def class_names(folder: str | Path, flag: str) -> list[str]:
    """Sorted names of the class folders in a folder. Raises UsageError where there are none."""
    if not os.path.isdir(folder):
        raise UsageError(f"{flag} {folder}: no such folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name))
    if not names:
        raise UsageError(_no_class_folders(folder, flag))
    return names


def _no_class_folders(folder: str | Path, flag: str) -> str:
    return f"{flag} {folder}: holds no class folders; labelled images go to {folder}/CLASS/IMAGE"


def _image_names(root: str, flag: str, in_chans: int, index_cache: bool) -> dict[str, list[str]]:
    """Every folder below root with its images: of RGB data, arrays count only where there are no other images."""
    if not os.path.isdir(root):
        raise UsageError(f"{flag} {root}: no such folder")
    folders = list_files(root, EXTENSIONS, index_cache)
    if in_chans == 3:
        images = {folder: [x for x in names if x.lower().endswith(IMG_EXTENSIONS)] for folder, names in folders.items()}
        return images if any(images.values()) else folders
    return folders


def _numbered(found: list[str], classes: list[str], what: str) -> dict[str, int]:
    """Number of each class name. Raises UsageError where a name that was found is not among them."""
    if unknown := sorted(set(found) - set(classes)):
        raise UsageError(
            f"{what} {unknown[0]!r} is not among the {len(classes)} training classes{suggest(unknown[0], classes)}"
        )
    return {name: i for i, name in enumerate(classes)}


class ImageList(ImageFiles):
    """The images that a file lists, a line each: a path and, after a tab, a space or a comma, its label.

    Labels are as `number_labels` has them. A path may hold spaces.

    Args:
        root: the folder that paths are relative to.
        classes: None: labels are neither needed nor read. []: they tell the classes. Else the classes by their number.
        nb_classes: as for `number_labels`.

    Raises:
        UsageError: no such file, or a line, which the message names, that is not understood.
    """

    def __init__(
        self, file: str, flag: str, root: str | None, classes: list[str] | None = None, in_chans: int = 3,
        nb_classes: int | None = None,
    ):  # fmt: skip
        try:
            lines = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        except OSError as error:
            raise UsageError(f"{flag} {file}: {error.strerror}") from error
        entries = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                path, label = _split_line(line)
                if not path.lower().endswith(EXTENSIONS):
                    what = f"names no image ({', '.join(EXTENSIONS)})"
                    raise UsageError(f"{flag} {file}: line {number}, {line.strip()!r}, {what}; {LINE}")
                if not label and classes is not None:
                    raise UsageError(f"{flag} {file}: line {number}, {line.strip()!r}, has no label; {LINE}")
                entries.append((number, os.path.join(root or "", path), label))
        if not entries:
            raise UsageError(f"{flag} {file}: is empty; {LINE}")
        number, path, _ = entries[0]
        if not os.path.isfile(path):
            raise UsageError(f"{flag} {file}: line {number}: no file {path}; paths are absolute or below --data_path")
        targets = [0] * len(entries)
        if classes is not None:
            labels, where = [label for *_, label in entries], [f"line {number}" for number, *_ in entries]
            self.classes, targets = number_labels(labels, where, f"{flag} {file}", classes, nb_classes)
        super().__init__([path for _, path, _ in entries], targets, None, in_chans)


def _split_line(line: str) -> tuple[str, str]:
    """Path and label, or "" where there is none."""
    if "\t" in line:
        path, label = line.rsplit("\t", 1)
    elif line.strip().lower().endswith(EXTENSIONS):
        path, label = line, ""
    else:
        path, label = re.fullmatch(r"(.*?)[ ,]*([^ ,]*)", line.strip()).groups()
    return path.strip(), label.strip()


def number_labels(
    labels: list[str], where: Sequence[str], source: str, classes: list[str], nb_classes: int | None
) -> tuple[list[str], list[int]]:
    """Classes and, for each label, its class's number.

    All labels are names of the classes; or none is, and all are positions among them, from 0. Where classes are named
    by numbers, labels are names.

    Args:
        where: what each label is called in messages, after the source.
        classes: []: the labels tell them, 0 up to the largest where all are numbers.
        nb_classes: the number of classes, where labels are numbers, and the last may be missing.

    Raises:
        UsageError: a label that is none of these, or numbers that leave nearly all classes without an image.
    """
    known = classes
    if not classes and labels[0].isdecimal():
        count = max(1 + max(int(label) for label in labels if label.isdecimal()), nb_classes or 0)
        if count > max(len(labels), MANY_CLASSES, nb_classes or 0):
            raise UsageError(
                f"{source}: labels up to {count - 1} are {count:,} classes, of {len(labels)} images; number them from "
                f"0, or give --nb_classes {count}"
            )
        known = [str(i) for i in range(count)]
    elif not classes:
        known = sorted({label for label in labels if not label.isdecimal()})
    numbers = {name: i for i, name in enumerate(known)}
    by_position = known == [str(i) for i in range(len(known))]
    if not by_position:
        by_position = not any(x.isdecimal() for x in known) and not any(label in numbers for label in labels)
    targets = []
    for i, label in enumerate(labels):
        target = int(label) if by_position and label.isdecimal() else numbers.get(label, len(known))
        if target >= len(known):
            raise UsageError(
                f"{source}: {where[i]}: label {label!r} is not among the {len(known)} classes{suggest(label, known)}; "
                "all labels are names, or, where no class is named by a number, all are positions from 0"
            )
        targets.append(target)
    if empty := () if classes else sorted(set(range(len(known))) - set(targets)):
        log.info("%s: %d of %d classes have no image, the first is %s", source, len(empty), len(known), empty[0])
    return known, targets


class TarFiles(ImageFiles):
    """Image files in tars, `paths` being their index."""

    def _load(self, index: int) -> torch.Tensor:
        return decode(self.paths.read(index), self.paths[index], self.in_chans, self.eight_bit)


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
    images = TarIndex(index.shards, index.groups, rows, index.names)
    dataset = TarFiles(images, [0] * len(images), None, in_chans)
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
        numbers = _numbered(sorted(set(names)), dataset.classes, f"{source}: class")
        dataset.targets = [numbers[name] for name in names]
    return dataset


class TimmFiles(Dataset):
    """A map-style data set of timm's, its files decoded as `ImageFiles` are.

    Args:
        files: whose own transform is not used.
        name: for messages.
    """

    def __init__(self, files: timm.data.ImageDataset, name: str, in_chans: int):
        files.load_bytes = True
        self.files, self.name, self.transform, self.in_chans, self.eight_bit = files, name, None, in_chans, None
        found = getattr(files.reader, "class_to_idx", None) or {}
        self.classes = sorted(found, key=found.get) or None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        try:
            content, target = self.files[index]
        except (OSError, RuntimeError) as error:
            raise BadImage(f"{self.name}: image {index}: {error}") from error
        image = decode(content, f"{self.name}: image {index}", self.in_chans, self.eight_bit)
        return image if self.transform is None else self.transform(image), int(target)
