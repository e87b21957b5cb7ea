"""The command line that both entry scripts share: argument groups, booleans, argument files, and their checks."""

import argparse
import contextlib
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from .distributed import main_process_first
from .errors import UsageError, suggest

log = logging.getLogger("fcmae")


class Arguments(argparse.Namespace):
    """Parsed arguments; `given` names those of the command line and of argument files, and is not one of `vars`."""

    __slots__ = ("given",)


def given(args: argparse.Namespace) -> frozenset[str]:
    """Names of the flags that a user gave, even if with the default's value; none of arguments built by hand."""
    return getattr(args, "given", frozenset())


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `@file` arguments, defaults in --help, and errors of one line that suggest the nearest flag."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """One or several words per line, as a shell would split them; # starts a comment."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"argument file: {error} in the line {line}")

    def parse_args(self, args=None) -> Arguments:
        names = [action.dest for action in self._actions if action.default is not argparse.SUPPRESS]
        parsed, unknown = self.parse_known_args(args, Arguments(**dict.fromkeys(names)))  # None: not given
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag}{suggest(flag, self._option_string_actions)}; see --help")
        parsed.given = frozenset(name for name in names if getattr(parsed, name) is not None)
        vars(parsed).update({name: self.get_default(name) for name in names if name not in parsed.given})
        return parsed

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): (\S*: must be )", r"\1 \2", message)  # --flag value: must be ...
        self.exit(2, f"error: {message}\n")


def boolean(text: str) -> bool:
    """true/false, yes/no, on/off or 1/0, in any case."""
    if text.lower() in ("true", "yes", "on", "1", "t", "y"):
        return True
    if text.lower() in ("false", "no", "off", "0", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a boolean: give true or false")


def seed(text: str) -> int:
    """An argparse type: 32 bits, since larger numbers would draw what others draw."""
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give a whole number from 0 to {2**32 - 1}")


def _number(kind: type, ranged: str, fits: Callable[[float], bool]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {ranged}")
        return value

    return parse


def at_least(least: int) -> Callable[[str], int | float]:
    """An argparse type: a whole number from `least` on."""
    return _number(int, f"a whole number, at least {least}", lambda x: x >= least)


finite = _number(float, "a number", lambda x: True)
not_negative = _number(float, "a number, at least 0", lambda x: x >= 0)
positive = _number(float, "a number above 0", lambda x: x > 0)
fraction = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
share = _number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def add_bool(group, flag: str, default: bool | None, help: str) -> None:
    """A flag that takes a boolean; bare, it means true."""
    group.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def check_shared_arguments(args: argparse.Namespace, models: list[str]) -> None:
    """Refuse what cannot work, before anything is built or written.

    Raises:
        UsageError: names the flag, its value and what would be right.
    """
    if args.model not in models:
        raise UsageError(f"--model {args.model}: unknown{suggest(args.model, models)}; one of {', '.join(models)}")
    if getattr(args, "warmup_steps", -1) < 0 and args.warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup_epochs {args.warmup_epochs}: must be less than --epochs {args.epochs}, "
            "or the learning rate never reaches its peak"
        )
    if not getattr(args, "eval", False):  # then the checkpoint tells what is not given
        check_image_arguments(args)
    if args.resume and not Path(args.resume).is_file():
        raise UsageError(f"--resume {args.resume}: no such file")
    if args.wandb:
        try:
            from wandb import init  # noqa: F401  (which a mere folder of this name has not)
        except ImportError as error:
            raise UsageError(f"--wandb {args.wandb}: needs a package more: pip install wandb") from error


def check_image_arguments(args: argparse.Namespace) -> None:
    """What `check_shared_arguments` refuses of the size of images, their crop, mean and deviation."""
    if args.input_size < 8 * args.stem_stride:
        least = f"the model's total stride {8 * args.stem_stride} (8 * stem_stride)"
        raise UsageError(f"--input_size {args.input_size}: must be at least {least}")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UsageError(f"--crop_pct {args.crop_pct}: must be above 0 and at most 1")
    if bool(args.mean) != bool(args.std):
        raise UsageError(f"--{'mean' if args.mean else 'std'}: give --mean and --std, or neither")
    for name in ("mean", "std") if args.mean else ():
        values = getattr(args, name)
        if len(values) != args.in_chans:
            raise UsageError(f"--{name}: has {len(values)} numbers, --in_chans {args.in_chans} needs {args.in_chans}")
        if name == "std" and not min(values) > 0:
            raise UsageError(f"--std {min(values)}: must be above 0")
    if args.mean and "imagenet_default_mean_and_std" in given(args):
        raise UsageError("--imagenet_default_mean_and_std: has no effect beside --mean; give one or the other")


def tell_without_effect(args: argparse.Namespace, use_amp: bool, rows: list[tuple[str, object, str]]) -> None:
    """Name the given flags, defaults never, that do nothing in this combination, in a line for each reason.

    rows: of each script's own flags, (their names, whether they do nothing, beside what).
    """
    left = set(given(args))  # each is named once
    saving, data = "save_ckpt_freq save_ckpt_steps save_ckpt_num", f"with --data_set {args.data_set}"
    for flags, idle, beside in [
        *rows,
        ("blr", args.lr is not None, "beside --lr"),
        ("start_epoch", args.resume, "beside --resume"),
        (f"save_ckpt auto_resume {saving}", not args.output_dir, "without --output_dir"),
        (saving, not args.save_ckpt, "with --save_ckpt false"),
        ("amp_dtype", not use_amp, "without mixed precision"),
        ("kernels", not args.fused, "with --fused false"),
        ("data_path", args.data_set == "shapes", data),
        ("depth nodata max_pixels", args.data_set not in ("IMNET", "image_folder"), data),
        ("eval_data_path", args.data_set.startswith(("shapes", "CIFAR")), data),
    ]:
        if idle and (names := [name for name in flags.split() if name in left]):
            left.difference_update(names)
            log.warning("--%s: %s no effect %s", ", --".join(names), "has" if len(names) == 1 else "have", beside)


def effective_lr(args: argparse.Namespace, world_size: int) -> float:
    """The peak learning rate: --lr, or --blr scaled linearly from a batch of 256 to the run's."""
    if args.lr is not None:
        return args.lr
    return args.blr * args.batch_size * args.update_freq * world_size / 256


@contextlib.contextmanager
def prepared_output_dir(output_dir: str) -> Iterator[None]:
    """Around a run: creates the folder, and takes it away again if nothing came of it.

    Raises:
        UsageError: on entry, where the folder cannot be written.
    """
    if not output_dir:
        yield
        return
    path = Path(output_dir)
    with main_process_first():
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may have been faster
        except OSError as error:
            raise UsageError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for folder in missing:
                folder.rmdir()
