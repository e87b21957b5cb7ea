"""submit, interrupt, preempt and time out on a real SLURM cluster of two nodes, brought up on this machine.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; skipped, with that reason, elsewhere.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

import main_pretrain
from tests.small_runs import load, records, same
from utils.errors import run_cli
from utils.slurm import check_job_dir, launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "tests/slurm"
SMALL = "--data_set image_folder --model convnextv2_atto --input_size 16 --stem_stride 1 --batch_size 4 --epochs 4"
SMALL += " --lr 1e-3 --warmup_epochs 1 --num_workers 0 --device cpu --nodes 2 --ngpus 1 --cpus_per_task 16"
SMALL = [*SMALL.split(), "--signal_delay", "30"]

COUNTS = ("nodes", "ngpus", "timeout", "cpus_per_task")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment of a cluster's clients; the cluster lives as long as this file's tests."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root and the packages slurmctld, slurmd, slurm-client, munge")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([LAB / "slurm_up.sh", folder, "2"], check=True, capture_output=True, timeout=60)
    yield {
        **os.environ,
        "SLURM_CONF": f"{folder}/etc/slurm.conf",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([LAB / "slurm_down.sh", folder], check=True, capture_output=True, timeout=60)


class Job:
    def __init__(self, slurm, scripts, name: str, folder: Path, *flags):
        self.slurm, self.output_dir, self.logs = slurm, folder / "out", folder / "jobs"
        data = ["--data_path", scripts.train]
        if name == "finetune":
            data += ["--eval_data_path", scripts.val]
        words = [sys.executable, ROOT / f"submitit_{name}.py", *SMALL, *data, "--timeout", 60, *flags]
        words += ["--output_dir", self.output_dir, "--job_dir", self.logs / "%j"]
        done = subprocess.run(
            [str(word) for word in words], env=slurm, cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        self.id = re.search(r"submitted job (\d+)", done.stdout)[1]

    def field(self, name: str) -> str:
        text = subprocess.run(
            ["scontrol", "show", "job", self.id], env=self.slurm, capture_output=True, text=True
        ).stdout
        return re.search(rf"{name}=(\S+)", text)[1]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.glob("*/*_log.*")))

    def wait(self, done, seconds=240) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.log()[-5000:]
            assert self.field("JobState") not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.log()[-5000:]
            time.sleep(0.2)

    def wait_for_epoch(self, epoch: int) -> None:
        self.wait((self.output_dir / f"checkpoint-{epoch}.pth").exists)

    def wait_until_completed(self) -> None:
        self.wait(lambda: self.field("JobState") == "COMPLETED")


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """submitit_pretrain.py, in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")  # which launch changes

    def call(*flags):
        monkeypatch.setattr("sys.argv", ["submitit_pretrain.py", "--data_set", "shapes", *flags])
        code = 0
        try:
            run_cli(lambda: launch(main_pretrain))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def calm(slurm, scripts, tmp_path_factory):
    """Undisturbed jobs, by script."""
    jobs = {}
    for name in ("pretrain", "finetune"):
        jobs[name] = Job(slurm, scripts, name, tmp_path_factory.mktemp(name))
        jobs[name].wait_until_completed()
        assert jobs[name].field("Restarts") == "0"
    return jobs


def assert_same_end(job: Job, other: Job) -> None:
    a, b = (load(j.output_dir / "checkpoint-3.pth") for j in (job, other))
    for key in ("model", "optimizer"):
        assert same(a[key], b[key]), key
    assert records(job.output_dir) == records(other.output_dir)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_interrupted_job_is_requeued_and_ends_the_same(slurm, scripts, calm, name, tmp_path):
    job = Job(slurm, scripts, name, tmp_path)
    job.wait_for_epoch(0)
    subprocess.run(["scancel", "--signal=USR2", job.id], env=slurm, check=True)
    job.wait_until_completed()
    assert job.field("Restarts") == "1"
    log = job.log()
    assert "stopped after" in log
    assert "resumed from" in log
    assert_same_end(job, calm[name])


