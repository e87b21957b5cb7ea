"""models/fcmae.py and models/visible.py: visible patches alone give what the reference, the masked dense network and
a convolution written with loops give; nothing of a removed patch gets in."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import fcmae, fused, operators
from models.convnextv2 import SIZES, Block
from models.fcmae import FCMAE, convnextv2_atto, convnextv2_tiny, random_mask
from models.visible import VisiblePatches
from tools.baselines import masked_dense_features

GOLDEN = Path(__file__).parent / "golden"
fill_fcmae = runpy.run_path(str(GOLDEN / "fill.py"))["fill_fcmae"]
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "decoder_embed_dim": 16}


def fill(model):
    """Every parameter, GRN's and the mask token too, far from its neutral value."""
    model.load_state_dict({name: torch.from_numpy(fill_fcmae(name, p.shape)) for name, p in model.state_dict().items()})
    return model


def small(**kwargs):
    return fill(FCMAE(**SMALL | kwargs))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masks(model, imgs, mask_ratio=0.6, seed=0):
    return model.gen_random_mask(imgs, mask_ratio, torch.Generator().manual_seed(seed))


def spread(mask, grid, side):
    """(N, L) -> (N, 1, h*side, w*side)."""
    return mask.view(-1, 1, *grid).repeat_interleave(side, 2).repeat_interleave(side, 3)


def assert_close(actual, expected, tolerance, what=""):
    """The largest difference against the largest value."""
    scale = expected.abs().max()
    assert scale > 0, what
    assert (actual - expected).abs().max() <= tolerance * scale, what


@pytest.fixture(params=["plain", "map", "window"])
def form(request, monkeypatch):
    """A model as it is, and with both of the CPU's fast depthwise convolutions."""
    if request.param == "plain":
        return lambda model: model
    monkeypatch.setattr(operators, "_fastest_backend", lambda *_: request.param)
    return lambda model: model if fused.enable(model) else pytest.fail("no block is fused")


# ---- the reference's sparse model


@pytest.mark.parametrize(("factory", "size", "file"), [
    (convnextv2_atto, 224, "fcmae_sparse_atto_224.npz"), (convnextv2_tiny, 160, "fcmae_sparse_tiny_160.npz"),
])  # fmt: skip
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fused"])
def test_golden_outputs_and_gradients(factory, size, file, fast):
    golden = np.load(GOLDEN / file)
    model = fill(factory(norm_pix_loss=True))
    assert not fast or fused.enable(model)
    imgs = torch.from_numpy(np.random.RandomState(7 + size).standard_normal((3, 3, size, size)).astype(np.float32))
    mask = torch.from_numpy(golden["mask"])
    with torch.no_grad():
        features = model.forward_encoder(imgs, mask)
        pred = model.forward_decoder(features, mask)
    outputs = {"features": features, "pred_first": pred[:, :16], "pred_mean": pred.mean(1)}
    for name, value in outputs.items():
        assert_close(value, torch.from_numpy(golden[name]), 1e-5, name)
    for norm_pix_loss, expected in ((False, golden["loss_raw"]), (True, golden["loss_norm_pix"])):
        model.norm_pix_loss = norm_pix_loss
        losses = [model.forward_loss(imgs[i : i + 1], pred[i : i + 1], mask[i : i + 1]) for i in range(3)]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)

    loss, _, returned = model(imgs[:1], mask=mask[:1])
    assert loss.item() == pytest.approx(golden["loss_norm_pix"][0], rel=1e-5)
    assert torch.equal(returned, mask[:1])
    loss.backward()
    norms = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"], strict=True))
    assert norms.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad.norm().item() == pytest.approx(norms[name], rel=1e-3), name


@pytest.mark.parametrize("file", ["fcmae_loss_p8_img64_norm.npz", "fcmae_loss_p8_img64_raw.npz"])
def test_golden_loss(file):
    golden = np.load(GOLDEN / file)
    values = {name: torch.from_numpy(golden[name]) for name in golden.files if golden[name].ndim > 1}
    imgs, mask = values["imgs"], values["mask"]
    pred = values["pred_nchw"].requires_grad_()
    model = FCMAE(**SMALL, patch_size=int(golden["patch_size"]), norm_pix_loss=bool(golden["norm_pix_loss"]))
    assert torch.equal(model.patchify(imgs), values["patchified"])
    assert torch.equal(model.unpatchify(values["unpatchify_in"]), values["unpatchify_out"])
    assert torch.equal(model.unpatchify(values["patchified"]), imgs)
    loss = model.forward_loss(imgs, pred, mask)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss64"]), rel=1e-6)
    assert_close(pred.grad, values["grad_pred_nchw"], 1e-5)
    assert model.forward_loss(imgs.double(), pred.double(), mask).item() == pytest.approx(golden["loss64"], rel=1e-12)


