"""Data sets of image files: folders of any depth, class folders, lists of files; tars.py has those of tars."""

import copy
import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import median_low
from typing import TypeVar

import torch
from torch.utils.data import Dataset

from ..errors import UsageError, refuse, suggest
from .images import EXTENSIONS, IMAGE_EXTENSIONS, Reading, Survey, decode, read_file, shown, visible

T = TypeVar("T", bound="ImageFiles")
log = logging.getLogger("fcmae")

MANY_CLASSES = 1000  # beyond which a list of fewer images holds ids, not numbers of classes
LOOKED_FOR = 100_000  # files of a list, before training; a network file system takes a minute for so many
LISTS = (".csv", ".tsv", ".txt")  # what --data_path takes for a list
DEPTHS = {8: "bytes", 16: "shares of what 8 or 16 bits can hold", 32: "numbers as they are"}
EMPTY = ",;\t\f\v "  # spreadsheets fill up lines with commas
LINE = "a line is the path of an image, then, after a tab, a comma, a semicolon or a space, its label"
LINE += "; or a header names the columns, path and label among them"
PATHS = ("path", "file", "filename", "filepath", "image", "imagepath", "imagename", "img", "imgpath")
LABELS = ("label", "labels", "class", "classname", "target", "category", "labelname")


class ImageFiles(Dataset):
    """Image files with their labels; an image is what `decode` makes of its file, then the transform, once one is set.

    source: what they are called in messages. left_out: how many other files there are, by extension.
    """

    def __init__(self, paths: Sequence[str], targets: list[int], in_chans: int, source: str, left_out: Counter):
        self.paths, self.targets, self.transform = paths, targets, None
        self.reading, self.source = Reading(in_chans), source
        if left_out:
            counts = ", ".join(f"{extension} {count}" for extension, count in left_out.most_common(10))
            log.info("%s: %d files left out: %s", source, sum(left_out.values()), counts)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = decode(self.read(index), self.paths[index], self.reading)
        return image if self.transform is None else self.transform(image), self.targets[index]

    def read(self, index: int) -> bytes:
        """The content of a file. Raises BadImage."""
        return read_file(self.paths[index])

    def part(self: T, indices: Sequence[int]) -> T:
        """The same data set with these images alone."""
        part = copy.copy(self)
        part.paths, part.targets = ([x[i] for i in indices] for x in (self.paths, self.targets))
        return part


