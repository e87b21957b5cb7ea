"""The flags of both entry scripts, by groups, and which of them do nothing; utils/args.py parses and checks them."""

import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from .args import (
    RESIZE_MODES,
    ArgumentParser,
    add_bool,
    add_size,
    below_one,
    device,
    finite,
    fraction,
    given,
    matching,
    not_negative,
    part,
    positive,
    seed,
    share,
    whole,
)
from .data.images import Reading
from .errors import refuse
from .weights import MODEL_KEY

CROP_HELP = "evaluation crop; where not given: 224/256, 1 up to 32 px and with squash and pad, from 384 px on squash"
RESIZE_HELP = "short side in pixels that the crop is taken of, in place of --crop_pct: input_size / eval_resize"
MODE_HELP = (
    "how images become --input_size. crop: at random in training, the centre in evaluation; squash: the whole image is "
    "warped; pad: the whole image, in its proportions, gets borders of the mean; both in training and evaluation alike"
)
INPUTS = "data_path", "eval_data_path", "train_list", "eval_list", "class_weights", "finetune", "resume"
SEVERAL_HELP = "images have any number of labels: lists with cat;dog, which mAP scores"
DEVICE_HELP = "auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N"


def add_group(parser: ArgumentParser, title: str, description: str | None = None) -> tuple[Callable, Callable]:
    """What adds a flag, and what adds a boolean one, to a new group of --help."""
    group = parser.add_argument_group(title, description)
    return group.add_argument, partial(add_bool, group)


def add_shared_arguments(parser: ArgumentParser, data_sets: str) -> None:
    """What both scripts have in all modes; data_sets: the help of --data_set."""
    add, add_switch = add_group(parser, "model")
    sizes = "atto,femto,pico,nano,tiny,base,large,huge"
    add("--model", default="convnextv2_base", help=f"convnextv2_{{{sizes}}}")
    add("--in_chans", type=whole(1, 4096), default=3, help="channels of the images")
    add_size(add, "height and width of the training images in pixels; one number: a square")
    stem_help = "kernel and stride of the stem; 2 or 1 suit images below 100 pixels"
    add("--stem_stride", type=int, default=4, choices=(4, 2, 1), help=stem_help)
    average_help = "average the checkpoint's stem over its channels where --in_chans differs"
    add_switch("--stem_average", False, average_help)
    add_switch("--compile", False, "compile model and loss as one graph with torch.compile")

    add, add_switch = add_group(parser, "data")
    path_help = "folder of training images, of train/ and val/, or of .tar shards; a .tar; a glob; a list"
    add("--data_path", default=None, help=path_help)
    add("--eval_data_path", default=None, help="the same, of the images that are evaluated, by class")
    add("--data_set", default="IMNET", help=data_sets)
    list_help = "file with an image per line: its path below --data_path, and after a tab, space or comma its label"
    add("--train_list", default=None, help=list_help)
    add("--eval_list", default=None, help="the same for evaluation, below --eval_data_path if given")
    split_help = "share of each class that image_folder holds out of training, for evaluation, without a folder for it"
    add("--val_split", type=part, default=None, help=split_help)
    add("--split_seed", type=seed, default=0, help="draws what --val_split holds out, whatever --seed is")
    add("--nb_classes", type=whole(1), default=None, help="number of classes, where the data does not tell")
    add_switch("--multi_label", False, SEVERAL_HELP)
    add("--mean", type=finite, nargs="+", default=None, help="of each channel; ImageNet's for 8-bit RGB")
    add("--std", type=positive, nargs="+", default=None, help="of each channel; ImageNet's for 8-bit RGB")
    add("--resize_mode", choices=RESIZE_MODES, default="crop", help=MODE_HELP)
    add("--crop_pct", type=share, default=None, help=CROP_HELP)
    add("--eval_resize", type=whole(1, 65536), default=None, help=RESIZE_HELP)
    add("--batch_size", type=whole(1), default=64, help="images per process and forward pass")
    add("--num_workers", type=whole(0, 1024), default=10, help="loader processes; change no result but a stream's")
    add_switch("--pin_mem", True, "page-locked host memory for faster copies to the GPU")
    add_file_arguments(add)

    add, add_switch = add_group(parser, "device and precision")
    add("--seed", type=seed, default=0, help="everything random follows from it")
    add("--device", type=device, default="auto", help=DEVICE_HELP)
    add_switch("--use_amp", None, "mixed precision; where not given: on cuda")
    add("--amp_dtype", default="bfloat16", choices=("bfloat16", "float16"), help="mixed-precision type")

    add, add_switch = add_group(parser, "processes", "torchrun, mpirun and srun fill these in from their environment")
    add("--world_size", type=whole(1), default=1, help="number of processes, where no launcher tells")
    add("--local_rank", type=whole(-1), default=-1, help="rank of this process, where no launcher tells")
    add_switch("--dist_on_itp", False, "take the ranks from OpenMPI's environment")
    url = matching(r"env://|tcp://.+:\d+|file://.+", "env://, tcp://HOST:PORT or file://PATH")
    add("--dist_url", type=url, default="env://", help="where processes meet: env:// or tcp://HOST:PORT")
    timeout_help = "seconds to wait for others; where not given: 600 to meet, then torch's default in each collective"
    add("--dist_timeout", type=positive, default=None, help=timeout_help)

    add, add_switch = add_group(parser, "run")
    add("--output_dir", default="", help="folder for checkpoints, logs, pictures; empty: save nothing")
    add("--resume", default="", help="checkpoint file to continue from")
    add_switch("--auto_resume", True, "continue from the newest good checkpoint in --output_dir")


