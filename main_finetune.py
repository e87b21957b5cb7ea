"""Fine-tuning and evaluation of ConvNeXt V2 classifiers.

python main_finetune.py @recipes/demo_finetune.args
python main_finetune.py --data_set image_folder --data_path TRAIN --eval_data_path VAL --finetune base.pth
python main_finetune.py @recipes/finetune_base.args --finetune base.pth --data_path /data/imagenet --output_dir out/ft
python main_finetune.py @recipes/linear_probe.args --finetune base.pth --data_path /data/imagenet --output_dir out/lp
python main_finetune.py --eval true --resume out/ft/checkpoint-best.pth --data_path /data/imagenet

--help lists all flags; recipes/ holds the published settings.
"""

import logging
import math
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import datasets
from engine_finetune import MixedLabels, WithLoss, evaluate, score, train_one_epoch
from models import convnextv2, fused, kernels
from models.convnextv2 import SIZES, ConvNeXtV2, layer_id, name_of, num_layer_ids
from models.linear_probe import LinearProbe
from utils import distributed, errors, flags, record, weights
from utils.amp import Amp
from utils.args import (
    ArgumentParser,
    check_shared_arguments,
    effective_lr,
    given,
    prepared_files,
    prepared_output_dir,
    tell_idle,
)
from utils.data.balance import first_of_each_class
from utils.data.sampling import StepLoader, path_of
from utils.data.transforms import SMALL_INPUT_SIZE
from utils.errors import UsageError, masked, refuse
from utils.lr_sched import Schedule
from utils.param_groups import optimizer_info, param_groups
from utils.report import METRICS, Reporter
from utils.run import Run, open_run
from utils.settings import as_trained

log = logging.getLogger("fcmae")


def training_parser() -> ArgumentParser:
    """The flags that --eval true does not read."""
    parser = ArgumentParser("Fine-tuning and evaluation of ConvNeXt V2. @FILE reads arguments from a file (recipes/).")
    flags.add_training_arguments(parser)
    parser.set_defaults(epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6, min_crop=0.08)
    flags.add_finetune_arguments(parser)
    return parser


def get_args_parser() -> ArgumentParser:
    parser = training_parser()
    flags.add_shared_arguments(parser, datasets.DATA_SETS_HELP)
    flags.add_evaluation_arguments(parser)
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    refuse(args.eval and args.disable_eval, "--eval true and --disable_eval true leave nothing to do")
    if args.eval:
        return
    datasets.build_transform(True, args)
    if max(args.input_size) <= SMALL_INPUT_SIZE and (idle := {"min_crop", "train_interpolation"} & given(args)):
        raise UsageError(f"--{min(idle)}: has no effect at --input_size {SMALL_INPUT_SIZE} and below; leave it out")
    opt, count = optimizer_info(args.opt), len(args.opt_betas or ())
    second_order = "needs second derivatives, which are not computed here; try adamw or lamb"
    refuse(opt.second_order, f"--opt {args.opt}: {second_order}")
    needed = f"--opt_betas: has {count} numbers, --opt {args.opt} needs {opt.num_betas}"
    refuse(count and opt.has_betas and count != opt.num_betas, needed)
    grouped = args.layer_decay_type == "group" and args.layer_decay < 1
    made_for = "is made for depths 3,3,27,3 (base, large, huge); give --layer_decay_type single"
    refuse(grouped and SIZES[args.model]["depths"] != (3, 3, 27, 3), f"--layer_decay_type group: {made_for}")
    flags.check_labels(args)
    low, high = args.cutmix_minmax or (0, 1)  # shares, between which timm draws whole pixels
    apart = f"the smaller side comes first, a pixel of --input_size {args.input_size} apart"
    refuse(any(int(x * low) >= int(x * high) for x in args.input_size), f"--cutmix_minmax {low} {high}: {apart}")
    pairs = "must be even, as Mixup and CutMix pair images, and a linear probe's batch norm needs two"
    refuse(args.batch_size % batch_divisor(args), f"--batch_size {args.batch_size}: {pairs}")
    whole_network = {"layer_decay": 1, "drop_path": 0, "grad_checkpointing": False, "model_ema": False}
    whole_network["freeze_stages"] = 0
    for name, without in whole_network.items() if args.linear_probe else ():
        frozen = "and --linear_probe true: one layer is trained, the encoder is frozen; leave out"
        refuse(getattr(args, name) != without, f"--{name} {getattr(args, name)} {frozen} --{name}")
    no_average = args.model_ema_eval and not args.model_ema
    refuse(no_average, "--model_ema_eval true: there is no average without --model_ema true")


