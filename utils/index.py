"""Which files a folder holds, remembered between runs, so that a million of them are listed once."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from .data.images import hidden

VERSION = 2
FRESH = 2_000_000_000  # nanoseconds; a folder changed so recently may change again without its time telling


def list_files(root: str, extensions: tuple[str, ...], cache: bool = True) -> dict[str, list[str]]:
    """Every folder below `root`, by its path from there ("" for itself), with the sorted names of its files.

    Only files with one of the extensions, in any case, count, and nothing hidden; links are followed, except back to
    where they are.

    cache: keep the list below $XDG_CACHE_HOME (~/.cache), and take it from there while each folder's time of change is
    what it was, as added, removed and renamed files change it. A cache that cannot be read or written does no harm.
    """
    root = os.path.abspath(root)
    path = cache_path(root, extensions)
    if cache and (folders := _remembered(path, root)) is not None:
        return folders
    now = time.time_ns()
    found = _scan(root, extensions)
    if cache and all(changed < now - FRESH for changed, _ in found.values()):
        _remember(path, {"version": VERSION, "root": root, "folders": found})
    return {folder: names for folder, (_, names) in found.items()}


def cache_path(root: str, extensions: tuple[str, ...]) -> Path:
    """Where the list of a folder, by its absolute path, is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    key = hashlib.sha256(os.fsencode("\n".join((root, *extensions)))).hexdigest()[:32]
    return Path(home, "fcmae", "index", f"{key}.json")


def _scan(root: str, extensions: tuple[str, ...]) -> dict[str, tuple[int, list[str]]]:
    found = {}
    waiting = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)  # before the listing: what changes after it is then seen to have changed
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
        found[folder] = (status.st_mtime_ns, sorted(names))
    return found


def _remembered(path: Path, root: str) -> dict[str, list[str]] | None:
    try:
        content = json.loads(path.read_bytes())
        if (content["version"], content["root"]) != (VERSION, root):
            return None
        for folder, (changed, names) in content["folders"].items():
            "".join(names)  # a TypeError unless they are names
            if os.stat(os.path.join(root, folder)).st_mtime_ns != changed:
                return None
        return {folder: names for folder, (_, names) in content["folders"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, damaged, or a folder is gone
        return None


def _remember(path: Path, content: dict) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as aside:
            try:
                json.dump(content, aside)
                aside.close()
                os.replace(aside.name, path)
            except BaseException:
                os.unlink(aside.name)
                raise
