"""Fine-tuning and evaluation of ConvNeXt V2 classifiers.

python main_finetune.py @recipes/demo_finetune.args
python main_finetune.py @recipes/finetune_base.args --finetune base.pth --data_path /data/imagenet --output_dir out/ft
python main_finetune.py @recipes/linear_probe.args --finetune base.pth --data_path /data/imagenet --output_dir out/lp
python main_finetune.py --eval true --resume out/ft/checkpoint-best.pth --data_path /data/imagenet
"""

import logging
import sys
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import datasets
from engine_finetune import evaluate, score, train_one_epoch
from models import convnextv2, fused, kernels
from models.convnextv2 import SIZES, ConvNeXtV2, compile_blocks, layer_id, name_of, num_layer_ids
from models.linear_probe import LinearProbe
from utils import distributed, errors, flags, weights
from utils.amp import Amp
from utils.args import ArgumentParser, check_shared_arguments, effective_lr, given, tell_without_effect
from utils.data.sampling import StepLoader, first_of_each_class
from utils.data.transforms import SMALL_INPUT_SIZE
from utils.errors import UsageError, suggest
from utils.lr_sched import Schedule
from utils.param_groups import param_groups
from utils.run import Run, open_run, to_evaluate
from utils.settings import as_trained

log = logging.getLogger("fcmae")

TRAINING_ALONE = (
    "update_freq epochs start_epoch grad_checkpointing fused kernels lr blr min_lr warmup_epochs warmup_steps "
    "weight_decay weight_decay_end min_crop log_dir wandb save_ckpt save_ckpt_freq save_ckpt_steps save_ckpt_num "
    "stem_average images_per_class head_init_scale drop_path layer_decay layer_decay_type linear_probe opt opt_eps "
    "opt_betas momentum clip_grad color_jitter aa smoothing train_interpolation reprob remode recount resplit mixup "
    "cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode model_ema model_ema_decay model_ema_force_cpu "
    "eval_freq disable_eval max_bad_images"
)
EVALUATION = "eval_freq dist_eval eval_data_path eval_list crop_pct model_ema_eval"


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("Fine-tuning and evaluation of ConvNeXt V2. @FILE reads arguments from a file (recipes/).")
    flags.add_shared_arguments(
        parser, epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6, min_crop=0.08, data_sets=datasets.DATA_SETS_HELP
    )
    flags.add_finetune_arguments(parser)
    flags.add_augmentation_arguments(parser)
    flags.add_evaluation_arguments(parser)
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    if not args.eval:
        datasets.mean_std(args)
        if args.input_size <= SMALL_INPUT_SIZE and (idle := {"min_crop", "train_interpolation"} & given(args)):
            raise UsageError(f"--{min(idle)}: has no effect at --input_size {SMALL_INPUT_SIZE} and below; leave it out")
    depths = SIZES[args.model]["depths"]
    opt = args.opt.lower().removeprefix("lookahead_")
    if opt not in list_optimizers():
        raise UsageError(f"--opt {args.opt}: unknown to timm{suggest(opt, list_optimizers())}")
    if get_optimizer_info(opt).second_order:
        raise UsageError(f"--opt {args.opt}: needs second derivatives, which are not computed here; try adamw or lamb")
    if args.layer_decay_type == "group" and args.layer_decay < 1 and depths != (3, 3, 27, 3):
        raise UsageError(
            f"--layer_decay_type group: is made for depths 3,3,27,3 (base, large, huge), {args.model} has "
            f"{','.join(map(str, depths))}; give --layer_decay_type single"
        )
    if mixes(args) and args.batch_size % 2:
        raise UsageError(f"--batch_size {args.batch_size}: must be even, Mixup and CutMix pair the images of a batch")
    if args.linear_probe:
        check_linear_probe(args)
    if args.finetune and not Path(args.finetune).is_file():
        raise UsageError(f"--finetune {args.finetune}: no such file")
    if args.finetune and args.resume:
        raise UsageError("--finetune and --resume: give one; --finetune starts a run, --resume continues one")
    if args.eval and args.disable_eval:
        raise UsageError("--eval true and --disable_eval true leave nothing to do")
    if args.model_ema_eval and not args.model_ema and not args.eval:
        raise UsageError("--model_ema_eval true: there is no average without --model_ema true")


