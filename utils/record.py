"""run.json: which run it is, its arguments, versions and commit, an entry for each start; and what else tells of it."""

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path

import numpy
import timm
import torch
import torchvision

from . import checkpoint
from .distributed import get_world_size, is_main_process
from .errors import UsageError, masked, surviving_disk_errors
from .settings import trained_size

log = logging.getLogger("fcmae")

# arguments that change no result
PLACES = {
    *("output_dir", "log_dir", "job_dir", "auto_resume", "num_workers", "pin_mem", "local_rank", "world_size"),
    *("dist_url", "dist_timeout", "device", "max_bad_images", "kernels", "predictions"),
}
ROOT = Path(__file__).resolve().parent.parent


def plain(value):
    """Arguments as JSON and checkpoints hold them, without secrets."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    return value if isinstance(value, (int, float, type(None))) else masked(str(value))


def launch() -> str:
    """What stays the same when a launcher starts a run again: the SLURM job, or torchrun's process."""
    return os.environ.get("SLURM_JOB_ID") or f"{socket.gethostname()}:{os.getppid()}"


def restarted(last: dict) -> bool:
    """Whether a launcher has started this process again, after an attempt that added the entry `last` to run.json."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count != "0" for count in counts) and last.get("launch") == launch()


def same_command(last: dict, flags: dict) -> bool:
    """Whether an entry of run.json was started with these arguments, but for those that say where and on what.

    Flags that only one of them knows, since the program was updated in between, do not count.
    """
    then, now = last.get("args", {}), plain(flags)
    if now.get("depth") is None:  # which the data told
        now["depth"] = then.get("depth")
    return bool(then) and all(then[name] == now[name] for name in (then.keys() & now.keys()) - PLACES)


def tell_begun(path: Path, state: dict, flags: dict) -> None:
    """Name what a resume changes of a checkpoint's run: first weights, images, warm-up, average, evaluation."""
    was, now = state.get("args", {}), plain(flags)
    names = ["finetune", "initial_checkpoint", "head_init_scale", "start_epoch"]
    if now.get("finetune") or now.get("initial_checkpoint"):
        names += ["model_key", "model_prefix", "stem_average"]
    for name in names:
        if now.get(name) and name in was and now[name] != was[name]:
            anew = "another --output_dir, without --resume, begins anew"
            log.info("--%s %s: no effect on what goes on from %s; %s", name, now[name], path, anew)
    size, trained = flags["input_size"], trained_size(was.get("input_size"))
    if trained not in (None, size):  # as progressive resizing wants it
        log.info("--input_size %s: %s was trained with %s", size, path, trained)
    then, until = was.get("warmup_epochs"), flags["warmup_epochs"]  # a short run's default is another
    in_steps = any(x.get("warmup_steps", -1) != -1 for x in (was, flags))
    amid = isinstance(then, int) and state["epoch"] + ("step" not in state) < max(then, until)
    if amid and then != until and not in_steps:
        log.info("--warmup_epochs %s: %s was trained with %s, so the learning rate jumps", until, path, then)
    if state.get("model_ema") and not flags.get("model_ema"):
        log.info("without --model_ema true: the moving average of %s ends here", path)
    for name in ("eval_data_path", "eval_list", "crop_pct", "eval_resize") if state.get("best") else ():
        if name in was and now.get(name) != was[name]:
            then, other = (x.get(name) or "the default" for x in (was, now))
            log.info("--%s: the best so far, of %s, was scored with %s, now with %s", name, path, then, other)


def add_start(output_dir: str, flags: dict, device: torch.device, **more) -> None:
    """Add this start to output_dir/run.json; a full disk is reported, and training goes on."""
    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, timm, numpy)}
    start = more | {
        "launch": launch(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(map(masked, sys.orig_argv)),
        "args": plain(flags),
        "processes": get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version(), **versions},
        "git": git_revision(),
    }
    path, content = Path(output_dir) / "run.json", {"starts": [*read(output_dir), start]}
    with surviving_disk_errors(f"{path} was NOT written"):
        checkpoint.replace(path, lambda file: file.write(json.dumps(content, indent=2, default=str).encode() + b"\n"))


