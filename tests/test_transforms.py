"""utils/data/transforms.py: pixels against PIL, normalisation, what flags of augmentation do."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import datasets
from tests.pictures import MEAN, STD, finetune_args, levels, picture, pretrain_args
from utils.data.transforms import (
    Normalise,
    eval_transform,
    pretrain_transform,
    sample_box,
    train_transform,
)
from utils.errors import UsageError
from utils.seeding import seed_all

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m9", "original", "originalr", "v0", "v0r", "3a", "augmix-m3-w3")


def assert_about_equal(found, expected):
    """8-bit pixels that differ by rounding alone."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.2


@pytest.mark.parametrize("scale", [0.2, 0.9])
def test_pretrain_transform_crops_then_resizes_as_pil(scale):
    image, flips = picture(), 0
    transform, normalise = (
        pretrain_transform((32, 32), 3, scale),
        Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )
    for seed in range(8):
        torch.manual_seed(seed)
        found = transform(image)
        assert (found.dtype, found.shape) == (torch.uint8, (3, 32, 32))
        torch.manual_seed(seed)
        top, left, height, width, mirrored = sample_box(40, 60, scale)
        expected = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        if mirrored:
            expected, flips = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flips + 1
        assert_about_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
        expected = transforms.functional.normalize(found / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert torch.equal(normalise(found[None])[0], expected)
        assert width * height >= 0.9 * scale * 60 * 40
    assert 0 < flips < 8


@pytest.mark.parametrize(
    ("height", "width", "min_crop"), [(40, 60, 0.08), (375, 500, 0.2), (30, 200, 0.5), (90, 20, 1)]
)
def test_boxes_are_distributed_as_torchvisions(height, width, min_crop):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    boxes = [sample_box(height, width, min_crop) for _ in range(4000)]
    theirs = [transforms.RandomResizedCrop.get_params(image, (min_crop, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    for top, left, h, w, _ in boxes:
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0 < w
    assert abs(np.mean([mirrored for *_, mirrored in boxes]) - 0.5) < 0.04
    for statistic in (0, 1, 2, 3, lambda b: b[2] * b[3], lambda b: b[2] / b[3]):
        value = statistic if callable(statistic) else lambda b, i=statistic: b[i]
        a, b = (np.sort([value(box) for box in drawn]) for drawn in (boxes, theirs))
        grid = np.union1d(a, b)
        shares = [np.searchsorted(x, grid, "right") / len(x) for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 0.043  # Kolmogorov-Smirnov at 0.1 %


def test_a_crop_that_does_not_fit_is_the_largest_that_does():
    for height, width, expected in ((10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))):
        image = torch.empty(3, height, width)
        assert sample_box(height, width, 1.0)[:4] == expected
        assert transforms.RandomResizedCrop.get_params(image, (1.0, 1.0), (3 / 4, 4 / 3)) == expected


def test_train_transform_crops_then_resizes_as_pil():
    transform = datasets.build_transform(True, finetune_args(input_size=48, aa="", reprob=0, min_crop=0.3))
    image = picture()
    for seed in range(6):
        seed_all(seed)
        found = levels(transform(image))
        seed_all(seed)
        box = RandomResizedCropAndInterpolation.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = box
        expected = image.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("input_size", "crop_pct", "image_size", "resized"),
    [
        (48, None, (60, 40), (81, 54)),  # 48 / (224 / 256) = 54.86
        (224, None, (60, 40), (384, 256)),
        (48, 1.0, (60, 40), (72, 48)),
        (48, 0.5, (40, 60), (96, 144)),
        (32, None, (32, 32), (32, 32)),
        (32, None, (60, 40), (48, 32)),
        (383, None, (80, 40), (874, 437)),
        (384, None, (60, 40), (384, 384)),  # warped
        (384, 0.5, (60, 40), (1152, 768)),
        (384, 1.0, (60, 40), (576, 384)),
    ],
)
def test_evaluation_transform(input_size, crop_pct, image_size, resized):
    args, image = finetune_args(input_size=input_size), picture(*image_size)
    args.crop_pct = crop_pct
    found = levels(datasets.build_transform(False, args)(image))
    left, top = (round((side - input_size) / 2) for side in resized)
    expected = image.resize(resized, Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + input_size, top + input_size))
    assert found.shape == (input_size, input_size, 3)
    assert_about_equal(found, np.asarray(expected))


@pytest.mark.parametrize("is_train", [True, False])
def test_normalisation_constants(is_train):
    for flag, mean, std in (("true", MEAN, STD), ("false", torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5))):
        args = finetune_args(input_size=64, aa="", reprob=0, imagenet_default_mean_and_std=flag)
        transform = datasets.build_transform(is_train, args)
        for level in (0, 255):
            found = transform(Image.new("RGB", (80, 70), (level,) * 3))
            assert found.shape == (3, 64, 64)
            torch.testing.assert_close(found, ((level / 255 - mean) / std).expand(3, 64, 64))
    assert datasets.mean_std(pretrain_args()) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_small_inputs_are_padded_and_cropped():
    transform = datasets.build_transform(True, finetune_args(input_size=32, aa="", reprob=0))
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    seen = set()
    for seed in range(24):
        seed_all(seed)
        found = levels(transform(Image.fromarray(image)))
        windows = {
            (top, left, flipped): padded[top : top + 32, left : left + 32][:, :: -1 if flipped else 1]
            for top in range(9) for left in range(9) for flipped in (False, True)
        }  # fmt: skip
        matching = [place for place, window in windows.items() if np.array_equal(window, found)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) > 15
    assert {0, 4, 8} <= {offset for top, left, _ in seen for offset in (top, left)}
    assert transform(picture(50, 40)).shape == (3, 32, 32)
    assert not any(isinstance(t, RandomResizedCropAndInterpolation) for t in transform.transforms)


def stage(transform, kind):
    return [t for t in transform.transforms if isinstance(t, kind)]


def test_augmentation_flags():
    build = partial(datasets.build_transform, True)
    assert stage(build(finetune_args()), RandomErasing)[0].probability == 0.25
    erasing = stage(build(finetune_args(resplit="true", remode="rand", recount=3)), RandomErasing)[0]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.125, "rand", 3)
    assert not stage(build(finetune_args(reprob=0)), RandomErasing)
    assert stage(build(finetune_args()), auto_augment.RandAugment)
    assert not stage(build(finetune_args(aa="")), auto_augment.RandAugment)
    assert stage(build(finetune_args(aa="", color_jitter=0.4)), transforms.ColorJitter)
    assert not stage(build(finetune_args(aa="")), transforms.ColorJitter)
    assert not stage(build(finetune_args(color_jitter=0.4)), transforms.ColorJitter)  # auto-augment has its own
    crop = stage(build(finetune_args(min_crop=0.4, train_interpolation="bilinear")), RandomResizedCropAndInterpolation)
    assert crop[0].scale == (0.4, 1.0)
    assert crop[0].interpolation is transforms.InterpolationMode.BILINEAR


