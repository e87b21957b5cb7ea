"""Data sets of image files: folders of any depth, class folders, lists of files; tars.py has those of tars."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from ..errors import UsageError, suggest
from .images import EXTENSIONS, IMAGE_EXTENSIONS, Reading, decode, hidden, read_file

log = logging.getLogger("fcmae")

MANY_CLASSES = 1000  # beyond which a list of fewer images holds ids, not numbers of classes
LINE = "a line is the path of an image, then, after a tab, a space or a comma, its label"


class ImageFiles(Dataset):
    """Image files with their labels; an image is what `decode` makes of its file, then the transform, once one is set.

    Attributes:
        paths, targets: a file and a label for each sample.
        reading: what `decode` is told of all of them.
    """

    def __init__(self, paths: Sequence[str], targets: list[int], in_chans: int):
        self.paths, self.targets, self.transform = paths, targets, None
        self.reading = Reading(in_chans)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = decode(self.read(index), self.paths[index], self.reading)
        return image if self.transform is None else self.transform(image), self.targets[index]

    def read(self, index: int) -> bytes:
        """The content of a file. Raises BadImage."""
        return read_file(self.paths[index])


class ImageTree(ImageFiles):
    """All images below a folder, however nested, each with the label 0.

    Raises:
        UsageError: no such folder, or no images in it.
    """

    def __init__(self, root: str, flag: str, in_chans: int = 3):
        folders = _image_names(root, flag, in_chans)
        paths = sorted(os.path.join(root, folder, name) for folder, names in folders.items() for name in names)
        if not paths:
            raise UsageError(f"{flag} {root}: holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, [0] * len(paths), in_chans)


class ClassFolders(ImageFiles):
    """Images in one folder per class, however nested in there.

    Labels follow the sorted folder names, or `classes` where given.

    Raises:
        UsageError: no such folder, no class folders, a class that has no images or is not among `classes`.
    """

    def __init__(self, root: str, flag: str, classes: list[str] | None = None, in_chans: int = 3):
        folders = _image_names(root, flag, in_chans)
        found = sorted(folder for folder in folders if folder and os.sep not in folder)
        if not found:
            raise UsageError(_no_class_folders(root, flag))
        self.classes = found if classes is None else classes
        numbers = number_classes(found, self.classes, f"{flag} {root}: class folder")
        paths, targets = [], []
        for folder in sorted(folders.keys() - {""}, key=lambda folder: (folder.split(os.sep)[0], folder)):
            paths += [os.path.join(root, folder, name) for name in folders[folder]]
            targets += [numbers[folder.split(os.sep)[0]]] * len(folders[folder])
        empty = sorted(set(found) - {self.classes[label] for label in set(targets)})
        if empty and (classes is None or not paths):
            raise UsageError(f"{flag} {root}: class folder {empty[0]!r} holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, targets, in_chans)


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


def _image_names(root: str, flag: str, in_chans: int) -> dict[str, list[str]]:
    """Every folder below root with its images: of RGB data, arrays count only where there are no other images."""
    if not os.path.isdir(root):
        raise UsageError(f"{flag} {root}: no such folder")
    folders = list_files(root, EXTENSIONS)
    if in_chans == 3:
        images = {
            folder: [x for x in names if x.lower().endswith(IMAGE_EXTENSIONS)] for folder, names in folders.items()
        }
        return images if any(images.values()) else folders
    return folders


def list_files(root: str, extensions: tuple[str, ...]) -> dict[str, list[str]]:
    """Every folder below `root`, by its path from there ("" for itself), with the sorted names of its files.

    Only files with one of the extensions, in any case, count, and nothing hidden; links are followed, except back to
    where they are.
    """
    found, waiting = {}, [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        this = (status.st_dev, status.st_ino)
        if this in above:
            continue
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append((os.path.join(folder, entry.name), above | {this}))
                elif entry.name.lower().endswith(extensions):
                    names.append(entry.name)
        found[folder] = sorted(names)
    return found


def number_classes(found: list[str], classes: list[str], what: str) -> dict[str, int]:
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
        super().__init__([path for _, path, _ in entries], targets, in_chans)


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
