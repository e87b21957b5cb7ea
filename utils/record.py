"""run.json: what was run, where and on which versions, an entry for each start; and the trackers it opens."""

import contextlib
import json
import logging
import math
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy
import timm
import torch
import torch.distributed as dist
import torchvision

from .distributed import get_world_size, is_main_process
from .errors import UsageError
from .metrics import RunLog, finite

log = logging.getLogger("fcmae")

ROOT = Path(__file__).resolve().parent.parent


def open_log(
    args, device: torch.device, found: tuple[Path, dict] | None, start_epoch: int, share: float = 0.0
) -> RunLog:
    """Add this start to output_dir/run.json and open log.txt, TensorBoard and, with --wandb, a run there.

    All processes call it together.

    Args:
        found: the checkpoint that the run goes on from, as `checkpoint.find` returned it.
        start_epoch: epoch that the run goes on with.
        share: part of that epoch that the checkpoint has done already.

    Raises:
        UsageError: wandb refuses to start a run.
    """
    machines = gather((socket.gethostname(), device_name(device)))
    if not is_main_process():
        return RunLog("", None)
    start = describe(args, machines) | {"resumed_from": found and str(found[0]), "start_epoch": start_epoch}
    starts, wandb_run = read(args.output_dir), None
    if args.wandb:
        earlier = [s["wandb"]["id"] for s in starts if s.get("wandb", {}).get("project") == args.wandb]
        # where there is no checkpoint to go on from, the curves begin anew
        run_id = earlier[-1] if earlier and found else secrets.token_hex(4)
        start["wandb"] = {"project": args.wandb, "id": run_id}
        wandb_run = start_wandb(args.wandb, run_id, args.log_dir or args.output_dir, start["args"])
    write(args.output_dir, [*starts, start])
    return RunLog(args.output_dir, args.log_dir, start_epoch, share, start["args"], wandb_run)


def record_end(output_dir: str, seconds: float, metrics: dict) -> None:
    """Add the time of the end, the seconds since the start and the final metrics to the last entry of run.json."""
    if is_main_process() and (starts := read(output_dir)):
        end = {"finished": now(), "seconds": round(seconds, 1), "metrics": finite(metrics)}
        write(output_dir, [*starts[:-1], starts[-1] | end])


def gather(value: object) -> list:
    """Every process's value, in the order of ranks."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def describe(args, machines: list[tuple[str, str]]) -> dict:
    """Command, arguments, time, versions, revision of the code, and the machines: (host, device) of every process."""
    hosts, devices = zip(*machines, strict=True)
    return {
        "command": shlex.join(sys.orig_argv),
        "args": {k: _plain(v) for k, v in vars(args).items()},
        "started": now(),
        "hosts": list(dict.fromkeys(hosts)),
        "devices": dict(Counter(devices)),
        "processes": len(machines),
        "versions": versions(),
        "git": git_revision(ROOT),
    }


def _plain(value: object) -> object:
    """What JSON and protocol buffers take: NaN by name, bytes of a path that are no text escaped."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str | int]:
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": numpy}
    found = {"python": platform.python_version()} | {name: str(m.__version__) for name, m in modules.items()}
    libraries = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    return found | {name: version for name, version in libraries.items() if version}


def device_name(device: torch.device) -> str:
    """The product's name where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            if name := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
                return name[1]
    return f"{device.type} ({platform.machine()})"


def git_revision(root: Path) -> dict | None:
    """The commit that is checked out in `root`, and whether its files were changed since; None: no checkout, no git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", root, "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    revision, dirty, _ = done.stdout.strip().partition("-dirty")
    return {"revision": revision, "dirty": bool(dirty)}


def read(output_dir: str) -> list[dict]:
    """The starts that run.json holds, oldest first; a file that is none of ours is put aside and reported."""
    path = Path(output_dir) / "run.json"
    if not output_dir or not path.exists():
        return []
    try:
        starts = json.loads(path.read_text())["starts"]
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
    except (ValueError, KeyError, TypeError):
        pass
    aside = path.with_name("run.json.damaged")
    os.replace(path, aside)
    log.warning("%s: not the record of a run, moved to %s", path, aside.name)
    return []


def write(output_dir: str, starts: list[dict]) -> None:
    """Replace run.json at once. A full disk is reported, and training goes on."""
    if not output_dir:
        return
    path = Path(output_dir) / "run.json"
    aside = path.with_name(".run.json.tmp")
    try:
        aside.write_text(json.dumps({"starts": starts}, indent=2, default=str) + "\n")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        log.error("%s was NOT written (%s); training goes on", path, error.strerror)


def start_wandb(project: str, run_id: str, folder: str, config: dict):
    """Start, or go on with, a run of Weights & Biases. Raises UsageError where that fails, for want of a login, say."""
    import wandb

    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=project,
            id=run_id,
            resume="allow",
            name=Path(folder).resolve().name if folder else None,
            dir=folder or None,
            config=config,
            allow_val_change=True,  # of the arguments, at a resume
        )
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"--wandb {project}: {reason}; WANDB_MODE=offline needs no account") from error
