"""Several gloo processes: the same trajectory as one, exact evaluation, prompt failure, elastic restart, signals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import main_pretrain
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
    """Two epochs of pre-training, 40 images in steps of 12 (the last of 4, so two of six processes have none of it).

    One spread is computed by the plain model.
    """
    folders = {}
    spreads = [(1, 12, 1, 0), (2, 6, 1, 2), (3, 4, 1, 0), (3, 2, 2, 1), (6, 2, 1, 0), (2, 3, 2, 0)]
    for processes, batch_size, update_freq, workers in spreads:
        folder = tmp_path_factory.mktemp("spread")
        spread = ["--batch_size", batch_size, "--update_freq", update_freq, "--num_workers", workers]
        spread += ["--fused", str(batch_size != 3)]
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


def test_a_moved_folder_goes_on_with_more_processes(scripts, tmp_path):
    flags = ("--epochs", 2, "--vis_freq", 0, "--batch_size")
    assert scripts.pretrain("--output_dir", tmp_path / "one", *flags, GLOBAL_BATCH).code == 0
    folder = shutil.copytree(tmp_path / "one", tmp_path / "moved")
    (folder / "checkpoint-1.pth").unlink()
    done = launch(scripts, "main_pretrain", 2, folder, *flags, GLOBAL_BATCH // 2)
    assert f"resumed from {folder}/checkpoint-0.pth, going on with epoch 1" in done.stdout
    for line, other in zip(*(records(path) for path in (tmp_path / "one", folder)), strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-5)


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
    args = argparse.Namespace(device="cpu", world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://",
        dist_timeout=None)
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
    lines, tables = [], []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        flags = ["--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0, "--batch_size", 4]
        flags += ["--predictions", folder / "all.csv"]
        done = launch(scripts, "main_finetune", processes, folder, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "(22 images)" in done.stdout
        lines.append(records(folder)[0])
        report = json.loads((folder / "report.json").read_text())
        matrix = report["confusion_matrix"]
        assert 100 * sum(row[i] for i, row in enumerate(matrix)) / 22 == report["acc1"] == lines[-1]["test_acc1"]
        tables.append([row.rsplit(",", 1) for row in (folder / "all.csv").read_text().splitlines()[1:]])
    for line, table in zip(lines[1:], tables[1:], strict=True):
        assert [row for row, _ in table] == [row for row, _ in tables[0]]
        for key in ("test_acc1", "test_acc5", "test_loss"):
            assert line[key] == pytest.approx(lines[0][key], rel=1e-6)


def test_patience_ends_all_processes_after_the_same_epoch(scripts, tmp_path):
    """The weights move, differently by rounding alone; 22 validation images."""
    flags = ("--epochs", 8, "--best_metric", "f1", "--patience", 1, "--lr", 1e-4, "--batch_size")
    for processes, batch_size in ((1, 8), (2, 4)):
        done = launch(scripts, "main_finetune", processes, tmp_path / str(processes), *flags, batch_size)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("the run ends early, after epoch") == 1
    one, two = (records(tmp_path / str(processes)) for processes in (1, 2))
    assert [line["test_f1"] for line in one] == pytest.approx([line["test_f1"] for line in two])
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "12"]
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["evaluated"] == reports[1]["evaluated"] == f"epoch {len(one) - 1}"


def test_frozen_stages_on_several_processes(scripts, tmp_path):
    """As on one process; torch has nothing to say of parameters without gradients."""
    flags = ("--freeze_stages", 2, "--batch_size")
    for processes, batch_size in ((1, 8), (2, 4)):
        done = launch(scripts, "main_finetune", processes, tmp_path / str(processes), *flags, batch_size)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "find_unused" not in done.stderr + done.stdout
        assert "strides" not in done.stderr
    one, two = (load(tmp_path / name / "checkpoint-2.pth")["model"] for name in "12")
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-3, atol=1e-4), name
        if name.startswith(("downsample_layers.0", "downsample_layers.1", "stages.0", "stages.1")):
            assert torch.equal(value, two[name])


LAUNCHERS = {  # what they set for the second of two processes on each of two nodes
    "torchrun": {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1},
    "mpirun": {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_RANK": 1},
    "hydra": {"PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1},
    "srun": {"SLURM_STEP_ID": 0, "SLURM_PROCID": 3, "SLURM_STEP_NUM_TASKS": 4, "SLURM_LOCALID": 1, "SLURM_NTASKS": 4},
}
BATCH = {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "SLURM_LOCALID": 0}  # a batch script's own shell
OTHER = {"RANK": 7, "WORLD_SIZE": 9, "LOCAL_RANK": 5}
PROXIES = LAUNCHERS["srun"] | {"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 2}  # that mpirun started through srun
PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}


@pytest.fixture
def variables(monkeypatch):
    """Sets a launcher's variables, and no other's."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI_", "PMI_", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *distributed.LOCAL_RANKS):
        monkeypatch.delenv(name, raising=False)

    def set_(values: dict) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_