def idle_flags(args, use_amp: bool) -> list[tuple[str, object, str]]:
    """The rows of `tell_idle`."""
    training, cutmix = " ".join(vars(training_parser().parse_args([]))), args.cutmix > 0 or args.cutmix_minmax
    opt, of_opt = optimizer_info(args.opt), f"with --opt {args.opt}"
    evaluations = math.ceil(args.epochs / args.eval_freq)  # the first is better than none, the last ends the run
    return [
        (training, args.eval, "with --eval true"),
        ("stem_average", args.eval, "with --eval true"),
        ("auto_resume", args.eval and (args.resume or args.finetune), "with --eval true of a named file"),
        ("warmup_epochs", args.warmup_steps >= 0, "beside --warmup_steps"),
        ("model_key model_prefix stem_average", not (args.finetune or args.eval), "without --finetune"),
        ("head_init_scale", args.linear_probe, "with --linear_probe true"),
        ("layer_decay drop_path grad_checkpointing", args.freeze_stages == 4, "with --freeze_stages 4"),
        ("min_crop train_interpolation", args.resize_mode != "crop", f"with --resize_mode {args.resize_mode}"),
        ("layer_decay_type", args.layer_decay == 1, "with --layer_decay 1"),
        ("patience", args.patience > evaluations - 2, f"in a run of {evaluations} evaluations"),
        ("opt_eps", not opt.has_eps, of_opt),
        ("opt_betas", not opt.has_betas, of_opt),
        ("momentum", not opt.has_momentum, of_opt),
        ("color_jitter", args.aa and "3a" not in args.aa, "beside --aa; give --aa '' for it"),
        ("remode recount resplit", not args.reprob, "with --reprob 0"),
        ("cutmix", args.cutmix_minmax, "beside --cutmix_minmax"),
        ("mixup_prob mixup_mode", not mixes(args), "without --mixup and --cutmix"),
        ("smoothing", args.multi_label, "with --multi_label true"),
        ("bce_target_thresh", not (args.multi_label and mixes(args)), "without --multi_label and --mixup or --cutmix"),
        ("mixup_switch_prob", not (args.mixup > 0 and cutmix), "unless both --mixup and --cutmix are on"),
        ("model_ema_decay model_ema_force_cpu", not args.model_ema, "without --model_ema true"),
        ("dist_eval", distributed.get_world_size() == 1, "on one process"),
        ("eval_freq dist_eval eval_data_path eval_list model_ema_eval predictions best_metric patience "
         "crop_pct eval_resize", args.disable_eval, "with --disable_eval true"),
        *flags.idle_flags(args, use_amp),
    ]  # fmt: skip


def build_optimizer(model: ConvNeXtV2, args, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over this project's parameter groups, fused where torch has it so."""
    kind = args.layer_decay_type
    layers = ()
    if args.layer_decay < 1:
        layers = (partial(layer_id, depths=model.depths, layer_decay_type=kind), num_layer_ids(model.depths, kind))
    groups = param_groups(model.named_parameters(), args.weight_decay, args.layer_decay, *layers)
    name = args.opt.lower()
    if name.endswith(("lars", "larc")):
        for group in groups:  # matrices alone, as in MAE, and those without weight decay too, which timm leaves out
            group["always_adapt"] = group["decays"]
    options = {"eps": args.opt_eps, "momentum": args.momentum}  # timm leaves out what an optimizer does not have
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    if name in ("adam", "adamw") and next(model.parameters()).device.type != "mps":
        options["fused"] = True
    try:
        return create_optimizer_v2(groups, opt=args.opt, lr=lr, weight_decay=args.weight_decay, **options)
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt}: {error}") from error


def mixes(args) -> bool:
    """Whether Mixup or CutMix is on; they pair the images of a batch."""
    return args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)


def batch_divisor(args) -> int:
    """Pairs are mixed; a linear probe's batch norm needs two images."""
    return 2 if mixes(args) or args.linear_probe else 1


def build_mixup(args, nb_classes: int) -> Callable | None:
    mixup, smoothing = None, 0 if args.multi_label else args.smoothing
    if mixes(args):
        strengths = args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob
        mixup = Mixup(*strengths, mode=args.mixup_mode, label_smoothing=smoothing, num_classes=nb_classes)
    return MixedLabels(mixup) if args.multi_label else mixup


