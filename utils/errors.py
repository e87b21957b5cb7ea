"""Mistakes of the person at the keyboard: one line on what to change, exit code 2, no stack trace."""

import contextlib
import difflib
import errno
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger("fcmae")

# what is secret; what comes before it, and quotes around it, stay
ADDRESSES = (r"(://)[^/\s]+(?=@)", r"(://[^\s?]+\?)\S+?(?=[:;,)]*(?:\s|$))")
SECRETS = (
    *ADDRESSES,
    r"""(?i)(\w*(?:token|secret|password|api_?key)\w*=(["']?))(?:(?!\2(?:[\s;&]|$)).)+""",
)


class UsageError(Exception):
    """Something the user can put right; the message names the flag or file, what is wrong and what would be right."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


def refuse(wrong: object, message: str) -> None:
    """Raise UsageError if something is wrong."""
    if wrong:
        raise UsageError(message)


def masked(text: str, secrets: Iterable[str] = SECRETS) -> str:
    """Without what is secret in addresses, ://USER:TOKEN@ and all behind ?, and in settings such as HF_TOKEN=..."""
    for secret in secrets:
        text = re.sub(secret, r"\1***", text)
    return text


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' where one of the known names is close, else ''; flags share words, so must be closer."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8 if name.startswith("--") else 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


@contextlib.contextmanager
def surviving_disk_errors(lost: str) -> Iterator[None]:
    """Around writing in the midst of a run: a full disk, say, is reported with what was lost, and training goes on."""
    try:
        yield
    except OSError as error:
        log.error("%s (%s); training goes on", lost, error.strerror)


def drop_stdout() -> None:
    """Send nowhere what is still to be printed, once nobody reads it; Python flushes its buffer in the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unread_stdout() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's main, turning mistakes into one line on stderr and an exit code.

    2 for a UsageError, a full or read-only disk, or a file that may not be opened or is a folder, 1 for a
    NonFiniteLoss, 130 for Ctrl-C, 141 without a line where nobody reads what is printed (`| head`); any other
    exception is a bug and keeps its traceback.
    """
    try:
        main()
        return print(end="", flush=True)  # an error of this, too, is told here
    except (UsageError, NonFiniteLoss) as error:
        code = 2 if isinstance(error, UsageError) else 1
        # a loader worker's error arrives as a traceback that ends in the message; a library's may have several lines
        message = "error: " + " ".join(str(error).split(f"{UsageError.__module__}.UsageError: ")[-1].split())
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread_stdout():
            drop_stdout()
            sys.exit(141)  # as of what SIGPIPE ends
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not full and not (error.filename and error.errno in (errno.EISDIR, errno.EACCES, errno.EPERM)):
            raise
        lost, advice = error.filename or "what was to be written", "make room, or write elsewhere"
        code, message = 2, f"error: {lost}: {error.strerror}; {advice if full else 'mend that, or give another'}"
    except RuntimeError as error:
        if not re.search(r"shared memory\(shm\)|out of shared memory", str(error)):
            raise
        code, room = 2, "make that larger (docker run --shm-size=8g, or --ipc=host), or give fewer workers, or 0"
        message = f"error: --num_workers: /dev/shm has no room for what loader processes hand over; {room}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; a run with --output_dir goes on from its last checkpoint: start it again"
    rank = os.environ.get("RANK", "0")
    try:
        message = masked(message, ADDRESSES)
        print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
        print(end="", flush=True)
    except OSError:  # which Python would tell with a trace, and end with 120
        drop_stdout()
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    sys.exit(code)
