"""Mistakes of the person at the keyboard: one line on what to change, exit code 2, no stack trace."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UsageError(Exception):
    """Something the user can put right; the message names the flag or file, what is wrong and what would be right."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' where one of the known names is close, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def run(main: Callable[[], None]) -> None:
    """Run a script's main, turning a UsageError into one line on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        rank = os.environ.get("RANK", "0")
        # a loader worker's error arrives as a traceback whose last line is the message
        message = str(error).strip().splitlines()[-1].removeprefix(f"{UsageError.__module__}.UsageError: ")
        print(f"error: {message}" if rank == "0" else f"[rank {rank}] error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
