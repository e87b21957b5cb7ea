"""Process group set-up, helpers that also work in a single process, and rank-aware logging."""

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ADDRESSES, UsageError, drop_stdout, masked, refuse

log = logging.getLogger("fcmae")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # and accelerate
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
LOCAL_RANKS = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID")  # of Intel MPI and MPICH, Cray's PALS, Flux
FLAGS = ("--local_rank", "--world_size", "--local_rank")
LOST = re.compile("Timed out waiting|Connection (closed|reset) by peer|Socket closed|Broken pipe")  # gloo's words
_local_rank = 0  # of this process on its node


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block (a download, say), then one on each other node, then all others."""
    turn = 0 if is_main_process() else 1 if _local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:  # also when it failed: the others then fail likewise instead of waiting for it
        for _ in range(turn, 2):
            barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def from_main_process(call: Callable[[], object]) -> object:
    """What a function returns in the first process, in all of them; a UsageError of it is raised in all."""
    told: list = [None, ""]
    if is_main_process():
        try:
            told[0] = call()
        except UsageError as error:
            told[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    result, error = told
    refuse(error, error)
    return result


def gather(value: object) -> list:
    """Every process's value, in the order of ranks."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same(count: int, what: str) -> None:
    """Raise UsageError, on every process, unless all found the same number of `what`."""
    counts = gather(count)
    other = next((rank for rank, value in enumerate(counts) if value != counts[0]), None)
    if other is not None:
        late = "Where a network file system has yet to tell them of a change, start again in a minute"
        found = f"{counts[0]} on rank 0, {counts[other]} on rank {other}"
        raise UsageError(f"{what}: {found}; all nodes need the same files. {late}")


class _Console(logging.StreamHandler):
    """A handler without which a run goes on once nobody reads it any more (`| head`), or its disk is full."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record), ADDRESSES)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif isinstance(error, BrokenPipeError):
            drop_stdout()
            log.removeHandler(self)
            log.warning("stdout is closed: no more lines there, warnings come here")  # unhandled, they go to stderr


def setup_logging(rank: int = 0) -> None:
    """Log to stdout, with the rank of all but the first process."""
    with contextlib.suppress(AttributeError):  # a stream that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be text
    handler = _Console(sys.stdout)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank else "%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' is cuda, else mps, else cpu; a bare 'cuda' is this process's own GPU. Raises UsageError where absent."""
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = next(kind for kind, is_there in present.items() if is_there())
    refuse(not present[kind](), f"--device {name}: torch sees no {kind.upper()} device here; use --device cpu or auto")
    if kind != "cuda":
        return torch.device(kind)
    index, count = int(number or local_rank), torch.cuda.device_count()
    if not number and count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = 0  # of srun --gpus-per-task and its like, each task sees its own; torchrun's processes see the same
    refuse(index >= count, f"--device {name}: GPU {index} asked for, {count} present; start one process per GPU")
    torch.cuda.set_device(index)
    # gradients of weights are sums over 300,000 rows, whose parts cuBLAS would add up in half precision
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return torch.device("cuda", index)


def _launcher(dist_on_itp: bool) -> tuple[str, str, str] | None:
    """The variables of rank, number of processes and rank on the node that count here; None: the flags do."""
    env = os.environ
    if dist_on_itp:
        refuse(OPENMPI[0] not in env, f"--dist_on_itp true: {OPENMPI[0]} is not set; start the processes with mpirun")
        return OPENMPI
    if "RANK" in env or "WORLD_SIZE" in env:
        return TORCHRUN
    local = next((name for name in LOCAL_RANKS if name in env), "SLURM_LOCALID")
    hydra = ("PMI_RANK", "PMI_SIZE", local)
    step = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # a batch script's own shell is in none
    return next((names for names in (OPENMPI, hydra, step) if env.get(names[1], "1") != "1"), None)


def _number(name: str) -> int:
    value = os.environ.get(name, "0" if "LOCAL" in name else "")
    refuse(
        not value.isdecimal(),
        f"{name} {value!r}: must be a whole number; launchers set {', '.join(TORCHRUN)} or their own, else unset all",
    )
    return int(value)


