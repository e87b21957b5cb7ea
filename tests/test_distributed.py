"""Several gloo processes: the same trajectory as one, exact evaluation, prompt failure, elastic restart, signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.small_runs import COMMON, Scripts, load, records, same
from utils import distributed
from utils.errors import UsageError
from utils.interrupts import EXIT_CODE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 12


def command(scripts: Scripts, name: str, processes: int, output_dir: Path, *flags, torchrun=()) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    data = ["--data_path", scripts.train]
    data += ["--eval_data_path", scripts.val] if name == "main_finetune" else ["--decoder_embed_dim", 16]
    words = [*run, ROOT / "tests/small_process.py", name, *COMMON.split(), *data, "--output_dir", output_dir, *flags]
    return [str(word) for word in words]


def environment(**more) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHELASTIC_ERROR_FILE": "", **more}


def launch(scripts, name, processes, output_dir, *flags, torchrun=(), **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(scripts, name, processes, output_dir, *flags, torchrun=torchrun),
        env=environment(**more), capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(scripts, tmp_path_factory):
    """Two epochs of pre-training, 40 images in steps of 12 (the last of 4, so two of six processes have none of it)."""
    folders = {}
    spreads = [(1, 12, 1, 0), (2, 6, 1, 2), (3, 4, 1, 0), (3, 2, 2, 1), (6, 2, 1, 0)]
    for processes, batch_size, update_freq, workers in spreads:
        folder = tmp_path_factory.mktemp("spread")
        spread = ["--batch_size", batch_size, "--update_freq", update_freq, "--num_workers", workers]
        # SGD-like comparison would hide nothing, but AdamW is what people run: its first steps amplify rounding most
        done = launch(scripts, "main_pretrain", processes, folder, *spread, "--epochs", 2, "--vis_freq", 0)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "strides" not in done.stderr  # DDP warns where it has to copy a gradient
        folders[processes, batch_size, update_freq] = folder
    return folders


def test_trajectory_does_not_depend_on_the_spread(pretrained):
    (_, first), *others = pretrained.items()
    whole, lines = load(first / "checkpoint-1.pth")["model"], records(first)
    for spread, folder in others:
        weights = load(folder / "checkpoint-1.pth")["model"]
        for name, value in whole.items():
            assert torch.allclose(weights[name], value, rtol=1e-4, atol=2e-5), (spread, name)
        for line, other in zip(lines, records(folder), strict=True):
            assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-5)
            assert other["train_lr"] == line["train_lr"]


def test_training_moved_the_weights(pretrained, scripts, tmp_path):
    """The comparison above would mean nothing if nothing had changed."""
    assert scripts.pretrain("--output_dir", tmp_path, "--epochs", 2, "--lr", 0, "--batch_size", 12).code == 0
    still = load(tmp_path / "checkpoint-1.pth")["model"]
    moved = load(pretrained[1, 12, 1] / "checkpoint-1.pth")["model"]
    assert max(float((moved[k] - still[k]).abs().max()) for k in still) > 1e-3


IN_TURN = """
import argparse, os, pathlib, sys, time
from utils import distributed, errors

