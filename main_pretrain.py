"""FCMAE pre-training of ConvNeXt V2.

python main_pretrain.py @recipes/demo_pretrain.args
python main_pretrain.py @recipes/pretrain_base.args --data_path /data/imagenet --output_dir output/base
"""

import copy
import itertools
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import datasets
from engine_pretrain import train_one_epoch
from models import fcmae, fused, kernels
from models.convnextv2 import SIZES, compile_blocks, total_stride
from utils import distributed, errors, flags, weights
from utils.amp import Amp
from utils.args import (
    ArgumentParser,
    add_bool,
    at_least,
    check_shared_arguments,
    effective_lr,
    fraction,
    tell_without_effect,
)
from utils.data.sampling import StepLoader, random_subset, readable, shuffled_indices, with_transform
from utils.errors import UsageError
from utils.knn import knn_acc1
from utils.lr_sched import Schedule
from utils.param_groups import param_groups
from utils.pictures import reconstruction_grid
from utils.run import Run, open_run

log = logging.getLogger("fcmae")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("FCMAE pre-training of ConvNeXt V2. @FILE reads arguments from a file, as in recipes/.")
    flags.add_shared_arguments(
        parser, epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0, min_crop=0.2, data_sets=datasets.DATA_SETS_HELP
    )
    group = parser.add_argument_group("masked autoencoding")
    group.add_argument("--mask_ratio", type=fraction, default=0.6, help="share of patches that are removed")
    add_bool(group, "--norm_pix_loss", True, "normalise each target patch by its own mean and deviation")
    group.add_argument("--decoder_depth", type=at_least(0), default=1, help="blocks of the decoder")
    group.add_argument("--decoder_embed_dim", type=at_least(1), default=512, help="channels of the decoder")
    group.add_argument(
        "--initial_checkpoint", default="",
        help="weights to start from, in any layout; the decoder is fresh unless the file has one that fits; ignored "
        "once a checkpoint of --output_dir is resumed",
    )  # fmt: skip
    add_bool(group, "--stem_average", False, "average the checkpoint's stem over its channels where --in_chans differs")
    group.add_argument(
        "--vis_freq",
        "--picture_freq",
        type=at_least(0),
        default=10,
        help="epochs between reconstruction pictures in --output_dir; 0: none",
    )
    group = parser.add_argument_group("k-NN accuracy of the encoder", "on labelled images; training never sees labels")
    group.add_argument("--knn_freq", type=at_least(0), default=0, help="epochs between k-NN evaluations; 0: none")
    group.add_argument(
        "--knn_images", type=at_least(1), default=5000, help="at most so many that vote, and so many tested"
    )
    group.add_argument(
        "--eval_data_path", default=None, help="class folders of test images; without, image_folder holds a fifth out"
    )
    group.add_argument(
        "--nb_classes", type=at_least(1), default=None, help="number of classes, where the data does not tell"
    )
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    datasets.mean_std(args)
    patch_size = total_stride(args.stem_stride)
    if args.input_size % patch_size:
        fitting = max(patch_size, round(args.input_size / patch_size) * patch_size)
        raise UsageError(
            f"--input_size {args.input_size}: must be a multiple of the patch size {patch_size} (8 * stem_stride), "
            f"such as {fitting}"
        )
    try:
        fcmae.num_visible((args.input_size // patch_size) ** 2, args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio {args.mask_ratio}: {error}; or give a larger --input_size") from error
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UsageError(f"--initial_checkpoint {args.initial_checkpoint}: no such file")
    if args.initial_checkpoint and args.resume:
        raise UsageError("--initial_checkpoint and --resume: give one; the first starts a run, --resume continues one")


def without_effect(args) -> list[tuple[str, object, str]]:
    """The rows of `tell_without_effect`."""
    shown = args.output_dir or args.log_dir or args.wandb
    return [
        ("vis_freq", not shown, "without --output_dir, --log_dir and --wandb"),
        ("knn_images nb_classes eval_data_path eval_list", not args.knn_freq, "without --knn_freq"),
        ("crop_pct", not ((args.vis_freq and shown) or args.knn_freq), "without pictures and --knn_freq"),
        ("stem_average", not args.initial_checkpoint, "without --initial_checkpoint"),
    ]


def sample_mask(num_patches: int, mask_ratio: float) -> torch.Tensor:
    """One sample's mask (L,), drawn beside its augmentation under the sample's own seed."""
    return fcmae.random_mask(torch.rand(num_patches), mask_ratio)


def picture_images(dataset: Dataset, args, count: int = 8) -> torch.Tensor:
    """A few images, not augmented and the same in every run; of a stream, the first, augmented: (count, C, H, W)."""
    if not isinstance(dataset, IterableDataset):
        dataset = with_transform(dataset, datasets.build_transform(False, args))
        samples = readable(dataset, shuffled_indices(dataset).tolist())  # the first may all be of one class
    else:
        stream = copy.copy(dataset)
        stream.reader = copy.copy(dataset.reader)  # once read, it would give all workers one and the same part
        samples = iter(stream)
    imgs = [sample[0] for sample in itertools.islice(samples, count)]
    if not imgs:
        raise UsageError(f"--data_path {args.data_path}: none of its images can be read")
    imgs = torch.stack(imgs)
    if isinstance(dataset, IterableDataset):  # as in training
        return datasets.build_batch_transform(args, imgs.device)(imgs)
    return imgs


def knn_loaders(args) -> tuple[DataLoader, DataLoader] | None:
    """What --knn_freq classifies by, and what it classifies."""
    if not args.knn_freq:
        return None
    try:
        splits = datasets.labelled_splits(args)
    except UsageError as error:
        raise UsageError(f"--knn_freq {args.knn_freq}: needs labelled images; {error}") from error
    subsets = (random_subset(split, args.knn_images) for split in splits)
    return tuple(datasets.build_eval_loader(subset, args, spread=True) for subset in subsets)


def build_model(args) -> fcmae.FCMAE:
    model = getattr(fcmae, args.model)(
        in_chans=args.in_chans,
        mask_ratio=args.mask_ratio,
        norm_pix_loss=args.norm_pix_loss,
        decoder_depth=args.decoder_depth,
        decoder_embed_dim=args.decoder_embed_dim,
        patch_size=total_stride(args.stem_stride),
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def build_loader(dataset: Dataset, args, device: torch.device) -> StepLoader:
    """Steps of (image, label, mask)."""
    sampler = partial(sample_mask, (args.input_size // total_stride(args.stem_stride)) ** 2, args.mask_ratio)
    batch_transform = datasets.build_batch_transform(args, device)
    loader = datasets.build_train_loader(dataset, args, sampler, batch_transform=batch_transform)
    counts = loader.sampler.num_samples, loader.global_batch, len(loader)
    log.info("%d images, %d per optimizer step, %d steps per epoch", *counts)
    return loader


def train(args, amp: Amp, run: Run) -> None:
    """Pre-train for all epochs that are still to be done, drawing pictures on the way."""
    device = amp.device
    dataset = datasets.build_pretrain_dataset(args)
    loader = build_loader(dataset, args, device)
    labelled = knn_loaders(args)
    torch.manual_seed(args.seed)
    model = build_model(args).to(device)
    if args.fused:
        fused.enable(model, run.triton(kernels.available))
    lr = effective_lr(args, distributed.get_world_size())
    optimizer = torch.optim.AdamW(
        param_groups(model.named_parameters(), args.weight_decay), lr=lr, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    if args.initial_checkpoint and not run.resume_from:
        weights.load_checkpoint(args.initial_checkpoint, model, "--initial_checkpoint", stem_average=args.stem_average)
    run.begin(model, optimizer, loader, order={"--seed": args.seed, "number of images": loader.sampler.num_samples})
    log.info(
        "%s: %.2f M parameters, patches of %d pixels, lr %.3g, epochs %d to %d on %s",
        args.model, sum(p.numel() for p in model.parameters()) / 1e6, model.patch_size, lr, run.start_epoch,
        args.epochs - 1, device,
    )  # fmt: skip
    if args.compile:
        compile_blocks(model)
    wrapped = distributed.data_parallel(model)
    picture_of = None
    if args.vis_freq and (args.output_dir or args.log_dir or args.wandb) and distributed.is_main_process():
        picture_of = picture_images(dataset, args)
    for epoch in run.epochs():
        stats, scores = train_one_epoch(wrapped, loader, optimizer, schedule, run, epoch), {}
        if labelled and run.due(epoch, args.knn_freq):
            scores["knn_acc1"] = knn_acc1(model.encoder, labelled, amp)
            log.info("epoch %d: k-NN acc1 %.2f", epoch, scores["knn_acc1"])
        if picture_of is not None and run.due(epoch, args.vis_freq):
            run.picture(
                "reconstruction", reconstruction_grid(model, picture_of, amp, *datasets.picture_mean_std(args)), epoch
            )
        run.record(epoch, stats, scores)


def main(args) -> None:
    check_args(args)
    with distributed.process_group(args) as device:
        use_amp = device.type == "cuda" if args.use_amp is None else args.use_amp
        amp = Amp(device, use_amp, getattr(torch, args.amp_dtype))
        tell_without_effect(args, use_amp, without_effect(args))
        with open_run(vars(args), amp) as run:
            train(args, amp, run)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(
            "Pre-train on the embedded data set:  python main_pretrain.py @recipes/demo_pretrain.args\n"
            "or on your own:  python main_pretrain.py --data_set image_folder --data_path FOLDER --output_dir DIR\n"
            "python main_pretrain.py --help lists all arguments; recipes/ holds the published settings."
        )
    errors.run_cli(lambda: main(get_args_parser().parse_args()))
