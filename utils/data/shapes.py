"""`shapes`: a labelled image data set that is drawn, not downloaded, so that every step can be tried anywhere.

An image is one textured shape on a textured background, with stray strokes, uneven light and pixel noise. Positions and
lengths are in half image sides (the image spans -1..1), so only the pixel noise depends on the resolution.

The pixels are the same on every machine: the stream of numpy's `RandomState` is frozen, and arrays meet only operations
that IEEE 754 rounds exactly (+ - * / sqrt abs min max floor). `np.sin` or a matrix product may differ in the last bit.
"""

import math
from functools import lru_cache

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

FIRST_INDEX = {"train": 0, "val": 10_000_000}  # multiples of the number of classes: the label is index % 10
NUM_SAMPLES = {"train": 8000, "val": 2000}


# Signed distances, negative inside, of shapes that about fill the unit disc. All are symmetric in x, y points up.


def _disc(x, y, radius=0.8):
    return np.sqrt(x * x + y * y) - radius


def _box(x, y, width=0.72, height=0.72):
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _star(x, y, inner=0.45):
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    for _ in range(2):  # mirror all five points onto the upper one, of which a single edge is then enough
        x = np.abs(x)
        beyond = 2 * np.maximum(c * x - s * y, 0)
        x, y = x - c * beyond, y + s * beyond
    a, b = 1 - inner * c, inner * s
    return (a * np.abs(x) + b * (y - 1)) / math.hypot(a, b)


def _heart(x, y):
    u, v = math.sqrt(0.5) * (y + np.abs(x)), math.sqrt(0.5) * (y - np.abs(x))
    return np.minimum(_box(u, v, 0.49, 0.49), _disc(u - 0.6, v, 0.49))


def _arrow(x, y):
    head = np.maximum(0.1 - y, math.sqrt(0.5) * (np.abs(x) + y - 0.95))
    return np.minimum(head, _box(x, y + 0.4, 0.22, 0.55))


_DISTANCES = {
    "disc": _disc,
    "ring": lambda x, y: np.abs(_disc(x, y, 0.72)) - 0.2,
    "triangle": lambda x, y: np.maximum(-y, math.sqrt(0.75) * np.abs(x) + 0.5 * y) - 0.52,
    "square": _box,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "star": _star,
    "crescent": lambda x, y: np.maximum(_disc(x, y, 0.95), -_disc(x, y - 0.42, 0.78)),
    "heart": _heart,
    "arrow": _arrow,
    "bowtie": lambda x, y: np.maximum(np.abs(x) - 0.85, 0.78 * (np.abs(y) - 0.8 * np.abs(x) - 0.06)),
}
CLASSES = tuple(_DISTANCES)


def _wave(u):
    """Smooth wave of period 1 in -1..1: parabolas in place of a sine, whose last bit is not portable."""
    u = u - np.floor(u) - 0.5
    return 8 * u * (1 - 2 * np.abs(u))


def _texture(rng, kinds, x, y):
    """A random pattern in -1..1, one of `kinds`: all go on across the image, so that a part tells of the rest."""

    def axes(low, high):
        """Rotated coordinates, in periods."""
        angle, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(low, high)
        c, s = frequency * math.cos(angle), frequency * math.sin(angle)
        return c * x + s * y + rng.uniform(), c * y - s * x + rng.uniform()

    kind = kinds[rng.randint(len(kinds))]
    if kind == "gradient":
        return np.clip(2 * axes(0.4, 0.7)[0] - 1, -1, 1)
    if kind == "stripes":
        return np.clip(rng.uniform(1, 3) * _wave(axes(1.6, 3.6)[0]), -1, 1)
    if kind == "checker":
        u, v = axes(1.2, 2.2)
        return np.clip(3 * _wave(u) * _wave(v), -1, 1)
    if kind == "clouds":
        return sum(_wave(axes(0.3, 1.1)[0]) for _ in range(4)) / 4
    return np.zeros_like(x)


def _rgb(rng, low, high):
    return rng.uniform(low, high, (3, 1, 1)).astype(np.float32)


