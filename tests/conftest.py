"""Shared fixtures: small runs of the entry scripts on the drawn data set."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.pictures import broken_files, picture, save
from tests.small_runs import Scripts

ROOT = Path(__file__).resolve().parent.parent

# a GPU machine without submitit can run all others
NEED_SUBMITIT = "clients", "drawn_files", "evaluation", "flags", "readme", "slurm"
collect_ignore = [] if find_spec("submitit") else [f"test_{name}.py" for name in NEED_SUBMITIT]

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=30, help="how often test_faults.py kills its runs")
    parser.addoption("--real_timeout", action="store_true", help="wait for a real SLURM time limit, two minutes")


@pytest.fixture(autouse=True)
def no_log_to_what_is_closed():
    """Scripts that earlier tests ran in this process leave a handler, whose stream may have ended with its test."""
    log = logging.getLogger("fcmae")
    log.handlers[:] = [x for x in log.handlers if not getattr(getattr(x, "stream", None), "closed", False)]


@pytest.fixture
def logs(caplog, monkeypatch):
    """The log, whether or not a script run by another test has redirected it."""
    log = logging.getLogger("fcmae")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level(logging.INFO, "fcmae")
    return caplog


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def script():
    """Run an entry script or tool in its own process: script("main_pretrain.py", "--epochs", 1) -> CompletedProcess."""

    def call(*words, cwd=ROOT, env=None, timeout=300):
        command = [sys.executable, *(str(word) for word in words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)

    return call


@pytest.fixture
def folders(tmp_path):
    """Class folders train/{ant,bee,cat} and val/{ant,cat} of 60 x 40 images, each of its own colours."""
    for i, name in enumerate(("ant", "bee", "cat")):
        for j in range(4):
            save(picture(seed=10 * i + j), tmp_path / "train" / name / f"{j}.png")
            if name != "bee":
                save(picture(seed=100 + 10 * i + j), tmp_path / "val" / name / f"{j}.jpg")
    return tmp_path


@pytest.fixture
def spoiled(folders):
    """Those folders, with every kind of broken file in train/bee and val/cat; 12 and 8 good ones remain."""
    for name, content in broken_files().items():
        for split in ("train/bee", "val/cat"):
            (folders / split / f"0-{name}").write_bytes(content)
    return folders