def test_preempted_job_goes_on_afterwards(slurm, scripts, calm, tmp_path):
    job = Job(slurm, scripts, "pretrain", tmp_path, "--partition", "main")
    job.wait_for_epoch(0)
    urgent = ["sbatch", "-p", "high", "-N2", "-n2", "-c16", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(urgent, env=slurm, check=True, capture_output=True, cwd=tmp_path)
    job.wait_until_completed()
    assert job.field("Restarts") == "1"
    assert_same_end(job, calm["pretrain"])


def test_killed_job_resumes_from_disk(slurm, scripts, calm, tmp_path):
    """As after a node's failure: the tasks are killed outright, and nobody calls checkpoint()."""
    job = Job(slurm, scripts, "pretrain", tmp_path, "--save_ckpt_steps", 1)
    job.wait_for_epoch(0)
    subprocess.run(["scontrol", "requeue", job.id], env=slurm, check=True)
    job.wait_until_completed()
    assert job.field("Restarts") == "1"
    assert_same_end(job, calm["pretrain"])


def test_time_out(slurm, scripts, tmp_path, pytestconfig):
    if not pytestconfig.getoption("real_timeout"):
        pytest.skip("waits for a real time limit: pytest --real_timeout")
    job = Job(slurm, scripts, "pretrain", tmp_path, "--timeout", 2, "--epochs", 400, "--save_ckpt_num", 1)
    job.wait(lambda: job.field("Restarts") == "1" and "resumed from" in job.log(), seconds=300)
    assert "timed-out" in job.log()
    subprocess.run(["scancel", job.id], env=slurm, check=True)


def test_local_executor(scripts, tmp_path):
    words = [sys.executable, ROOT / "submitit_pretrain.py", *SMALL, "--data_path", scripts.train, "--epochs", 2]
    words += ["--nodes", 1, "--ngpus", 2, "--local", "true", "--job_dir", tmp_path / "%j"]
    done = subprocess.run(
        [str(w) for w in words], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("*/checkpoint-1.pth"))) == 1


def test_dry_run_prints_the_script(tmp_path):
    words = ["--dry_run", "true", "--nodes", 8, "--job_dir", "/shared/%j", "--partition", "gpu", "--account", "lab"]
    words += ["--setup", "module load cuda", "--mem_gb", 200, "--constraint", "h100", "--qos", "high"]
    done = subprocess.run(
        [sys.executable, ROOT / "submitit_pretrain.py", "--data_set", "shapes", *map(str, words)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=gpu",
        "#SBATCH --account=lab", "#SBATCH --constraint=h100", "#SBATCH --qos=high", "#SBATCH --mem=200GB",
        "#SBATCH --signal=USR2@120", "#SBATCH --requeue", "module load cuda",
    ):  # fmt: skip
        assert line in done.stdout.splitlines(), line
    assert "--kill-on-bad-exit=1" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--job_dir: give a folder"),
        ("--job_dir /proc/no/%j", "--job_dir /proc/no/%j: /proc/no cannot be written"),
        *((f"--{name} 0", f"--{name} 0: must be at least 1") for name in COUNTS),
        ("--timeout 2 --signal_delay 60", "--signal_delay 60: must be a minute less than --timeout 2 min"),
        ("--mask_ratio 2", "--mask_ratio 2: must be a number from 0 to 1"),
        ("--job_dir %j", 'no SLURM here (Could not detect "srun", are you indeed on a slurm cluster?); --local true'),
    ],
)
def test_mistakes_are_one_line(flags, message, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = submit(*flags.split())
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_the_script_that_is_submitted(submit, tmp_path, monkeypatch):
    """Not the dry run's: what a real submission hands to sbatch."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").touch(0o755)
    (programs / "sbatch").write_text(f"#!/bin/sh\ncp $1 {tmp_path}/script\necho Submitted batch job 17\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    flags = "--nodes 3 --ngpus 4 --timeout 90 --job_dir jobs/run-%j --partition gpu --account lab --qos high"
    flags += " --mem_gb 200 --signal_delay 45 --cpus_per_task 6 --constraint h100 --comment thesis --max_requeues 7"
    code, out, error = submit(*flags.split(), "--setup", "module load cuda", "--setup", "ulimit -n 4096")
    assert code == 0, error
    folder = tmp_path / "jobs/run-17"
    assert out == f"submitted job 17: logs in {folder}, results in jobs/run-%j\n"
    lines = (tmp_path / "script").read_text().splitlines()
    for line in (
        "nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "partition=gpu", "account=lab", "qos=high",
        "mem=200GB", "signal=USR2@45", "cpus-per-task=6", "constraint=h100", "comment=thesis", "requeue",
        "job-name=pretrain",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    setup = [f"export PYTHONPATH={ROOT}:$PYTHONPATH", "module load cuda", "ulimit -n 4096"]
    begin = lines.index(setup[0])
    assert lines[begin : begin + 3] == setup
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)
    submission = submitit.core.utils.DelayedSubmission.load(folder / "17_submitted.pkl")
    assert (submission.function.script, submission.function.args.output_dir) == ("main_pretrain", "jobs/run-%j")
    assert submission._timeout_countdown == 7
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "script", "jobs"}


@pytest.mark.parametrize(
    ("job_dir", "made"),
    [("a/b", "a/b"), ("a/%j", "a"), ("a/run-%j", "a"), ("a/%j/b", "a"), ("run-%j", "."), ("%j", ".")],
)
def test_of_job_dir_only_what_is_certain_is_made(job_dir, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_job_dir(job_dir)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == {Path(made), *Path(made).parents} - {Path()}