def _stroke(rng, x, y):
    """Distance to a short thick line."""
    x, y = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
    angle, length, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.02, 0.25), rng.uniform(0.03, 0.06)
    dx, dy = length * math.cos(angle), length * math.sin(angle)
    along = np.clip((dx * x + dy * y) / length**2, 0, 1)
    return _disc(x - dx * along, y - dy * along, radius)


@lru_cache(maxsize=8)
def _grid(size):
    """Pixel centres x, y (size, size), the y axis pointing down as in images."""
    centres = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
    return np.meshgrid(centres, centres)


def draw(index: int, seed: int, size: int, mask: bool = False) -> np.ndarray:
    """Draw image `index` of the collection `seed`, uint8 (size, size, 3). It shows CLASSES[index % 10].

    mask: give instead where the shape is, uint8 (size, size): 1 + index % 10, elsewhere 0; strokes do not hide it.

    Raises ValueError if index or seed is not in 0..2**32-1.
    """
    rng = np.random.RandomState([seed, index])  # init_by_array mixes both words into the whole state
    x, y = _grid(size)

    def cover(image, distance, paint):
        alpha = np.clip(0.5 - distance * (size / 2), 0, 1)  # an edge fades over one pixel
        return image + alpha * (paint - image)

    # Every channel differs by 0.36 or more between the two colors, hence by 0.08 or more between their textures.
    back = _rgb(rng, 0, 1)
    fore = (back + _rgb(rng, 0.36, 0.64)) % 1
    image = back + _rgb(rng, -0.14, 0.14) * _texture(rng, ("flat", "gradient", "stripes", "clouds"), x, y)
    paint = fore + _rgb(rng, -0.14, 0.14) * _texture(rng, ("flat", "gradient", "stripes", "checker"), x, y)

    scale, aspect, shear = rng.uniform(0.5, 0.8), rng.uniform(0.85, 1.18), rng.uniform(-0.2, 0.2)
    angle, margin = rng.uniform(-0.7, 0.7), 0.97 - scale
    u, v = x - rng.uniform(-margin, margin), y - rng.uniform(-margin, margin)
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    u, v = (c * u + s * v) * aspect, (c * v - s * u) / aspect
    label = index % len(CLASSES)
    distance = scale * _DISTANCES[CLASSES[label]](u + shear * v, v)
    if mask:
        return np.where(distance < 0, np.uint8(1 + label), np.uint8(0))
    image = cover(image, distance, paint)

    for _ in range(rng.randint(1, 4)):
        image = cover(image, _stroke(rng, x, y), _rgb(rng, 0, 1))

    image = image * (1 + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y)
    noise = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape).astype(np.float32) / 255 - 0.5
    image = image + rng.uniform(0.01, 0.1) * noise
    return np.ascontiguousarray((255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8).transpose(1, 2, 0))


class Shapes(Dataset):
    """The split "train" or "val" of `shapes`, drawn on demand: pairs of a PIL image, or `transform` of it, and a label.

    Raises ValueError for another split, or for more samples than keep the two splits disjoint.
    """

    def __init__(self, split, size=64, seed=0, num_samples=None, transform=None):
        if split not in FIRST_INDEX:
            raise ValueError(f"unknown split {split!r} of shapes: choose from {', '.join(FIRST_INDEX)}")
        num_samples = NUM_SAMPLES[split] if num_samples is None else num_samples
        if not 0 < num_samples <= FIRST_INDEX["val"]:
            raise ValueError(f"num_samples must be in 1..{FIRST_INDEX['val']}, got {num_samples}")
        self.indices = range(FIRST_INDEX[split], FIRST_INDEX[split] + num_samples)
        self.size, self.seed, self.transform = size, seed, transform
        self.classes = list(CLASSES)
        self.targets = [index % len(CLASSES) for index in self.indices]

    def __len__(self):
        return len(self.indices)

    def mask(self, i: int) -> np.ndarray:
        """Where the shape of image i is, see `draw`."""
        return draw(self.indices[i], self.seed, self.size, mask=True)

    def __getitem__(self, i):
        image = Image.fromarray(draw(self.indices[i], self.seed, self.size))
        if self.transform is not None:
            image = self.transform(image)
        return image, self.targets[i]