def main():
    rank, shared, own = os.environ["RANK"], *sys.argv[1:]
    args = argparse.Namespace(device="cpu", world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://")
    with distributed.process_group(args):
        for folder in (shared, own + ("A" if rank in "01" else "B")):
            with distributed.main_process_first():
                if not os.path.exists(folder + "/data"):
                    time.sleep(0.3)
                    pathlib.Path(folder, "download" + rank).touch()
                    pathlib.Path(folder, "data").touch()
        distributed.check_same(5, "training images")
        distributed.check_same(7 + (rank == "2"), "evaluation images")

errors.run_cli(main)
"""


def test_downloads_once_per_node_and_file_counts(tmp_path):
    """Two nodes of two processes: a shared folder gets one download, a folder of each node one each."""
    for name in ("shared", "ownA", "ownB"):
        (tmp_path / name).mkdir()
    words = [sys.executable, "-c", IN_TURN, str(tmp_path / "shared"), str(tmp_path / "own")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "4"}
    processes = [
        subprocess.Popen(
            words, env=environment(RANK=str(rank), LOCAL_RANK=str(rank % 2), **meet), cwd=ROOT, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert "error: evaluation images: 7 on rank 0, 8 on rank 2; all nodes need the same files." in err
    found = {name: sorted(x.name for x in (tmp_path / name).glob("down*")) for name in ("shared", "ownA", "ownB")}
    assert found == {"shared": ["download0"], "ownA": ["download0"], "ownB": ["download2"]}


def test_evaluation_counts_every_image_once(scripts, tmp_path):
    """22 validation images, which 3 does not divide, nor 8 per batch; lr 0 keeps the weights the same."""
    lines = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        flags = ["--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0, "--batch_size", 4]
        done = launch(scripts, "main_finetune", processes, folder, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "(22 images)" in done.stdout
        lines.append(records(folder)[0])
    for line in lines[1:]:
        for key in ("test_acc1", "test_acc5", "test_loss"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-6)


LAUNCHERS = {  # what they set for the second of two processes on each of two nodes
    "torchrun": {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1},
    "mpirun": {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_RANK": 1},
    "srun": {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1},
}
OTHER = {"RANK": 7, "WORLD_SIZE": 9, "LOCAL_RANK": 5}


@pytest.mark.parametrize(
    ("variables", "flags", "ranks"),
    [
        ({}, (1, -1, False), (0, 1, 0)),
        ({}, (4, 2, False), (2, 4, 2)),
        *((variables, (1, -1, False), (3, 4, 1)) for variables in LAUNCHERS.values()),
        ({"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4}, (1, -1, False), (3, 4, 0)),
        (LAUNCHERS["mpirun"] | OTHER, (1, -1, False), (7, 9, 5)),
        (LAUNCHERS["mpirun"] | OTHER, (1, -1, True), (3, 4, 1)),
        (LAUNCHERS["srun"] | OTHER, (1, -1, False), (7, 9, 5)),
        (LAUNCHERS["srun"] | LAUNCHERS["mpirun"] | {"SLURM_PROCID": 0}, (1, -1, False), (3, 4, 1)),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_LOCALID": 0}, (4, 2, False), (2, 4, 2)),  # a shell of salloc
        ({"SLURM_PROCID": 0, "SLURM_LOCALID": 0}, (1, -1, False), (0, 1, 0)),
    ],
)
def test_ranks_from_the_launcher(variables, flags, ranks, monkeypatch):
    for name in [name for launcher in LAUNCHERS.values() for name in launcher]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert distributed.launched_ranks(*flags) == ranks


def test_openmpi_asked_for_and_absent(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    with pytest.raises(UsageError, match="--dist_on_itp true: OMPI_COMM_WORLD_RANK is not set"):
        distributed.launched_ranks(1, -1, True)


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_processes_that_a_launcher_started(launcher, pretrained, scripts, tmp_path):
    """By hand, as mpirun and srun would: two processes with the weights of two of torchrun's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    flags = ["--batch_size", 6, "--epochs", 2, "--vis_freq", 0, "--dist_url", url]
    words = command(scripts, "main_pretrain", 2, tmp_path, *flags)
    words = [sys.executable, *words[words.index(str(ROOT / "tests/small_process.py")) :]]
    names = LAUNCHERS[launcher]
    processes = [
        subprocess.Popen(
            words, env=environment(**dict(zip(names, map(str, (rank, 2, rank)), strict=True))), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    first, second = (process.communicate(timeout=240)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "40 images, 12 per optimizer step" in first
    assert "optimizer step" not in second
    weights, expected = (load(f / "checkpoint-1.pth")["model"] for f in (tmp_path, pretrained[2, 6, 1]))
    assert same(weights, expected)


def test_a_failing_rank_ends_the_job_with_its_own_message(scripts, tmp_path):
    begun = time.monotonic()
    done = launch(scripts, "main_pretrain", 2, tmp_path, FAIL_ON_RANK="1")
    assert done.returncode not in (0, EXIT_CODE)
    assert "rank failed on purpose" in done.stderr
    assert time.monotonic() - begun < 90


def test_a_mistake_is_one_line_on_every_rank(scripts, tmp_path):
    done = launch(scripts, "main_pretrain", 2, tmp_path, "--mask_ratio", 2)
    assert done.stderr.count("error: --mask_ratio 2: must be a number from 0 to 1") == 2
    assert done.returncode != 0


def test_elastic_restart(scripts, tmp_path):
    """One worker is killed in its eighth step; torchrun starts the group again, which ends as if nothing had been."""
    flags = ["--save_ckpt_steps", 1, "--vis_freq", 0, "--batch_size", 4]
    calm = launch(scripts, "main_pretrain", 2, tmp_path / "calm", *flags)
    assert calm.returncode == 0
    killed = launch(
        scripts, "main_pretrain", 2, tmp_path / "killed", *flags,
        torchrun=["--max-restarts=1"], KILL_ONCE=str(tmp_path / "once"),
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert (tmp_path / "once").exists()
    assert "resumed from" in killed.stdout
    a, b = (load(tmp_path / run / "checkpoint-2.pth") for run in ("calm", "killed"))
    assert same(a["model"], b["model"])
    assert same(a["optimizer"], b["optimizer"])
    assert records(tmp_path / "calm") == records(tmp_path / "killed")


def test_ranks_agree_on_the_step_at_which_a_signal_stops_them(scripts, tmp_path):
    flags = ["--batch_size", 4, "--epochs", 40, "--vis_freq", 0]
    process = subprocess.Popen(
        command(scripts, "main_pretrain", 2, tmp_path / "stopped", *flags),
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not (tmp_path / "stopped/checkpoint-1.pth").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to its workers
    out, _ = process.communicate(timeout=90)
    assert "stopped after step" in out
    again = launch(scripts, "main_pretrain", 2, tmp_path / "stopped", *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    assert launch(scripts, "main_pretrain", 2, tmp_path / "calm", *flags).returncode == 0
    a, b = (load(tmp_path / run / "checkpoint-39.pth") for run in ("calm", "stopped"))
    assert same(a["model"], b["model"])
    assert same(a["optimizer"], b["optimizer"])
    assert records(tmp_path / "calm") == records(tmp_path / "stopped")
