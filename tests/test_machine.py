"""What a machine does to a run: disks that fill, a console that closes, an environment that lacks things."""

import errno
import logging
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from main_pretrain import get_args_parser
from tests.small_runs import COMMON, Scripts, records
from utils.distributed import launched_ranks, setup_logging
from utils.errors import UsageError, run_cli

ROOT = Path(__file__).resolve().parent.parent
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def command(scripts: Scripts, output_dir, root=ROOT, name="main_pretrain") -> list[str]:
    data = ["--data_path", scripts.train, "--output_dir", output_dir, "--auto_resume", "false"]
    data += ["--decoder_embed_dim", 16] if name == "main_pretrain" else ["--eval_data_path", scripts.val]
    return [str(x) for x in (sys.executable, root / "tests/small_process.py", name, *COMMON.split(), *data)]


@pytest.mark.slow
def test_a_gpu_machine_without_submitit_finds_its_tests(script):
    program = "import pytest, sys; sys.modules['submitit'] = None; sys.exit(pytest.main(['--co', '-qm', 'gpu']))"
    done = script("-c", program)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("printed", ["print('row')", "[print('row') for _ in range(9999)]"])
def test_a_reader_that_goes_away_ends_a_table(printed, unbuffered):
    """Whether it goes while lines are printed, or before a buffer is written in the end."""
    program = f"from utils.errors import run_cli; input(); run_cli(lambda: {printed})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, **PIPES) as process:
        process.stdout.close()
        assert process.communicate("\n")[1] == ""
        assert process.returncode == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("mistake", [0, 1])
@pytest.mark.parametrize("all_of_it", [0, 1])
def test_a_full_disk_behind_stdout_is_a_line(all_of_it, mistake, unbuffered):
    program = "from utils.errors import UsageError, refuse, run_cli\n"
    program += f"run_cli(lambda: (print('row'), refuse({mistake}, '--x: wrong')))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        err = full if all_of_it else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=full, stderr=err, text=True)
    assert done.returncode == 2
    if not all_of_it:
        assert re.fullmatch("error: .*(No space left|--x: wrong).*\n", done.stderr)


def test_another_broken_pipe_keeps_its_traceback():
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError), open(write, "wb", buffering=0) as file:
        run_cli(lambda: file.write(b"x"))


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_does_not_end_a_run(unbuffered, scripts, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command(scripts, tmp_path), env=environment, **PIPES) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
        assert process.stderr.read() == "stdout is closed: no more lines there, warnings come here\n"
    assert len(records(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_console_on_a_full_disk_does_not_end_a_run(unbuffered, scripts, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(scripts, tmp_path), env=environment, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(records(tmp_path)) == 3


def test_help_that_finds_no_room_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: get_args_parser().parse_args(["--help"]))
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: what was to be written: No space left on device; make room, or write elsewhere\n"
    )


def test_a_console_on_a_full_disk_loses_lines_alone(monkeypatch, capsys):
    console = logging.getLogger("fcmae")
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    monkeypatch.setattr(console, "handlers", [])
    setup_logging()
    console.info("lost")
    assert capsys.readouterr().err == ""
    assert len(console.handlers) == 1  # there may be room again
    console.info("%d", "a mistake of ours")
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_a_line(number, capsys):
    def write():
        raise OSError(number, os.strerror(number), "x.png")

    with pytest.raises(SystemExit, match="2"):
        run_cli(write)
    assert capsys.readouterr().err == f"error: x.png: {os.strerror(number)}; make room, or write elsewhere\n"


@pytest.mark.parametrize(
    "words",
    [
        "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_loaders_without_shared_memory_are_a_line(words, capsys):
    def load():
        raise RuntimeError(words)

    with pytest.raises(SystemExit, match="2"):
        run_cli(load)
    error = capsys.readouterr().err
    assert error.startswith("error: --num_workers: /dev/shm has no room")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_run_without_streams(closed, scripts, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(f"{shlex.join(command(scripts, tmp_path))} {closed}", shell=True, env=environment, **PIPES)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert len(records(tmp_path)) == 3


def test_a_last_checkpoint_that_found_no_room_is_told_at_the_end(scripts, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = "--output_dir", tmp_path, "--vis_freq", 0, "--epochs", 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file of this process grows beyond that
    try:
        result = scripts.pretrain(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path}: the last checkpoint, of epoch 1, was NOT saved; make room")
    assert scripts.pretrain(*flags).code == 0


def test_a_rank_alone_names_what_goes_with_it(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match=r"^WORLD_SIZE '': .* RANK, WORLD_SIZE, LOCAL_RANK or their own, else unset"):
        launched_ranks(1, -1, False)


@pytest.mark.slow
def test_a_bare_environment(scripts, tmp_path):
    """64 open files, neither HOME nor TMPDIR, an ASCII locale, code behind a link, another folder."""
    (tmp_path / "code").symlink_to(ROOT)
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "PYTHONUTF8")}
    environment |= {"PYTHONPATH": str(tmp_path / "code"), "LC_ALL": "C", "LANG": "C", "TMPDIR": "/nonexistent"}
    done = subprocess.run(
        [*command(scripts, "größe", tmp_path / "code"), "--num_workers", "2"], cwd=tmp_path, env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), timeout=120, **PIPES,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(records(tmp_path / "größe")) == 3


def test_an_evaluation_says_that_it_replaces_a_report(scripts, tmp_path):
    assert scripts.finetune("--output_dir", tmp_path, "--epochs", 1, "--warmup_epochs", 0).code == 0
    result = scripts.finetune("--eval", "true", "--output_dir", tmp_path)
    assert f"written: {tmp_path}/report.json, in place of an earlier one\n" in result.out


HIDDEN = """
import builtins, os, runpy, signal, sys
for name in ("fcntl", "resource", "triton"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIG_BLOCK", "pthread_sigmask", "sigwaitinfo", "setitimer"):
    delattr(signal, name)
del os.fork
real = builtins.open

def absent(path, *args, **kwargs):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "hidden", path)
    return real(path, *args, **kwargs)

builtins.open = absent
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_what_other_systems_lack_is_not_needed(scripts, tmp_path):
    """Windows and macOS have no fork, no such signals, no fcntl, no /proc, no Triton."""
    for name in ("main_pretrain", "main_finetune"):
        python, *words = command(scripts, tmp_path, name=name)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([python, "-c", HIDDEN, *words], env=environment, timeout=120, **PIPES)
        assert done.returncode == 0, done.stderr
        assert "no locks here (import of fcntl halted" in done.stdout
