"""How flags are parsed and checked: spellings that people know, argument files, ranges, errors of one line."""

import argparse
import contextlib
import logging
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from .distributed import main_process_first
from .errors import UsageError, refuse, suggest
from .sources import check_source

log = logging.getLogger("fcmae")
T = TypeVar("T")

ALIASES = {  # a flag of this project: what MAE, timm and others call it
    "update_freq": "accum_iter grad_accum grad_accum_steps gradient_accumulation_steps",
    "batch_size": "b bs batch batch_size_per_gpu per_device_train_batch_size",
    "num_workers": "j workers dataloader_num_workers",
    "data_path": "data_dir data train_dir train_data",
    "eval_data_path": "val_dir val_path val_data test_data",
    "val_split": "val_ratio validation_split",
    "input_size": "img_size image_size imgsz",
    "eval_resize": "val_resize_size resize_size",
    "use_amp": "amp mixed_precision", "output_dir": "output save_dir work_dir",
    "epochs": "num_epochs max_epochs num_train_epochs",
    "save_ckpt_freq": "save_freq save_interval",
    "save_ckpt_steps": "recovery_interval save_steps",
    "save_ckpt_num": "checkpoint_hist save_total_limit",
    "eval": "evaluate eval_only test_only",
    "grad_checkpointing": "gradient_checkpointing use_checkpoint",
    "clip_grad": "clip_grad_norm max_grad_norm",
    "patience": "early_stopping early_stopping_patience",
    "lr": "learning_rate", "weight_decay": "wd", "data_set": "dataset", "nb_classes": "num_classes",
    "opt": "optimizer", "opt_betas": "betas", "smoothing": "label_smoothing", "aa": "auto_augment",
    "train_interpolation": "interpolation", "compile": "torchcompile", "eval_freq": "val_interval",
    "drop_path": "drop_path_rate", "vis_freq": "picture_freq", "best_metric": "eval_metric",
    "freeze_stages": "frozen_stages", "resize_mode": "crop_mode", "model": "arch",
}  # fmt: skip
HELP = {  # what does here what others have a flag for, and their flags
    "give a file, an address or a name of weights to --finetune, in pre-training to --initial_checkpoint": (
        "pretrained pretrained_weights pretrained_path weights finetune initial_checkpoint load_from checkpoint"
    ),
    "--val_split is the share that is held out": "train_split",
    "--wandb PROJECT": "log_wandb use_wandb enable_wandb wandb_project",
    "--min_crop is the smallest share of an image that is cropped": "scale ratio train_crop_mode",
    "--class_weights": "bce_pos_weight pos_weight", "--patience": "early_stop patience_epochs",
    "--freeze_stages": "freeze", "--device cpu": "no_cuda", "--drop_path": "drop drop_connect",
    "the schedule is a cosine after --warmup_epochs, down to --min_lr": "sched lr_scheduler lr_scheduler_type cos_lr",
    "--device cuda:N, or torchrun --nproc_per_node=N for several": "gpu gpus gpu_id",
    "--use_amp true --amp_dtype float16": "fp16", "--use_amp true": "bf16 amp_impl precision",
    "--use_amp false": "disable_amp", "--multi_label true": "bce_loss", "--aa '' --reprob 0 --min_crop 1": "no_aug",
    "--finetune starts from weights alone": "no_resume_opt", "--batch_size evaluates, too": "validation_batch_size",
    "torchrun, srun and mpirun tell, or --dist_url tcp://HOST:PORT": "rank master_port nproc",
    "@FILE reads flags from a file": "config cfg", "the warm-up begins at 0": "warmup_lr",
    "features are averaged over the image": "global_pool gp cls_token",
    "there is no batch norm": "sync_bn sync_batchnorm dist_bn bn_momentum",
    "half of the images are mirrored, left to right": "hflip vflip",
    "a line is printed every 20 steps": "log_interval print_freq logging_steps",
    "each run has an --output_dir of its own": "experiment project name",
    "the layers keep to that layout anyway": "channels_last",
}  # fmt: skip
SYNONYMS = {"-" * (1 + (len(x) > 1)) + x: f"--{flag}" for flag, names in ALIASES.items() for x in names.split()}
HINTS = {f"--{name}": hint for hint, names in HELP.items() for name in names.split()}
RESIZE_MODES = "crop", "squash", "pad"