def build_criterion(args, mixup: Callable | None, class_weights: torch.Tensor | None = None) -> Callable:
    if args.multi_label:
        return BinaryCrossEntropy(0.0, args.bce_target_thresh, class_weights)
    if class_weights is not None:  # the loader divides by the weights of a step, see `Batch`
        weighted = nn.CrossEntropyLoss(class_weights, reduction="sum", label_smoothing=0 if mixup else args.smoothing)
        return lambda logits, labels: weighted(logits, labels) / len(logits)
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()


def build_model(args, nb_classes: int) -> ConvNeXtV2:
    if args.linear_probe:
        return LinearProbe(
            nb_classes, args.batch_size, in_chans=args.in_chans, stem_stride=args.stem_stride, **SIZES[args.model]
        )
    scale = args.head_init_scale
    if scale is None:  # from scratch, a small head costs some points (results.md)
        scale = 0.001 if args.finetune else 1.0
    model = getattr(convnextv2, args.model)(
        in_chans=args.in_chans,
        num_classes=nb_classes,
        drop_path_rate=args.drop_path,
        head_init_scale=scale,
        stem_stride=args.stem_stride,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    model.freeze_stages(args.freeze_stages)
    return model


def build_loaders(args) -> tuple[StepLoader, DataLoader | None, int, list[str] | None, torch.Tensor | None]:
    """Training loader, evaluation loader unless --disable_eval, number of classes, their names, their weights."""
    dataset, nb_classes = datasets.build_dataset(True, args)
    classes = getattr(dataset, "classes", None)
    if args.images_per_class is not None:
        dataset = first_of_each_class(dataset, args.images_per_class, f"--data_set {args.data_set}")
    class_weights = datasets.class_weights(dataset, args, classes or list(map(str, range(nb_classes))))
    divisor = batch_divisor(args)
    loader = datasets.build_train_loader(dataset, args, batch_divisor=divisor, class_weights=class_weights)
    if args.disable_eval:
        return loader, None, nb_classes, classes and list(classes), class_weights
    eval_dataset, _ = datasets.build_dataset(False, args, classes)
    eval_loader = datasets.build_eval_loader(eval_dataset, args, spread=args.dist_eval)
    return loader, eval_loader, nb_classes, classes and list(classes), class_weights


def build_schedule(args, lr: float, steps: int) -> Schedule:
    """The schedule of a run of `steps` optimizer steps per epoch."""
    warmup_epochs = args.warmup_steps / steps if args.warmup_steps >= 0 else args.warmup_epochs
    if warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup_steps {args.warmup_steps}: must be less than the {args.epochs * steps} steps of the whole run"
        )
    return Schedule(lr, args.min_lr, warmup_epochs, args.epochs, args.weight_decay, args.weight_decay_end)


def build_ema(model: ConvNeXtV2, args) -> ModelEmaV3 | None:
    if not args.model_ema:
        return None
    return ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)


def build_classifier(path: str | Path, config: weights.BackboneConfig) -> ConvNeXtV2:
    """The model of a checkpoint's sizes. Raises UsageError where that has no head."""
    if not config.num_classes:
        raise UsageError(f"--eval true: {path} holds an encoder without a classifier's head; fine-tune it first")
    return ConvNeXtV2(**config.encoder(), num_classes=config.num_classes)


def build_reporter(args, evaluated: str, dataset, classes: list[str] | None, nb_classes: int) -> Reporter:
    names = list(classes or getattr(dataset, "classes", None) or map(str, range(nb_classes)))
    paths = partial(path_of, dataset)
    return Reporter(evaluated, names, paths, args.output_dir, args.predictions, not args.eval, args.best_metric)


def evaluate_only(args, amp: Amp) -> None:
    """Score a checkpoint on the validation set; neither training data nor training state is needed.

    What no flag gives of the model and the images is as in its training.
    """
    path = args.resume or args.finetune
    if not path and args.auto_resume and args.output_dir:
        path = record.to_evaluate(args.output_dir)
    if not path:
        raise UsageError("--eval true: needs a checkpoint; give --resume FILE, or the --output_dir of a run")
    load = partial(weights.load_checkpoint, path, partial(build_classifier, path), whole=True)
    found = load("--eval true:", model_key=args.model_key, model_prefix=args.model_prefix)
    scored, config = {"": found.model}, found.config
    if args.model_ema_eval:
        scored["-ema"] = load("--model_ema_eval true:", model_key="model_ema").model
    same = SIZES[args.model] == {"depths": config.depths, "dims": config.dims}
    name = args.model if same else name_of(config) or "(of no published size)"
    as_trained(args, path, found.content, config, model=name, nb_classes=config.num_classes)
    classes = found.content.get("classes")
    dataset, _ = datasets.build_dataset(False, args, classes)
    loader = datasets.build_eval_loader(dataset, args, spread=args.dist_eval)
    report = build_reporter(args, masked(str(path)), dataset, classes, config.num_classes)
    for suffix, model in scored.items():
        model.to(amp.device)
        if args.compile:
            model.forward_features = torch.compile(model.forward_features)
        evaluate(model, loader, amp, f"eval {path}{suffix and ' (EMA)'}", partial(report, suffix=suffix))
    report.write()


