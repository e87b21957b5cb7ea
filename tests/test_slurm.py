"""submit, interrupt, preempt and time out on a real SLURM cluster of two nodes, brought up on this machine.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; skipped, with that reason, elsewhere.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

import main_pretrain
from tests.small_runs import load, records, same
from utils.errors import run_cli
from utils.slurm import Trainer, launch, minutes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "tests/slurm"
SMALL = "--data_set image_folder --model convnextv2_atto --input_size 16 --stem_stride 1 --batch_size 4 --epochs 4"
SMALL += " --lr 1e-3 --warmup_epochs 1 --num_workers 0 --device cpu --nodes 2 --ngpus 1 --cpus_per_task 16"
SMALL = [*SMALL.split(), "--signal_delay", "30"]


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


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Puts a program of this name, a shell script, first on PATH."""

    def put(script: str) -> None:
        program = tmp_path / "bin/sbatch"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    return put


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


def test_a_mistake_that_the_job_finds_is_one_line_of_its_log(slurm, scripts, tmp_path):
    job = Job(slurm, scripts, "pretrain", tmp_path, "--batch_size", 64, "--nodes", 1)
    while job.field("JobState") in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(0.2)
    assert job.field("ExitCode") == "2:0"
    (errors,) = job.logs.glob("*/*_log.err")
    lines = [line for line in errors.read_text().splitlines() if not line.startswith(("srun:", "slurmstepd:"))]
    assert [line.split()[0] for line in lines] == ["error:"], lines


def test_a_batch_script_with_srun_and_without(slurm, tmp_path):
    flags = "--data_set shapes --model convnextv2_atto --input_size 32 --stem_stride 1 --world_size 1 --device cpu"
    flags += " --initial_checkpoint config.json"  # is refused once the group is there
    (tmp_path / "config.json").write_text("{}")
    words = [sys.executable, ROOT / "main_pretrain.py", *flags.split()]
    command = " ".join(str(word) for word in words)
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/bash\nexport MASTER_ADDR=$(hostname) MASTER_PORT=29613\n{command}\nsrun {command}\n")
    words = ["sbatch", "--wait", "-N2", "-n2", "-c16", "-o", tmp_path / "log", script]
    subprocess.run(words, env=slurm, cwd=tmp_path, capture_output=True, timeout=120)
    log = (tmp_path / "log").read_text()
    assert log.count("SLURM has 2 tasks and started one: put srun in front") == 1
    for rank in range(2):
        assert f"rank {rank} of 2, by SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID: meeting at n1:29613" in log
    assert len(re.findall("^error: config.json", log, re.MULTILINE)) == 3
    assert "Traceback" not in log


def test_time_out(slurm, scripts, tmp_path, pytestconfig):
    if not pytestconfig.getoption("real_timeout"):
        pytest.skip("waits for a real time limit: pytest --real_timeout")
    job = Job(slurm, scripts, "pretrain", tmp_path, "--timeout", 2, "--epochs", 400, "--save_ckpt_num", 1)
    job.wait(lambda: job.field("Restarts") == "1" and "resumed from" in job.log(), seconds=300)
    assert "timed-out" in job.log()
    subprocess.run(["scancel", job.id], env=slurm, check=True)


@pytest.fixture
def run_here(scripts, tmp_path):
    """Starts submitit_pretrain.py --local true, from a folder that has modules of our names."""

    def start(*flags) -> subprocess.Popen:
        elsewhere = tmp_path / "an other project"
        (elsewhere / "utils").mkdir(parents=True)
        (elsewhere / "utils/__init__.py").touch()
        words = [sys.executable, ROOT / "submitit_pretrain.py", *SMALL, "--data_path", scripts.train, "--nodes", 1]
        words += ["--local", "true", "--job_dir", tmp_path / "my jobs/%j", *flags]
        return subprocess.Popen(
            [str(w) for w in words], cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    return start


def test_local_executor(run_here, tmp_path):
    run = run_here("--ngpus", 2, "--epochs", 2)
    _, error = run.communicate(timeout=240)
    assert run.returncode == 0, error[-3000:]
    assert len(list(tmp_path.glob("my jobs/*/checkpoint-1.pth"))) == 1


def test_a_mistake_that_the_job_finds_is_one_line(run_here, tmp_path):
    run = run_here("--batch_size", 64)
    _, error = run.communicate(timeout=240)
    assert run.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("my jobs/*/*.pth"))