def without_effect(args) -> list[tuple[str, object, str]]:
    """The rows of `tell_without_effect`."""
    if args.eval:
        return [
            (TRAINING_ALONE, True, "with --eval true"),
            ("output_dir auto_resume", args.resume or args.finetune, "with --eval true of a named file"),
        ]
    opt, cutmix = get_optimizer_info(args.opt.lower().removeprefix("lookahead_")), args.cutmix > 0 or args.cutmix_minmax
    return [
        ("warmup_epochs", args.warmup_steps >= 0, "beside --warmup_steps"),
        ("model_key model_prefix stem_average", not args.finetune, "without --finetune"),
        ("head_init_scale", args.linear_probe, "with --linear_probe true"),
        ("layer_decay_type", args.layer_decay == 1, "with --layer_decay 1"),
        ("opt_eps", not opt.has_eps, f"with --opt {args.opt}"),
        ("opt_betas", not opt.has_betas, f"with --opt {args.opt}"),
        ("momentum", not opt.has_momentum, f"with --opt {args.opt}"),
        ("color_jitter", args.aa and "3a" not in args.aa, "beside --aa; give --aa '' for it"),
        ("remode recount resplit", not args.reprob, "with --reprob 0"),
        ("cutmix", args.cutmix_minmax, "beside --cutmix_minmax"),
        ("mixup_prob mixup_mode", not mixes(args), "without --mixup and --cutmix"),
        ("mixup_switch_prob", not (args.mixup > 0 and cutmix), "unless both --mixup and --cutmix are on"),
        ("model_ema_decay model_ema_force_cpu", not args.model_ema, "without --model_ema true"),
        ("dist_eval", distributed.get_world_size() == 1, "on one process"),
        (EVALUATION, args.disable_eval, "with --disable_eval true"),
    ]


def check_linear_probe(args) -> None:
    """Refuse what only the training of a whole network can use. Raises UsageError."""
    for name, without in (("layer_decay", 1), ("drop_path", 0), ("grad_checkpointing", False), ("model_ema", False)):
        if getattr(args, name) != without:
            raise UsageError(
                f"--{name} {getattr(args, name)} and --linear_probe true: the encoder is frozen, one linear layer is "
                f"trained; leave out --{name}"
            )
    if args.batch_size % 2:
        raise UsageError(f"--batch_size {args.batch_size}: must be even, batch norm needs two images in every batch")


def build_optimizer(model: ConvNeXtV2, args, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over this project's parameter groups, fused where torch has it so."""
    ids = {}
    if args.layer_decay < 1:
        ids = {
            "layer_id": partial(layer_id, depths=model.depths, layer_decay_type=args.layer_decay_type),
            "num_layer_ids": num_layer_ids(model.depths, args.layer_decay_type),
        }
    groups = param_groups(model.named_parameters(), args.weight_decay, args.layer_decay, **ids)
    if args.opt.lower().endswith(("lars", "larc")):
        for group in groups:  # matrices alone, as in MAE, and those without weight decay too, which timm leaves out
            group["always_adapt"] = group["decays"]
    options = {"eps": args.opt_eps}  # timm leaves out what an optimizer does not have
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    if args.opt.lower() in ("adam", "adamw") and next(model.parameters()).device.type != "mps":
        options["fused"] = True
    try:
        return create_optimizer_v2(
            groups, opt=args.opt, lr=lr, weight_decay=args.weight_decay, momentum=args.momentum, **options
        )
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt}: {error}") from error


def mixes(args) -> bool:
    """Whether Mixup or CutMix is on; they pair the images of a batch."""
    return args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)


def build_mixup(args, nb_classes: int) -> Mixup | None:
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=nb_classes,
    )


def build_criterion(args, mixup: Mixup | None) -> nn.Module:
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()


