"""torch.compile: model and loss of both training steps are one graph, compiled at most twice, with the same results."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from engine_finetune import WithLoss
from models import fused, kernels
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, random_mask

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def training_step(stage: str, fast: bool, checkpointing: bool):
    """The module that the script compiles, and its arguments for so many images."""
    torch.manual_seed(0)
    if stage == "pretrain":
        model = step = FCMAE(**TINY, decoder_embed_dim=8, norm_pix_loss=True, patch_size=8)
    else:
        model = ConvNeXtV2(**TINY, num_classes=3, stem_stride=1, drop_path_rate=0.3)
        step = WithLoss(model, nn.CrossEntropyLoss(label_smoothing=0.1))
    for name, p in model.named_parameters():
        if ".grn." in name:
            nn.init.normal_(p)
    model.set_grad_checkpointing(checkpointing)
    assert not fast or fused.enable(model)
    # as a loader on a GPU gives it: whatever reads the mask would break the graph
    mask = {"mask": random_mask(noise(5, 9, seed=1), 0.6), "mask_ratio": 0.6}
    if stage == "pretrain":
        return step, lambda count: ((noise(count, 3, 24, 24),), mask | {"mask": mask["mask"][:count]})
    return step, lambda count: ((noise(count, 3, 24, 24), torch.arange(count) % 3), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fast", "checkpointing"),
    [(True, False), (True, True), (False, True)],
    ids=["fused", "fused, checkpointing", "plain, checkpointing"],
)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_training_step_is_one_graph(stage, fast, checkpointing):
    """Whatever numbers of images follow; blocks of different drop paths are in it as they are."""
    step, inputs = training_step(stage, fast, checkpointing)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)  # a break would be an error
    results = []
    for form in (step, compiled):
        for count in (5, 3, 4):
            args, more = inputs(count)
            torch.manual_seed(count)
            loss = form(*args, **more)[0]
            results.append([loss, *torch.autograd.grad(loss, list(step.parameters()))])
    assert counter.frame_count == 2
    for eager, graph in zip(results[:3], results[3:], strict=True):
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    parts = [part for graph in counter.graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    names = {str(node.target) for part in parts for node in part.graph.nodes}
    assert any("fcmae.depthwise" in name for name in names) == fast  # on the CPU they stay
    assert any("fcmae.grn_mlp" in name for name in names) == fast


@pytest.mark.skipif(not hasattr(kernels.tl, "tuple"), reason="needs Triton 3.3")
def test_whether_kernels_can_run_is_asked_in_the_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda **_: True)  # as where there is a GPU
    ask = lambda x: x + kernels.available(torch.device("cuda", 0), torch.bfloat16)  # noqa: E731
    assert torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


def test_a_given_mask_is_checked_unless_its_ratio_is_told():
    step, inputs = training_step("pretrain", False, False)
    (imgs,), told = inputs(5)
    loss, _, mask = step(imgs, **told)
    assert torch.equal(loss, step(imgs, mask=told["mask"])[0])
    assert torch.equal(mask, told["mask"])
    uneven = told["mask"].clone()
    uneven[0] = 1 - uneven[0]
    with pytest.raises(ValueError, match="same number"):
        step(imgs, mask=uneven)


@pytest.mark.slow
def test_the_compiler_copies_no_map_for_a_convolution(monkeypatch):
    """Once it did, of the stem's output, through a layout of its own: 3 % of an evaluation's time."""

    def stop(code: str):
        raise RuntimeError(code)  # before a C++ compiler takes its time

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(stop))
    torch._dynamo.reset()
    compiled = torch.compile(ConvNeXtV2(**TINY, stem_stride=1).eval())
    with torch.no_grad(), config.patch(force_disable_caches=True), pytest.raises(BackendCompilerFailed) as error:
        compiled(noise(2, 3, 16, 16))
    inputs = re.findall(r"= extern_kernels.convolution\((\w+)", str(error.value))
    assert inputs == 5 * ["reinterpret_tensor"]


@pytest.mark.parametrize("name", ["depthwise", "grn_mlp"])
def test_operators_keep_what_torch_library_asks(name):
    """Of schema, fake results, strides, and gradients, traced with shapes that change."""
    x, c = noise(2, 3, 4, 8).requires_grad_(), 8
    p = [
        noise(*shape, seed=i).requires_grad_() for i, shape in enumerate([(32, c), (32,), (32,), (32,), (c, 32), (c,)])
    ]
    weight, bias = noise(c, 1, 7, 7).requires_grad_(), noise(c).requires_grad_()
    returned = {str(result.type) for result in getattr(torch.ops.fcmae, name).default._schema.returns}
    assert returned == {"Tensor"}, "torch flattens lists in Python, at each call"
    if name == "grn_mlp":
        torch.library.opcheck(torch.ops.fcmae.grn_mlp, (x.flatten(1, 2), *p, 1e-6))
    else:
        torch.library.opcheck(torch.ops.fcmae.depthwise, (x, weight, bias, None, None, [], "map"))
