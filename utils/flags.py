"""The flags of both entry scripts, by groups; how they are parsed and checked is in utils/args.py."""

from .args import ArgumentParser, add_bool, at_least, finite, fraction, not_negative, positive, seed, share
from .data.images import Reading
from .weights import MODEL_KEY

CROP_HELP = "evaluation crop; where not given: 224/256, 1 up to 32 px, from 384 px on the whole, warped to a square"


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
    kernels_help = "the depthwise convolution's on a GPU; auto: the checkpoint's that is resumed, else the library's"
    group.add_argument("--kernels", default="auto", choices=("auto", "library", "triton"), help=kernels_help)
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
    add_file_arguments(group)
    group.add_argument(
        "--max_bad_images", type=fraction, default=0.01,
        help="share of unreadable training images above which the run ends after the epoch; where not given, 4 may be",
    )  # fmt: skip
    _add_run_arguments(parser)


def add_file_arguments(group) -> None:
    """How image files are read; also of tools."""
    group.add_argument(
        "--depth", type=int, choices=(8, 16, 32), default=None,
        help="read files as bytes (8), shares of what 8 or 16 bits can hold (16), or numbers as they are (32); "
        "where not given: as most of a sample are",
    )  # fmt: skip
    nodata_help = "value of pixels without data, in files that do not say; they become the mean (--nodata=-1e38)"
    group.add_argument("--nodata", type=finite, default=None, help=nodata_help)
    group.add_argument(
        "--max_pixels", type=at_least(1), default=Reading.max_pixels, help="larger images are refused from their header"
    )


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
    group.add_argument(
        "--save_ckpt_num",
        type=at_least(1),
        default=3,
        help="checkpoints kept; one more until the newest has shown itself good",
    )

    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    add_bool(group, "--use_amp", None, "mixed precision; where not given: on cuda")
    group.add_argument("--amp_dtype", default="bfloat16", choices=("bfloat16", "float16"), help="mixed-precision type")

    group = parser.add_argument_group("processes", "torchrun, mpirun and srun fill these in from their environment")
    group.add_argument("--world_size", type=at_least(1), default=1, help="number of processes, where no launcher tells")
    group.add_argument("--local_rank", type=int, default=-1, help="rank of this process, where no launcher tells")
    add_bool(group, "--dist_on_itp", False, "take the ranks from OpenMPI's environment")
    group.add_argument("--dist_url", default="env://", help="where processes meet: env:// or tcp://HOST:PORT")


def add_finetune_arguments(parser: ArgumentParser) -> None:
    """Of fine-tuning: the start, the network, the optimizer."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--finetune", default="", help="checkpoint whose encoder to start from; the head is new")
    group.add_argument("--model_key", default=MODEL_KEY, help="where a checkpoint holds its weights, by preference")
    group.add_argument("--model_prefix", default="", help="take only the weights under this prefix, without it")
    add_bool(group, "--stem_average", False, "average the checkpoint's stem over its channels where --in_chans differs")
    group.add_argument(
        "--images_per_class",
        type=at_least(1),
        default=None,
        help="train on the first so many images of each class alone",
    )
    head_help = "the head, which is new, starts with std 0.02 times this"
    group.add_argument("--head_init_scale", type=not_negative, default=0.001, help=head_help)
    group.add_argument("--drop_path", type=fraction, default=0.0, help="stochastic depth of the last block")
    group.add_argument("--layer_decay", type=share, default=1.0, help="learning-rate factor per layer below the head")
    group.add_argument(
        "--layer_decay_type", choices=("single", "group"), default="single",
        help="count blocks one by one, or, for depths 3,3,27,3, in groups",
    )  # fmt: skip
    add_bool(group, "--linear_probe", False, "freeze the encoder, train a linear head; see recipes/linear_probe.args")
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="any optimizer of timm's factory")
    group.add_argument("--opt_eps", type=not_negative, default=1e-8, help="the optimizer's epsilon")
    group.add_argument(
        "--opt_betas", type=fraction, nargs="+", default=None, help="the optimizer's betas, if not its own"
    )
    group.add_argument("--momentum", type=fraction, default=0.9, help="momentum of optimizers that have one")
    group.add_argument("--clip_grad", type=positive, default=None, help="largest norm of the gradient")
    group.add_argument(
        "--warmup_steps", type=at_least(-1), default=-1, help="warm-up in steps; overrides --warmup_epochs"
    )
    group.add_argument(
        "--weight_decay_end", type=not_negative, default=None, help="weight decay at the end of a half cosine"
    )


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
