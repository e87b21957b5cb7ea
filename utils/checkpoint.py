"""Checkpoints on disk: written aside and renamed, verified and read without running code, newest good one first."""

import errno
import functools
import itertools
import logging
import math
import os
import re
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from safetensors.torch import load_file

from .errors import UsageError, refuse, surviving_disk_errors

log = logging.getLogger("fcmae")

# what checkpoints of MAE and its descendants keep their arguments in; neither runs anything when it is read
PLAIN_CLASSES = [Namespace, (PosixPath, "pathlib.PosixPath")]
BEST_AVERAGE = "checkpoint-best-ema.pth"
BEST_NAMES = {"": "checkpoint-best.pth", "_ema": BEST_AVERAGE}
SETTINGS = {"weight_decay", "lr_scale", "betas", "eps", "momentum"}  # of an optimizer's group, set by flags


def replace(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds, at every moment and after a power cut, a whole file or the previous one.

    Raises:
        OSError: the disk is full or the folder not writable; `path` is then as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")  # what a killed run left under this name, the next one overwrites
    try:
        with open(aside, "wb") as file:
            write(file)
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
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that has it for files alone
            raise
    finally:
        os.close(folder)


def save(state: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint as `replace` does."""
    replace(path, lambda file: torch.save(state, file))


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    """Those of the plain tensors in a checkpoint."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and not (value.is_meta or value.is_nested):
            yield value.untyped_storage()
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _storages(inner)


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
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):  # a few bytes could become any number
                    raise ValueError("compressed, as torch writes none")
                if damaged := archive.testzip():  # torch.load itself does not compare checksums
                    raise ValueError(f"the checksum of {damaged} does not match")
                held = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            # mapped, tensors are read as they are loaded into a model: host memory holds them once, not twice
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        # nor whether a tensor ends where what it was saved with does
        if zipped and sum({x.data_ptr(): x.nbytes() for x in _storages(state)}.values()) > held:
            raise ValueError("its tensors are larger than what it holds of them")
    except Exception as error:  # a damaged archive or pickle may raise anything
        what = "cannot be read, truncated or damaged"
        if isinstance(error, UnpicklingError):
            what = "not a checkpoint of tensors and plain values, refused"
        named = re.search(r"(?<=GLOBAL )\S+", str(error))  # the function or class that it would call
        reason = named[0] if named else (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: {what} ({reason[:120]})") from error
    if not isinstance(state, dict):
        raise UsageError(f"{path}: holds a {type(state).__name__}, not a dictionary")
    if path.name == BEST_AVERAGE and "model_ema" in state:  # older ones do not say so themselves
        state.setdefault("scored", "model_ema")
    if "args" in state:  # of other trainers a Namespace, or something else that tells nothing here
        args = vars(state["args"]) if isinstance(state["args"], Namespace) else state["args"]
        args = args if isinstance(args, dict) else {}
        state["args"] = {name: value for name, value in args.items() if not isinstance(value, torch.Tensor)}
    return state


def awaited(path: Path) -> dict:
    """`read`, up to a minute later: a network file system may show other processes the file late."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    return read(path)


def run_of(path: str | os.PathLike) -> str | None:
    """The id of the run that wrote a checkpoint, read without its tensors and once; None where it does not tell."""
    try:
        file = os.stat(path)
        return _read_run(path, file.st_ino, file.st_mtime_ns)
    except Exception:  # damaged, or another format
        return None


@functools.cache  # unpickling the 1,500 tensors of base takes 0.1 s, and each save asks of all files
def _read_run(path: str | os.PathLike, *_) -> str | None:
    with torch.serialization.safe_globals(PLAIN_CLASSES):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("run")


def finite(state_dict: dict) -> bool:
    """Whether no weight is NaN or infinite; waits for the device once."""
    tensors = (v for v in state_dict.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    found = [v.isfinite().all() for v in tensors]
    return not found or bool(torch.stack(found).all())


def unfit(state_dict: dict, own: dict | None = None) -> str:
    """Why a state dict holds no weights, or none for those of `own`, another that has its names; else ""."""
    for name, value in state_dict.items():
        if not isinstance(name, str):
            return f"has the key {name!r}, which is no name of a weight"
        if not isinstance(value, torch.Tensor):
            return f"{name} is of the type {type(value).__name__}, no tensor"
        plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)
        if not plain or (own and value.is_floating_point() != own[name].is_floating_point()):
            return f"{name} is a tensor of {value.dtype}, {value.layout}, on {value.device}, which is no weight"
        if not own and value.nbytes > value.untyped_storage().nbytes():  # expanded: a few bytes could become any number
            return f"{name} has the shape {tuple(value.shape)}, of which the file holds a part"
        if own and value.is_floating_point() and not value.float().isfinite().all():
            return f"its weights are NaN or infinite in {name}; give an earlier checkpoint"
    return ""


def numbered(output_dir: str | os.PathLike) -> list[tuple[int, float, Path]]:
    """A folder's checkpoint-{epoch}.pth and checkpoint-{epoch}-step{step}.pth files, newest first.

    Each as (epoch, optimizer steps done in it, path), the steps being infinite for a finished epoch.
    """
    found = []
    for path in Path(output_dir).glob("checkpoint-*.pth"):
        if match := re.fullmatch(r"checkpoint-(\d+)(?:-step(\d+))?\.pth", path.name):
            found.append((int(match[1]), int(match[2]) if match[2] else math.inf, path))
    return sorted(found, reverse=True)


def newest(output_dir: str | os.PathLike, *run: str | None) -> tuple[Path, dict] | None:
    """The newest good checkpoint of a folder, of one run where its id is given.

    One that cannot be read whole, or holds NaN, is reported and left where it is.
    """
    for *_, path in numbered(output_dir):
        if run and run_of(path) not in (None, run[0]):  # None: also of one that cannot be read
            continue
        try:
            state = read(path)
            model = state.get("model")
            weights = isinstance(model, dict) and not unfit(model)  # what are none is refused where they are loaded
            refuse(weights and not finite(model), f"{path}: its weights are not finite")
        except UsageError as error:
            log.warning("skipping %s", error)
            continue
        if not run or state.get("run") == run[0]:
            return path, state
    return None


def save_numbered(state: dict, output_dir: str | os.PathLike, name: str = "") -> Path | None:
    """Save `name`, or checkpoint-{epoch}.pth, or with a `step` in the state checkpoint-{epoch}-step{step}.pth.

    What another run had saved under the name is renamed first. A full disk or a folder that became read-only is
    reported, and training goes on: the checkpoints already there are whole, and the next one may succeed.

    Returns:
        where it was saved, or None.
    """
    number = f"{state['epoch']}-step{state['step']}" if "step" in state else state["epoch"]
    path, run = Path(output_dir) / (name or f"checkpoint-{number}.pth"), state.get("run")
    with surviving_disk_errors(f"{path} was NOT saved, earlier checkpoints are untouched"):
        if path.exists() and (other := run_of(path)) != run:
            log.info("%s of another run is renamed to %s", path, set_aside(path, other or "earlier"))
        save(state, path)
        return path
    return None


def set_aside(path: Path, why: str) -> str:
    """Give a file that a run must not take a name that no run takes, and return it: x.pth becomes x.WHY.pth."""
    names = itertools.chain([why], (f"{why}-{i}" for i in itertools.count(2)))
    aside = next(p for p in (path.with_name(f"{path.stem}.{name}{path.suffix}") for name in names) if not p.exists())
    os.replace(path, aside)
    return aside.name


def load_weights(model: torch.nn.Module, state_dict: dict, source: str) -> None:
    """Load a state dict whole. Raises UsageError naming what does not fit, and changes nothing then."""
    own = model.state_dict()
    refuse(wrong := unfit(state_dict), f"{source}: {wrong}")
    problems = {
        "lacks": own.keys() - state_dict.keys(),
        "also has": state_dict.keys() - own.keys(),
        "has another shape for": {k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape},
    }
    if problem := next(filter(problems.get, problems), None):
        shown, count = ", ".join(sorted(problems[problem])[:3]), len(problems[problem])
        raise UsageError(f"{source}: a checkpoint of another model: it {problem} {shown} ({count} in all)")
    refuse(wrong := unfit(state_dict, own), f"{source}: {wrong}")
    model.load_state_dict(state_dict)


def check_same_run(path: Path, state: dict, flags: dict, classes: list[str] | None, order: dict) -> None:
    """Refuse to go on from a checkpoint where its numbers would mean something else now.

    classes, order: as `Run.begin` has them. What it was trained with, the checkpoint tells, else nothing is compared.

    Raises:
        UsageError: another script, another optimizer, other classes, or, inside an epoch, another order of the samples.
    """
    here, there = ("pretrain" if "mask_ratio" in x else "finetune" for x in (flags, state.get("args", {})))
    start = "finetune" if here == "finetune" else "initial_checkpoint"
    other = f"{path}: was written by main_{there}.py; give it to --{start}, and this run an --output_dir of its own"
    refuse("run" in state and here != there, other)
    opt = flags.get("opt")
    if opt and (was := str(state.get("args", {}).get("opt", opt))).lower() != opt.lower():
        raise UsageError(f"--opt {opt}: {path} was trained with {was}, whose state does not fit")
    several, was = (bool(x.get("multi_label")) for x in (flags, state.get("args", {})))
    if several != was and (opt or flags.get("val_split")):  # k-NN takes any
        raise UsageError(f"--multi_label {several}: {path} was trained with {was}; go on with that")
    split, was = (x.get("val_split") and (x["val_split"], x.get("split_seed")) for x in (flags, state.get("args", {})))
    if split != was:  # other images would then be held out than were not trained on
        shown = f"--val_split {was[0]} --split_seed {was[1]}" if was else "no --val_split"
        raise UsageError(f"--val_split: {path} was trained with {shown}; go on with that")
    count, was = (x.get("number of images") for x in (order, state.get("order", {})))
    others = f"was trained on {was} images, now there are {count}: others may be held out; start with --finetune {path}"
    refuse(split and was not in (None, count), f"--val_split: {path} {others}")
    if classes and (known := state.get("classes")) and list(known) != list(classes):
        pairs = itertools.zip_longest(known, classes, fillvalue="none")
        changed = next(f"{i} was {a!r}, in the training data it is {b!r}" for i, (a, b) in enumerate(pairs) if a != b)
        raise UsageError(
            f"{path}: was trained on other classes: class {changed} ({len(known)} and {len(classes)} classes); name "
            f"the folders as they were, or start with --finetune {path}"
        )
    for name, before in state.get("order", {}).items() if "step" in state else ():
        if name in order and order[name] != before:
            now, was = ("none" if x == "" else x for x in (order[name], before))
            raise UsageError(
                f"{name} {now}: {path} is inside an epoch that was begun with {was}, which decides its order and sums; "
                "give that, or --resume a checkpoint from an epoch's end"
            )


def load_training(
    path: Path, state: dict, model, optimizer, scaler, global_batch: int, average: torch.nn.Module | None = None
) -> tuple[int, dict | None]:
    """Restore model, optimizer, loss scaler and `average` from a checkpoint; the optimizer's settings stay its own.

    Returns:
        the epoch to go on with, and, where that one was begun, what `EpochTracker` needs to go on inside it.

    Raises:
        UsageError: a file without training state, or of another model or optimizer.
    """
    if "run" in state and "optimizer" not in state:
        log.info("%s: has no state of the optimizer, as the best ones have not; that begins anew", path)
        state = state | {"optimizer": optimizer.state_dict()}
    kinds = {"model": dict, "optimizer": dict, "epoch": int}
    if missing := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
        raise UsageError(f"{path}: has no {' and no '.join(missing)}, so training cannot continue from it; see --help")
    load_weights(model, state["model"], str(path))
    if average:
        load_weights(average, state["model_ema"], str(path))
    own = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(optimizer.param_groups, own, strict=True):
            if lost := sorted(options.keys() - group.keys()):
                raise ValueError(f"it has no {', '.join(lost)}")
            # loading has put the checkpoint's in their place, whatever the command line says now
            group.update({k: v for k, v in options.items() if k in SETTINGS or isinstance(v, bool | None)})
        held = ((state.get(name, p), p) for p, state in optimizer.state.items() for name in ("exp_avg", "exp_avg_sq"))
        if any(getattr(moment, "shape", None) not in (p.shape, ()) for moment, p in held):  # (): one of all of it
            raise ValueError("it has moments of another shape than the weights")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        flags = "--opt or --layer_decay or --freeze_stages"
        raise UsageError(f"{path}: its optimizer does not fit {flags} ({error})") from error
    if state.get("scaler"):
        try:
            scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: its loss scaler cannot be taken up ({error})") from error
    if "step" not in state:
        return state["epoch"] + 1, None
    progress = dict(state["partial"])
    if global_batch != state["global_batch"]:
        progress["step"] = state["step"] * state["global_batch"] // global_batch
        log.info("%s: steps had %d samples, now %d", path, state["global_batch"], global_batch)
    return state["epoch"], progress


def prune(good: Path, keep: int, run: str | None = None) -> None:
    """Delete a run's old checkpoints, `good` being its newest one that is known to be good.

    The newest `keep` finished epochs stay, and inside an epoch the newest two, unless it is finished. So do files of
    other runs, and those after `good`, which are damaged or will be written again.
    """
    own = (entry for entry in numbered(good.parent) if run_of(entry[2]) == run)
    found = list(itertools.dropwhile(lambda entry: entry[2] != good, own))
    finished = [path for _, steps, path in found if steps == math.inf]
    inside = [path for _, steps, path in found if steps < math.inf]
    for path in finished[max(keep, 1) :] + (inside if good in finished else inside[2:]):
        path.unlink(missing_ok=True)
