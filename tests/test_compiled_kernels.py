"""models/kernels.py compiled ahead of time for GPUs that are not here: what each kernel of the eight sizes takes."""

import multiprocessing
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from models import kernels
from models.convnextv2 import SIZES

pytestmark = pytest.mark.skipif(
    not hasattr(kernels.tl, "tuple") or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton 3.3's compiler"
)

CAPABILITIES = 80, 90, 100

# Registers per thread for each capability and bytes of shared memory, of bfloat16 features at batch 64 and 224 pixels.
# At 168 registers three programs of 128 threads run on a multiprocessor at once, beyond it two.
TABLE = """
kernel      layout   rows  channels  sm_80  sm_90  sm_100  shared
forward     patches     8        40    168    168     170       0
forward     patches     8       192    168    168     172       0
forward     patches     8       352    168    168     172       0
forward     patches     4       160    168    175     170       0
forward     patches     4       704    168    175     170       0
forward     patches     2       160     98    105     102       0
forward     patches     2      1408     98    105     102       0
forward     patches     1      2816     58    100     106       0
forward     map         8        40    190    215     224       0
forward     map         8       192    188    214     224       0
forward     map         8       352    188    214     224       0
forward     map         7       160    179    194     188       0
forward     map         7      2816    179    194     188       0
input's     patches     8        40    166    168     170       0
input's     patches     8       192    166    168     172       0
input's     patches     8       352    166    168     172       0
input's     patches     4       160    168    170     170       0
input's     patches     4       704    168    170     170       0
input's     patches     2       160    102    103     102       0
input's     patches     2      1408    102    103     102       0
input's     patches     1      2816     58    100     106       0
input's     map         8        40    190    216     224       0
input's     map         8       192    190    214     224       0
input's     map         8       352    190    214     224       0
input's     map         7       160    182    193     186       0
input's     map         7      2816    182    193     186       0
weights'    patches     8        40    168    167     172     256
weights'    patches     8       192    168    168     174     512
weights'    patches     8       352    168    168     174     256
weights'    patches     4       160    128    130     151     256
weights'    patches     4       704    128    136     150     512
weights'    patches     2       160    128    122     128     256
weights'    patches     2      1408    126    120     128     512
weights'    patches     1      2816     96     96     112     512
weights'    map         8        40    174    170     184     256
weights'    map         8       192    178    168     186     512
weights'    map         8       352    180    168     186     256
weights'    map         7       160    168    163     184     256
weights'    map         7      2816    168    162     180     512
"""


class Launches:
    """Stands for a kernel and keeps, of every launch, its arguments."""

    def __init__(self, kernel):
        self.kernel, self.kept = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.kept.append((args, options))