def launched_ranks(world_size: int, local_rank: int, dist_on_itp: bool) -> tuple[int, int, int]:
    """(rank, world_size, local_rank) from the environment of torchrun, MPI or srun, else from the flags.

    Raises UsageError for a variable that is no number, and a rank beyond the number of processes.
    """
    names, rank = _launcher(dist_on_itp), max(local_rank, 0)
    rank, world_size, local_rank = map(_number, names) if names else (rank, world_size, rank)
    rank_name, size_name, _ = names or FLAGS
    refuse(rank >= world_size, f"{rank_name} {rank}: must be less than {size_name} {world_size}")
    return rank, world_size, local_rank


def _meeting_point(dist_url: str) -> tuple[str, int]:
    """(host, port) of rank 0. Raises UsageError, at once, for what cannot be one."""
    names = ("MASTER_ADDR", "MASTER_PORT") if dist_url == "env://" else (f"--dist_url {dist_url}:",) * 2
    host, _, port = dist_url.removeprefix("tcp://").rpartition(":")
    if dist_url == "env://":
        host, port = (os.environ.get(name, "") for name in names)
    needed = "several processes need a host, and a port from 1 to 65535, to meet at; give --dist_url tcp://HOST:PORT, "
    needed += "or start with torchrun; in a SLURM script, export MASTER_PORT=29500 "
    needed += "MASTER_ADDR=$(scontrol show hostnames | head -n 1)"
    refuse(not host, f"{names[0]} {host!r}: {needed}")
    refuse(not (port.isdecimal() and 0 < int(port) < 65536), f"{names[1]} {port!r}: {needed}")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{names[0]} {host}: no such host here ({error}); give rank 0's name or address") from error
    return host.strip("[]"), int(port)


