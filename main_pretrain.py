"""FCMAE pre-training of ConvNeXt V2.

python main_pretrain.py @recipes/demo_pretrain.args
python main_pretrain.py --data_set image_folder --data_path FOLDER --output_dir output/mine
python main_pretrain.py @recipes/pretrain_base.args --data_path /data/imagenet --output_dir output/base

--help lists all flags; recipes/ holds the published settings.
"""

import copy
import itertools
import logging
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import datasets
from engine_pretrain import train_one_epoch
from models import fcmae, fused, kernels
from models.convnextv2 import SIZES, total_stride
from models.layers import GRN
from utils import distributed, errors, flags, weights
from utils.amp import Amp
from utils.args import ArgumentParser, Size, check_shared_arguments, effective_lr, fraction, tell_idle, whole
from utils.data.sampling import StepLoader, random_subset, readable, shuffled_indices, with_transform
from utils.errors import UsageError, refuse
from utils.health import health
from utils.knn import knn_score
from utils.lr_sched import Schedule
from utils.param_groups import param_groups
from utils.pictures import reconstructions, tile
from utils.run import Run, open_run

log = logging.getLogger("fcmae")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("FCMAE pre-training of ConvNeXt V2. @FILE reads arguments from a file, as in recipes/.")
    flags.add_shared_arguments(parser, datasets.DATA_SETS_HELP)
    flags.add_training_arguments(parser)
    parser.set_defaults(epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0, min_crop=0.2)
    add, add_switch = flags.add_group(parser, "masked autoencoding")
    add("--mask_ratio", type=fraction, default=0.6, help="share of patches that are removed")
    add_switch("--norm_pix_loss", True, "normalise each target patch by its own mean and deviation")
    add("--decoder_depth", type=whole(0, 1000), default=1, help="blocks of the decoder")
    add("--decoder_embed_dim", type=whole(1, 65536), default=512, help="channels of the decoder")
    start_help = "weights to start from, in any layout; the decoder is fresh unless the file has one that fits"
    add("--initial_checkpoint", default="", help=f"{start_help}; ignored once a checkpoint of --output_dir is resumed")
    add("--vis_freq", type=whole(0), default=10, help="epochs between reconstruction pictures; 0: none")
    knn_help = "on labelled images; image_folder without a validation folder holds a fifth out; training sees no labels"
    add, _ = flags.add_group(parser, "k-NN accuracy of the encoder", knn_help)
    add("--knn_freq", type=whole(0), default=0, help="epochs between k-NN evaluations; 0: none")
    add("--knn_images", type=whole(1), default=5000, help="at most so many that vote, and so many tested")
    health_help = "epochs between looks, without labels, at the features' effective rank (RankMe) and at dead channels"
    add("--health_freq", type=whole(0), default=None, help=f"{health_help}; 0: none; where not given: as --knn_freq")
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    datasets.mean_std(args)
    patch_size = total_stride(args.stem_stride)
    fitting = Size(*(max(patch_size, round(side / patch_size) * patch_size) for side in args.input_size))
    fits = f"must be a multiple of the patch size {patch_size} (8 * stem_stride), such as {fitting}"
    refuse(any(side % patch_size for side in args.input_size), f"--input_size {args.input_size}: {fits}")
    try:
        fcmae.num_visible(fcmae.num_patches(args.input_size, patch_size), args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio {args.mask_ratio}: {error}; or give a larger --input_size") from error


def shows(args) -> bool:
    """Whether pictures are drawn."""
    return bool(args.vis_freq and (args.output_dir or args.log_dir or args.wandb))


def idle_flags(args, use_amp: bool) -> list[tuple[str, object, str]]:
    """The rows of `tell_idle`."""
    watches = args.knn_freq or args.health_freq
    return [
        ("vis_freq", args.vis_freq and not shows(args), "without --output_dir, --log_dir and --wandb"),
        ("knn_images", not watches, "without --knn_freq and --health_freq"),
        ("nb_classes eval_data_path eval_list", not args.knn_freq, "without --knn_freq"),
        ("multi_label", not args.knn_freq and not args.val_split, "without --knn_freq and --val_split"),
        ("resize_mode crop_pct eval_resize", not shows(args) and not watches, "without pictures and --knn_freq"),
        ("stem_average", not args.initial_checkpoint, "without --initial_checkpoint"),
        *flags.idle_flags(args, use_amp),
    ]


def sample_mask(num_patches: int, mask_ratio: float) -> torch.Tensor:
    """One sample's mask (L,), drawn beside its augmentation under the sample's own seed."""
    return fcmae.random_mask(torch.rand(num_patches), mask_ratio)


def picture_images(dataset: Dataset, args, count: int = 8) -> torch.Tensor:
    """A few images, not augmented and the same in every run; of a stream, the first, augmented: (count, C, H, W)."""
    if streamed := isinstance(dataset, IterableDataset):
        dataset = copy.copy(dataset)
        dataset.reader = copy.copy(dataset.reader)  # once read, it would give all workers one and the same part
        samples = iter(dataset)
    else:
        dataset = with_transform(dataset, datasets.build_transform(False, args))
        samples = readable(dataset, shuffled_indices(dataset).tolist())  # the first may all be of one class
    imgs = [sample[0] for sample in itertools.islice(samples, count)]
    refuse(not imgs, f"--data_path {args.data_path}: none of its images can be read")
    imgs = torch.stack(imgs)
    return datasets.build_batch_transform(args, imgs.device)(imgs) if streamed else imgs


def knn_loaders(args) -> tuple[DataLoader, DataLoader] | None:
    """What --knn_freq classifies by, and what it classifies."""
    if not args.knn_freq:
        return None
    try:
        splits = datasets.labelled_splits(args)
    except UsageError as error:
        needs = f"needs labelled images; {error}; --health_freq needs none"
        raise UsageError(f"--knn_freq {args.knn_freq}: {needs}") from error
    subsets = (random_subset(split, args.knn_images) for split in splits)
    return tuple(datasets.build_eval_loader(subset, args, spread=True) for subset in subsets)


def health_freq(args) -> int:
    return args.knn_freq if args.health_freq is None else args.health_freq


def health_loader(dataset: Dataset, args) -> DataLoader | None:
    """The same training images in every run, not augmented, that --health_freq looks at."""
    if not health_freq(args):
        return None
    streamed = "needs images that have indices, which a stream's have not"
    refuse(isinstance(dataset, IterableDataset), f"--health_freq {args.health_freq}: {streamed}")
    plain = with_transform(dataset, datasets.build_transform(False, args))
    return datasets.build_eval_loader(random_subset(plain, args.knn_images), args, spread=True)


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
    length = fcmae.num_patches(args.input_size, total_stride(args.stem_stride))
    sampler = partial(sample_mask, length, args.mask_ratio)
    normalise = datasets.build_batch_transform(args, device)
    return datasets.build_train_loader(dataset, args, sampler, batch_transform=normalise)


def train(args, amp: Amp, run: Run) -> None:
    """Pre-train for all epochs that are still to be done, drawing pictures on the way."""
    device = amp.device
    dataset = datasets.build_pretrain_dataset(args)
    loader = build_loader(dataset, args, device)
    labelled, watched = knn_loaders(args), health_loader(dataset, args)
    torch.manual_seed(args.seed)
    model = build_model(args).to(device)
    if args.fused:
        fused.enable(model, run.triton(kernels.available))
    lr = effective_lr(args, distributed.get_world_size())
    groups = param_groups(model.named_parameters(), args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type != "mps")
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    if args.initial_checkpoint and not run.resume_from:
        weights.load_checkpoint(args.initial_checkpoint, model, "--initial_checkpoint", stem_average=args.stem_average)
    run.begin(model, optimizer, loader, order={"--seed": args.seed, "number of images": loader.sampler.num_samples})
    log.info(
        "%s: %.2f M parameters, patches of %d pixels, lr %.3g, warm-up %d, epochs %d to %d on %s",
        args.model, sum(p.numel() for p in model.parameters()) / 1e6, model.patch_size, lr, args.warmup_epochs,
        run.start_epoch, args.epochs - 1, device,
    )  # fmt: skip
    wrapped = distributed.data_parallel(model, args.compile)
    picture_of = picture_images(dataset, args) if shows(args) and distributed.is_main_process() else None
    for epoch in run.epochs():
        stats, scores = train_one_epoch(wrapped, loader, optimizer, schedule, run, epoch), {}
        if labelled and run.due(epoch, args.knn_freq):
            name = "map" if args.multi_label else "acc1"
            scores[f"knn_{name}"] = value = knn_score(model.encoder, labelled, amp)
            log.info("epoch %d: k-NN %s %.2f", epoch, name, value)
        if watched and run.due(epoch, health_freq(args)):
            grns = [module for module in model.encoder.modules() if isinstance(module, GRN)]
            scores |= health(model.encoder, grns, watched, amp)
        if picture_of is not None and run.due(epoch, args.vis_freq):
            pictures = reconstructions(model, picture_of, amp, *datasets.picture_mean_std(args), args.mask_ratio)
            run.picture("reconstruction", tile(pictures.flatten(0, 1), 6), epoch)
        run.record(epoch, stats, scores)


def main(args) -> None:
    check_args(args)
    with distributed.process_group(args) as device:
        amp = Amp(device, args.use_amp, getattr(torch, args.amp_dtype))
        tell_idle(args, idle_flags(args, amp.enabled))
        with open_run(vars(args), amp) as run:
            train(args, amp, run)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    errors.run_cli(lambda: main(get_args_parser().parse_args()))