def build_model(args, nb_classes: int) -> ConvNeXtV2:
    if args.linear_probe:
        return LinearProbe(
            nb_classes, args.batch_size, in_chans=args.in_chans, stem_stride=args.stem_stride, **SIZES[args.model]
        )
    model = getattr(convnextv2, args.model)(
        in_chans=args.in_chans,
        num_classes=nb_classes,
        drop_path_rate=args.drop_path,
        head_init_scale=args.head_init_scale,
        stem_stride=args.stem_stride,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def build_loaders(args) -> tuple[StepLoader, DataLoader | None, int, list[str] | None]:
    """The training loader, the evaluation loader unless --disable_eval, the number of classes and their names."""
    dataset, nb_classes = datasets.build_dataset(True, args)
    classes = getattr(dataset, "classes", None)
    if args.images_per_class is not None:
        dataset = first_of_each_class(dataset, args.images_per_class, f"--data_set {args.data_set}")
    loader = datasets.build_train_loader(dataset, args, batch_divisor=2 if mixes(args) or args.linear_probe else 1)
    eval_loader = None
    if not args.disable_eval:
        eval_dataset, _ = datasets.build_dataset(False, args, classes)
        eval_loader = datasets.build_eval_loader(eval_dataset, args, spread=args.dist_eval)
    counts = loader.sampler.num_samples, nb_classes, loader.global_batch, len(loader)
    log.info("%d images of %d classes, %d per optimizer step, %d steps per epoch", *counts)
    return loader, eval_loader, nb_classes, classes and list(classes)


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


def evaluate_only(args, amp: Amp) -> None:
    """Score a checkpoint on the validation set; neither training data nor training state is needed.

    What no flag gives of the model and the images is as in its training.
    """
    path = args.resume or args.finetune
    if not path and args.auto_resume and args.output_dir:
        path = to_evaluate(args.output_dir)
    if not path:
        raise UsageError("--eval true: needs a checkpoint; give --resume FILE, or the --output_dir of a run")
    load = partial(weights.load_checkpoint, path, partial(build_classifier, path), whole=True)
    found = load("--eval true:", model_key=args.model_key, model_prefix=args.model_prefix)
    scored, config = {f"eval {path}": found.model}, found.config
    if args.model_ema_eval:
        scored[f"eval {path} (EMA)"] = load("--model_ema_eval true:", model_key="model_ema").model
    same = SIZES[args.model] == {"depths": config.depths, "dims": config.dims}
    name = args.model if same else name_of(config) or "(of no published size)"
    as_trained(args, path, found.content, config, model=name, nb_classes=config.num_classes)
    dataset, _ = datasets.build_dataset(False, args, found.content.get("classes"))
    loader = datasets.build_eval_loader(dataset, args, spread=args.dist_eval)
    for header, model in scored.items():
        model.to(amp.device)
        if args.compile:
            compile_blocks(model)
        evaluate(model, loader, amp, header)


def train(args, amp: Amp, run: Run) -> None:
    """Fine-tune for all epochs that are still to be done, evaluating after each."""
    loader, eval_loader, nb_classes, classes = build_loaders(args)
    torch.manual_seed(args.seed)
    model = build_model(args, nb_classes)
    if args.fused:
        fused.enable(model, run.triton(kernels.available))
    if args.finetune and not run.resume_from:
        weights.load_checkpoint(
            args.finetune, model, "--finetune", model_key=args.model_key, model_prefix=args.model_prefix,
            stem_average=args.stem_average, fresh_head=True,
        )  # fmt: skip
    model.to(amp.device)
    ema = build_ema(model, args)
    lr = effective_lr(args, distributed.get_world_size())
    optimizer = build_optimizer(model, args, lr)
    schedule = build_schedule(args, lr, len(loader))
    mixup = build_mixup(args, nb_classes)
    criterion = build_criterion(args, mixup)
    order = {"--seed": args.seed, "Mixup or CutMix": mixes(args), "number of images": loader.sampler.num_samples}
    run.begin(model, optimizer, loader, ema=ema, classes=classes, order=order)
    if args.linear_probe and not args.finetune and not run.resume_from:
        log.warning("--linear_probe true without --finetune: the frozen encoder is a random one")
    log.info(
        "%s: %.2f M parameters, lr %.3g, epochs %d to %d on %s",
        args.model, sum(p.numel() for p in model.parameters()) / 1e6, lr, run.start_epoch, args.epochs - 1, amp.device,
    )  # fmt: skip
    if args.compile:
        compile_blocks(model)
    wrapped = distributed.data_parallel(model)
    for epoch in run.epochs():
        stats = train_one_epoch(wrapped, loader, criterion, optimizer, schedule, run, epoch, mixup)
        evaluates = eval_loader is not None and run.due(epoch, args.eval_freq)
        scores = score(model, ema if args.model_ema_eval else None, eval_loader, amp) if evaluates else {}
        run.record(epoch, stats, scores)


def main(args) -> None:
    check_args(args)
    with distributed.process_group(args) as device:
        use_amp = device.type == "cuda" if args.use_amp is None else args.use_amp
        amp = Amp(device, use_amp, getattr(torch, args.amp_dtype), args.clip_grad)
        tell_without_effect(args, use_amp, without_effect(args))
        if args.eval:
            evaluate_only(args, amp)
            return
        with open_run(vars(args), amp) as run:
            train(args, amp, run)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(
            "Fine-tune the encoder of the pre-training demo:  python main_finetune.py @recipes/demo_finetune.args\n"
            "or your own:  python main_finetune.py --data_set image_folder --data_path TRAIN --eval_data_path VAL "
            "--finetune CKPT\n"
            "python main_finetune.py --help lists all arguments; recipes/ holds the published settings."
        )
    errors.run_cli(lambda: main(get_args_parser().parse_args()))