class ImageTree(ImageFiles):
    """All images below a folder, however nested, each with the label 0. Raises UsageError where there are none."""

    def __init__(self, root: str, flag: str, in_chans: int = 3):
        folders, left_out = _image_names(root, flag, in_chans)
        paths = sorted(os.path.join(root, folder, name) for folder, names in folders.items() for name in names)
        if not paths:
            raise UsageError(f"{flag} {root}: holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, [0] * len(paths), in_chans, f"{flag} {root}", left_out)


class ClassFolders(ImageFiles):
    """Images in one folder per class, however nested in there; labels follow the sorted names, or `classes`.

    Raises UsageError where there are no class folders, or one that has no images or is not among `classes`.
    """

    def __init__(self, root: str, flag: str, classes: list[str] | None = None, in_chans: int = 3):
        folders, left_out = _image_names(root, flag, in_chans)
        order = sorted((folder.split(os.sep)[0], folder) for folder in folders if folder)
        found = sorted({name for name, _ in order})
        refuse(not found, f"{flag} {root}: holds no class folders; labelled images go to {root}/CLASS/IMAGE")
        left_out.update(map(extension, folders[""]))  # of no class
        paths = [os.path.join(root, folder, file) for _, folder in order for file in folders[folder]]
        names = [name for name, folder in order for _ in folders[folder]]
        self.classes, targets = number_classes(names, classes or found, f"{flag} {root}: class folder")
        empty = sorted(set(found) - set(names))
        if empty and (classes is None or not paths):
            raise UsageError(f"{flag} {root}: class folder {empty[0]!r} holds no images ({', '.join(EXTENSIONS)})")
        super().__init__(paths, targets, in_chans, f"{flag} {root}", left_out)


def describe(dataset: ImageFiles, found: Survey, input_size: tuple[int, int]) -> None:
    """Log what a data set of files holds, `found` in a sample of them, and warn of what is seldom meant."""
    depth, sample = DEPTHS[dataset.reading.depth], len(found.sizes) + len(found.bad)
    kinds = Counter(found.kinds) + Counter(unreadable=len(found.bad))
    heights, widths = (f"{min(x)} to {max(x)}, median {median_low(x)}" for x in zip(*found.sizes, strict=True))
    log.info("%s: %d images, %d channels, read as %s", dataset.source, len(dataset), dataset.reading.in_chans, depth)
    log.info("in a sample of %d: %s", sample, "; ".join(f"{count} {kind}" for kind, count in kinds.most_common(9)))
    log.info("heights %s; widths %s; no data in %.2g %% of the pixels", heights, widths, 100 * found.no_data)
    if small := sum(h < input_size[0] or w < input_size[1] for h, w in found.sizes):
        log.info("%d of %d images are smaller than --input_size %s and enlarged", small, sample, input_size)
    if classes := getattr(dataset, "classes", None):
        sizes = Counter(each_label(dataset.targets))
        ranked = sorted((sizes[i], name) for i, name in enumerate(classes))
        told = [f"{ranked[i][0]} ({ranked[i][1]})" for i in (0, len(ranked) // 2, -1)]
        log.info("images per class: smallest %s, median %s, largest %s", *told)
        if few := [f"{name} {count}" for count, name in ranked if count < 10]:
            log.info("%d of %d classes have fewer than 10 images: %s", len(few), len(classes), ", ".join(few[:10]))


def each_label(targets: Sequence) -> Iterator[int]:
    """The labels of all samples, whether each has one or a tuple of them."""
    return chain.from_iterable(x if isinstance(x, tuple) else (x,) for x in targets)


def _image_names(root: str, flag: str, in_chans: int) -> tuple[dict[str, list[str]], Counter]:
    """Every folder below root with its images; how many other files there are, by extension."""
    if not os.path.isdir(root):
        raise UsageError(f"{flag} {root}: no such folder")
    left_out = Counter()
    folders = list_files(root, EXTENSIONS, left_out)
    if arrays_beside([name for names in folders.values() for name in names], in_chans):
        for folder, names in folders.items():
            folders[folder] = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
            left_out.update(extension(name) for name in set(names) - set(folders[folder]))
    return folders, left_out


def arrays_beside(names: list[str], in_chans: int) -> bool:
    """Whether arrays are something else, beside images: of RGB data, where they are not most of the files."""
    return in_chans == 3 and 2 * sum(name.lower().endswith(IMAGE_EXTENSIONS) for name in names) >= len(names)


def list_files(root: str, extensions: tuple[str, ...], left_out: Counter | None = None) -> dict[str, list[str]]:
    """Every folder below `root`, by its path from there ("" for itself), with the sorted names of its files.

    Only files with one of the extensions, in any case, count, and nothing hidden; links are followed, except back to
    where they are. What cannot be listed is reported; left_out is told of other files, by extension.
    """
    found, waiting = {}, [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path, names = os.path.join(root, folder), []
        try:
            status = os.stat(path)
            this = (status.st_dev, status.st_ino)
            if this in above:
                continue
            entries = visible(path)
        except OSError as error:  # also one that is gone since
            log.warning("%r is left out: %s", path, error.strerror)
            entries = []
        for entry in entries:
            if is_folder(entry):
                waiting.append((os.path.join(folder, entry.name), above | {this}))
            elif entry.name.lower().endswith(extensions) and (entry.is_symlink() or entry.is_file()):  # no pipe
                names.append(entry.name)
            elif left_out is not None:
                left_out[extension(entry.name)] += 1
        found[folder] = sorted(names)
    return found


def is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # which fails on a link to itself


def extension(name: str) -> str:
    """What a file is counted as where it is left out."""
    return os.path.splitext(name)[1].lower() or "without extension"


def number_classes(names: list[str], classes: list[str], what: str) -> tuple[list[str], list[int]]:
    """The classes, and the number of each name among them. Raises UsageError where it is none of them."""
    if unknown := sorted(set(names) - set(classes)):
        raise UsageError(
            f"{what} {unknown[0]!r} is not among the {len(classes)} training classes{suggest(unknown[0], classes)}"
        )
    numbers = {name: i for i, name in enumerate(classes)}
    return classes, [numbers[name] for name in names]


class ImageList(ImageFiles):
    """The images that a file in UTF-8 or UTF-16 lists, see `split_line`; labels are as `number_labels` has them.

    root: the folder that paths are relative to. classes: None: labels are neither needed nor read. Raises UsageError,
    which names the line, for one that cannot be understood, and where none of the files is there.
    """

    def __init__(
        self, file: str, flag: str, root: str | None, classes: list[str] | None = None, in_chans: int = 3,
        nb_classes: int | None = None,
    ):  # fmt: skip
        source, paths, labels, where = f"{flag} {file}", [], [], []
        split, header = split_line, False
        for number, line in enumerate(text_lines(file, source), 1):
            if not line.strip(EMPTY):
                continue
            path, label = split(line)
            if path.lower().endswith(EXTENSIONS):
                fault = "" if label or classes is None or hasattr(self, "several") else "has no label"
            elif not (paths or header) and _is_header(line):
                split, header = by_columns(line), True
                continue
            else:
                fault = f"names no image ({', '.join(EXTENSIONS)})" if path else "has no path, or columns without name"
            refuse(fault, f"{source}: line {number}, {line.strip()[:200]!r}, {fault}; {LINE}")
            paths.append(os.path.join(root or "", path))
            labels.append(label)
            where.append(f"line {number}")
        refuse(not paths, f"{source}: is empty; {LINE}")
        missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)] if len(paths) <= LOOKED_FOR else []
        if missing:
            names = ", ".join(shown(paths[i]) for i in missing[:10]) + ", ..." * (len(missing) > 10)
            count = f"{len(missing)} of {len(paths)} are not there"
            found = f"{source}: {where[missing[0]]}: no file {names}; paths are absolute or below --data_path ({count})"
            refuse(len(missing) == len(paths), found)
            log.info("%s", found)
        targets = [0] * len(paths)
        if classes is not None:
            self.classes, targets = self.number(labels, where, source, classes, nb_classes)
            if clash := len({*zip(paths, targets, strict=True)}) - len({*paths}):
                several = "several stand on one line, as cat;dog, with --multi_label true"
                log.warning("%s: %d lines give an image another label than one before; %s", source, clash, several)
        super().__init__(paths, targets, in_chans, source, Counter())

    def number(self, labels: list[str], *of_labels) -> tuple[list[str], list]:
        if found := next((label for label in labels if ";" in label), ""):
            log.warning("%s: %r is taken for one class; --multi_label true would split it at ';'", of_labels[1], found)
        return number_labels(labels, *of_labels)


class MultiLabelList(ImageList):
    """The same with labels that ";" separates, or none; a sample's are float32 (classes,), 1 for those that it has."""

    several = True  # labels a line

    def number(self, labels: list[str], where: list[str], source: str, *of_labels) -> tuple[list[str], list]:
        names = [[*dict.fromkeys(filter(None, map(str.strip, label.split(";"))))] for label in labels]
        refuse(not any(names), f"{source}: holds no labels; a line is a path, a comma, and labels as in cat;dog")
        if count := names.count([]):
            log.info("%s: %d of %d images have no label", source, count, len(names))
        places = [place for place, found in zip(where, names, strict=True) for _ in found]
        classes, flat = number_labels([*chain.from_iterable(names)], places, source, *of_labels)
        numbers = iter(flat)
        return classes, [tuple(islice(numbers, len(found))) for found in names]

    def __getitem__(self, index: int):
        image, numbers = super().__getitem__(index)
        return image, torch.zeros(len(self.classes)).index_fill(0, torch.tensor(numbers, dtype=torch.int64), 1)


def text_lines(file: str, source: str) -> list[str]:
    """Of a text in UTF-8 or UTF-16. Raises UsageError, which names `source`, for another file."""
    try:
        refuse(Path(file).is_char_device(), f"{source}: is a device, as /dev/zero without end; give a file")
        content = Path(file).read_bytes()
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        text = content.decode(encoding, errors="surrogateescape")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    refuse("\0" in text, f"{source}: is no text in UTF-8, or in UTF-16 with a byte order mark")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n").split("\n")  # cat a.csv b.csv


def split_line(line: str) -> tuple[str, str]:
    """Path and label ("": none) of a list's line by csv's rules, split at a tab, comma, semicolon or space.

    A path may hold blanks and commas, quoted or not.
    """
    line = line.strip().rstrip(EMPTY)
    if line.lower().endswith(EXTENSIONS):
        return line, ""
    for delimiter in "\t,; ":
        try:
            *fields, label = next(csv.reader([line], delimiter=delimiter)) if '"' in line else line.split(delimiter)
        except csv.Error:  # too long: no list
            break
        path = delimiter.join(fields).strip(EMPTY)
        if path.lower().endswith(EXTENSIONS):
            return path, label.strip()
        if line[0] == '"' and label.lower().endswith(EXTENSIONS):
            return label, ""
    return line, ""


def by_columns(header: str) -> Callable[[str], tuple[str, str]]:
    """What splits the lines below a header: by its columns, where they are more than a path and then a label."""
    delimiter = next((mark for mark in "\t,;" if mark in header), ",")
    names = [_letters(name) for name in header.split(delimiter)]
    path, label = (next((i for i, name in enumerate(names) if name in known), None) for known in (PATHS, LABELS))
    if path is None or (path == 0 and len(names) < 3):
        return split_line
    at = path, (1 - path if len(names) == 2 else label)

    def split(line: str) -> tuple[str, str]:
        try:
            fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        except csv.Error:  # too long
            fields = []
        row = {} if any(fields[len(names) :]) else dict(enumerate(fields))  # else cat,dog would be cat alone
        return row.get(at[0], "").strip(), row.get(at[1], "").strip()

    return split


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.lower()))


