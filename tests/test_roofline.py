"""tools/roofline.py: its counts against another way of counting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import fcmae
from tools import roofline
from tools.baselines import MaskedAutoencoderViT

PEAKS = 990e12, 3.35e12


def products(model, *inputs, **kwargs) -> int:
    """FLOP of matrix products and attention, forward and backward, as torch counts them while they run."""
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs, **kwargs)
        (out[0] if isinstance(out, tuple) else out).backward()
    return sum(n for name, n in counter.get_flop_counts()["Global"].items() if "convolution" not in str(name))


@pytest.mark.slow
def test_products_are_those_of_the_plain_model():
    counted = roofline.count("convnextv2_atto", 2, *PEAKS)
    mask = fcmae.random_mask(torch.rand(2, 49), 0.6)
    usual = products(fcmae.convnextv2_atto(), torch.randn(2, 3, 224, 224), mask=mask, mask_ratio=0.6)
    assert counted.classes[roofline.PRODUCTS][0] == pytest.approx(usual, rel=0.02)


@pytest.mark.slow
def test_a_batch_costs_as_many_times_more():
    small, large = (roofline.count("convnextv2_atto", n, *PEAKS).classes for n in (8, 32))
    for kind in (roofline.PRODUCTS, roofline.DEPTHWISE):
        assert large[kind][0] == pytest.approx(4 * small[kind][0], rel=0.01)
    assert 3 < large["GELU"][1] / small["GELU"][1] < 4.01
    assert large[roofline.OPTIMIZER] == small[roofline.OPTIMIZER]


@pytest.mark.slow
def test_depthwise_convolutions_and_gelu_by_hand():
    """Of atto: 19 patches of 8, 4, 2 and 1 positions a side in blocks (2, 2, 6, 2), and 49 positions in the decoder."""
    counted = roofline.count("convnextv2_atto", 4, *PEAKS)
    blocks = zip((2, 2, 6, 2), (40, 80, 160, 320), (64, 16, 4, 1), strict=True)
    values = 4 * (sum(19 * depth * dim * positions for depth, dim, positions in blocks) + 49 * 512)
    assert counted.classes[roofline.DEPTHWISE][0] == 3 * 2 * 49 * values
    wide = 4 * values * 2  # bfloat16
    assert counted.classes["GELU"][1] == 5 * wide  # forward reads and writes one, backward reads two, writes one


@pytest.mark.slow
def test_of_mae(monkeypatch):
    """Its attention counted by hand: 12 blocks of 50 tokens and 768 channels, 8 of 197 and 512."""
    counted = roofline.count("mae", 2, *PEAKS).classes[roofline.PRODUCTS][0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        usual = products(MaskedAutoencoderViT(224), torch.randn(2, 3, 224, 224))
    embedding = 2 * 2 * 2 * 196 * 768 * 768  # forward, and the weight's gradient
    attention = 2 * (12 * 50**2 * 768 + 8 * 197**2 * 512)
    assert counted == pytest.approx(usual + embedding + 2 * attention, rel=0.02)  # backward makes the scores again


def test_the_inside_of_an_operator_is_counted():
    """Its two products of 18 rows, 8 and 32 channels; in bfloat16 the casts of weights and scales as well."""
    x, w1, w2 = torch.randn(2, 9, 8), torch.randn(32, 8), torch.randn(8, 32)
    operations = []
    for dtype in (torch.float32, torch.bfloat16):
        with roofline.Count(*PEAKS) as counted:
            torch.ops.fcmae.grn_mlp(x.to(dtype), w1, w1[:, 0], w1[:, 0], w1[:, 0], w2, w2[:, 0], 1e-6)
        assert counted.classes[roofline.PRODUCTS][0] == 2 * 2 * 18 * 8 * 32
        operations.append(counted.classes[roofline.REST][2])
    assert operations[1] >= operations[0] + 6


def test_time_is_bound_by_arithmetic_or_by_memory():
    counted = roofline.Count(100.0, 10.0)
    counted.add(roofline.PRODUCTS, 700.0, 7.0)
    counted.add(roofline.PRODUCTS, 7.0, 70.0)
    assert counted.classes[roofline.PRODUCTS] == [707.0, 77.0, 2, pytest.approx(10 + 10)]


@pytest.mark.slow
def test_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline.py", "--model", "convnextv2_atto", "--batch_size", "2"])
    roofline.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[float(x) for x in line.split("|")[2:-1]] for line in lines[2:]]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*roofline.CLASSES, "all"]
    *parts, total = cells
    for column, value in zip(zip(*parts, strict=True), total, strict=True):
        assert value == pytest.approx(sum(column), abs=0.4)
    assert all(fused <= eager for *_, eager, fused in cells)