# ---- visible patches alone = the masked dense network, in float64


def compare_with_masked_dense(model, imgs, mask):
    model, imgs = model.double(), imgs.double().requires_grad_()
    inputs = dict(model.encoder.named_parameters()) | {"image": imgs}
    p = model.patch_size
    grid = (imgs.shape[2] // p, imgs.shape[3] // p)

    def run(features):
        assert features.shape == (*mask.shape[:1], model.encoder.dims[-1], *grid)
        loss = (features * noise(*features.shape, seed=5, dtype=torch.float64)).sum()
        return features.detach(), dict(zip(inputs, torch.autograd.grad(loss, inputs.values()), strict=True))

    features, gradients = run(model.forward_encoder(imgs, mask))
    expected, expected_gradients = run(masked_dense_features(model.encoder, imgs, mask))
    assert_close(features, expected, 1e-10, "features")
    for name in inputs:
        assert_close(gradients[name], expected_gradients[name], 1e-10, name)
    removed = spread(mask, grid, p).expand_as(imgs) == 1
    assert removed.any()
    assert not gradients["image"][removed].any()


@pytest.mark.parametrize(("batch", "grid", "patch_size", "mask_ratio"), [
    (1, (3, 3), 32, 0.6), (2, (2, 4), 32, 0.4), (3, (5, 2), 32, 0.75), (5, (1, 5), 32, 0.6),
    (2, (3, 4), 16, 0.6), (4, (4, 4), 16, 0.75), (1, (6, 3), 16, 0.4),
    (3, (7, 5), 8, 0.6), (2, (4, 8), 8, 0.75), (5, (3, 1), 8, 0.4),
])  # fmt: skip
def test_encoder_equals_the_masked_dense_network(form, batch, grid, patch_size, mask_ratio):
    model = form(small(patch_size=patch_size))
    imgs = noise(batch, 3, grid[0] * patch_size, grid[1] * patch_size, seed=batch)
    compare_with_masked_dense(model, imgs, masks(model, imgs, mask_ratio, seed=batch))


def test_atto_equals_the_masked_dense_network():
    model = fill(convnextv2_atto(in_chans=2))
    imgs = noise(2, 2, 96, 128)
    compare_with_masked_dense(model, imgs, masks(model, imgs))


def test_a_single_visible_patch_and_other_depths():
    model = fill(FCMAE(depths=(2, 0, 1, 2), dims=(4, 6, 10, 12), decoder_embed_dim=16))
    imgs = noise(2, 3, 96, 96)
    mask = torch.ones(2, 9)
    mask[0, 4] = mask[1, 8] = 0
    compare_with_masked_dense(model, imgs, mask)


@pytest.mark.parametrize("patch_size", [8, 32])
def test_without_removed_patches_all_three_forms_agree(patch_size):
    model = small(patch_size=patch_size).double()
    imgs = noise(2, 3, 2 * patch_size, 3 * patch_size, dtype=torch.float64)
    mask = torch.zeros(2, 6)
    *_, expected = model.encoder.forward_stages(imgs)
    assert_close(masked_dense_features(model.encoder, imgs, mask), expected, 1e-12)
    assert_close(model.forward_encoder(imgs, mask), expected, 1e-12)


# ---- moving features


@pytest.mark.parametrize("side", [1, 2, 8])
def test_gather_scatter_and_crop(side):
    model, (h, w) = FCMAE(**SMALL, patch_size=8), (2, 4)
    x = noise(3, 5, h * side, w * side)
    mask = masks(model, torch.empty(3, 3, 8 * h, 8 * w))
    patches = VisiblePatches(mask, (h, w))
    crops = [
        x[i, :, r * side : (r + 1) * side, c * side : (c + 1) * side]
        for i in range(3)
        for r in range(h)
        for c in range(w)
        if mask[i, r * w + c] == 0
    ]
    expected = torch.stack(crops)  # (N*K, C, s, s)
    assert len(crops) == 3 * patches.num_visible == 3 * 3
    assert torch.equal(patches.crop(x, side), expected)
    gathered = patches.gather(x.permute(0, 2, 3, 1))
    assert torch.equal(gathered, expected.permute(0, 2, 3, 1).reshape(3, 3, side * side, 5))
    assert torch.equal(patches.scatter(gathered).permute(0, 3, 1, 2), x * (1 - spread(mask, (h, w), side)))


# ---- nothing of a removed patch gets in


@pytest.mark.parametrize("junk", [1e6, float("inf"), float("nan")])
def test_removed_pixels_change_no_bit(form, junk):
    model = form(small())
    imgs = noise(3, 3, 96, 160)
    mask = masks(model, imgs)
    removed = spread(mask, (3, 5), 32).expand_as(imgs) == 1
    spoilt = imgs.masked_fill(removed, junk).requires_grad_()
    imgs.requires_grad_()

    def run(x):
        model.zero_grad()
        features = model.forward_encoder(x, mask)
        features.square().sum().backward()
        return [features.detach(), x.grad, *(p.grad.clone() for p in model.encoder.parameters())]

    clean, dirty = run(imgs), run(spoilt)
    assert clean[0].any()
    for a, b in zip(clean, dirty, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)
    assert not clean[1][removed].any()
    assert (clean[1][~removed] != 0).float().mean() > 0.99


# ---- masks


def blank(n, h, w, patch_size=8):
    """Images of which only the shape matters: they take no memory."""
    return torch.zeros(()).expand(n, 3, h * patch_size, w * patch_size)


@pytest.mark.parametrize(("h", "w", "mask_ratio", "len_keep"), [
    (7, 7, 0.6, 19), (7, 7, 0.75, 12), (5, 5, 0.4, 15), (5, 5, 0.6, 10),
    (1, 2, 0.5, 1), (4, 3, 0.9, 1), (4, 3, 0.01, 11),
])  # fmt: skip
def test_mask_keeps_an_exact_number(h, w, mask_ratio, len_keep):
    mask = FCMAE(**SMALL, patch_size=8).gen_random_mask(blank(50, h, w), mask_ratio)
    assert mask.shape == (50, h * w)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert ((mask == 0).sum(1) == len_keep).all()
    if len_keep > 1:
        assert len({tuple(row) for row in mask.tolist()}) > 1  # not one mask for the whole batch


def test_mask_is_uniform():
    n, length, kept = 100_000, 49, 19
    kept_map = 1 - masks(FCMAE(**SMALL, patch_size=8), blank(n, 7, 7))
    p = kept / length
    assert (kept_map.mean(0) - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
    pair = p * (kept - 1) / (length - 1)  # both of two different patches kept
    together = kept_map.T @ kept_map / n
    off_diagonal = together[~torch.eye(length, dtype=torch.bool)]
    assert (off_diagonal - pair).abs().max() < 5.5 * (pair * (1 - pair) / n) ** 0.5


def test_mask_generator():
    model, imgs = FCMAE(**SMALL, patch_size=8), blank(4, 7, 7)
    state = torch.get_rng_state()
    a, b, other = masks(model, imgs, seed=1), masks(model, imgs, seed=1), masks(model, imgs, seed=2)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert torch.equal(torch.get_rng_state(), state)  # a generator leaves the global one alone
    torch.manual_seed(0)
    c, d = (model.gen_random_mask(imgs, 0.6) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(model.gen_random_mask(imgs, 0.6), c)
    assert not torch.equal(c, d)


def test_random_mask_keeps_the_smallest_noise():
    noise = torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.8], [0.5, 0.2, 0.7, 0.6, 0.1]])
    assert random_mask(noise, 0.6).tolist() == [[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]]