def launches():
    """(kernel, arguments, options) of every depthwise convolution and gradient in the eight sizes and the decoder."""
    names = ("_convolve_kernel", "_weight_grad_kernel")
    with mock.patch.multiple(kernels, **{name: Launches(getattr(kernels, name)) for name in names}):
        for dims in [size["dims"] for size in SIZES.values()]:
            for side, c in zip((8, 4, 2, 1), dims, strict=True):
                reach = -(-3 // side)
                table = torch.empty(64 * 19, 2 * reach + 1, 2 * reach + 1, dtype=torch.int32, device="meta")
                all_forms((64, 19, side * side, c), table, side)
                all_forms((64, 7 * side, 7 * side, c))
        all_forms((64, 7, 7, 512))
        return [(name, *launch) for name in names for launch in getattr(kernels, name).kept]


def all_forms(shape, *where):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    weight, bias = x.new_empty(shape[-1], 1, 7, 7), x.new_empty(shape[-1])
    kernels.convolve(x, weight, bias, *where)
    kernels.convolve(x, weight, None, *where)
    kernels.weight_grad(x, x, 7, *where)


def specialised(kernel, args, options):
    """What Triton compiles a launch as: the type of each argument, those that are constants, and those divisible by 16.

    It makes a constant of the integer 1. The smallest shapes take one step, which changes little.
    """
    options = {key: value for key, value in options.items() if key != "num_warps"}
    types = {torch.bfloat16: "*bf16", torch.int32: "*i32", torch.float32: "*fp32"}
    signature, constants, divisible = {}, dict(options), []
    for name, value in zip(kernel.arg_names, args, strict=False):  # the constants follow
        signature[name] = types[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible.append(name)
        elif value == 1 and name != "steps":
            constants[name] = 1
    signature |= dict.fromkeys(constants, "constexpr")
    return signature, constants, divisible


def distinct_kernels():
    """Launches that Triton compiles to code of its own but for the number of channels; of these, the widest."""
    found = {}
    for name, args, options in launches():
        signature, constants, divisible = specialised(getattr(kernels, name), args, options)
        c = constants["C"]
        shape = {key: value for key, value in constants.items() if key != "C"}, signature, divisible, c % 16
        key = name, str(shape)
        if key not in found or found[key][1]["C"] < c:
            found[key] = name, constants, signature, divisible
    return list(found.values())


def compiled(name, constants, signature, divisible, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    return kernels.triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels._WARPS}
    )


@pytest.mark.slow
def test_offsets_into_features_are_64_bits_wide():
    """A batch may hold more than 2**31 values: what a row's number is multiplied by is an int64 before it."""
    seen = set()
    for name, constants, *rest in distinct_kernels():
        if (key := (name, constants["MAP"])) in seen:
            continue
        seen.add(key)
        code = compiled(name, constants, *rest, 80).asm["ttir"]
        rows = re.findall(r"addptr .*tensor<\d+x1x!tt.ptr<\w+>>, tensor<\d+x1x(i\d+)>", code)
        assert set(rows) == {"i64"}, (name, constants)
        assert not re.search(r"extsi .*: tensor<\d+x\d+xi32>", code), "widened after the multiplication"
    assert len(seen) == 4


def usage(folder, *what):
    """Registers, stack (what is spilled lies there) and shared memory of one kernel."""
    os.environ["TRITON_CACHE_DIR"] = folder
    result = compiled(*what)
    path = Path(folder, f"{os.getpid()}.cubin")
    path.write_bytes(result.asm["cubin"])
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    numbers = (re.search(rf"{key}:(\d+)", text.stdout + text.stderr) for key in ("REG", "STACK"))
    return *(int(number[1]) for number in numbers), result.metadata.shared


def row_of(name, constants):
    kernel = "weights'" if name == "_weight_grad_kernel" else "forward" if constants["BIAS"] else "input's"
    return kernel, "map" if constants["MAP"] else "patches", constants["R"], constants["C"]


@pytest.mark.slow
def test_registers_and_shared_memory(tmp_path):
    """Nothing is spilled, and no kernel takes much more than the table says."""
    kinds = distinct_kernels()
    jobs = [(str(tmp_path), *kind, capability) for kind in kinds for capability in CAPABILITIES]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = iter(pool.starmap(usage, jobs, chunksize=1))
    found, spilled = {}, []
    for name, constants, *_ in kinds:
        row = row_of(name, constants)
        registers, stack, shared = zip(*(next(results) for _ in CAPABILITIES), strict=True)
        found[row] = *registers, max(shared)
        spilled += [row] * any(stack)
    listed = {}
    for line in TABLE.strip().splitlines()[1:]:
        kernel, layout, rows, channels, *limits = line.split()
        listed[kernel, layout, int(rows), int(channels)] = [int(limit) for limit in limits]
    table = "\n".join("  ".join(f"{x:>8}" for x in (*row, *numbers)) for row, numbers in found.items())
    assert not spilled, table
    assert found.keys() == listed.keys(), table
    assert all(a <= 1.1 * b for row in found for a, b in zip(found[row], listed[row], strict=True)), table
