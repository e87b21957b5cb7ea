"""One run per folder."""

import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from .distributed import is_main_process
from .errors import UsageError

log = logging.getLogger("fcmae")


class OutputLock:
    """Keeps two runs from writing into one output_dir; a context manager, held by the first process.

    The kernel holds a POSIX lock on `.lock` for the process and lets go when that ends, however it ends. What the file
    says is for people and decides nothing. Forked loader workers do not inherit such a lock, as they would an flock:
    one that outlives a killed run keeps nobody out. The price: closing any other descriptor of the file in this process
    drops the lock, so nothing else may open it here.

    On NFS the server keeps the lock for all hosts. A host that died gives it up when its lease runs out (version 4) or
    when it is up again (version 3). Where a file system has no locks, a warning is all. Where a mount keeps locks local
    (`nolock`, `local_lock`, Lustre's `localflock`), runs on different hosts are not kept apart.

    Raises:
        UsageError: on entry, where another process has the lock, or `.lock` cannot be opened.
    """

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / ".lock" if output_dir and is_main_process() else None
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        self._file: TextIO | None = None

    def __enter__(self) -> "OutputLock":
        while self.path and not self._file:
            try:
                file = open(self.path, "a+", errors="replace")
            except OSError as error:
                raise UsageError(f"{self.path}: cannot be opened ({error.strerror}); remove it") from error
            taken = self._take(file)
            if not self._is_at_path(file):
                file.close()  # its owner has just removed it: lock the file that is there now
            elif taken:
                try:
                    file.truncate(0)
                    os.write(file.fileno(), str(self).encode())
                except OSError as error:
                    self.path.unlink()
                    raise UsageError(f"{self.path}: cannot be written ({error.strerror})") from error
                self._file = file
            else:
                file.seek(0)
                owner = " ".join(file.read(200).split()) or "another run"
                raise UsageError(
                    f"--output_dir {self.path.parent}: in use by {owner}; give another folder, or remove {self.path} "
                    "if that run is dead"
                )
        return self

    def __exit__(self, *_) -> None:
        if not self._file:
            return
        with self._file, contextlib.suppress(OSError):  # a folder that became read-only
            self._file.seek(0)
            # locked, it is removed by nobody else; where locks are local, another host may have taken it over
            if self._is_at_path(self._file) and self._file.read() == str(self):
                self.path.unlink()

    def __str__(self) -> str:
        job = f", SLURM job {self.owner['job']}" if self.owner["job"] else ""
        return f"process {self.owner['pid']} on {self.owner['host']}{job}"

    def _take(self, file: TextIO) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            log.warning("%s: no locks here (%s), so nothing keeps a second run out", self.path, error.strerror)
        return True

    def _is_at_path(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except OSError:  # gone, on NFS also "stale"
            return False
