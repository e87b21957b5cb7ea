"""Checkpoints on disk: written aside and renamed, verified and read without running code, newest good one first."""

import logging
import math
import os
import re
import zipfile
from argparse import Namespace
from pathlib import Path, PosixPath
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file

from .distributed import is_main_process
from .errors import UsageError

log = logging.getLogger("fcmae")

# what checkpoints of MAE and its descendants keep their arguments in; neither runs anything when it is read
PLAIN_CLASSES = [Namespace, (PosixPath, "pathlib.PosixPath")]


def save(state: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint so that `path` holds, at every moment and after a power cut, a whole file or the previous one.

    Raises:
        OSError: the disk is full or the folder not writable; `path` is then as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")  # what a killed run left under this name, the next one overwrites
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer hides a full disk behind a failed check of its own
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is durable only once the folder is
    finally:
        os.close(folder)


def read(path: str | os.PathLike) -> dict:
    """Read a .pth, .pt, .bin or .safetensors file onto the CPU; no code in it is ever run.

    Raises:
        UsageError: no such file, a truncated or damaged one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself does not compare checksums
            if damaged:
                raise UsageError(f"{path}: damaged checkpoint, the checksum of {damaged} does not match")
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a checkpoint of tensors and plain values, refused ({reason[:120]})") from error
    except Exception as error:  # a damaged archive or pickle may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: cannot be read, truncated or damaged ({reason[:120]})") from error
    if not isinstance(state, dict):
        raise UsageError(f"{path}: holds a {type(state).__name__}, not a dictionary")
    return state


def numbered(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """The checkpoint-{epoch}.pth files of a folder as (epoch, path), newest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*.pth"):
        if match := re.fullmatch(r"checkpoint-(\d+)\.pth", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest(output_dir: str | os.PathLike) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read whole; each that cannot is reported and left where it is."""
    for _, path in numbered(output_dir):
        try:
            return path, read(path)
        except UsageError as error:
            log.warning("skipping %s", error)
    return None


def training_state(model, optimizer, scaler, epoch: int, args, **more) -> dict:
    """What a training checkpoint holds: tensors and plain values only, readable without unpickling code."""
    simple = (bool, int, float, str, list, type(None))
    plain = {k: v if isinstance(v, simple) else str(v) for k, v in vars(args).items()}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "args": plain,
        **more,
    }


def save_numbered(state: dict, output_dir: str | os.PathLike, keep: int) -> None:
    """Save checkpoint-{epoch}.pth, then prune the earlier ones to `keep` in all. Only the first process writes."""
    if is_main_process():
        save(state, Path(output_dir) / f"checkpoint-{state['epoch']}.pth")
        prune(output_dir, keep, state["epoch"])


def find(resume: str, auto_resume: bool, output_dir: str) -> tuple[Path, dict] | None:
    """What to continue from: the file --resume names, else with --auto_resume the newest good one of output_dir."""
    if resume:
        return Path(resume), read(resume)
    return newest(output_dir) if auto_resume and output_dir else None


def load_weights(model: torch.nn.Module, state_dict: dict, source: str) -> None:
    """Load a state dict whole. Raises UsageError naming what does not fit, and changes nothing then."""
    own = model.state_dict()
    for problem, names in (
        ("lacks", own.keys() - state_dict.keys()),
        ("also has", state_dict.keys() - own.keys()),
        ("has another shape for", {k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise UsageError(f"{source}: a checkpoint of another model: it {problem} {shown} ({len(names)} in all)")
    model.load_state_dict(state_dict)


def load_training(path: Path, state: dict, model, optimizer, scaler) -> int:
    """Restore model, optimizer and loss scaler from a training checkpoint; the epoch to go on with.

    Raises:
        UsageError: a file without training state, or of another model or optimizer.
    """
    missing = [key for key in ("model", "optimizer", "epoch") if key not in state]
    if missing:
        raise UsageError(f"{path}: has no {' and no '.join(missing)}, so training cannot continue from it; see --help")
    load_weights(model, state["model"], str(path))
    options = set(optimizer.param_groups[0])  # loading puts the checkpoint's in their place
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UsageError(f"{path}: its optimizer does not fit --opt or --layer_decay ({error})") from error
    if lost := sorted(options - optimizer.param_groups[0].keys()):
        raise UsageError(f"{path}: its optimizer does not fit --opt, it has no {', '.join(lost)}")
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return state["epoch"] + 1


def prune(output_dir: str | os.PathLike, keep: int, epoch: float = math.inf) -> None:
    """Delete all but the newest `keep` of the checkpoints up to `epoch`; call it once the newest is safely on disk.

    Later ones are another run's, which this one was started again before the end of: they neither count nor go.
    """
    for _, path in [found for found in numbered(output_dir) if found[0] <= epoch][max(keep, 1) :]:
        path.unlink(missing_ok=True)
