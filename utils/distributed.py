"""Process group set-up, helpers that also work in a single process, and rank-aware logging."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UsageError

log = logging.getLogger("fcmae")

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
    result, error = None, None
    if is_main_process():
        try:
            result = call()
        except UsageError as raised:
            error = str(raised)
    if dist.is_initialized():
        told = [result, error]
        dist.broadcast_object_list(told)
        result, error = told
    if error is not None:
        raise UsageError(error)
    return result


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor, in the order of ranks."""
    if not dist.is_initialized():
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


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
        raise UsageError(
            f"{what}: {counts[0]} on rank 0, {counts[other]} on rank {other}; all nodes need the same files. Where a "
            "network file system has yet to tell them of a change, start again in a minute"
        )


def setup_logging() -> None:
    """Log to stdout: everything from the first process, warnings and worse, with their rank, from the others."""
    rank = get_rank()
    with contextlib.suppress(AttributeError):  # a stream that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be text
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' is cuda, else mps, else cpu; a bare 'cuda' is this process's own GPU.

    Raises:
        UsageError: a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; give auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu or auto")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: GPU {index} asked for, {torch.cuda.device_count()} present")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no MPS device here; use --device cpu or auto")
    return device


def launched_ranks(world_size: int, local_rank: int, dist_on_itp: bool) -> tuple[int, int, int]:
    """(rank, world_size, local_rank) from the environment of torchrun, OpenMPI or SLURM, else from the flags."""
    env = os.environ
    if dist_on_itp or ("OMPI_COMM_WORLD_RANK" in env and "RANK" not in env):
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if names[0] not in env:
            raise UsageError("--dist_on_itp true: OMPI_COMM_WORLD_RANK is not set; start the processes with mpirun")
    elif "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return max(local_rank, 0), world_size, max(local_rank, 0)
    return int(env[names[0]]), int(env[names[1]]), int(env.get(names[2], 0))


def init_distributed(
    device: str, world_size: int = 1, local_rank: int = -1, dist_on_itp: bool = False, dist_url: str = "env://"
) -> torch.device:
    """Join the process group the launcher describes, if there is more than one process; nccl on CUDA, gloo elsewhere.

    Returns:
        this process's device.
    """
    global _local_rank
    rank, world_size, local_rank = launched_ranks(world_size, local_rank, dist_on_itp)
    _local_rank = local_rank
    picked = pick_device(device, local_rank)
    if world_size > 1:
        if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
            raise UsageError(f"{world_size} processes, but no MASTER_ADDR: use torchrun, or --dist_url tcp://HOST:PORT")
        store, rank, world_size = next(dist.rendezvous(dist_url, rank, world_size))
        # torchrun's restarted workers may find the store of the attempt before, with addresses of the dead
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend="nccl" if picked.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
            device_id=picked if picked.type == "cuda" else None,
        )
    return picked


def data_parallel(model: nn.Module, compiled: bool) -> nn.Module:
    """The model under DistributedDataParallel where there are several processes; else the model itself.

    compiled: its forward pass becomes one graph, which draws the same random numbers.
    """
    if compiled:
        model.compile(options={"fallback_random": True})
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model


def accumulate(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward of one of several accumulated batches: gradients are reduced after the last only."""
    return nullcontext() if last or not dist.is_initialized() else model.no_sync()


@contextmanager
def process_group(args) -> Iterator[torch.device]:
    """Around a run: joins the process group, sets up logging, yields this process's device, and leaves the group."""
    device = init_distributed(args.device, args.world_size, args.local_rank, args.dist_on_itp, args.dist_url)
    setup_logging()
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
