"""A long run grows nowhere: not in memory, file handles, threads, processes or shared memory, from epoch to epoch.

`LONG_RUN="2000 20" pytest -s tests/test_long_run.py` takes 2,000 steps in each of 20 epochs and shows the figures.
"""

import ctypes
import gc
import os
import statistics
import sys
from pathlib import Path

import pytest
from torch import multiprocessing

from tests.small_runs import TINY, records, write_images
from utils.metrics import RunLog

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

STEPS, EPOCHS = map(int, os.environ.get("LONG_RUN", "40 8").split())
FLAGS = {
    "pretrain": "--batch_size 1 --vis_freq 2 --knn_freq 2 --knn_images 40 --decoder_embed_dim 8",
    "finetune": "--batch_size 2 --input_size 8 --mixup 0.8 --model_ema true --model_ema_eval true --clip_grad 1",
}


def figures() -> dict[str, int]:
    """Of this process; what it shares with its loader's workers are mapped files without a name in /dev/shm."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it hides no growth
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "RSS (kB)": int(status["VmRSS"].split()[0]),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "processes": len(multiprocessing.active_children()),
        "shared": Path("/proc/self/maps").read_text().count("/dev/shm"),
    }


@pytest.mark.parametrize("stage", FLAGS)
def test_nothing_grows(stage, scripts, tmp_path, monkeypatch):
    seen, write_epoch = [], RunLog.epoch

    def watched(log, record):
        write_epoch(log, record)
        seen.append(figures())

    monkeypatch.setattr(RunLog, "epoch", watched)
    monkeypatch.setitem(TINY, "depths", (1, 1, 1, 1))
    data = write_images(tmp_path / "data", "train", STEPS * (1 + (stage == "finetune")), size=10)
    flags = ["--data_path", data, "--output_dir", tmp_path / "run", "--epochs", EPOCHS, "--num_workers", 1]
    assert getattr(scripts, stage)(*flags, *FLAGS[stage].split()).code == 0
    assert len(records(tmp_path / "run")) == len(seen) == EPOCHS
    for epoch, row in enumerate(seen):
        print(stage, epoch, row)
    seen = seen[1:-1]  # the last one draws its report, too
    memory = [row.pop("RSS (kB)") for row in seen]
    # what grows does so in most pairs of epochs (a picture is drawn in every other one), what is made once in two pairs
    assert statistics.median_low(later - earlier for earlier, later in zip(memory, memory[2:], strict=False)) < 2048
    assert seen[-1] == seen[0]