def train(args, amp: Amp, run: Run) -> None:
    """Fine-tune for all epochs that are still to be done, evaluating after each."""
    loader, eval_loader, nb_classes, classes, class_weights = build_loaders(args)
    torch.manual_seed(args.seed)
    model = build_model(args, nb_classes)
    if args.fused:
        fused.enable(model, run.triton(kernels.available))
    if args.finetune and not run.resume_from:
        flag = f"--model_key {args.model_key}, --finetune" if "model_key" in given(args) else "--finetune"
        weights.load_checkpoint(
            args.finetune, model, flag, model_key=args.model_key, model_prefix=args.model_prefix,
            stem_average=args.stem_average, fresh_head=True,
        )  # fmt: skip
    model.to(amp.device)
    ema = build_ema(model, args)
    lr = effective_lr(args, distributed.get_world_size())
    optimizer = build_optimizer(model, args, lr)
    schedule = build_schedule(args, lr, len(loader))
    mixup = build_mixup(args, nb_classes)
    order = {"--seed": args.seed, "Mixup or CutMix": mixes(args), "number of images": loader.sampler.num_samples}
    weighed = args.class_weights
    if weighed not in ("", "balanced"):  # a file that may be edited, or moved
        weighed = f"weights of CRC-32 {zlib.crc32(class_weights.float().numpy()):08x}"
    order |= {"--class_weights": weighed, "--balanced_sampling": args.balanced_sampling}
    run.begin(model, optimizer, loader, ema=ema, classes=classes, order=order)
    if (args.linear_probe or args.freeze_stages) and not args.finetune and not run.resume_from:
        frozen = "--linear_probe true" if args.linear_probe else f"--freeze_stages {args.freeze_stages}"
        log.warning("%s without --finetune: the frozen encoder is a random one", frozen)
    size, trained = (sum(p.numel() for p in model.parameters() if x <= p.requires_grad) / 1e6 for x in (False, True))
    log.info(
        "%d images of %d classes; %s: %.2f M parameters%s, lr %.3g, warm-up %.3g, epochs %d to %d on %s",
        loader.sampler.num_samples, nb_classes, args.model, size, f", {trained:.2f} M trained" * (trained < size), lr,
        schedule.warmup_epochs, run.start_epoch, args.epochs - 1, amp.device,
    )  # fmt: skip
    class_weights = class_weights if class_weights is None else class_weights.float().to(amp.device)
    wrapped = distributed.data_parallel(WithLoss(model, build_criterion(args, mixup, class_weights)), args.compile)
    for epoch in run.epochs():
        stats = train_one_epoch(wrapped, loader, optimizer, schedule, run, epoch, mixup)
        scores, report = {}, None
        if eval_loader is not None and run.due(epoch, args.eval_freq):
            if epoch + 1 == args.epochs or args.patience or args.best_metric in METRICS or args.multi_label:
                report = build_reporter(args, f"epoch {epoch}", eval_loader.dataset, classes, nb_classes)
            scores = score(model, ema if args.model_ema_eval else None, eval_loader, amp, report)
        run.record(epoch, stats, scores)
        if report and run.ends(epoch):
            report.write()


def main(args) -> None:
    check_args(args)
    with distributed.process_group(args) as device:
        amp = Amp(device, args.use_amp, getattr(torch, args.amp_dtype), args.clip_grad)
        tell_idle(args, idle_flags(args, amp.enabled))
        with prepared_files(args, ["predictions"], flags.INPUTS):
            if args.eval:
                with prepared_output_dir(args.output_dir):
                    evaluate_only(args, amp)
                return
            with open_run(vars(args), amp) as run:
                train(args, amp, run)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    errors.run_cli(lambda: main(get_args_parser().parse_args()))