def add_file_arguments(add: Callable) -> None:
    """How image files are read; also of tools."""
    depth_help = "read files as bytes (8), shares of what 8 or 16 bits can hold (16), or numbers as they are (32)"
    add("--depth", type=int, choices=(8, 16, 32), default=None, help=f"{depth_help}; where not given: as most are")
    nodata_help = "value of pixels without data, in files that do not say; they become the mean (--nodata=-1e38)"
    add("--nodata", type=finite, default=None, help=nodata_help)
    pixels_help = "larger images are refused from their header"
    add("--max_pixels", type=whole(1, 10**12), default=Reading.max_pixels, help=pixels_help)


def add_training_arguments(parser: ArgumentParser) -> None:
    """What both scripts read in training alone."""
    add, add_switch = add_group(parser, "training")
    add("--update_freq", type=whole(1), default=1, help="batches accumulated for one optimizer step")
    add("--epochs", type=whole(1), help="length of the run")
    add("--start_epoch", type=whole(0), default=0, help="first epoch; a resume sets it")
    add_switch("--fused", True, "gradients written by hand where a block's layers are the plain ones: faster")
    kernels_help = "the depthwise convolution's on a GPU; auto: the checkpoint's that is resumed, else the library's"
    add("--kernels", default="auto", choices=("auto", "library", "triton"), help=kernels_help)
    add_switch("--grad_checkpointing", False, "recompute activations in backward: less memory, more time")
    bad_help = "share of unreadable images above which the run ends after the epoch; where not given, 4 may be"
    add("--max_bad_images", type=fraction, default=0.01, help=bad_help)
    nonfinite_help = "of a NaN or infinite loss: end the run; leave out and count steps with such a loss or gradient, "
    nonfinite_help += "each waiting for the device; or go back to the last good checkpoint, in all three times, "
    nonfinite_help += "with the data that follow"
    add("--on_nonfinite", choices=("stop", "skip", "rollback"), default="stop", help=nonfinite_help)
    add("--min_crop", type=share, help="smallest share of an image that a crop takes; in fine-tuning, above 32 px")

    add, _ = add_group(parser, "learning rate and weight decay")
    add("--lr", type=not_negative, default=None, help="absolute learning rate; overrides --blr")
    add("--blr", type=not_negative, help="base rate: lr = blr * batch_size * update_freq * processes / 256")
    add("--min_lr", type=not_negative, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=whole(0), help="epochs of linear warm-up; of a run no longer than this, a tenth")
    add("--weight_decay", type=not_negative, default=0.05, help="weight decay of kernels and matrices")

    add, add_switch = add_group(parser, "checkpoints and logs")
    add_switch("--save_ckpt", True, "save checkpoints")
    add("--save_ckpt_freq", type=whole(1), default=1, help="epochs between checkpoints")
    add("--save_ckpt_steps", type=whole(0), default=0, help="optimizer steps between checkpoints as well")
    num_help = "checkpoints kept; one more until the newest has shown itself good"
    add("--save_ckpt_num", type=whole(1), default=3, help=num_help)
    add("--log_dir", default=None, help="folder for TensorBoard; --output_dir where not given")
    add("--wandb", default="", metavar="PROJECT", help="send the curves to Weights & Biases as well")


