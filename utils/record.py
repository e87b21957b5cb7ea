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
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
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

# arguments that change no result
PLACES = {
    *("output_dir", "log_dir", "job_dir", "auto_resume", "num_workers", "pin_mem", "local_rank", "world_size"),
    *("dist_url", "device", "max_bad_images", "kernels"),
}
ROOT = Path(__file__).resolve().parent.parent


def open_log(flags: dict, device: torch.device, run: str | None, resumed_from: Path | None, done: float) -> RunLog:
    """Add this start to output_dir/run.json and open log.txt, TensorBoard and, with --wandb, a run there.

    All processes call it together.

    Args:
        flags: the script's arguments by name.
        run: the run's id.
        resumed_from: the checkpoint that the run goes on from.
        done: epochs that it has done already, with the begun part of one.

    Raises:
        UsageError: wandb refuses to start a run.
    """
    machines = gather((socket.gethostname(), device_name(device)))
    if not is_main_process():
        return RunLog("", None)
    output_dir, log_dir, project = flags["output_dir"], flags["log_dir"], flags["wandb"]
    start = describe(flags, machines) | {"run": run, "launch": launch(), "start_epoch": int(done)}
    start["resumed_from"] = resumed_from and str(resumed_from)
    starts, wandb_run = read(output_dir), None
    if project:
        earlier = [s["wandb"]["id"] for s in starts if s.get("wandb", {}).get("project") == project]
        # where there is no checkpoint to go on from, the curves begin anew
        wandb_id = earlier[-1] if earlier and resumed_from else new_id()
        start["wandb"] = {"project": project, "id": wandb_id}
        wandb_run = start_wandb(project, wandb_id, log_dir or output_dir, start["args"])
    write(output_dir, [*starts, start])
    return RunLog(output_dir, log_dir, done, start["args"], wandb_run)


def new_id() -> str:
    return secrets.token_hex(4)


def launch() -> str:
    """What stays the same when a launcher starts a run again: the SLURM job, or torchrun's process."""
    return os.environ.get("SLURM_JOB_ID") or f"{socket.gethostname()}:{os.getppid()}"


def restarted(last: dict) -> bool:
    """Whether a launcher has started this process again, after an attempt that added the entry `last` to run.json."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts) and last.get("launch") == launch()


def same_command(last: dict, flags: dict) -> bool:
    """Whether an entry of run.json was started with these arguments, but for those that say where and on what."""
    then, now = (
        {k: v for k, v in args.items() if k not in PLACES} for args in (last.get("args", {}), plain_arguments(flags))
    )
    if now.get("depth") is None:  # which the data told
        now["depth"] = then.get("depth")
    return then == json.loads(json.dumps(now, default=str))


def set_earlier_aside(output_dir: str, start_epoch: int) -> None:
    """Keep what an earlier run recorded in the folder from being overwritten by a new one, which begins at an epoch."""
    folder, starts = Path(output_dir), read(output_dir)
    if not output_dir or not is_main_process() or not starts:
        return
    run = starts[-1].get("run") or "earlier"
    if (lines := folder / "log.txt").exists():
        shutil.copy2(lines, folder / f"log.{run}.txt")
    for path in folder.glob("reconstruction-*.png"):
        number = path.stem.removeprefix("reconstruction-")
        if number.isdecimal() and int(number) >= start_epoch:
            os.replace(path, path.with_name(f"{path.stem}.{run}.png"))


def record_end(output_dir: str, seconds: float, metrics: dict) -> None:
    """Add the time of the end, the seconds since the start and the final metrics to the last entry of run.json."""
    if is_main_process() and (starts := read(output_dir)):
        end = {"finished": now(), "seconds": round(seconds, 1), "metrics": finite(metrics)}
        write(output_dir, [*starts[:-1], starts[-1] | end])


def list_bad_images(output_dir: str, messages: Iterable[str]) -> None:
    """Add to output_dir/bad_images.txt, a line each, what is not in it."""
    if output_dir and is_main_process():
        path = Path(output_dir) / "bad_images.txt"
        try:
            known = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
            lines = dict.fromkeys([*known, *(" ".join(message.splitlines()) for message in messages)])
            path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
        except OSError as error:
            log.error("%s was NOT written (%s); training goes on", path, error.strerror)


def gather(value: object) -> list:
    """Every process's value, in the order of ranks."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def plain_arguments(flags: dict) -> dict:
    """Arguments as JSON can hold them."""
    return {k: _plain(v) for k, v in flags.items()}


def describe(flags: dict, machines: list[tuple[str, str]]) -> dict:
    """Command, arguments, time, versions, revision of the code, and the machines: (host, device) of every process."""
    hosts, devices = zip(*machines, strict=True)
    return {
        "command": shlex.join(sys.orig_argv),
        "args": plain_arguments(flags),
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