def _is_header(line: str) -> bool:
    columns = any(mark in line for mark in ",;\t") and not any(mark in line for mark in "./\\")
    return columns or _letters(line) in PATHS


def number_labels(
    labels: list[str], where: Sequence[str], source: str, classes: list[str], nb_classes: int | None
) -> tuple[list[str], list[int]]:
    """Classes and, for each label, its class's number.

    All labels are names of the classes; or all are positions among them, from 0, where no class is named by a number.
    where: what each label is called in messages. classes: []: the labels tell them, 0 up to the largest, or nb_classes,
    where all are numbers. Raises UsageError for other labels, and for numbers that leave most classes without an image.
    """
    known, all_numbers = classes, all(label.isdecimal() for label in labels)
    if all_numbers and len(longest := max(labels, key=len, default="")) > 18:
        place = where[labels.index(longest)]
        raise UsageError(f"{source}: {place}: a label of {len(longest)} digits; number the classes from 0")
    if not classes and all_numbers:
        count = max(1 + max(map(int, labels)), nb_classes or 0)
        many = f"labels up to {count - 1} are {count:,} classes, of {len(labels)} images; number them from 0, or give"
        refuse(count > max(len(labels), MANY_CLASSES, nb_classes or 0), f"{source}: {many} --nb_classes {count}")
        known = [str(i) for i in range(count)]
    elif not classes:
        known = sorted({label for label in labels if not label.isdecimal()})
    numbers = {name: i for i, name in enumerate(known)}
    if all_numbers and (known == [str(i) for i in range(len(known))] or not any(x.isdecimal() for x in known)):
        numbers = {label: int(label) for label in set(labels) if int(label) < len(known)}
    for i, label in enumerate(labels):
        if label not in numbers:
            raise UsageError(
                f"{source}: {where[i]}: label {label!r} is not among the {len(known)} classes{suggest(label, known)}; "
                "all labels are names, or, where no class is named by a number, all are positions from 0"
            )
    return known, [numbers[label] for label in labels]