def test_a_task_that_is_killed_is_one_line(run_here, tmp_path):
    run = run_here("--epochs", 400, "--save_ckpt_num", 1)
    while not (found := list(tmp_path.glob("my jobs/*/run.json"))):
        assert run.poll() is None
        time.sleep(0.1)
    job = found[0].parent
    (task,) = subprocess.run(["pgrep", "-P", job.name], capture_output=True, text=True).stdout.split()
    os.kill(int(task), signal.SIGKILL)
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: job {job.name}: a task was killed")
    assert str(job) in error


def test_ctrl_c_in_a_local_run_saves(run_here, tmp_path):
    run = run_here("--epochs", 400, "--save_ckpt_num", 1)
    while not list(tmp_path.glob("my jobs/*/checkpoint-1*.pth")):
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal sends it
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.count("\n") == 1, error
    assert "stopped after" in "".join(path.read_text() for path in tmp_path.glob("my jobs/*/*.out"))
    assert not list(tmp_path.glob("my jobs/*/.lock"))


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
        "#SBATCH --account=lab", "#SBATCH --constraint=h100", "#SBATCH --qos=high", "#SBATCH --mem=204800M",
        "#SBATCH --signal=USR2@120", "#SBATCH --requeue", "module load cuda",
    ):  # fmt: skip
        assert line in done.stdout.splitlines(), line
    assert "--kill-on-bad-exit=1" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "present", "absent"),
    [
        ("", "gpus-per-node=8 cpus-per-task=10 time=4320 requeue open-mode=append", "mem partition"),
        ("--sbatch gres=gpu:a100:8 --sbatch exclusive", "gres=gpu:a100:8 exclusive", "gpus-per-node"),
        ("--gres gpu:2", "gres=gpu:2", "gpus-per-node"),
        ("--gpus_per_task 1 --mem_per_cpu 4G", "gpus-per-task=1 mem-per-cpu=4G", "gpus-per-node mem"),
        (
            "--sbatch gpus-per-node= --sbatch requeue= --sbatch cpus-per-task=",
            "nodes=2",
            "gpus-per-node requeue cpus-per-task",
        ),
        ("--timeout 3-00:00:00 --exclude n7 --reservation r", "time=4320 exclude=n7 reservation=r", ""),
        ("--device cpu --use_volta32", "constraint=volta32gb", "gpus-per-node"),
        ("--use_volta32 --constraint h100", "constraint=h100", ""),
    ],
)
def test_options_of_sbatch(flags, present, absent, submit):
    code, out, error = submit("--dry_run", "true", "--job_dir", "jobs/%j", *flags.split())
    assert code == 0, error
    options = [line.removeprefix("#SBATCH --") for line in out.splitlines() if line.startswith("#SBATCH")]
    assert set(present.split()) <= set(options)
    assert not set(absent.split()) & {option.split("=")[0] for option in options}
    assert ("--cpus-per-task=10" in out.splitlines()[-1]) == ("cpus-per-task" not in absent)


