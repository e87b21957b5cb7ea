"""CUDA without a card: CPU tensors are real, CUDA tensors are fake, and what a card would wait for or refuse fails.

`FakeCuda` is a dispatch mode. What it finds it raises at once, so that the traceback names the line. On CUDA wheels
autograd asks the driver for devices: `shim` builds the five functions that answer it, to be preloaded by a process.
"""

import contextlib
import os
import subprocess
import traceback
from pathlib import Path

import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = str(Path(__file__).resolve().parent.parent)
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # a value or a shape that depends on values
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

SHIM = """
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
"""


def shim(folder: Path) -> dict[str, str]:
    """The environment of a process that finds one CUDA device; needs a C compiler."""
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=SHIM, text=True, check=True)
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


class WaitsError(AssertionError):
    """An operation that waits for the device."""


class WrongDeviceError(AssertionError):
    """An operation on tensors of two devices."""


def where() -> str:
    """The innermost line of the project, tests/fake_cuda.py apart: file:line source."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and frame.filename != __file__:
            return f"{frame.filename[len(ROOT) + 1 :]}:{frame.lineno} {frame.line}"
    return "?"


class FakeCuda(TorchDispatchMode):
    """Inside, devices "cuda" hold fake tensors.

    Attributes:
        may_wait: whether the device may be waited for now. What is then read is 0 or True, but for a single number
            that was copied there from the CPU.
        waits: the lines that waited.
    """

    def __init__(self, own=None):
        super().__init__()
        self.own = own or {}
        self.fake, self.may_wait, self.waits = FakeTensorMode(allow_non_fake_inputs=True), True, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = tree_leaves((args, kwargs))
        fakes = [x for x in flat if isinstance(x, FakeTensor)]
        to_cuda = any(isinstance(x, torch.device) and x.type == "cuda" for x in flat)
        if not fakes and not to_cuda:
            return func(*args, **kwargs)
        if func in self.own:  # what it does, not what it says of its results
            with self:
                return self.own[func](*args, **kwargs)
        if func.overloadpacket is aten.to:  # comes in whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        real = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if fakes and not copies and any(x.dim() for x in real):
            raise WrongDeviceError(f"{where()}: {func} of tensors on the CPU and on CUDA")
        if func in (aten._local_scalar_dense.default, aten.item.default):
            self.wait(func)
            return getattr(args[0], "known", torch.full((), args[0].dtype == torch.bool, dtype=args[0].dtype)).item()
        if copies and self.reads_device(func, args, kwargs):
            self.wait(func)
            zeros = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return getattr(args[0], "known", zeros) if func is aten._to_copy.default else args[0]
        if copies and real and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.wait(func)
        indices = tree_leaves(args[1]) if func in INDEXED else ()
        if (func not in INDEXED and WAITS & set(func.tags)) or any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices
        ):
            self.wait(func)
            raise WaitsError(f"{where()}: {func} has a shape that nobody knows without the device")
        args, kwargs = tree_map(lambda x: self.fake.from_tensor(x) if any(x is y for y in real) else x, (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        if copies and real and real[-1].numel() == 1 and func is aten._to_copy.default:
            result.known = real[-1]
        return result

    def reads_device(self, func, args, kwargs) -> bool:
        if func is aten.copy_.default:
            return not isinstance(args[0], FakeTensor)
        return isinstance(args[0], FakeTensor) and getattr(kwargs.get("device"), "type", "cuda") == "cpu"

    def wait(self, func) -> None:
        if not self.may_wait:
            raise WaitsError(f"{where()}: {func} waits for the device")
        self.waits.append(where())


class Launches:
    """In place of a Triton kernel: checks the tensors it would be launched with."""

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def __getitem__(self, grid):
        def launch(*args, **fixed):
            self.count += 1
            for x in args:
                if isinstance(x, torch.Tensor) and not (x.is_cuda and x.is_contiguous()):
                    raise WrongDeviceError(f"{where()}: {self.name} of a tensor on {x.device}, strides {x.stride()}")

        return launch


class _Generator(torch.Generator):
    """On the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def fake_cuda(patch, kernels, operators):
    """A `FakeCuda` with what torch asks of the card in Python.

    kernels, operators: the modules whose launches do nothing, and whose `custom_op` functions run as on a card.
    """
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    patch.setattr(torch.cuda, "max_memory_allocated", lambda *args: 0)
    patch.setattr(torch.cuda, "manual_seed_all", lambda *args: None)
    patch.setattr(torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8))
    patch.setattr(torch.cuda, "set_rng_state", lambda *args: None)
    patch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(fake_tensor, "init_gpu_context", lambda *args: None, raising=False)
    patch.setattr(torch, "Generator", _Generator)
    for name in ("_convolve_kernel", "_weight_grad_kernel"):
        patch.setattr(kernels, name, Launches(name))
    patch.setattr(kernels, "_on", lambda x: contextlib.nullcontext())
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") is a copy, which is seen
    cuda = FakeCuda({x._opoverload: x._init_fn for x in vars(operators).values() if isinstance(x, CustomOpDef)})
    patch.setattr(torch.cuda, "synchronize", lambda *args: cuda.wait("torch.cuda.synchronize"))
    try:
        with cuda, torch.autograd.set_multithreading_enabled(False):
            yield cuda
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