def _meet(rank: int, world_size: int, dist_url: str, timeout: float, told_by: str) -> dist.Store:
    """A store that all processes have come to. Says each minute who is missing.

    Raises UsageError after `timeout` seconds, or at once where the port is taken or a rank comes twice.
    """
    host, port = ("", 0) if dist_url.startswith("file://") else _meeting_point(dist_url)
    where = f"{host}:{port}" if host else dist_url
    log.info("rank %d of %d, by %s: meeting at %s, for up to %g s", rank, world_size, told_by, where, timeout)
    begun, minutes, opened = time.monotonic(), 0, []

    def wait_for(ready: Callable[[], object], missing: Callable[[], str]) -> None:
        nonlocal minutes
        while not ready():  # asleep in Python, so that Ctrl-C is heard
            waited = time.monotonic() - begun
            refuse(waited > timeout, f"--dist_timeout {timeout:g}: {missing()} after so many seconds")
            if waited >= 60 * (minutes + 1):
                minutes += 1
                log.warning("%s after %d min", missing(), minutes)
            time.sleep(0.1)

    def answers() -> bool:  # to wait for it, TCPStore would print stack traces and abort at the exit
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            return True
        return False

    def open_store() -> None:
        try:
            place = "localhost" if serves else host, port, world_size, serves, timedelta(seconds=timeout)
            opened.append(dist.TCPStore(*place, wait_for_workers=False, multi_tenant=True))
        except dist.DistError as error:
            opened.append(f"port {port}: {str(error).splitlines()[0]}; give another")

    # torchrun's agent serves its own store
    serves = rank == 0 and not (dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    if not host:
        opened.append(dist.FileStore(dist_url.removeprefix("file://"), world_size))
    else:
        if not serves:
            wait_for(answers, lambda: f"no answer at {where}, where rank 0 must run,")
        threading.Thread(target=open_store, daemon=True).start()  # with a service of another kind it never ends
        wait_for(lambda: opened, lambda: f"{where} is another service's: it had not answered as rank 0 does")
    (store,) = opened
    refuse(isinstance(store, str), store)
    twice = f"rank {rank}: two processes have it, by {told_by}; or {where} was used before"
    twice *= "TORCHELASTIC_RUN_ID" not in os.environ  # whose workers, started again, find the store of those before
    return _gather_in(dist.PrefixStore(f"of {world_size}", store), rank, world_size, wait_for, twice)


def _gather_in(store: dist.Store, rank: int, world_size: int, wait_for: Callable, twice: str) -> dist.Store:
    """A part of the store in which all ranks are. Raises UsageError(twice), unless empty, where a rank comes twice.

    torchrun's store outlives its workers, with the addresses of the dead in it, and each node counts restarts of its
    own. So rank 0 gives each meeting a name, and alone says that all have come: of a meeting of the dead, either this
    rank was there or rank 0 never says so.
    """
    name, meeting = b"", None
    if rank == 0:
        refuse(store.add("meetings", 1) > 1 and twice, twice)
        store.set("name", str(time.time_ns()))

    def all_here() -> object:
        nonlocal name, meeting
        if store.check(["name"]) and (latest := store.get("name")) != name:
            name, meeting = latest, dist.PrefixStore(latest.decode(), store)
            if meeting.add(f"{rank}", 1) > 1:  # of the dead
                refuse(twice, twice)
                meeting = None
        if rank == 0 and meeting.check([f"{other}" for other in range(world_size)]):
            meeting.set("all", "")
        return meeting and meeting.check(["all"])

    def missing() -> str:
        ranks = [f"{other}" for other in range(world_size) if not meeting.check([f"{other}"])] if meeting else ["0"]
        return f"of {world_size} processes, rank {', '.join(ranks[:8])}{', ...' * (len(ranks) > 8)} had not come"

    wait_for(all_here, missing)
    return dist.PrefixStore(name.decode(), store)


@contextmanager
def process_group(args) -> Iterator[torch.device]:
    """Around a run: joins the process group that the launcher describes, yields this process's device, and leaves.

    nccl on CUDA, gloo elsewhere; no group for one process. Then only the first process logs more than warnings. Raises
    UsageError also for a group that does not come together, or that other processes have left.
    """
    global _local_rank
    rank, world_size, _local_rank = launched_ranks(args.world_size, args.local_rank, args.dist_on_itp)
    device = pick_device(args.device, _local_rank)
    setup_logging(rank)
    names = _launcher(args.dist_on_itp)
    if not names and world_size == 1 and os.environ.get("SLURM_NTASKS", "1") != "1":
        log.warning("SLURM has %s tasks and started one: put srun in front for all", os.environ["SLURM_NTASKS"])
    try:
        if world_size > 1:
            store = _meet(rank, world_size, args.dist_url, args.dist_timeout or 600, ", ".join(names or FLAGS))
            limit = timedelta(seconds=args.dist_timeout) if args.dist_timeout else None
            options = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
            dist.init_process_group(**options, store=store, rank=rank, world_size=world_size, timeout=limit)
            log.setLevel(logging.WARNING if rank else logging.INFO)
        yield device
    except torch.OutOfMemoryError as error:
        found = f"--batch_size {args.batch_size}: more than the GPU holds ({str(error).split('. GPU')[0]})"
        trained = "training does the same with a larger --update_freq, and takes less with --grad_checkpointing true"
        raise UsageError(f"{found}; give a smaller one; {trained}") from error
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or (dist.is_initialized() and LOST.search(str(error))):
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(f"rank {rank} lost the others, whose messages may say why ({reason})") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        try:
            if sys.stdout:  # else it was closed from the first
                sys.stdout.write("")  # and what could not be written before
                sys.stdout.flush()
        except OSError:  # of a full disk: lines are lost, not the run
            drop_stdout()


def data_parallel(model: nn.Module, compiled: bool) -> nn.Module:
    """The model under DistributedDataParallel where there are several processes; else the model itself.

    compiled: its forward pass becomes one graph, which draws the same random numbers.
    """
    if compiled:
        model.compile(options={"fallback_random": True})
    if not dist.is_initialized():
        return model
    for weight in model.parameters():
        # depthwise: the library's gradient has other strides, of which DDP warns
        if weight.requires_grad and weight.dim() == 4 and weight.shape[1] == 1:
            weight.register_hook(lambda grad: grad.squeeze(1)[:, None])
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulate(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward of one of several accumulated batches: gradients are reduced after the last only."""
    return nullcontext() if last or not dist.is_initialized() else model.no_sync()
