"""Small runs of the entry scripts in this process: the network shrunk, a few drawn images in class folders."""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from engine_finetune import WithLoss
from models.convnextv2 import SIZES
from utils.amp import Amp
from utils.data.shapes import FIRST_INDEX, draw
from utils.errors import run_cli
from utils.metrics import EpochTracker

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
COMMON = "--data_set image_folder --model convnextv2_atto --input_size 16 --stem_stride 1 --batch_size 8 --epochs 3"
COMMON += " --warmup_epochs 1 --num_workers 0 --lr 2e-3 --device cpu"
STEPS = 5  # optimizer steps per epoch: 40 images, 8 a batch


class Result(NamedTuple):
    code: int
    out: str
    err: str


def write_images(root: Path, split: str, count: int, classes: int = 4, size: int = 24) -> Path:
    """`count` drawn images as PNG files in `classes` folders c0, c1, ..."""
    for i in range(count):
        folder = root / f"c{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(FIRST_INDEX[split] + i, 0, size)).save(folder / f"{i:03}.png")
    return root


class Scripts:
    """The two entry scripts as functions of their flags, on train and val folders below `data`."""

    def __init__(self, data: Path):
        self.train = write_images(data / "train", "train", 40)
        self.val = write_images(data / "val", "val", 22)

    def pretrain(self, *flags) -> Result:
        defaults = [*COMMON.split(), "--data_path", self.train, "--decoder_embed_dim", 16]
        return self.call(main_pretrain, *defaults, *flags)

    def finetune(self, *flags) -> Result:
        defaults = [*COMMON.split(), "--data_path", self.train, "--eval_data_path", self.val]
        return self.call(main_finetune, *defaults, *flags)

    def call(self, script, *flags) -> Result:
        """As `python script.py flags`, with the exit code; exceptions that are not the user's doing come through."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "convnextv2_atto", TINY)
            try:
                run_cli(lambda: script.main(script.get_args_parser().parse_args([str(flag) for flag in flags])))
            except SystemExit as error:
                code = error.code
        return Result(code, out.getvalue(), err.getvalue())


class Killed(Exception):
    """Stands for a power cut."""


@contextlib.contextmanager
def killed_after(steps: int):
    """Stop the run inside the block with Killed once it has taken this many optimizer steps."""
    taken, step = [], Amp.step

    def counted(*args, **kwargs):
        if len(taken) == steps:
            raise Killed
        taken.append(1)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Amp, "step", counted)
        try:
            yield
        except Killed:
            return
    pytest.fail(f"the run ended before its step {steps}")


def poison(patch: Callable, what: str, at: range) -> None:
    """NaN in the loss that is watched, in the gradient, or in the images, at these of this process's batches."""
    owner, name = {
        "loss": (EpochTracker, "update"), "gradient": (Amp, "backward"), "images": (WithLoss, "forward"),
    }[what]  # fmt: skip
    original, calls = getattr(owner, name), itertools.count()

    def poisoned(self, *args, **kwargs):
        factor = math.nan if next(calls) in at else 1
        if kwargs:
            return original(self, *args, **{key: value * factor for key, value in kwargs.items()})
        return original(self, args[0] * factor, *args[1:])

    patch(owner, name, poisoned)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def records(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
