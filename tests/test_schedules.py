"""utils/lr_sched.py, utils/param_groups.py, utils/seeding.py: tables, the reference's and hand-written ones."""

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import convnextv2
from models.convnextv2 import layer_id, num_layer_ids
from models.fcmae import FCMAE
from utils.lr_sched import Schedule, cosine, warmup_cosine
from utils.param_groups import decays, param_groups
from utils.seeding import seed_all

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return json.loads((GOLDEN / name).read_text())


def optimizer_of(*groups):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **g} for g in groups], lr=9.0)


# ---- schedules


@pytest.mark.parametrize("table", golden("adjust_learning_rate.json"), ids=lambda t: f"{t['epochs']} epochs")
def test_learning_rate_tables(table):
    keys = ("lr", "min_lr", "warmup_epochs", "epochs")
    schedule = Schedule(**{key: table[key] for key in keys})
    optimizer = optimizer_of({"lr_scale": 0.5}, {})
    assert len(table["epoch"]) >= 30
    columns = (table[key] for key in ("epoch", "returned", "group_lr_scale_half", "group_no_scale"))
    for epoch, returned, half, plain in zip(*columns, strict=True):
        exact = partial(pytest.approx, rel=1e-12, abs=1e-18)
        assert warmup_cosine(epoch, *(table[key] for key in keys)) == exact(returned)
        assert schedule.apply(optimizer, epoch) == exact(returned)
        assert [group["lr"] for group in optimizer.param_groups] == [exact(half), exact(plain)]


def test_weight_decay_follows_the_reference_cosine():
    table = golden("cosine_scheduler.json")[0]
    start, end = table["kwargs"]["base_value"], table["kwargs"]["final_value"]
    epochs, steps = table["kwargs"]["epochs"], table["kwargs"]["niter_per_ep"]
    schedule = Schedule(0.1, 0, 2, epochs, weight_decay=start, weight_decay_end=end)
    optimizer = optimizer_of({"decays": True, "weight_decay": start}, {"decays": False, "weight_decay": 0.0})
    assert len(table["schedule"]) == epochs * steps
    for i, expected in enumerate(table["schedule"]):
        assert cosine(i / (epochs * steps), start, end) == pytest.approx(expected, rel=1e-12)
        schedule.apply(optimizer, i / steps)
        decaying, other = (group["weight_decay"] for group in optimizer.param_groups)
        assert decaying == pytest.approx(expected, rel=1e-12)
        assert other == 0
    assert cosine(0, 3, 7) == 3
    assert cosine(0.5, 3, 7) == pytest.approx(5)
    assert cosine(1, 3, 7) == pytest.approx(7)


def test_weight_decay_end_may_be_zero_and_absent():
    optimizer = optimizer_of({"decays": True, "weight_decay": 0.3})
    Schedule(0.1, 0, 2, 10, weight_decay=0.05).apply(optimizer, 5)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    Schedule(0.1, 0, 2, 10, weight_decay=0.05, weight_decay_end=0.0).apply(optimizer, 10)
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_fractional_warmup():
    assert warmup_cosine(0.25, 1.0, 0.0, 0.5, 10) == 0.5
    assert warmup_cosine(0.5, 1.0, 0.0, 0.5, 10) == 1
    assert warmup_cosine(5.25, 1.0, 0.2, 0.5, 10) == pytest.approx(0.6)


# ---- parameter groups


@pytest.mark.parametrize("name", ["param_groups_atto_single_0.9.json", "param_groups_base_group_0.6.json"])
def test_parameter_groups_with_layer_decay(name):
    table = golden(name)
    kind = table["layer_decay_type"]
    with torch.device("meta"):
        model = getattr(convnextv2, f"convnextv2_{table['size']}")()
    groups = param_groups(
        model.named_parameters(), table["weight_decay"], table["layer_decay"],
        layer_id=lambda name: layer_id(name, model.depths, kind), num_layer_ids=num_layer_ids(model.depths, kind),
    )  # fmt: skip
    assert [group["name"] for group in groups] == table["group_order"]
    parameters = dict(model.named_parameters())
    found = {}
    for group in groups:
        assert group["decays"] == (group["weight_decay"] > 0)
        for parameter_name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is parameters[parameter_name]
            assert parameter_name not in found
            found[parameter_name] = [group["lr_scale"], group["weight_decay"], group["name"]]
    assert found.keys() == table["params"].keys() == parameters.keys()
    for parameter_name, (scale, weight_decay, label) in table["params"].items():
        assert found[parameter_name] == [pytest.approx(scale, rel=1e-12), weight_decay, label], parameter_name


SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
# one block's names, and those of everything else; a name that is in neither list must not exist
DECAYING = ("dwconv.weight", "pwconv1.weight", "pwconv2.weight")
NOT_DECAYING = ("dwconv.bias", "norm.weight", "norm.bias", "pwconv1.bias", "pwconv2.bias", "grn.gamma", "grn.beta")


def test_parameter_groups_of_pre_training():
    model = FCMAE(**SMALL, decoder_embed_dim=8)
    groups = param_groups(model.named_parameters(), weight_decay=0.05)
    assert [(g["name"], g["weight_decay"], g["lr_scale"], g["decays"]) for g in groups] == [
        ("no_decay", 0.0, 1.0, False),  # the mask token is the first parameter
        ("decay", 0.05, 1.0, True),
    ]
    no_decay, decay = (set(group["names"]) for group in groups)
    blocks = ["decoder.0", *(f"encoder.stages.{s}.0" for s in range(4))]
    downsample = [f"encoder.downsample_layers.{i}" for i in range(4)]
    assert decay == (
        {f"{block}.{name}" for block in blocks for name in DECAYING}
        | {f"{downsample[0]}.0.weight", *(f"{name}.1.weight" for name in downsample[1:])}
        | {"proj.weight", "pred.weight"}
    )
    assert no_decay == (
        {f"{block}.{name}" for block in blocks for name in NOT_DECAYING}
        | {f"{downsample[0]}.0.bias", *(f"{name}.1.bias" for name in downsample[1:])}
        | {f"{downsample[0]}.1.{kind}" for kind in ("weight", "bias")}
        | {f"{name}.0.{kind}" for name in downsample[1:] for kind in ("weight", "bias")}
        | {"proj.bias", "pred.bias", "mask_token"}
    )
    torch.optim.AdamW(groups, lr=1.0)  # extra keys and all


def test_what_decays():
    vector, matrix, grn = torch.zeros(4), torch.zeros(4, 4), torch.zeros(1, 1, 1, 4)
    assert decays("head.weight", matrix)
    assert decays("stages.0.0.dwconv.weight", torch.zeros(4, 1, 7, 7))
    assert not decays("norm.weight", vector)
    assert not decays("head.bias", vector)
    assert not decays("x.bias", matrix)
    for name in ("stages.0.0.grn.gamma", "decoder.0.grn.beta", "mask_token", "module.mask_token"):
        assert not decays(name, grn), name


def test_frozen_parameters_are_left_out():
    model = FCMAE(**SMALL, decoder_embed_dim=8)
    model.encoder.requires_grad_(False)
    names = [name for group in param_groups(model.named_parameters(), 0.05) for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters() if not name.startswith("encoder."))


# ---- seeding


def draws():
    return random.random(), float(np.random.random()), float(torch.rand((), dtype=torch.float64))


def drawn(*keys):
    seed_all(*keys)
    return draws()


def test_same_keys_same_draws():
    first = drawn(1, 2, 3)
    assert draws() != first  # the generators moved on
    assert drawn(1, 2, 3) == first


def test_different_keys_different_draws():
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    for stream in zip(*(drawn(*k) for k in keys), strict=True):
        assert len(set(stream)) == len(keys)


# If these change, a run can no longer be continued by a newer version as the older one would have.
def test_draws_are_frozen():
    seed_all(7, 3, 11)
    assert random.getrandbits(32) == 2628154164
    assert np.random.randint(2**31) == 1833313285
    assert torch.initial_seed() == 715112911


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        seed_all(0, -1)
