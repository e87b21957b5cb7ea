"""Training and validation images of one folder: its train/ and val/, or a share of each class that is held out."""

import hashlib
import os
from collections import defaultdict

from .files import ImageFiles, is_folder
from .images import hidden

NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}


def split_folders(root: str | None) -> dict[str, str]:
    """The folders "train" and, if there is one, "val", of a folder of such; {}: of a folder of classes or images."""
    try:
        folders = {x.name.lower(): x.path for x in os.scandir(root or "") if not hidden(x.name) and is_folder(x)}
    except OSError:  # no folder, which is told where it is read
        return {}
    found = {split: next((folders[x] for x in names if x in folders), "") for split, names in NAMES.items()}
    by_split = found["train"] and (found["val"] or len(folders) == 1)
    return {split: path for split, path in found.items() if path} if by_split else {}


def parts(dataset: ImageFiles, share: float | None, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
    """The images to train on, and of each class the share that is held out, at least one of two.

    They are drawn by the seed and by the names of a file and its folder: the same wherever the data lie, as folders or
    as shards. share: None: every fifth image is held out, whatever the seed, and none of fewer.
    """
    by_class, held = defaultdict(lambda: defaultdict(list)), set()
    for i, label in enumerate(dataset.targets):  # a list may have a file on several lines, which stay together
        by_class[() if isinstance(label, tuple) else label][dataset.paths[i]].append(i)  # several labels: one class
    for files in by_class.values():
        if share is None:
            drawn = list(files)[4::5]
        else:
            count = min(max(round(share * len(files)), 1), len(files) - 1)
            drawn = sorted(files, key=lambda path: _draw(path, seed))[:count]
        held.update(*(files[path] for path in drawn))
    kept = [i for i in range(len(dataset)) if i not in held]
    return dataset.part(kept), dataset.part(sorted(held))


def _draw(path: str, seed: int) -> bytes:
    name = os.sep.join(os.path.abspath(path).split(os.sep)[-2:])
    return hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()