@pytest.mark.parametrize("mask_ratio", [0, 0.0, 1, 1.0, 0.99, 1e-18, -0.5, 1.5])
def test_useless_mask_ratios_are_refused(mask_ratio):
    model = small(patch_size=8)
    for call in (model.gen_random_mask, lambda imgs, ratio: model(imgs, mask_ratio=ratio)):
        with pytest.raises(ValueError, match=rf"mask_ratio {mask_ratio} keeps -?\d+ of 16"):
            call(blank(2, 4, 4), mask_ratio)
    with pytest.raises(ValueError, match="keeps 0 of 1 "):
        model(blank(2, 1, 1))


def test_which_mask_ratio():
    model = small(patch_size=8, mask_ratio=0.75)
    imgs = noise(2, 3, 32, 32)
    removed = [model(imgs, **kwargs)[2].sum(1).tolist() for kwargs in ({}, {"mask_ratio": 0.5})]
    assert removed == [[12, 12], [8, 8]]
    assert FCMAE(**SMALL).mask_ratio == 0.6


# ---- given masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_given_masks_of_any_type(dtype):
    model = small(norm_pix_loss=True)
    imgs = noise(2, 3, 64, 96)
    mask = masks(model, imgs)
    loss, pred, _ = model(imgs, mask=mask)
    given_loss, given_pred, given = model(imgs, mask=mask.to(dtype))
    assert torch.equal(given_loss, loss)
    assert torch.equal(given_pred, pred)
    assert torch.equal(given, mask.to(dtype))
    for a, b in zip(model.reconstruct(imgs, mask.to(dtype)), model.reconstruct(imgs, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("mask", "message"), [
    (torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]), r"same number.*\[1, 2\]"),
    (torch.ones(2, 6), r"same number.*\[0\]"),
    (torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 1]]), r"\(2, 5\).*2 x 3 patches needs \(N, 6\)"),
    (torch.tensor([0, 0, 1, 1, 1, 1]), r"\(6,\)"),
    (torch.ones(2, 2, 3), r"\(2, 2, 3\).*\(N, 6\)"),
    (torch.tensor([[0, 0, 1, 1, 1, 1]]), "mask"),  # one row for two images must not be broadcast
    (torch.tensor([[0, 0, 1, 1, 1, 1]] * 3), "mask"),
])  # fmt: skip
def test_bad_masks_are_refused(mask, message):
    model, imgs = small(), noise(2, 3, 64, 96)
    for call in (model.forward_encoder, lambda imgs, mask: model(imgs, mask=mask)):
        with pytest.raises(ValueError, match=message):
            call(imgs, mask)