class Arguments(argparse.Namespace):
    """Parsed arguments; `given` names those of the command line and of argument files, and is not one of `vars`."""

    __slots__ = ("given",)


def given(args: argparse.Namespace) -> frozenset[str]:
    """Names of the flags that a user gave, even if with the default's value; none of arguments built by hand."""
    return getattr(args, "given", frozenset())


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `@file` arguments, hyphens as good as underscores, others' names, and errors of one line."""

    def __init__(self, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # argparse's takes -1e-3 for a flag

    def parse_args(self, args=None) -> Arguments:
        words = [self._known(word) for word in self._read(sys.argv[1:] if args is None else args)]
        names = [action.dest for action in self._actions if action.default is not argparse.SUPPRESS]
        parsed, unknown = self.parse_known_args(words, Arguments(**dict.fromkeys(names)))  # None: not given
        if unknown:
            flag = unknown[0].split("=")[0]
            hint, options = HINTS.get(flag, ""), self._option_string_actions
            about = set(re.findall(r"--\w+", hint)) or {"--warmup_epochs"}  # without a flag, of training
            if not hint or not about & options.keys():
                hint = owners(SYNONYMS.get(flag, flag).replace("--no_", "--", 1))
            hint = f": {hint}" if hint else suggest(flag, options)
            self.error(f"unknown argument {flag}{hint}; see --help")
        parsed.given = frozenset(name for name in names if getattr(parsed, name) is not None)
        vars(parsed).update({name: self.get_default(name) for name in names if name not in parsed.given})
        return parsed

    def _read(self, words: Iterable[str], files: tuple[str, ...] = ()) -> Iterator[str]:
        """The words, with those of @FILE in its place: one or several per line, as a shell splits them; # comments."""
        for word in words:
            if not word.startswith("@"):
                yield word
                continue
            if word in files:
                self.error(f"argument file {word[1:]}: reads itself")
            try:
                if Path(word[1:]).is_char_device():
                    raise ValueError("a device, as /dev/zero without end")
                lines = Path(word[1:]).read_text("utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                self.error(f"argument file {word[1:]}: cannot be read ({error})")
            for line in lines:
                try:
                    inner = shlex.split(line, comments=True)
                except ValueError as error:
                    self.error(f"argument file {word[1:]}: {error} in the line {line}")
                yield from self._read(inner, (*files, word))

    def _known(self, word: str) -> str:
        """A word, its flag as it is called here; --no_FLAG is --FLAG=false. A home is one behind = and in files."""
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        options, plain = self._option_string_actions, flag.replace("--no_", "--", 1)
        if flag not in options and not equals and plain in options:
            return f"{plain}=false"
        if flag not in options and SYNONYMS.get(flag) in options:
            flag = SYNONYMS[flag]
        return os.path.expanduser(flag) + equals + os.path.expanduser(value)

    def print_help(self, file=None) -> None:
        if stream := file or sys.stdout:  # None: closed
            stream.write(self.format_help())  # argparse's own passes over a full disk
            stream.flush()

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): (.*: must be )", r"\1 \2", " ".join(message.split()))  # --flag value: ...
        self.exit(2, f"error: {message}\n")


def owners(flag: str) -> str:
    """What tells which other scripts have a flag, or ''; by their text, as to import them all takes seconds."""
    root, found = Path(__file__).resolve().parents[1], {}
    declared = rf'(add\w*|for \w+, \w+ in \(.*)\(\s*(\w+, )?"{re.escape(flag)}", '
    for file in sorted(file for room in ("main_*.py", "utils/*.py", "tools/*.py") for file in root.glob(room)):
        if re.search(declared, file.read_text("utf-8")):
            script = "submitit_finetune.py" if file.stem == "slurm" else "main_finetune.py"
            found[script if file.parent.name == "utils" else str(file.relative_to(root))] = True
    return f"{flag} is of {', '.join(found)}" if found else ""


def _type(parse: Callable[[str], T], fits: Callable[[T], object], wanted: str) -> Callable[[str], T]:
    """An argparse type that refuses, in one line, what does not fit."""

    def check(text: str) -> T:
        with contextlib.suppress(KeyError, ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text or repr(text)}: must be {wanted}")

    return check


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    return _type(int, lambda x: least <= x <= most, f"a whole number from {least} to {most}")


def matching(pattern: str, wanted: str) -> Callable[[str], str]:
    """An argparse type: text that a pattern matches whole."""
    return _type(str, re.compile(pattern).fullmatch, wanted)


finite = _type(float, lambda x: -1e39 <= x <= 1e39, "a finite number")
not_negative = _type(float, lambda x: 0 <= x <= 1e9, "a number from 0 to 1e9")
positive = _type(float, lambda x: 0 < x <= 1e9, "a number above 0, at most 1e9")
fraction = _type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
part = _type(float, lambda x: 0 < x < 1, "a number above 0, below 1")
share = _type(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
below_one = _type(float, lambda x: 0 <= x < 1, "a number from 0 on, below 1")
seed = whole(0, 2**32 - 1)  # larger numbers would draw what others draw
device = matching(r"auto|cpu|mps|cuda(:\d{1,3})?", "auto, cpu, mps, cuda or cuda:N")

BOOLEANS = dict.fromkeys(("true", "yes", "on", "1", "t", "y"), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", "0", "f", "n"), False)
boolean = _type(lambda text: BOOLEANS[text.lower()], lambda x: True, "true or false")


class Size(NamedTuple):
    """Height and width of images in pixels, written as --input_size takes them."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}" if self.height == self.width else f"{self.height} {self.width}"


class _SizeAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            wanted = "must be one number, of a square, or two, height and width"
            raise argparse.ArgumentError(self, f"{' '.join(map(str, values))}: {wanted}")
        setattr(namespace, self.dest, Size(values[0], values[-1]))


def add_size(add: Callable, help: str, least: int = 1) -> None:
    """--input_size, a `Size`: one number is a square, two are height and width."""
    options = {"type": whole(least, 16384), "default": Size(224, 224), "metavar": ("H", "W"), "help": help}
    add("--input_size", nargs="+", action=_SizeAction, **options)


def add_bool(group, flag: str, default: bool | None, help: str) -> None:
    """A flag that takes a boolean; bare, it means true."""
    group.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def check_shared_arguments(args: argparse.Namespace, models: list[str]) -> None:
    """Refuse, in a line, what cannot work, before anything is built or written. Raises UsageError."""
    known = f"unknown{suggest(args.model, models)}; one of {', '.join(models)}"
    refuse(args.model not in models, f"--model {args.model}: {known}")
    warms_up = f"must be less than --epochs {args.epochs}, or the learning rate never reaches its peak"
    if args.warmup_epochs >= args.epochs and getattr(args, "warmup_steps", -1) < 0:
        refuse("warmup_epochs" in given(args), f"--warmup_epochs {args.warmup_epochs}: {warms_up}")
        args.warmup_epochs = args.epochs // 10  # the default is of longer runs
    begins = f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}"
    refuse(args.start_epoch >= args.epochs and not args.resume, begins)
    if not getattr(args, "eval", False):  # then the checkpoint tells what is not given
        check_image_arguments(args)
        no_way_back = args.on_nonfinite == "rollback" and not (args.output_dir and args.save_ckpt)
        refuse(no_way_back, "--on_nonfinite rollback: needs --output_dir and --save_ckpt true")
    starts = [name for name in ("finetune", "initial_checkpoint", "resume") if getattr(args, name, "")]
    refuse(len(starts) > 1, f"--{' and --'.join(starts)}: give one; the first starts a run, --resume continues one")
    for name in starts:
        in_training = name == "resume" and not getattr(args, "eval", False)  # which lies in files alone
        check_source(f"--{name}", getattr(args, name), in_training)
    if args.wandb:
        try:
            from wandb import init  # noqa: F401  (which a mere folder of this name has not)
        except ImportError as error:
            raise UsageError(f"--wandb {args.wandb}: needs a package more: pip install wandb") from error


def check_image_arguments(args: argparse.Namespace) -> None:
    """What `check_shared_arguments` refuses of the images, of flags or of a checkpoint. Raises UsageError.

    --eval_resize, where given, becomes the --crop_pct that it means.
    """
    stride = 8 * args.stem_stride
    least = f"must be at least the model's total stride {stride} (8 * stem_stride)"
    refuse(min(args.input_size) < stride, f"--input_size {args.input_size}: {least}")
    if args.eval_resize:  # kept as a share, which goes with every size
        short, shown = min(args.input_size), f"--eval_resize {args.eval_resize}"
        refuse("crop_pct" in given(args), f"{shown}: beside --crop_pct, which is input_size / eval_resize; give one")
        refuse(args.eval_resize < short, f"{shown}: must be at least {short}, as --input_size {args.input_size} is")
        args.crop_pct = short / args.eval_resize
        if int(short / args.crop_pct) < args.eval_resize:  # by rounding
            args.crop_pct = math.nextafter(args.crop_pct, 0)
    refuse(args.resize_mode not in RESIZE_MODES, f"--resize_mode {args.resize_mode}: one of {', '.join(RESIZE_MODES)}")
    least = min(args.input_size) / 65536  # of what is resized for it, as --eval_resize has it
    refuse(args.crop_pct and args.crop_pct < least, f"--crop_pct {args.crop_pct}: must be at least {least:.2g}")
    refuse(bool(args.mean) != bool(args.std), f"--{'mean' if args.mean else 'std'}: give --mean and --std, or neither")
    for name in ("mean", "std") if args.mean else ():
        count = len(getattr(args, name))
        needed = f"has {count} numbers, --in_chans {args.in_chans} needs {args.in_chans}"
        refuse(count != args.in_chans, f"--{name}: {needed}")
    refuse(args.std and not min(args.std) > 0, f"--std {args.std}: must be above 0")
    both = args.mean and "imagenet_default_mean_and_std" in given(args)
    refuse(both, "--imagenet_default_mean_and_std: has no effect beside --mean; give one or the other")


def tell_idle(args: argparse.Namespace, rows: Iterable[tuple[str, object, str]]) -> None:
    """Name the given flags, defaults never, that nothing reads in this combination, in a line for each reason.

    rows: (the flags' names, whether they are idle, the reason).
    """
    left = set(given(args))  # each is named once
    for names, idle, reason in rows:
        if idle and (found := [name for name in names.split() if name in left]):
            left.difference_update(found)
            log.warning("--%s: no effect %s", ", --".join(found), reason)


def effective_lr(args: argparse.Namespace, world_size: int) -> float:
    """The peak learning rate: --lr, or --blr scaled linearly from a batch of 256 to the run's."""
    lr = args.blr * args.batch_size * args.update_freq * world_size / 256 if args.lr is None else args.lr
    if args.min_lr > lr:
        log.info("--min_lr %g: is above the peak rate %.4g, so the rate climbs to it", args.min_lr, lr)
    return lr


@contextlib.contextmanager
def prepared_output_dir(output_dir: str | None, flag: str = "--output_dir") -> Iterator[None]:
    """Around a run: creates the folder, and takes it away again if nothing came of it.

    Raises:
        UsageError: on entry, where the folder cannot be written.
    """
    if not output_dir:
        yield
        return
    path = Path(output_dir)
    with main_process_first():
        try:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise UsageError(f"{flag} {output_dir}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def prepared_files(args: argparse.Namespace, outputs: Sequence[str], inputs: Sequence[str]) -> Iterator[None]:
    """Around what writes the files that the flags `outputs` name: `prepared_output_dir` of the folder of each.

    Raises:
        UsageError: on entry, where something else than a file is there, or what another of the flags names.
    """
    with contextlib.ExitStack() as folders:
        taken: dict[str, str] = {}
        for name in (name for name in (*inputs, *outputs) if getattr(args, name)):
            path = getattr(args, name)
            place = os.path.realpath(path)
            if name in outputs:
                no_file = os.path.dirname(os.path.abspath(path)) == "/dev"  # stdout may be a file
                no_file |= os.path.exists(path) and not os.path.isfile(path)
                refuse(no_file, f"--{name} {path}: is a folder or a device; give a file to write")
                refuse(place in taken, f"--{name} {path}: is what --{taken.get(place)} names; give another file")
                folders.enter_context(prepared_output_dir(os.path.dirname(place), f"--{name}"))
            taken[place] = name
        yield
