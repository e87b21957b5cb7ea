"""One run per folder."""

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from .distributed import from_main_process, is_main_process
from .errors import UsageError, refuse

log = logging.getLogger("fcmae")


class OutputLock:
    """Keeps two runs from writing into one output_dir; a context manager, held by the first process.

    The kernel holds a POSIX lock on `.lock` for the process and lets go when that ends, however it ends; what the file
    says is for people. Forked loader workers do not inherit such a lock, as they would an flock. The price: closing any
    other descriptor of the file in this process drops the lock, so nothing else may open it here.

    On NFS the server keeps the lock for all hosts, for a while also of one that died. Without locks, a warning is all;
    where a mount keeps them local (`nolock`, `local_lock`, Lustre's `localflock`), hosts are not kept apart.

    Raises:
        UsageError: on entry, in all processes, where another run has the lock, or `.lock` cannot be written.
    """

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / ".lock" if output_dir and is_main_process() else None
        job = os.environ.get("SLURM_JOB_ID")
        self.owner = f"process {os.getpid()} on {socket.gethostname()}" + (f", SLURM job {job}" if job else "")
        self._file: TextIO | None = None

    def __enter__(self) -> "OutputLock":
        from_main_process(self._acquire)
        return self

    def _acquire(self) -> None:
        while self.path and not self._file:
            try:
                file = open(self.path, "a+", errors="replace")  # noqa: SIM115
            except OSError as error:
                raise UsageError(f"{self.path}: cannot be opened ({error.strerror}); remove it") from error
            taken = self._take(file)
            if not self._is_at_path(file):
                file.close()  # its owner has just removed it: lock the file that is there now
                continue
            file.seek(0)
            owner = " ".join(file.read(200).split()) or "another run"
            dead = f"give another folder, or remove {self.path} if that run is dead"
            refuse(not taken, f"--output_dir {self.path.parent}: in use by {owner}; {dead}")
            try:
                file.truncate(0)
                os.write(file.fileno(), self.owner.encode())
            except OSError as error:
                self.path.unlink()
                raise UsageError(f"{self.path}: cannot be written ({error.strerror})") from error
            self._file = file

    def __exit__(self, *_) -> None:
        if not self._file:
            return
        with self._file, contextlib.suppress(OSError):  # a folder that became read-only
            self._file.seek(0)
            # locked, it is removed by nobody else; where locks are local, another host may have taken it over
            if self._is_at_path(self._file) and self._file.read() == self.owner:
                self.path.unlink()

    def _take(self, file: TextIO) -> bool:
        try:
            import fcntl  # which Windows has not

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except (ImportError, OSError) as error:
            reason = getattr(error, "strerror", error)
            log.warning("%s: no locks here (%s), so nothing keeps a second run out", self.path, reason)
        return True

    def _is_at_path(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except OSError:  # gone, on NFS also "stale"
            return False