@pytest.mark.parametrize(("patch_size", "height", "width"), [(32, 64, 80), (32, 48, 64), (16, 24, 16), (8, 8, 12)])
def test_sizes_that_are_not_multiples_are_refused(patch_size, height, width):
    model, imgs = small(patch_size=patch_size), torch.zeros(1, 3, height, width)
    calls = (
        model,
        model.patchify,
        lambda x: model.gen_random_mask(x, 0.5),
        lambda x: model.forward_encoder(x, torch.zeros(1, 4)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"multiples of the patch size {patch_size}, got {height} x {width}"):
            call(imgs)


# ---- loss


def loss_by_loops(imgs, pred, mask, p, norm_pix_loss):
    """imgs (N, C, H, W), pred (N, p*p*C, h, w), mask (N, L), float64 arrays."""
    n, channels, _, width = imgs.shape
    losses = []
    for i in range(n):
        for patch in np.flatnonzero(mask[i]):
            row, column = divmod(patch, width // p)
            target = [
                imgs[i, c, row * p + r, column * p + s] for r in range(p) for s in range(p) for c in range(channels)
            ]
            if norm_pix_loss:
                target = (np.array(target) - np.mean(target)) / np.sqrt(np.var(target, ddof=1) + 1e-6)
            losses.append(np.mean((pred[i, :, row, column] - target) ** 2))
    return np.mean(losses)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_equals_loops(norm_pix_loss):
    model = FCMAE(**SMALL, patch_size=8, in_chans=2, norm_pix_loss=norm_pix_loss)
    imgs, pred = 0.01 * noise(2, 2, 16, 40) + 3, noise(2, 128, 2, 5, seed=1)
    imgs[0, :, :8, :8] = 0.25  # a patch without variance
    mask = masks(model, imgs)
    mask[0, 0] = 1
    expected = loss_by_loops(imgs.double().numpy(), pred.double().numpy(), mask.numpy(), 8, norm_pix_loss)
    assert model.forward_loss(imgs, pred, mask).item() == pytest.approx(expected, rel=1e-4)
    assert model.forward_loss(imgs.double(), pred.double(), mask).item() == pytest.approx(expected, rel=1e-10)


def test_autocast():
    model = small(norm_pix_loss=True)
    imgs = noise(2, 3, 96, 96)
    mask = masks(model, imgs)
    expected, expected_loss = model.forward_encoder(imgs, mask), model(imgs, mask=mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_encoder(imgs, mask)
        loss, pred, _ = model(imgs, mask=mask)
        again = model.forward_loss(imgs, pred, mask)
    assert loss.dtype == torch.float32
    assert pred.dtype == torch.bfloat16
    error = (features.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.01)
    # exactly what the same prediction costs outside autocast
    assert torch.equal(loss, again)
    assert torch.equal(loss, model.forward_loss(imgs, pred.float(), mask))
    assert model.forward_loss(imgs.bfloat16(), pred, mask).dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_labels_are_ignored():
    model, imgs = small(), noise(2, 3, 64, 64)
    mask = masks(model, imgs)
    losses = [model(imgs, labels, mask=mask)[0] for labels in (None, torch.tensor([3, 4]), "anything")]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_shapes_of_the_three_outputs(in_chans):
    model = small(in_chans=in_chans, patch_size=16, decoder_depth=2)
    loss, pred, mask = model(noise(2, in_chans, 32, 80), mask_ratio=0.5)
    assert (loss.shape, pred.shape, mask.shape) == ((), (2, 256 * in_chans, 2, 5), (2, 10))


# ---- patchify, pictures


def test_patchify_order():
    model = FCMAE(**SMALL, patch_size=8)
    imgs = noise(2, 3, 16, 24)
    patches = model.patchify(imgs)
    assert patches.shape == (2, 6, 192)
    for patch, (row, column), (r, s), c in ((4, (1, 1), (5, 2), 1), (2, (0, 2), (0, 7), 2)):
        assert torch.equal(patches[:, patch, (r * 8 + s) * 3 + c], imgs[:, c, row * 8 + r, column * 8 + s])
    assert torch.equal(model.unpatchify(patches, (2, 3)), imgs)
    for grid in (None, (2, 4)):
        with pytest.raises(ValueError, match=r"6 patches.*give grid="):
            model.unpatchify(patches, grid)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct(norm_pix_loss, monkeypatch):
    model = small(norm_pix_loss=norm_pix_loss)
    imgs = noise(2, 3, 64, 96) * 3 + 1
    mask = masks(model, imgs)
    removed = spread(mask, (2, 3), 32).expand_as(imgs) == 1
    seen, pasted = model.reconstruct(imgs, mask)
    assert seen.shape == pasted.shape == imgs.shape
    assert not pasted.requires_grad
    assert torch.equal(seen, imgs * ~removed)
    assert torch.equal(pasted[~removed], imgs[~removed])
    assert not torch.isclose(pasted[removed], imgs[removed], atol=1e-3).all()

    imgs[0, :, :40] = torch.nan
    for a, b in zip(model.reconstruct(imgs, mask), model.reconstruct(imgs.nan_to_num(0), mask), strict=True):
        assert torch.equal(a, b)
    imgs = imgs.nan_to_num(0)

    target = model.patchify(imgs)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = target.transpose(1, 2).reshape(2, -1, 2, 3)
    assert model.forward_loss(imgs, perfect, mask) < 1e-10
    monkeypatch.setattr(model, "forward_decoder", lambda features, mask: perfect)
    torch.testing.assert_close(model.reconstruct(imgs, mask)[1], imgs, rtol=1e-5, atol=1e-5)


# ---- decoder, names, initialisation


def test_decoder_replaces_removed_features_by_the_mask_token():
    model = small(decoder_depth=2).double()
    features = noise(2, 32, 3, 4, dtype=torch.float64)
    mask = masks(model, torch.empty(2, 3, 96, 128))
    removed = spread(mask, (3, 4), 1) == 1
    x = F.conv2d(features, model.proj.weight, model.proj.bias)
    x = torch.where(removed, model.mask_token, x).permute(0, 2, 3, 1)
    for block in model.decoder:
        x = block(x)
    expected = F.conv2d(x.permute(0, 3, 1, 2), model.pred.weight, model.pred.bias)
    assert_close(model.forward_decoder(features, mask), expected, 1e-12)
    junk = torch.where(removed, torch.nan, features)
    assert torch.equal(model.forward_decoder(junk, mask), model.forward_decoder(features, mask))


def test_state_dict_names_and_shapes():
    model = convnextv2_atto()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes.keys() == set(np.load(GOLDEN / "fcmae_sparse_atto_224.npz")["grad_names"].tolist())
    outside = {n: s for n, s in shapes.items() if not n.startswith(("encoder.", "decoder.0."))}
    assert outside == {
        "proj.weight": (512, 320, 1, 1), "proj.bias": (512,), "mask_token": (1, 512, 1, 1),
        "pred.weight": (3072, 512, 1, 1), "pred.bias": (3072,),
    }  # fmt: skip
    block = {name: tuple(p.shape) for name, p in Block(512).state_dict().items()}
    assert {n.removeprefix("decoder.0."): s for n, s in shapes.items() if n.startswith("decoder.")} == block
    assert [n.split(".")[1] for n in small(decoder_depth=2).state_dict() if n.endswith("grn.beta")][-2:] == ["0", "1"]


def test_factories_take_all_arguments():
    for name in SIZES:
        assert getattr(fcmae, name).__name__ == name
    model = convnextv2_atto(
        mask_ratio=0.7, decoder_depth=2, decoder_embed_dim=64, norm_pix_loss=True, in_chans=1, patch_size=16
    )
    assert (model.mask_ratio, len(model.decoder), model.proj.out_channels) == (0.7, 2, 64)
    assert (model.norm_pix_loss, model.in_chans, model.patch_size) == (True, 1, 16)
    assert (model.encoder.depths, model.encoder.dims) == ((2, 2, 6, 2), (40, 80, 160, 320))
    with pytest.raises(ValueError, match=r"32, 16 or 8.*got 4"):
        convnextv2_atto(patch_size=4)


def test_initial_weights_and_loss():
    torch.manual_seed(0)
    model = convnextv2_atto(norm_pix_loss=True)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert not any(p.any() for name, p in model.named_parameters() if ".grn." in name)
    with torch.no_grad():
        loss = model(noise(4, 3, 96, 96))[0]
    assert 0.9 < loss < 2.5


# ---- gradient checkpointing


def test_grad_checkpointing_gives_the_same_gradients():
    model = small(norm_pix_loss=True)
    imgs = noise(3, 3, 96, 96)
    mask = masks(model, imgs)
    calls = []
    for block in (m for m in model.encoder.modules() if isinstance(m, Block)):
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        model(imgs, mask=mask)[0].backward()
        return [p.grad.clone() for p in model.parameters()], len(calls)

    expected, once = gradients()
    model.set_grad_checkpointing()
    actual, twice = gradients()
    assert (once, twice) == (5, 10)  # backward ran every encoder block again
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_mask_that_removes_nothing_is_refused():
    model, imgs = small(), noise(2, 3, 64, 64)
    with pytest.raises(ValueError, match="the mask removes no patch, so the loss is undefined"):
        model(imgs, mask=torch.zeros(2, 4))


def test_the_default_is_fcmae_tiny():
    """Names and shapes, without their memory."""
    with torch.device("meta"):
        default, tiny = FCMAE(), convnextv2_tiny()
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (default, tiny)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_patches_without_data_do_not_count(norm_pix_loss):
    """The loss is that of the other removed patches alone; in those with some data, what is missing is 0."""
    model = FCMAE(
        1, (1, 1, 1, 1), (8, 8, 8, 8), decoder_embed_dim=16, norm_pix_loss=norm_pix_loss, patch_size=8
    ).double()
    imgs = torch.randn(2, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(
        [[1.0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], [0.0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]
    )
    holed = imgs.clone()
    holed[0, :, :8, :16] = torch.nan  # two removed patches
    holed[0, :, :8, 16:20] = torch.nan  # half a visible one
    holed[1, :, 8:10, 8:12] = torch.nan  # a part of a removed one
    filled = holed.nan_to_num(0)
    loss, pred, _ = model(holed, mask=mask)
    assert torch.equal(pred, model(filled, mask=mask)[1])
    counted = mask.double()
    counted[0, :2] = 0
    target = model.patchify(filled)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (pred.flatten(2).transpose(1, 2) - target).square().mean(-1)
    torch.testing.assert_close(loss, (errors * counted).sum() / counted.sum(), rtol=1e-12, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model(torch.full_like(imgs, torch.nan), mask=mask)[0] == 0