def add_class_arguments(parser: ArgumentParser) -> None:
    """Classes of unequal size, and several labels an image."""
    add, add_switch = add_group(parser, "classes")
    weights_help = "weights of the classes' losses: balanced (images / classes / the class's images), or a file with a "
    weights_help += "class and a number a line; the sum over a step is divided by its images' weights, as torch does"
    add("--class_weights", default="", metavar="balanced|FILE", help=weights_help)
    add_switch("--balanced_sampling", False, "show each class equally often; an epoch has as many images as without")
    thresh_help = "of --multi_label, what Mixup makes of labels: 1 above this, else 0; where not given, shares"
    add("--bce_target_thresh", type=below_one, default=None, help=thresh_help)


def add_finetune_arguments(parser: ArgumentParser) -> None:
    """What fine-tuning reads in training alone: the network, the optimizer, augmentation, the moving average."""
    add, add_switch = add_group(parser, "fine-tuning")
    add("--images_per_class", type=whole(1), default=None, help="train on the first so many images of each class alone")
    head_help = "the new head starts with std 0.02 times this; where not given: 0.001 with --finetune, else 1"
    add("--head_init_scale", type=not_negative, default=None, help=head_help)
    add("--drop_path", type=below_one, default=0.0, help="stochastic depth of the last block")
    add("--layer_decay", type=share, default=1.0, help="learning-rate factor per layer below the head")
    type_help = "count blocks one by one, or, for depths 3,3,27,3, in groups"
    add("--layer_decay_type", choices=("single", "group"), default="single", help=type_help)
    freeze_help = "neither the stem nor the first so many stages are trained, 4 being the whole encoder; 0: all are"
    add("--freeze_stages", type=whole(0, 4), default=0, help=freeze_help)
    add_switch("--linear_probe", False, "freeze the encoder, train a linear head; see recipes/linear_probe.args")
    add("--eval_freq", type=whole(1), default=1, help="epochs between evaluations; the last always has one")
    add_switch("--disable_eval", False, "train without evaluating")
    best_help = "of an evaluation, by which checkpoint-best.pth is; of several labels, map where not given"
    metrics = ("acc1", "balanced_acc", "f1", "loss", "map")
    add("--best_metric", choices=metrics, default="acc1", help=best_help)
    patience_help = "evaluations in a row with no better --best_metric, of model or average, that end the run"
    add("--patience", type=whole(0), default=0, help=f"{patience_help}; 0: none do")

    add_class_arguments(parser)
    add, _ = add_group(parser, "optimizer")
    add("--opt", default="adamw", help="any optimizer of timm's factory")
    add("--opt_eps", type=share, default=1e-8, help="the optimizer's epsilon")
    add("--opt_betas", type=below_one, nargs="+", default=None, help="the optimizer's betas, if not its own")
    add("--momentum", type=below_one, default=0.9, help="momentum of optimizers that have one")
    add("--clip_grad", type=positive, default=None, help="largest norm of the gradient")
    add("--warmup_steps", type=whole(-1), default=-1, help="warm-up in steps; overrides --warmup_epochs")
    add("--weight_decay_end", type=not_negative, default=None, help="weight decay at the end of a half cosine")

    add, add_switch = add_group(parser, "augmentation")
    add("--color_jitter", type=not_negative, default=None, help="strength; only without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm auto-augment policy; '' for none")
    add("--smoothing", type=below_one, default=0.1, help="label smoothing")
    kinds, crops = ("random", "bilinear", "bicubic"), "of the random crop, above 32 px"
    add("--train_interpolation", choices=kinds, default="bicubic", help=crops)
    add("--reprob", type=fraction, default=0.25, help="chance that a rectangle of the image is erased")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what fills it")
    add("--recount", type=whole(1, 1000), default=1, help="rectangles erased")
    add_switch("--resplit", False, "leave a clean half of the images, drawn anew each epoch, unerased")
    add("--mixup", type=not_negative, default=0.0, help="Mixup's alpha; 0: none")
    add("--cutmix", type=not_negative, default=0.0, help="CutMix's alpha; 0: none")
    add("--cutmix_minmax", type=fraction, nargs=2, default=None, help="CutMix's smallest and largest side")
    add("--mixup_prob", type=fraction, default=1.0, help="chance of either per batch")
    add("--mixup_switch_prob", type=fraction, default=0.5, help="chance of CutMix where both are on")
    add("--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="what shares a mix")

    add, add_switch = add_group(parser, "moving average of the weights")
    add_switch("--model_ema", False, "keep an exponential moving average of the weights")
    add("--model_ema_decay", type=fraction, default=0.9999, help="its decay per optimizer step")
    add_switch("--model_ema_force_cpu", False, "keep it on the CPU")


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """What fine-tuning also reads with --eval true."""
    add, add_switch = add_group(parser, "weights and evaluation")
    add("--finetune", default="", help="checkpoint whose encoder to start from; the head is new")
    add("--model_key", default=MODEL_KEY, help="where a checkpoint holds its weights, by preference")
    add("--model_prefix", default="", help="take only the weights under this prefix, without it")
    eval_help = "only evaluate --resume, or --finetune with its head; model and images are as in its training"
    add_switch("--eval", False, eval_help)
    csv_file = matching(r"(?s).+\.csv", "a file that ends in .csv")
    predictions_help = "write path, label, prediction and probability of each evaluated image; in training, at its end"
    add("--predictions", type=csv_file, default="", metavar="FILE.csv", help=predictions_help)
    add_switch("--dist_eval", True, "spread the evaluation over the processes")
    add_switch("--model_ema_eval", False, "evaluate the moving average after each epoch, beside the model")
    add_switch("--imagenet_default_mean_and_std", True, "normalise as ImageNet models do; false: as Inception")


def check_labels(args: Namespace) -> None:
    """Refuse what has no meaning for one label an image, or for several; these are best by mAP. Raises UsageError."""
    other = args.class_weights not in ("", "balanced") and not os.path.isfile(args.class_weights)
    refuse(other, f"--class_weights {args.class_weights}: must be balanced, or a file, which this is not")
    both = args.class_weights and args.balanced_sampling
    refuse(both, "--class_weights and --balanced_sampling: either makes up for unequal classes; give one")
    if args.multi_label and "best_metric" not in given(args):
        args.best_metric = "map"
    wrong = {"map": not args.multi_label} | dict.fromkeys(("acc1", "balanced_acc"), args.multi_label)
    which = f"is of {'one label' if args.multi_label else 'several labels'} an image; f1 and loss are of both"
    refuse(wrong.get(args.best_metric), f"--best_metric {args.best_metric}: {which}")
    for name in ("images_per_class", "balanced_sampling") if args.multi_label else ():
        no_class = f"--{name} and --multi_label true: images have no class of their own; leave one out"
        refuse(getattr(args, name), no_class)


def idle_flags(args: Namespace, use_amp: bool) -> list[tuple[str, object, str]]:
    """Of the flags of both scripts, the rows of `tell_idle`."""
    saving, data = "save_ckpt_freq save_ckpt_steps save_ckpt_num", f"with --data_set {args.data_set}"
    return [
        ("blr", args.lr is not None, "beside --lr"),
        ("start_epoch", args.resume, "beside --resume"),
        (f"save_ckpt auto_resume {saving}", not args.output_dir, "without --output_dir"),
        (saving, not args.save_ckpt, "with --save_ckpt false"),
        ("amp_dtype", not use_amp, "without mixed precision"),
        ("kernels", not args.fused, "with --fused false"),
        ("data_path", args.data_set == "shapes", data),
        ("split_seed", not (args.val_split or getattr(args, "eval", False)), "without --val_split"),
        ("depth nodata max_pixels", args.data_set not in ("IMNET", "image_folder"), data),
        ("eval_data_path", args.data_set.startswith(("shapes", "CIFAR")), data),
    ]
