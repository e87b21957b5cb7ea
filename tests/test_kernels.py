"""The Triton kernels against a dense float64 computation; compiled where there is a GPU, else in Triton's interpreter.

Small integers in float32 make every sum exact, so results must be equal, whatever the order of summation.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import fused, kernels
from models.convnextv2 import Block, Stage
from models.operators import depthwise
from models.visible import VisiblePatches

tl = kernels.tl  # Triton 3.6 knows constants by this name alone
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.gpu  # there, compiled
has_triton = pytest.mark.skipif(not hasattr(kernels.tl, "tuple"), reason="needs Triton 3.3")
runs = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()) or not kernels.available(torch.device(DEVICE), torch.float32),
    reason="needs a GPU; without one test_in_the_interpreter runs it",
)


@pytest.mark.slow
@has_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """Triton reads the variable when it is first imported, which in this process may be long ago."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


# ---- the independent form ---------------------------------------------------------------------------------------


class Patches:
    """Visible patches of some images, one by one: `keep` lists, per image, the (row, column) of each."""

    def __init__(self, grid, *keep):
        self.grid, self.images = grid, len(keep)
        self.places = [(image, *place) for image, places in enumerate(keep) for place in sorted(places)]

    def patch_index(self, side, halo):
        reach = -(-halo // side)
        size = 2 * reach + 1
        table = torch.full((len(self.places), size, size), -1, dtype=torch.int32)
        for p, (image, row, column) in enumerate(self.places):
            for i in range(size):
                for j in range(size):
                    neighbour = (image, row + i - reach, column + j - reach)
                    if neighbour in self.places:
                        table[p, i, j] = self.places.index(neighbour)
        return table

    def to_map(self, x, side):
        """(1, P, s*s, C) -> (N, C, h*s, w*s), zeros where nothing is visible."""
        x = x.unflatten(2, (side, side)).permute(0, 1, 4, 2, 3)
        y = x.new_zeros(self.images, x.shape[2], self.grid[0] * side, self.grid[1] * side)
        for p, (image, row, column) in enumerate(self.places):
            y[image, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = x[0, p]
        return y

    def from_map(self, y, side):
        cut = [
            y[image, :, row * side : (row + 1) * side, column * side : (column + 1) * side].flatten(1).t()
            for image, row, column in self.places
        ]
        return torch.stack(cut)[None]


def all_of(h, w):
    return [(row, column) for row in range(h) for column in range(w)]


# all visible; one alone, in a corner; borders and holes. A wide grid where a kernel spans several small patches.
LAYOUTS = {
    8: Patches((2, 2), all_of(2, 2), [(1, 0)], [(0, 0), (1, 1)]),
    4: Patches((2, 3), all_of(2, 3), [(1, 2)], [(0, 1), (0, 2), (1, 0)]),
    2: Patches((3, 4), all_of(3, 4), [(1, 1)], [(0, 0), (0, 3), (2, 0), (2, 1), (1, 3)]),
    1: Patches((4, 7), all_of(4, 7), [(3, 3)], [(0, 0), (0, 4), (1, 6), (2, 2), (3, 1), (3, 3)]),
}


def integers(*shape, seed, limit=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def fenced(x):
    """x, on the device, between NaNs: what reads beyond it, and uses what it reads, gives NaN."""
    fence = 1 << 16
    buffer = torch.full((x.numel() + 2 * fence,), torch.nan, dtype=x.dtype, device=DEVICE)
    inside = buffer[fence:-fence].view(x.shape)
    return inside.copy_(x)


def expected_results(x, weight, bias, grad):
    """Output and gradients (x, weight, bias) on maps (N, C, H, W), in float64."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.double())


def compare(x, weight, bias, grad, expected, patch_index=None, side=None, **close):
    """Both kernels, all four results, with the expected ones in the kernels' layout."""
    k = weight.shape[-1]
    patch_index = patch_index if patch_index is None else patch_index.to(DEVICE)
    x, grad, weight, bias = fenced(x), fenced(grad), weight.to(DEVICE), bias.to(DEVICE)
    results = (
        kernels.convolve(x, weight, bias, patch_index, side),
        kernels.convolve(grad, weight.flip(2, 3), None, patch_index, side),
        *kernels.weight_grad(x, grad, k, patch_index, side),
    )
    dtypes = [x.dtype, x.dtype, torch.float32, torch.float32]
    assert [result.dtype for result in results] == dtypes
    for result, wanted in zip(results, expected, strict=True):
        if close:
            torch.testing.assert_close(result.cpu().double(), wanted, **close)
        else:
            assert torch.equal(result.cpu().double(), wanted)


# ---- visible patches --------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("side", LAYOUTS)
def test_visible_is_exact(side):
    patches, c = LAYOUTS[side], 40 if side == 1 else 24  # one channel block and a part of one, or less than one
    shape = (1, len(patches.places), side * side, c)
    x, grad = integers(*shape, seed=0), integers(*shape, seed=1)
    weight, bias = integers(c, 1, 7, 7, seed=2), integers(c, seed=3)
    y, grad_x, grad_weight, grad_bias = expected_results(
        patches.to_map(x, side), weight, bias, patches.to_map(grad, side)
    )
    # the bias reaches removed positions too; their gradient is zero there, so its sum is the visible ones'
    expected = (patches.from_map(y, side), patches.from_map(grad_x, side), grad_weight, grad_bias)
    compare(x, weight, bias, grad, expected, patches.patch_index(side, 3), side)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Sums are in float32: only the output is rounded, by up to one part in 2**8 or 2**11."""
    patches, side, c = LAYOUTS[2], 2, 24
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(patches.places), side * side, c)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((c, 1, 7, 7), (c,)))
    y, grad_x, grad_weight, grad_bias = expected_results(
        patches.to_map(x, side), weight, bias, patches.to_map(grad, side)
    )
    expected = (patches.from_map(y, side), patches.from_map(grad_x, side), grad_weight, grad_bias)
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    if INTERPRETED:  # it cuts bfloat16 off instead of rounding
        rtol *= 2
    compare(x, weight, bias, grad, expected, patches.patch_index(side, 3), side, rtol=rtol, atol=1e-4)


@runs
def test_equal_inputs_give_equal_weight_gradients():
    patches, side = LAYOUTS[1], 1
    x = torch.randn(2, 1, len(patches.places), 1, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, second = (kernels.weight_grad(*x, 7, patches.patch_index(1, 3).to(DEVICE), side) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
@pytest.mark.parametrize("programs", [1, 2 * 7])
def test_weight_gradient_of_long_shares(monkeypatch, programs):
    """Several steps per program, the last one beyond the last patch."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    x, grad = integers(1, 9, 12, 32, seed=0), integers(1, 9, 12, 32, seed=1)
    nchw, nchw_grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    expected = expected_results(nchw, torch.zeros(32, 1, 3, 3), torch.zeros(32), nchw_grad)[2:]
    results = kernels.weight_grad(x.to(DEVICE), grad.to(DEVICE), 3)
    assert all(torch.equal(a.cpu().double(), b) for a, b in zip(results, expected, strict=True))


@runs
@pytest.mark.skipif(DEVICE != "cuda", reason="9 GB, and a fast device")
def test_more_than_2_to_the_31_elements():
    count, side, c = 2**31 // 4096 + 4, 8, 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count * side**2 * c:
        pytest.skip("needs 13 GB of free memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.zeros(1, count, side**2, c, dtype=torch.bfloat16, device=DEVICE)
    x[:, -4:].normal_(generator=generator)
    weight, bias = torch.randn(c, 1, 7, 7, device=DEVICE), torch.zeros(c, device=DEVICE)
    patch_index = torch.full((count, 3, 3), -1, dtype=torch.int32, device=DEVICE)
    patch_index[:, 1, 1] = torch.arange(count, device=DEVICE)
    few = torch.full((4, 3, 3), -1, dtype=torch.int32, device=DEVICE)
    few[:, 1, 1] = torch.arange(4, device=DEVICE)
    y = kernels.convolve(x, weight, bias, patch_index, side)
    assert torch.equal(y[:, -4:], kernels.convolve(x[:, -4:], weight, bias, few, side))
    assert not y[:, :-4].any()
    result, wanted = (
        kernels.weight_grad(x, y, 7, patch_index, side),
        kernels.weight_grad(x[:, -4:], y[:, -4:], 7, few, side),
    )
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-3)


@kernels._jit
def positions(index_ptr, places_ptr, height, width, first, R: tl.constexpr, MAP: tl.constexpr):
    lane = first + kernels.tl.arange(0, 4)
    index, exists = kernels._place(index_ptr, height, width, first + 3, lane, 1, 2, 7, R, MAP)
    kernels.tl.store(places_ptr + kernels.tl.arange(0, 4), kernels.tl.where(exists, index, -1))


@runs
def test_positions_beyond_2_to_the_31():
    """One column to the right and two rows down of the last lanes of a batch; the fourth is not one."""
    places = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    width, first = 1 << 16, 1 << 30  # strips of 4 rows, one a map
    positions[(1,)](places, places, 4, width, first, R=4, MAP=True)
    assert places.tolist() == [(first // width * 4 + 2) * width + i + 1 for i in range(3)] + [-1]
    table = torch.full((1, 3, 3), -1, dtype=torch.int32, device=DEVICE)
    table[0, 1, 1] = far = (1 << 30) + 5  # the patch itself: 4 columns
    positions[(1,)](table, places, 4, 4, 0, R=4, MAP=False)
    assert places.tolist() == [far * 16 + 2 * 4 + i + 1 for i in range(3)] + [-1]


# ---- maps -------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    ("n", "h", "w", "k"), [(1, 9, 5, 7), (2, 3, 11, 7), (2, 1, 1, 7), (1, 17, 3, 3)], ids=str
)  # strips: two of 5 rows, the second with 4; less than a kernel; a single position; three of 6 rows
def test_map_is_exact(n, h, w, k):
    c = 40 if k == 3 else 24
    x, grad = integers(n, c, h, w, seed=0), integers(n, c, h, w, seed=1)
    weight, bias = integers(c, 1, k, k, seed=2), integers(c, seed=3)
    y, grad_x, grad_weight, grad_bias = expected_results(x, weight, bias, grad)
    x, y, grad, grad_x = (t.permute(0, 2, 3, 1) for t in (x, y, grad, grad_x))
    compare(x, weight, bias, grad, (y, grad_x, grad_weight, grad_bias))


@runs
def test_inputs_that_are_not_contiguous():
    x, weight = integers(2, 16, 3, 4, seed=0).to(DEVICE), integers(2, 16, 3, 3, seed=1).to(DEVICE)[1][:, None]
    strided = x.permute(0, 2, 3, 1)
    y = kernels.convolve(strided, weight, None)
    assert y.is_contiguous()
    wanted = F.conv2d(x.cpu().double(), weight.cpu().double(), padding=1, groups=16)
    assert torch.equal(y.cpu().double(), wanted.permute(0, 2, 3, 1))
    results, others = (kernels.weight_grad(t, t, 3) for t in (strided, strided.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


# ---- who may run, and what is chosen ----------------------------------------------------------------------------


def test_available(monkeypatch):
    device = torch.device("cpu")
    assert not kernels.available(device, torch.float64)
    assert kernels.available(device, torch.float32) == (INTERPRETED and hasattr(kernels.tl, "tuple"))
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.available(device, torch.float32)


@has_triton
def test_a_table_that_does_not_fit():
    x, weight = torch.zeros(1, 2, 4, 8), torch.zeros(8, 1, 7, 7)
    for patch_index in (torch.zeros(2, 3, 3, dtype=torch.int32), torch.zeros(2, 5, 5)):
        with pytest.raises(ValueError, match=r"need torch.int32 of shape \(2, 5, 5\)"):
            kernels.convolve(x, weight, None, patch_index, side=2)


# ---- where the model calls them -------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("side", [8, 2, None])
def test_equals_the_library_through_autograd(side, monkeypatch):
    """As a block calls them: on visible patches, and on maps."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    visible = None
    if side:
        mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 0]])
        visible = VisiblePatches(mask, (2, 3), device=DEVICE)
    conv = nn.Conv2d(40, 40, 7, padding=3, groups=40).to(DEVICE)
    results = {}
    for backend in ("map", "kernel"):
        x = integers(2, 3, side * side if side else 5, 40, seed=1).to(DEVICE).requires_grad_()
        y = depthwise(x, conv, visible, backend)
        loss = (y * torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)).sum()
        results[backend] = y, *torch.autograd.grad(loss, [x, conv.weight, conv.bias])
    for kernel, library in zip(results["kernel"], results["map"], strict=True):
        assert kernel.dtype == library.dtype
        torch.testing.assert_close(kernel, library, rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", ["trained", "checkpointed", "evaluated"])
def test_a_block_takes_them_from_its_first_call_on(way, masked, monkeypatch):
    """Under whatever mode that call comes: nothing is tried out or timed in it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    calls, convolve = [], kernels.convolve
    monkeypatch.setattr(kernels, "convolve", lambda *args: (calls.append(args), convolve(*args))[1])
    plain = Stage(Block(8)).to(DEVICE)
    quick = copy.deepcopy(plain)
    fused.enable(quick, triton=True)
    quick.grad_checkpointing = way == "checkpointed"
    visible = VisiblePatches(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]), (2, 2), device=DEVICE) if masked else None
    results, x = [], integers(2, 2, 4, 8, seed=0).to(DEVICE).requires_grad_()
    for stage in (plain, quick):
        with torch.inference_mode(way == "evaluated"):
            y = stage(x, visible)
        results.append([y] if way == "evaluated" else [y, *torch.autograd.grad(y.square().sum(), stage.parameters())])
    assert len(calls) == {"trained": 2, "checkpointed": 3, "evaluated": 1}[way]
    for library, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, library, rtol=1e-4, atol=1e-4)