def test_unknown_policy():
    for name in ("rnd-m9", "rand-x9", "rand-m9-k3"):
        with pytest.raises(UsageError, match=f"--aa {name}: .*rand-m9"):
            datasets.build_transform(True, finetune_args(aa=name))


def policy_ops(transform):
    for part in transform.transforms:
        yield from getattr(part, "ops", [])
        yield from (op for sub_policy in getattr(part, "policy", []) for op in sub_policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_posterize_to_no_bits_is_black(policy):
    transform = datasets.build_transform(True, finetune_args(input_size=32, aa=policy))
    ops = list(policy_ops(transform))
    posterizing = [op for op in ops if op.name.startswith("Posterize")]
    assert ops
    assert posterizing or policy == "3a"
    image = picture()
    for op in posterizing:
        op.prob, op.level_fn = 1.0, lambda magnitude, hparams: (0,)
        assert op(image).getextrema() == ((0, 0),) * 3
        op.level_fn = lambda magnitude, hparams: (2,)
        assert op(image).tobytes() == auto_augment.posterize(image, 2).tobytes() != image.tobytes()


def test_the_policy_of_the_recipes_reaches_no_bits():
    """With the default policy, magnitude 10 is 0 bits: what the guard is there for does happen."""
    transform = datasets.build_transform(True, finetune_args())
    (op,) = [op for op in policy_ops(transform) if op.name.startswith("Posterize")]
    assert op.level_fn(10, op.hparams) == (0,)
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert op(picture()).getextrema() == ((0, 0),) * 3


def test_pixels_without_data_count_for_nothing():
    """Neither in a crop, where they stay NaN, nor in what is evaluated, where they become the mean."""
    level, size = 300.0, (48, 48)
    image = torch.full((2, 90, 120), level)
    holes = torch.rand(90, 120, generator=torch.Generator().manual_seed(0)) < 0.1
    holes[:40, :40] = True
    image[:, holes] = torch.nan
    whole = []
    for seed in range(8):
        torch.manual_seed(seed)
        crop = pretrain_transform(size, 2, 0.3)(image)
        found = crop[~crop.isnan()]
        torch.testing.assert_close(found, torch.full_like(found, level))
        whole.append(crop.isnan().any(0).float().mean().item())
    assert 0 < np.mean(whole) < 0.25
    found = eval_transform(size, 2, 1.0, (100.0, 200.0), (50.0, 50.0))(image)
    assert set(found[0].unique().round().tolist()) == {0, 4}
    assert set(found[1].unique().round().tolist()) == {0, 2}
    names = ("scale", "auto_augment", "color_jitter", "interpolation", "re_prob", "re_mode", "re_count")
    augmentation = dict(zip(names, ((0.3, 1.0), None, None, "bicubic", 0, "pixel", 1), strict=True))
    found = train_transform(size, 2, augmentation, (100.0, 200.0), (50.0, 50.0), eight_bit=False)(image)
    assert set(found[1].unique().round().tolist()) <= {0, 2}


@pytest.mark.parametrize("shape", [(1, 8000), (8000, 1), (3, 2000)])
def test_thin_images_cost_what_others_cost(shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    transform, largest = eval_transform((224, 224), 3, 224 / 256, (0.5,) * 3, (0.5,) * 3), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **kwargs or {})
            largest.append(found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    with Sizes():
        found = transform(image)
    assert max(largest) < 3 * 256 * 256 * 10
    short, middle = min(shape), max(shape) // 2
    window = slice(middle - 20 * short, middle + 20 * short)
    cut = image[:, :, window] if shape[0] == short else image[:, window]
    expected = v2.functional.resize(cut, 256, transforms.InterpolationMode.BICUBIC)
    expected = v2.functional.center_crop(expected, 224) / 255 * 2 - 1
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    small = datasets.build_transform(True, finetune_args(input_size=32, aa="", reprob=0))
    assert small(to_pil_image(image)).shape == (3, 32, 32)