def test_a_home_in_job_dir_is_one_for_results_too(submit, tmp_path, monkeypatch):
    """A shell leaves `--job_dir=~/runs` as it is; submitit would put logs in the home and we results in `./~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    _, out, _ = submit("--dry_run", "true", "--job_dir=~/runs")
    assert out.splitlines()[-1].endswith(f" {tmp_path}/runs")


def test_a_job_that_goes_elsewhere_finds_what_was_here(submit, sbatch, tmp_path, monkeypatch):
    sbatch(f"cat > {tmp_path}/script\necho Submitted batch job 17")
    (tmp_path / "data").mkdir()
    (tmp_path / "list").touch()
    flags = "--data_set image_folder --data_path data --train_list list --job_dir j/%j --log_dir logs/%j"
    code, _, error = submit(*flags.split(), "--setup", "cd /", "--sbatch", "chdir=/tmp", "--sbatch", "export=NONE")
    assert code == 0, error
    last = (tmp_path / "script").read_text().splitlines()[-1]
    assert last.startswith("srun --export=ALL ")
    assert last.endswith(f" {tmp_path}/j/%j")
    args = vars(submitit.core.utils.DelayedSubmission.load(tmp_path / "j/17/17_submitted.pkl").function.args)
    names = {"data_path": "data", "train_list": "list", "job_dir": "j/%j", "output_dir": "j/%j", "log_dir": "logs/%j"}
    assert {name: args[name] for name in names} == {name: f"{tmp_path}/{path}" for name, path in names.items()}


def test_a_list_of_absolute_paths_needs_no_data_path(submit, sbatch, tmp_path):
    """As in a run without SLURM."""
    sbatch("echo Submitted batch job 17")
    (tmp_path / "list").touch()
    code, _, error = submit(
        "--data_set", "image_folder", "--train_list", f"{tmp_path}/list", "--job_dir", f"{tmp_path}/j"
    )
    assert code == 0, error


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("2:30", 3), ("72:00:00", 4320), ("3-00:00:00", 4320), ("1-2", 1560), ("1-2:30", 1590), ("0:01", 1)],
)
def test_time_as_slurm_writes_it(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--job_dir: give a folder"),
        ("--job_dir /proc/no/%j", "--job_dir /proc/no: cannot be written"),
        ("--job_dir jobs/%x-%j", "--job_dir jobs/%x-%j: %x is not filled in, only %j"),
        ("--job_dir jobs --output_dir out/%A", "--output_dir out/%A: %A is not filled in"),
        *((f"--{name} 0", f"--{name} 0: must be a whole number") for name in ("nodes", "ngpus", "cpus_per_task")),
        *((f"--timeout={t}", f"--timeout {t}: must be minutes") for t in ("0", "x", "-5", "1-2-3", "1:2:3:4")),
        ("--sbatch time=3", "--sbatch time=3: must be key=value"),
        ("--timeout 2 --signal_delay 60", "--signal_delay 60: must be a minute less than --timeout 2 min"),
        ("--mask_ratio 2", "--mask_ratio 2: must be a number from 0 to 1"),
        ("--job_dir %j", "no SLURM here (no sbatch); --local true"),
        ("--job_dir %j --local true", "--nodes 2: --local true has one machine"),
        ("--job_dir %j --data_set image_folder", "--data_set image_folder needs --data_path"),
        ("--job_dir %j --data_set IMNET --data_path daat", "--data_path daat: no such file or folder here"),
        ("--job_dir %j --data_set image_folder --data_path . --train_list l", "--train_list l: no such file"),
        ("--job_dir %j --initial_checkpoint no.pth", "--initial_checkpoint no.pth: no such file"),
    ],
)
def test_mistakes_are_one_line(flags, message, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = submit(*flags.split())
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_every_place_has_the_number_of_the_job(monkeypatch):
    environment = SimpleNamespace(job_id=17, cluster="slurm", paths=SimpleNamespace(result_pickle=Path("/nowhere")))
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: environment)
    of_torch = SimpleNamespace(export=lambda **_: None)
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", lambda: of_torch)
    seen: dict = {}
    monkeypatch.setitem(sys.modules, "a_script", SimpleNamespace(main=lambda args: seen.update(vars(args))))
    places = dict.fromkeys(("job_dir", "output_dir", "log_dir", "predictions"), "a-%j/b")
    assert Trainer("a_script", Namespace(**places))() == 0
    assert seen == dict.fromkeys(places, "a-17/b")


def test_the_script_that_is_submitted(submit, sbatch, tmp_path, monkeypatch):
    """Not the dry run's: what a real submission hands to sbatch."""
    sbatch(f"cat > {tmp_path}/script\nenv > {tmp_path}/environment\necho Submitted batch job 17")
    for name in ("SLURM_MEM_PER_CPU", "SLURM_ARRAY_JOB_ID", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    flags = "--nodes 3 --ngpus 4 --timeout 90 --partition gpu --mem_gb 200 --cpus_per_task 6 --max_requeues 7"
    flags = [*flags.split(), "--job_dir", "my jobs/run-%j", "--comment", "my thesis", "--data_path", "/nodes/only"]
    setup = ["ls /nodes/only", "ulimit -n 4096"]
    code, out, error = submit(*flags, "--data_set", "image_folder", "--setup", setup[0], "--setup", setup[1])
    assert code == 0, error
    folder = tmp_path / "my jobs/run-17"
    assert out == f"submitted job 17: logs in {folder}, results in {folder}\n"
    lines = (tmp_path / "script").read_text().splitlines()
    for line in (
        "nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "partition=gpu", "mem=204800M", "cpus-per-task=6",
        "comment='my thesis'", "job-name=pretrain", f"output='{tmp_path}/my jobs/run-%j/%j_0_log.out'",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert lines[lines.index(setup[0]) + 1] == setup[1]
    assert lines[-1].startswith("srun ")
    assert "--kill-on-bad-exit=1" in lines[-1]
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    left = {"SLURM_CONF": "conf", "SBATCH_ACCOUNT": "lab"}
    names = ("SLURM_CONF", "SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_ARRAY_JOB_ID", "MASTER_PORT", "RANK")
    assert {name: environment[name] for name in names if name in environment} == left
    submission = submitit.core.utils.DelayedSubmission.load(folder / "17_submitted.pkl")
    assert submission.function.script == "main_pretrain"
    assert submission.function.args.output_dir == f"{tmp_path}/my jobs/run-%j"
    assert (submission._timeout_min, submission._timeout_countdown) == (90, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "script", "environment", "my jobs"}


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("invalid partition specified: nosuch", "--partition"),
        ("Invalid feature specification", "--constraint"),
        ("Invalid qos specification", "--qos"),
        ("Invalid account or account/partition combination specified", "--account"),
        ("Requested time limit is invalid", "--timeout"),
        ("Memory specification can not be satisfied", "--mem_gb"),
        ("Invalid generic resource (gres) specification", "--ngpus"),
        ("Requested node configuration is not available", "--ngpus"),
        ("Invalid wckey specification", "--sbatch"),
    ],
)
def test_a_refusal_is_sbatch_s_own_words_and_a_flag(words, flag, submit, sbatch, tmp_path):
    sbatch(f"echo 'sbatch: error: {words}' >&2; exit 1")
    code, _, error = submit("--job_dir", "jobs/%j")
    assert code == 2
    assert error.startswith(f"error: sbatch: {words}; change {flag}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_folder_in_use_is_not_submitted_to(submit, tmp_path):
    code = "import sys, utils.lock\nwith utils.lock.OutputLock(sys.argv[1]): print(flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        code, _, error = submit("--job_dir", "jobs", "--output_dir", str(tmp_path))
        run.communicate(b"\n")
    assert code == 2
    assert f"--output_dir {tmp_path}: in use by process {run.pid} " in error


@pytest.mark.parametrize(
    ("job_dir", "made"),
    [("a/b", "a/b"), ("a/%j", "a"), ("a/run-%j", "a"), ("a/%j/b", "a"), ("run-%j", "."), ("%j", ".")],
)
def test_of_job_dir_only_what_is_certain_is_made(job_dir, made, submit, sbatch, tmp_path):
    """When sbatch is asked; here it refuses, and nothing stays."""
    sbatch("find . -mindepth 1 -type d >&2; exit 1")
    code, _, error = submit("--job_dir", job_dir)
    assert code == 2
    found = {Path(name) for name in error.split("; change")[0].split()[2:]}
    assert found == {Path("bin"), Path(made), *Path(made).parents} - {Path()}
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
