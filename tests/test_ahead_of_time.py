"""The Triton kernels as compiled for sm_80, sm_90 and sm_100: registers, shared memory, and no spills."""

import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from models import kernels
from models.convnextv2 import SIZES

CAPABILITIES = 80, 90, 100
ROWS = [(side, False) for side in (8, 4, 2, 1)] + [(8, True), (7, True)]  # visible patches, and strips of 224 px maps
# most registers over the widths and capabilities, with Triton 3.8; by rows of a lane, and whether of a map
REGISTERS = {
    "_convolve_kernel": dict(zip(ROWS, (172, 182, 106, 106, 226, 194), strict=True)),
    "_weight_grad_kernel": dict(zip(ROWS, (174, 151, 128, 120, 186, 184), strict=True)),
}
SHARED = {"_convolve_kernel": 0, "_weight_grad_kernel": 512}  # bytes
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(kernels.tl, "tuple"), reason="needs Triton 3.3"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"),
]


def distinct() -> dict[tuple, int]:
    """The smallest width of the eight sizes that has each (channels of a program, whether they divide the width).

    Kernels of other widths differ in constants alone.
    """
    widths = sorted({width for size in SIZES.values() for width in size["dims"]} | {512}, reverse=True)
    return {(block := kernels._tile(width, 8)[0], width % block == 0): width for width in widths}


def compiled(name: str, width: int, rows: int, on_map: bool, capability: int, folder: str) -> dict[str, int]:
    """Registers, bytes of stack (spills) and of shared memory of a kernel in bfloat16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ["TRITON_CACHE_DIR"] = folder
    kernel = getattr(kernels, name)
    values = (8 if rows > 4 else 16) if name == "_convolve_kernel" else 8
    block, lanes = kernels._tile(width, values)
    fixed = {"C": width, "K": 7, "R": rows, "MAP": on_map, "BIAS": True, "BM": lanes, "BLOCK_C": block}
    fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names}
    pointers = {"index_ptr": "*bf16" if on_map else "*i32", "partial_ptr": "*fp32"}
    types = {key: pointers.get(key, "*bf16" if key.endswith("_ptr") else "i32") for key in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={key: "constexpr" if key in fixed else types[key] for key in kernel.arg_names},
        constexprs={(kernel.arg_names.index(key),): value for key, value in fixed.items()},
        attrs={(i,): aligned for i, key in enumerate(kernel.arg_names) if key.endswith("_ptr")},
    )
    options = {"num_warps": kernels._WARPS}
    built = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    file = Path(folder, f"{name}-{width}-{rows}-{on_map}-{capability}.cubin")
    file.write_bytes(built.asm["cubin"])
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage.stdout + usage.stderr)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": built.metadata.shared}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(kernel, width, rows, map, capability) -> resources; compiled in two processes."""
    folder = str(tmp_path_factory.mktemp("triton"))
    keys = [
        (name, width, rows, on_map, capability)
        for name in REGISTERS for width in distinct().values() for rows, on_map in ROWS for capability in CAPABILITIES
    ]  # fmt: skip
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip(keys, pool.map(compiled, *zip(*keys, strict=True), [folder] * len(keys)), strict=True))


def test_resources(table):
    """A tenth more than the table is let through, as other versions of Triton may need it."""
    assert len(table) == len(REGISTERS) * len(distinct()) * len(ROWS) * len(CAPABILITIES)
    assert not {key: found for key, found in table.items() if found["stack"]}, "spills"
    for (name, _, rows, on_map, _), found in table.items():
        assert 32 <= found["registers"] <= min(255, 1.1 * REGISTERS[name][rows, on_map])
        assert found["shared"] <= SHARED[name]
