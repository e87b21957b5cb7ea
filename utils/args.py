"""The command line that both entry scripts share: argument groups, booleans, argument files, and their checks."""

import argparse
import contextlib
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from .distributed import main_process_first
from .errors import UsageError, suggest

log = logging.getLogger("fcmae")


CROP_HELP = "evaluation crop; where not given: 224/256, 1 up to 32 px, from 384 px on the whole, warped to a square"


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

    def error(self, message: str):
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


def add_shared_arguments(
    parser: ArgumentParser, *, epochs: int, warmup_epochs: int, blr: float, min_lr: float, min_crop: float,
    data_sets: str,
):  # fmt: skip
    """The arguments of both scripts; the keywords are the defaults in which they differ."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=at_least(1), default=64, help="images per process and forward pass")
    group.add_argument("--update_freq", type=at_least(1), default=1, help="batches accumulated for one optimizer step")
    group.add_argument("--epochs", type=at_least(1), default=epochs, help="length of the run")
    group.add_argument("--start_epoch", type=at_least(0), default=0, help="first epoch; a resume sets it")
    group.add_argument("--seed", type=seed, default=0, help="everything random follows from it")

    group = parser.add_argument_group("model")
    sizes = "atto,femto,pico,nano,tiny,base,large,huge"
    group.add_argument("--model", default="convnextv2_base", help=f"convnextv2_{{{sizes}}}")
    group.add_argument("--in_chans", type=at_least(1), default=3, help="channels of the images")
    group.add_argument("--input_size", type=at_least(1), default=224, help="side of the training images in pixels")
    stem_help = "kernel and stride of the stem; 2 or 1 suit images below 100 pixels"
    group.add_argument("--stem_stride", type=int, default=4, choices=(4, 2, 1), help=stem_help)
    add_bool(group, "--grad_checkpointing", False, "recompute activations in backward: less memory, more time")
    add_bool(group, "--fused", True, "gradients written by hand where a block's layers are the plain ones: faster")
    add_bool(group, "--compile", False, "compile the model's blocks with torch.compile")

    group = parser.add_argument_group("learning rate and weight decay")
    group.add_argument("--lr", type=not_negative, default=None, help="absolute learning rate; overrides --blr")
    group.add_argument(
        "--blr", type=not_negative, default=blr, help="base rate: lr = blr * batch_size * update_freq * processes / 256"
    )
    group.add_argument("--min_lr", type=not_negative, default=min_lr, help="learning rate at the end of the cosine")
    group.add_argument("--warmup_epochs", type=at_least(0), default=warmup_epochs, help="epochs of linear warm-up")
    group.add_argument("--weight_decay", type=not_negative, default=0.05, help="weight decay of kernels and matrices")

    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default=None, help="folder of training images, or of .tar shards; a .tar; a glob")
    group.add_argument("--data_set", default="IMNET", help=data_sets)
    list_help = "file with an image per line: its path below --data_path, and after a tab, space or comma its label"
    group.add_argument("--train_list", default=None, help=list_help)
    group.add_argument("--eval_list", default=None, help="the same for evaluation, below --eval_data_path if given")
    group.add_argument("--mean", type=finite, nargs="+", default=None, help="of each channel; ImageNet's for 8-bit RGB")
    group.add_argument(
        "--std", type=positive, nargs="+", default=None, help="of each channel; ImageNet's for 8-bit RGB"
    )
    group.add_argument("--crop_pct", type=share, default=None, help=CROP_HELP)
    group.add_argument(
        "--min_crop", type=share, default=min_crop,
        help="smallest share of an image that a training crop takes; in fine-tuning, above 32 px",
    )  # fmt: skip
    group.add_argument(
        "--num_workers", type=at_least(0), default=10, help="loader processes; change no result but a stream's"
    )
    add_bool(group, "--pin_mem", True, "page-locked host memory for faster copies to the GPU")

    _add_run_arguments(parser)


def _add_run_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument("--output_dir", default="", help="folder for checkpoints, logs, pictures; empty: save nothing")
    group.add_argument("--log_dir", default=None, help="folder for TensorBoard; --output_dir where not given")
    group.add_argument("--wandb", default="", metavar="PROJECT", help="send the curves to Weights & Biases as well")
    group.add_argument("--resume", default="", help="checkpoint file to continue from")
    add_bool(group, "--auto_resume", True, "continue from the newest good checkpoint in --output_dir")
    add_bool(group, "--save_ckpt", True, "save checkpoints")
    group.add_argument("--save_ckpt_freq", type=at_least(1), default=1, help="epochs between checkpoints")
    group.add_argument(
        "--save_ckpt_steps", type=at_least(0), default=0, help="optimizer steps between checkpoints as well"
    )
    group.add_argument("--save_ckpt_num", type=at_least(1), default=3, help="how many of the last checkpoints are kept")

    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add_bool(group, "--use_amp", None, "mixed precision; where not given: on cuda")
    group.add_argument("--amp_dtype", default="bfloat16", choices=("bfloat16", "float16"), help="mixed-precision type")

    group = parser.add_argument_group("processes", "torchrun, mpirun and srun fill these in from their environment")
    group.add_argument("--world_size", type=at_least(1), default=1, help="number of processes, where no launcher tells")
    group.add_argument("--local_rank", type=int, default=-1, help="rank of this process, where no launcher tells")
    add_bool(group, "--dist_on_itp", False, "take the ranks from OpenMPI's environment")
    group.add_argument("--dist_url", default="env://", help="where processes meet: env:// or tcp://HOST:PORT")


def add_augmentation_arguments(parser: ArgumentParser) -> None:
    """Of fine-tuning."""
    group = parser.add_argument_group("augmentation")
    group.add_argument("--color_jitter", type=not_negative, default=None, help="strength; only without --aa")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm auto-augment policy; '' for none")
    group.add_argument("--smoothing", type=fraction, default=0.1, help="label smoothing")
    group.add_argument(
        "--train_interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic",
        help="of the random crop, above 32 px",
    )  # fmt: skip
    group.add_argument("--reprob", type=fraction, default=0.25, help="chance that a rectangle of the image is erased")
    group.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what fills it")
    group.add_argument("--recount", type=at_least(1), default=1, help="rectangles erased")
    add_bool(group, "--resplit", False, "leave a clean half of the images, drawn anew each epoch, unerased")
    group.add_argument("--mixup", type=not_negative, default=0.0, help="Mixup's alpha; 0: none")
    group.add_argument("--cutmix", type=not_negative, default=0.0, help="CutMix's alpha; 0: none")
    group.add_argument(
        "--cutmix_minmax", type=fraction, nargs=2, default=None, help="CutMix's smallest and largest side"
    )
    group.add_argument("--mixup_prob", type=fraction, default=1.0, help="chance of either per batch")
    group.add_argument("--mixup_switch_prob", type=fraction, default=0.5, help="chance of CutMix where both are on")
    group.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="what shares a mix")


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """Of fine-tuning: the moving average, and what is evaluated."""
    group = parser.add_argument_group("moving average of the weights")
    add_bool(group, "--model_ema", False, "keep an exponential moving average of the weights")
    group.add_argument("--model_ema_decay", type=fraction, default=0.9999, help="its decay per optimizer step")
    add_bool(group, "--model_ema_force_cpu", False, "keep it on the CPU")
    add_bool(group, "--model_ema_eval", False, "evaluate it after each epoch, beside the model")
    group = parser.add_argument_group("evaluation data")
    group.add_argument(
        "--nb_classes", type=at_least(1), default=None, help="number of classes, where the data does not tell"
    )
    group.add_argument("--eval_data_path", default=None, help="folder of the validation class folders")
    add_bool(group, "--imagenet_default_mean_and_std", True, "normalise as ImageNet models do; false: as Inception")
    eval_help = "only evaluate --resume, or --finetune with its head; model and images are as in its training"
    add_bool(group, "--eval", False, eval_help)
    group.add_argument(
        "--eval_freq", type=at_least(1), default=1, help="epochs between evaluations; the last always has one"
    )
    add_bool(group, "--dist_eval", True, "spread the evaluation over the processes")
    add_bool(group, "--disable_eval", False, "train without evaluating")


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
        ("data_path", args.data_set == "shapes", data),
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