@pytest.mark.parametrize(
    ("values", "flags", "ranks"),
    [
        ({}, (1, -1, False), (0, 1, 0)),
        ({}, (4, 2, False), (2, 4, 2)),
        *((values, (1, -1, False), (3, 4, 1)) for values in LAUNCHERS.values()),
        ({"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4}, (1, -1, False), (3, 4, 0)),
        (LAUNCHERS["mpirun"] | OTHER, (1, -1, False), (7, 9, 5)),
        (LAUNCHERS["mpirun"] | OTHER, (1, -1, True), (3, 4, 1)),
        (LAUNCHERS["srun"] | OTHER, (1, -1, False), (7, 9, 5)),
        (PROXIES | LAUNCHERS["mpirun"], (1, -1, False), (3, 4, 1)),
        (PROXIES | LAUNCHERS["hydra"], (1, -1, False), (3, 4, 1)),
        (LAUNCHERS["srun"] | {"PMI_RANK": 3, "PMI_SIZE": 4}, (1, -1, False), (3, 4, 1)),  # srun --mpi=pmi2
        ({"PMI_RANK": 3, "PMI_SIZE": 4, "PMI_LOCAL_RANK": 1}, (1, -1, False), (3, 4, 1)),  # mpiexec of Cray's PALS
        ({"PMI_RANK": 3, "PMI_SIZE": 4, "FLUX_TASK_LOCAL_ID": 1}, (1, -1, False), (3, 4, 1)),  # flux run
        (BATCH, (1, -1, False), (0, 1, 0)),
        (BATCH, (4, 2, False), (2, 4, 2)),
        (BATCH | {"SLURM_STEP_ID": 4294967290, "SLURM_STEP_NUM_TASKS": 1}, (1, -1, False), (0, 1, 0)),  # salloc, --pty
        ({"RANK": 0, "WORLD_SIZE": 1}, (1, 0, False), (0, 1, 0)),
    ],
)
def test_ranks_from_the_launcher(values, flags, ranks, variables):
    variables(values)
    assert distributed.launched_ranks(*flags) == ranks


@pytest.mark.parametrize(
    ("values", "flags", "line"),
    [
        ({}, ["--dist_on_itp", "true"], "--dist_on_itp true: OMPI_COMM_WORLD_RANK is not set"),
        ({"RANK": "", "WORLD_SIZE": 2}, [], "RANK '': must be a whole number"),
        ({"RANK": 0}, [], "WORLD_SIZE '': must be a whole number"),
        ({"WORLD_SIZE": 2}, [], "RANK '': must be a whole number"),
        ({"RANK": 0, "WORLD_SIZE": "two"}, [], "WORLD_SIZE 'two': must be a whole number"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": "x"}, [], "LOCAL_RANK 'x': must be a whole number"),
        ({"RANK": -1, "WORLD_SIZE": 2}, [], "RANK '-1': must be a whole number"),
        ({"RANK": 2, "WORLD_SIZE": 2}, [], "RANK 2: must be less than WORLD_SIZE 2"),
        (LAUNCHERS["srun"] | {"SLURM_PROCID": 4}, [], "SLURM_PROCID 4: must be less than SLURM_STEP_NUM_TASKS 4"),
        ({}, ["--world_size", "2", "--local-rank", "2"], "--local_rank 2: must be less than --world_size 2"),
        ({}, ["--local_rank", "5"], "--local_rank 5: must be less than --world_size 1"),
        (LAUNCHERS["torchrun"], [], "MASTER_ADDR '': several processes need"),
        (LAUNCHERS["torchrun"] | {"MASTER_ADDR": "localhost"}, [], "MASTER_PORT '': several processes need"),
        (LAUNCHERS["srun"] | PLACE | {"MASTER_PORT": "x1"}, [], "MASTER_PORT 'x1': several processes need"),
        (LAUNCHERS["hydra"] | PLACE | {"MASTER_PORT": 65536}, [], "MASTER_PORT '65536': several processes need"),
        (
            LAUNCHERS["mpirun"] | PLACE | {"MASTER_ADDR": "no.such.invalid"},
            [],
            "MASTER_ADDR no.such.invalid: no such host",
        ),
        (LAUNCHERS["torchrun"], ["--dist_url", "tcp://localhost:70000"], "--dist_url tcp://localhost:70000: '70000':"),
    ],
)
def test_what_cannot_be_a_group_is_told_at_once(values, flags, line, variables):
    variables(values)
    args = main_pretrain.get_args_parser().parse_args(["--device", "cpu", *flags])
    with pytest.raises(UsageError) as told, distributed.process_group(args):
        pass
    assert str(told.value).startswith(line)


def test_a_batch_that_a_gpu_does_not_hold_is_one_line(variables):
    variables({})
    args = main_pretrain.get_args_parser().parse_args(["--device", "cpu", "--batch_size", "512"])
    with pytest.raises(UsageError) as told, distributed.process_group(args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
        )
    assert str(told.value).startswith(
        "--batch_size 512: more than the GPU holds (CUDA out of memory. Tried to allocate 2.00 GiB); give a smaller one"
    )


@pytest.mark.parametrize(("values", "warns"), [(BATCH, True), ({}, False), (BATCH | {"SLURM_NTASKS": 1}, False)])
def test_a_batch_script_without_srun_is_told(values, warns, variables, capsys):
    variables(values)
    args = main_pretrain.get_args_parser().parse_args(["--device", "cpu"])
    with distributed.process_group(args) as device:
        assert device.type == "cpu"
    assert ("SLURM has 4 tasks and started one: put srun in front" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(
    ("count", "local_rank", "torchrun", "device"),
    [(4, 3, True, "cuda:3"), (1, 1, False, "cuda:0"), (1, 1, True, None), (2, 2, False, None), (1, 0, True, "cuda:0")],
)
def test_each_task_takes_the_gpu_it_sees(count, local_rank, torchrun, device, variables, monkeypatch):
    variables({"TORCHELASTIC_RUN_ID": "1"} if torchrun else {})
    for name, value in {"is_available": True, "device_count": count, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if device:
        assert str(distributed.pick_device("auto", local_rank)) == device
    else:
        with pytest.raises(UsageError, match=f"GPU {local_rank} asked for, {count} present"):
            distributed.pick_device("auto", local_rank)


def test_a_missing_process_is_named_each_minute_and_ends_the_wait(variables, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    now, sleep = iter(range(0, 10000, 5)), time.sleep
    monkeypatch.setattr(distributed.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(distributed.time, "sleep", lambda _: sleep(0.05))
    for rank, missing in (
        (1, f"no answer at localhost:{port}, where rank 0 must run,"),
        (0, "of 2 processes, rank 1 had"),
    ):
        variables({"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        args = main_pretrain.get_args_parser().parse_args(["--device", "cpu", "--dist_timeout", "200"])
        with pytest.raises(UsageError, match=f"--dist_timeout 200: {missing}"), distributed.process_group(args):
            pass
        first, *later = capsys.readouterr().out.splitlines()
        told = f"rank {rank} of 2, by RANK, WORLD_SIZE, LOCAL_RANK: meeting at localhost:{port}, for up to 200 s"
        assert first.endswith(told)
        assert [line.split()[-2:] for line in later] == [["1", "min"], ["2", "min"], ["3", "min"]]


def test_a_port_of_others(variables):
    args = main_pretrain.get_args_parser().parse_args(["--device", "cpu", "--dist_timeout", "1"])
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        for rank, told in (
            (0, f"port {port}: .* address already in use"),
            (1, "--dist_timeout 1: .* is another service's"),
        ):
            variables({"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port})
            with pytest.raises(UsageError, match=told), distributed.process_group(args):
                pass


def meet(ranks: list[int], world_size: int, url: str, timeout: float = 20) -> list:
    """The stores that ranks get, each in a thread, started in this order; of one that is refused, the words."""

    def come(rank: int):
        try:
            return distributed._meet(rank, world_size, url, timeout, "X")
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        coming = []
        for rank in ranks:
            coming.append(threads.submit(come, rank))
            time.sleep(0.2)
        return [future.result() for future in coming]


@pytest.mark.parametrize("place", ["env://", "file://"])
def test_workers_started_again_do_not_meet_the_dead(place, variables, tmp_path):
    """torchrun keeps its store, and on the nodes where no worker died it also keeps TORCHELASTIC_RESTART_COUNT."""
    agent = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables({"MASTER_ADDR": "localhost", "MASTER_PORT": agent.port, "TORCHELASTIC_RESTART_COUNT": 0})
    variables({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    url = place if place == "env://" else f"file://{tmp_path}/store"
    for ranks in ([0, 1], [1, 0], [2, 0, 1], [0, 1]):
        assert {store.add("met", 1) for store in meet(ranks, len(ranks), url)} == {*range(1, len(ranks) + 1)}
    died = meet([0, 1], 3, url, timeout=0.5)  # before rank 2 had come, which the next time comes first
    assert died == ["--dist_timeout 0.5: of 3 processes, rank 2 had not come after so many seconds"] * 2
    assert {store.add("met", 1) for store in meet([2, 1, 0], 3, url)} == {1, 2, 3}


def test_a_rank_that_comes_twice_is_told(variables, tmp_path):
    variables({})
    url = f"file://{tmp_path}/store"
    told = f"rank 1: two processes have it, by X; or {url} was used before"
    assert meet([0, 1, 1], 3, url, timeout=1)[2] == told


@pytest.mark.parametrize("launcher", ["mpirun", "hydra", "srun"])
def test_processes_that_a_launcher_started(launcher, pretrained, scripts, tmp_path):
    """By hand, as mpirun and srun would: two processes with the weights of two of torchrun's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    flags = ["--batch_size", 6, "--epochs", 2, "--vis_freq", 0, "--dist_url", url]
    words = command(scripts, "main_pretrain", 2, tmp_path, *flags)
    words = [sys.executable, *words[words.index(str(ROOT / "tests/small_process.py")) :]]
    processes = [
        subprocess.Popen(
            words, cwd=ROOT,
            env=environment(**{k: str({3: rank, 4: 2, 1: rank, 0: 0}[v]) for k, v in LAUNCHERS[launcher].items()}),
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


@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_has_other_strides_than_its_parameter(compiled, script, tmp_path):
    """DistributedDataParallel warns of them, once in a process; a plain model is what a compiler gets on a GPU."""
    code = f"""
import torch, torch.distributed as dist
from models.fcmae import FCMAE
from utils.distributed import data_parallel
compile = torch.compile
torch.compile = lambda function, options: compile(function, backend="aot_eager")
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
model = FCMAE(depths=(1, 1, 1, 1), dims=(4, 6, 8, 8), decoder_embed_dim=8, patch_size=8)
data_parallel(model, {compiled})(torch.randn(2, 3, 16, 16))[0].backward()
print(sum(p.grad.stride() != p.stride() for p in model.parameters()))
"""
    done = script("-c", code)
    assert done.stdout.strip() == "0", done.stderr
    assert "strides" not in done.stderr
