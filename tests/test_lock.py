"""One run per folder: who gets the lock, who is refused, and what the dead leave behind."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time

import pytest

from utils.errors import UsageError
from utils.lock import OutputLock

fork = multiprocessing.get_context("fork")


@contextlib.contextmanager
def elsewhere(folder, work=None):
    """A process that has the lock, after it did `work`; the block gets the process and what `work` returned."""
    mine, theirs = fork.Pipe()

    def hold():
        with OutputLock(folder):
            theirs.send(work() if work else None)
            theirs.recv()

    process = fork.Process(target=hold)
    process.start()
    try:
        assert mine.poll(20)
        yield process, mine.recv()
    finally:
        mine.send("end")
        process.join()


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_full_disk_at_the_start_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match=r"\.lock: cannot be written \(No space left"), OutputLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with elsewhere(tmp_path) as (process, _):
        os.utime(tmp_path / ".lock", (0, 0))  # however long it did nothing, in an evaluation say
        for _ in range(2):  # and a refused run leaves the lock where it is
            with pytest.raises(UsageError) as refused, OutputLock(tmp_path):
                pass
            owner = f"process {process.pid} on {socket.gethostname()}, SLURM job 17"
            assert str(refused.value) == (
                f"--output_dir {tmp_path}: in use by {owner}; give another folder, or remove {tmp_path}/.lock "
                "if that run is dead"
            )
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("SLURM_JOB_ID")
    with OutputLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b'{"host": "cut sho', b"\xff\x00\n", b"[1]", b"process 1 on elsewhere"])
def test_what_the_file_says_keeps_nobody_out(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with OutputLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "owner"), [(b"", "another run"), (b"\xff\n", "\ufffd"), (b"x" * 999, "x" * 200)])
def test_a_lock_that_is_held_is_one_whatever_the_file_says(tmp_path, content, owner):
    with elsewhere(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(UsageError, match=f"in use by {owner};"), OutputLock(tmp_path):
            pass


def test_a_killed_run_keeps_nobody_out_nor_do_its_workers(tmp_path):
    def worker():
        process = fork.Process(target=time.sleep, args=(60,))
        process.start()
        return process.pid

    with elsewhere(tmp_path, worker) as (owner, orphan):
        kill(owner)
        try:
            with OutputLock(tmp_path):  # the worker lives on, with the descriptor it inherited
                os.kill(orphan, 0)
        finally:
            os.kill(orphan, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_ends_does_not_take_the_lock_along(tmp_path):
    def worker():
        process = fork.Process(target=int)
        process.start()
        process.join()

    with elsewhere(tmp_path, worker), pytest.raises(UsageError, match="in use"), OutputLock(tmp_path):
        pass


@pytest.mark.slow
def test_one_of_several_gets_the_lock_of_a_dead_one(tmp_path):
    """All at once, again and again, some of them ending meanwhile."""

    def compete(start, folder):
        start.wait()
        with contextlib.suppress(UsageError), OutputLock(folder):
            os.mkdir(folder / "owned")  # fails where somebody else owns it
            time.sleep(0.002)
            os.rmdir(folder / "owned")

    for i in range(60):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / ".lock").write_text("process 999999 on elsewhere")
        start = fork.Barrier(4)
        runs = [fork.Process(target=compete, args=(start, folder)) for _ in range(4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert [run.exitcode for run in runs] == [0] * 4
        assert not list(folder.iterdir())


def test_who_waited_for_a_file_that_is_removed_locks_the_next(tmp_path, monkeypatch):
    """The owner ends, and another run begins, between this one's opening of the file and its lock."""
    lockf, owners = fcntl.lockf, contextlib.ExitStack()

    def late(file, how):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / ".lock").unlink()
        owners.enter_context(elsewhere(tmp_path))
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with owners:
        with pytest.raises(UsageError, match="in use by process"), OutputLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()


def test_the_end_of_a_run_leaves_the_lock_of_another(tmp_path):
    """What the message advises, done to a run that was not dead."""
    with OutputLock(tmp_path):
        (tmp_path / ".lock").unlink()
        other = elsewhere(tmp_path)
        process, _ = other.__enter__()
    assert (tmp_path / ".lock").read_text().startswith(f"process {process.pid} ")
    with pytest.raises(UsageError, match=f"process {process.pid} "), OutputLock(tmp_path):
        pass
    other.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_without_locks_a_warning_is_all(tmp_path, monkeypatch):
    warnings = []

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr("utils.lock.log.warning", lambda text, *values: warnings.append(text % values))
    hosts = [OutputLock(tmp_path) for _ in range(2)]
    hosts[1].owner = "process 1 on elsewhere"
    for lock in hosts:
        lock.__enter__()
    assert warnings == 2 * [f"{tmp_path}/.lock: no locks here (No locks available), so nothing keeps a second run out"]
    hosts[0].__exit__()
    assert (tmp_path / ".lock").read_text().endswith(" on elsewhere")
    hosts[1].__exit__()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UsageError, match=r"\.lock: cannot be opened \(Is a directory\)"), OutputLock(tmp_path):
        pass


def test_a_folder_that_became_read_only_does_not_spoil_the_end(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with OutputLock(tmp_path) as lock:
        monkeypatch.setattr("pathlib.Path.unlink", read_only)
    monkeypatch.undo()
    with elsewhere(tmp_path):
        assert lock.path.exists()
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_locks_and_only_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.lock.is_main_process", lambda: False)
    with OutputLock(tmp_path), OutputLock(tmp_path):
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with OutputLock(""):
        assert not list(tmp_path.iterdir())
