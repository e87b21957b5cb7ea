"""Data sets of image files: folders of any depth, class folders, lists of files, tars.

Before a transform is set, an image is a tensor as `utils.images.load_tensor` has it.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from tarfile import TarError

import timm.data
from timm.data.readers import img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import UsageError, suggest
from .images import ARRAY_EXTENSIONS, BadImage, decode, load_tensor
from .index import list_files

EXTENSIONS = (*IMG_EXTENSIONS, *ARRAY_EXTENSIONS)
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
        image = load_tensor(self.paths[index], self.in_chans, self.eight_bit)
        return image if self.transform is None else self.transform(image), self.targets[index]


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
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
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

    Labels are class names, or class numbers where all are integers; among given classes, numbers count beside names. A
    path may hold spaces.

    Args:
        root: the folder that paths are relative to.
        classes: None: labels are neither needed nor read. []: they tell the classes. Else the classes by their number.
        nb_classes: the number of classes, where labels are numbers, and the last may be missing.

    Raises:
        UsageError: no such file, or a line, which the message names, that is not understood.
    """

    def __init__(
        self, file: str, flag: str, root: str | None, classes: list[str] | None = None, in_chans: int = 3,
        nb_classes: int | None = None,
    ):  # fmt: skip
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
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
            self.classes = classes or _classes_of([label for *_, label in entries], nb_classes)
            numbers = {name: i for i, name in enumerate(self.classes)}
            for i, (number, _, label) in enumerate(entries):
                targets[i] = numbers.get(label, int(label) if label.isdecimal() else len(numbers))
                if targets[i] >= len(numbers):
                    raise UsageError(
                        f"{flag} {file}: line {number}: label {label!r} is not among the {len(numbers)} classes"
                        f"{suggest(label, numbers)}"
                    )
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


def _classes_of(labels: list[str], nb_classes: int | None) -> list[str]:
    if all(label.isdecimal() for label in labels):
        return [str(number) for number in range(max(max(map(int, labels)) + 1, nb_classes or 0))]
    return sorted(set(labels))


class TimmFiles(Dataset):
    """A map-style data set of timm's, its files decoded as `ImageFiles` are.

    Args:
        files: whose own transform is not used.
        name: for messages.
        classes: as for `ClassFolders`.

    Raises:
        UsageError: a class that is not among `classes`.
    """

    def __init__(self, files: timm.data.ImageDataset, name: str, in_chans: int, classes: list[str] | None = None):
        files.load_bytes = True
        self.files, self.name, self.transform, self.in_chans, self.eight_bit = files, name, None, in_chans, None
        found = getattr(files.reader, "class_to_idx", None) or getattr(files.reader, "class_name_to_idx", None) or {}
        self.classes, self.numbers = sorted(found, key=found.get) or None, None
        if classes is not None:
            numbers = _numbered(self.classes or [], classes, f"{name}: class")
            self.classes, self.numbers = classes, [numbers[name] for name in self.classes or []]

    @property
    def targets(self) -> list[int]:
        """Of a tar alone: other data sets are not read through for their labels. Raises AttributeError."""
        if not hasattr(self.files.reader, "targets"):
            raise AttributeError(f"{self.name}: not listed")
        numbers = self.numbers or range(len(self.classes))
        return [numbers[target] for target in self.files.reader.targets]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        try:
            content, target = self.files[index]
        except (OSError, RuntimeError, TarError) as error:
            raise BadImage(f"{self.name}: image {index}: {error}") from error
        image = decode(content, f"{self.name}: image {index}", self.in_chans, self.eight_bit)
        target = int(target) if self.numbers is None else self.numbers[target]
        return image if self.transform is None else self.transform(image), target


def open_tar(path: str, flag: str, in_chans: int, classes: list[str] | None = None) -> TimmFiles:
    """The images of a tar, or of the tars in it; classes are the folders, or the inner tars, that they lie in.

    Raises:
        UsageError: a file that is no tar, or one without images.
    """
    img_extensions.set_img_extensions(IMG_EXTENSIONS)
    try:
        # kept open, the file would be one and the same to all loader processes, its position too
        reader = ReaderImageInTar(path, cache_tarfiles=False)
    except (OSError, TarError, ValueError) as error:
        raise UsageError(f"{flag} {path}: not a tar of images ({error})") from error
    return TimmFiles(timm.data.ImageDataset(path, reader=reader), f"{flag} {path}", in_chans, classes)
