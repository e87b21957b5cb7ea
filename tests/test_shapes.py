"""The drawn data set: the same pixels everywhere, balanced and disjoint splits, a task neither void nor trivial."""

import zlib

import numpy as np
import pytest
from PIL import Image

from utils.data import shapes
from utils.data.shapes import CLASSES, Shapes, draw


@pytest.mark.parametrize("size", [32, 64, 97])
def test_draw_is_an_rgb_image(size):
    image = draw(3, 0, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


# If these change, results on `shapes` are no longer comparable with those of earlier versions.
@pytest.mark.parametrize(("seed", "size", "start", "crc"), [
    (0, 64, 0, 0x47F59449),
    (0, 32, 10_000_000, 0x47F6DB04),
    (7, 48, 1230, 0x4B134342),
])  # fmt: skip
def test_pixels_are_frozen(seed, size, start, crc):
    assert zlib.crc32(b"".join(draw(index, seed, size).tobytes() for index in range(start, start + 20))) == crc


def test_pixels_depend_on_index_and_seed_only():
    first = {index: draw(index, 5, 32) for index in range(40)}
    np.random.seed(1)  # the global stream is neither used nor moved
    before = np.random.get_state()[1].copy()
    for index in reversed(range(40)):
        np.testing.assert_array_equal(draw(index, 5, 32), first[index])
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    drawn = {draw(index, seed, 32).tobytes() for index in range(40) for seed in range(5)}
    assert len(drawn) == 200
    assert draw(1, 0, 32).tobytes() != draw(0, 1, 32).tobytes()


def test_picture_does_not_depend_on_resolution():
    fine = np.stack([draw(index, 0, 128) for index in range(50)]).astype(float)
    coarse = np.stack([draw(index, 0, 64) for index in range(50)]).astype(float)
    pooled = fine.reshape(50, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(pooled - coarse).mean() < 6  # pixel noise; another picture is more than 60 away
    assert np.abs(pooled - np.roll(coarse, 1, 0)).mean() > 60


@pytest.mark.parametrize(("split", "length"), [("train", 8000), ("val", 2000)])
def test_labels_are_balanced(split, length):
    data = Shapes(split)
    assert len(data) == len(data.targets) == length
    assert data.classes == list(CLASSES)
    assert len(set(CLASSES)) == 10
    assert np.bincount(data.targets).tolist() == [length // 10] * 10
    assert [data[i][1] for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_splits_are_disjoint():
    train, val = Shapes("train"), Shapes("val")
    assert not set(train.indices) & set(val.indices)
    images = {image.tobytes() for data in (train, val) for image, _ in (data[i] for i in range(100))}
    assert len(images) == 200


def test_items():
    data = Shapes("val", size=40, seed=3, num_samples=25)
    image, label = data[24]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (40, 40))
    np.testing.assert_array_equal(np.asarray(image), draw(10_000_024, 3, 40))
    assert label == data.targets[24] == 4
    assert Shapes("val", 40, 3, 25, transform=lambda im: im.size)[24] == ((40, 40), 4)
    assert sum(1 for _ in data) == 25  # plain iteration ends: an index past the end raises IndexError


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"'test'.*train, val"):
        Shapes("test")
    for num_samples in (0, 10_000_001):
        with pytest.raises(ValueError, match="num_samples"):
            Shapes("train", num_samples=num_samples)
    for index, seed in ((-1, 0), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match="Seed"):
            draw(index, seed, 32)


def test_distances_are_signed_and_in_units_of_length():
    """An edge fades over one pixel only where the distance grows by one per unit of length."""
    x, y = shapes._grid(200)
    for name, distance in shapes._DISTANCES.items():
        d = distance(1.25 * x, 1.25 * y)
        assert d.dtype == np.float32, name
        assert (d[[0, -1]] > 0).all(), name
        assert (d[:, [0, -1]] > 0).all(), name
        slope = np.hypot(*np.gradient(d, 2.5 / 200))[np.abs(d) < 0.05]
        assert np.median(slope) == pytest.approx(1, abs=0.02), name


def test_classes_differ_under_rotation_and_scale():
    """Silhouettes of equal area, turned to the best match, overlap by less than 90 % (intersection over union)."""
    x, y = shapes._grid(64)
    area = {name: (d(1.25 * x, 1.25 * y) < 0).mean() * 1.25**2 for name, d in shapes._DISTANCES.items()}
    masks = []
    for angle in np.arange(0, 2 * np.pi, np.pi / 18):
        u, v = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
        zoom = {name: 1.8 * np.sqrt(area[name]) for name in CLASSES}
        masks.append([shapes._DISTANCES[name](zoom[name] * u, zoom[name] * v).ravel() < 0 for name in CLASSES])
    masks = np.array(masks, dtype=float)  # (angles, classes, pixels)
    both = masks[0] @ masks.transpose(0, 2, 1)
    union = masks[0].sum(-1)[:, None] + masks.sum(-1)[:, None] - both
    overlap = (both / union).max(0)
    assert (overlap[~np.eye(10, dtype=bool)] < 0.9).all()


def test_every_shape_stands_out(monkeypatch):
    with_shape = np.stack([draw(index, 0, 64) for index in range(200)]).astype(int)
    monkeypatch.setattr(shapes, "_DISTANCES", dict.fromkeys(CLASSES, lambda x, y: np.full_like(x, 9)))
    without = np.stack([draw(index, 0, 64) for index in range(200)]).astype(int)
    for difference in np.abs(with_shape - without).max(-1):
        assert 0.03 < (difference > 0).mean() < 0.5
        assert np.median(difference[difference > 0]) > 20


@pytest.mark.slow
def test_class_means_do_not_solve_it():
    def pixels(split, num_samples):
        data = Shapes(split, size=32, num_samples=num_samples)
        return np.stack([np.asarray(image, np.float32).ravel() for image, _ in data]), np.array(data.targets)

    (x, y), (x_val, y_val) = pixels("train", 1000), pixels("val", 500)
    means = np.stack([x[y == label].mean(0) for label in range(10)])
    nearest = np.square(x_val[:, None] - means).sum(-1).argmin(1)
    assert (nearest == y_val).mean() < 0.35