def read(output_dir: str) -> list[dict]:
    """The starts that run.json holds, oldest first; a file that is none of ours is put aside and reported."""
    path = Path(output_dir) / "run.json"
    if not output_dir or not path.exists():
        return []
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        starts = json.loads(path.read_text())["starts"]
        if all(isinstance(x.get("args", {}), dict) and isinstance(x.get("resumed_from"), str | None) for x in starts):
            return list(starts)
    if is_main_process():
        log.warning("%s: not the record of a run, moved to %s", path, checkpoint.set_aside(path, "damaged"))
    return []


def to_evaluate(output_dir: str) -> Path | None:
    """The best checkpoint of the run that a folder tells of last, else its newest good one."""
    starts, best = read(output_dir), Path(output_dir) / checkpoint.BEST_NAMES[""]
    own = [starts[-1].get("run")] if starts else []
    if best.is_file() and (not own or checkpoint.run_of(best) == own[0]):
        return best
    found = checkpoint.newest(output_dir, *own)
    return found and found[0]


def choose(flags: dict) -> tuple[str | None, bool, Path | None, dict | None]:
    """A run's id, whether it is a new one, the checkpoint to go on from, and what that holds.

    What a launcher starts again, and the same command started again, is the run that run.json tells of last, unless
    --auto_resume false. It goes on from the newest checkpoint of its own, else from what it had gone on from.
    """
    file, output_dir = flags["resume"], flags["output_dir"]
    starts = read(output_dir)
    last, own = (starts[-1], [starts[-1].get("run")]) if starts else ({}, [])
    told = flags["auto_resume"] and (not file or same_command(last, flags))
    found, run_id = None, None
    if output_dir and (told or restarted(last)):
        found, begun_from = checkpoint.newest(output_dir, *own), last.get("resumed_from")
        if found:
            run_id = found[1].get("run")
        elif begun_from:
            # else its weights would be random ones, or this run's best ones, without a word
            if not Path(begun_from).is_file() or checkpoint.run_of(begun_from) == own[0]:
                instead = "it is gone, or another now; --auto_resume false begins anew"
                raise UsageError(f"{begun_from}: this run went on from it; {instead}")
            run_id, found = own[0], (Path(begun_from), checkpoint.read(begun_from))
    new = not found
    if new:
        run_id, found = os.urandom(4).hex(), (Path(file), checkpoint.read(file)) if file else (None, None)
    return run_id, new, *found


def set_earlier_aside(output_dir: str, start_epoch: int) -> None:
    """Rename the records of an earlier run and its pictures from this epoch on, which a new run will write as well."""
    earlier = (read(output_dir) or [{}])[-1].get("run") or "earlier"
    own = r"(log|bad_images)\.txt|summary\.csv|(report|confusion)(-ema)?\.(json|png)|reconstruction-(?P<epoch>\d+)\.png"
    for path in Path(output_dir).iterdir():
        found = re.fullmatch(own, path.name)
        if found and int(found["epoch"] or start_epoch) >= start_epoch:
            checkpoint.set_aside(path, earlier)


def list_bad_images(output_dir: str, messages: Collection[str]) -> None:
    """Add to output_dir/bad_images.txt, a line each, what is not in it."""
    if messages and output_dir and is_main_process():
        path = Path(output_dir) / "bad_images.txt"
        with surviving_disk_errors(f"{path} was NOT written"):
            known = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
            lines = dict.fromkeys([*known, *(" ".join(message.splitlines()) for message in messages)])
            path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")


def git_revision(root: Path = ROOT) -> str | None:
    """The commit that is checked out, with "-dirty" behind it where files were changed; None: no checkout, no git."""
    command = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", "--no-optional-locks", "describe", "--always"]
    command += ["--abbrev=40", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20).strip()
    return None


def start_wandb(project: str, run_id: str | None, output_dir: str, config: dict):
    """Start, or go on with, a run of Weights & Biases. Raises UsageError where that fails, for want of a login, say."""
    import wandb

    place = {"name": Path(output_dir).resolve().name, "dir": output_dir} if output_dir else {"dir": None}
    resumed = {"id": run_id, "resume": "allow", "allow_val_change": True}  # of the arguments
    try:
        return wandb.init(project=project, config=config, **place, **resumed)
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"--wandb {project}: {reason}; WANDB_MODE=offline needs no account") from error
