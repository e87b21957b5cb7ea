"""FCMAE pre-training of ConvNeXt V2.

python main_pretrain.py @recipes/demo_pretrain.args
python main_pretrain.py @recipes/pretrain_base.args --data_path /data/imagenet --output_dir output/base
"""

import copy
import itertools
import logging
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset
from torchvision.utils import make_grid, save_image

import datasets
from engine_pretrain import train_one_epoch
from models import fcmae
from models.convnextv2 import SIZES, compile_blocks
from utils import checkpoint, distributed, errors
from utils.amp import Amp
from utils.args import (
    ArgumentParser,
    add_bool,
    add_shared_arguments,
    check_shared_arguments,
    effective_lr,
    prepare_output_dir,
)
from utils.errors import UsageError
from utils.interrupts import Interrupts
from utils.lr_sched import Schedule
from utils.metrics import RunLog, duration
from utils.param_groups import param_groups
from utils.run import Run

log = logging.getLogger("fcmae")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser("FCMAE pre-training of ConvNeXt V2. @FILE reads arguments from a file, as in recipes/.")
    add_shared_arguments(
        parser, epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0, min_crop=0.2, data_sets=datasets.DATA_SETS_HELP
    )
    group = parser.add_argument_group("masked autoencoding")
    group.add_argument("--mask_ratio", type=float, default=0.6, help="share of patches that are removed")
    add_bool(group, "--norm_pix_loss", True, "normalise each target patch by its own mean and deviation")
    group.add_argument("--decoder_depth", type=int, default=1, help="blocks of the decoder")
    group.add_argument("--decoder_embed_dim", type=int, default=512, help="channels of the decoder")
    group.add_argument(
        "--picture_freq", type=int, default=10, help="epochs between reconstruction pictures in --output_dir; 0: none"
    )
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    patch_size = 8 * args.stem_stride
    if args.input_size % patch_size:
        fitting = max(patch_size, round(args.input_size / patch_size) * patch_size)
        raise UsageError(
            f"--input_size {args.input_size}: must be a multiple of the patch size {patch_size} (8 * stem_stride), "
            f"such as {fitting}"
        )
    if not 0 < args.mask_ratio < 1:
        raise UsageError(f"--mask_ratio {args.mask_ratio}: must lie between 0 and 1, such as 0.6")
    try:
        fcmae.num_visible((args.input_size // patch_size) ** 2, args.mask_ratio)
    except ValueError as error:
        raise UsageError(f"--mask_ratio {args.mask_ratio}: {error}; or give a larger --input_size") from error
    for name in ("decoder_depth", "picture_freq"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.decoder_embed_dim < 1:
        raise UsageError(f"--decoder_embed_dim {args.decoder_embed_dim}: must be at least 1")


def draw_mask(num_patches: int, mask_ratio: float) -> torch.Tensor:
    """One sample's mask (L,), drawn beside its augmentation under the sample's own seed."""
    return fcmae.random_mask(torch.rand(num_patches), mask_ratio)


def picture_images(dataset: Dataset, args, count: int = 8) -> torch.Tensor:
    """The first few images, not augmented where the data set can be read twice: (count, C, H, W)."""
    if not isinstance(dataset, IterableDataset):
        dataset = copy.copy(dataset)
        dataset.transform = datasets.build_transform(False, args)
        dataset = datasets.EvalSamples(dataset)
        samples = (dataset[i] for i in range(len(dataset)))
    else:
        samples = iter(dataset)
    readable = list(itertools.islice((sample[0] for sample in samples if sample is not None), count))
    if not readable:
        raise UsageError(f"--data_path {args.data_path}: none of its images can be read")
    return torch.stack(readable)


def reconstruction_grid(model: fcmae.FCMAE, imgs: torch.Tensor, amp: Amp, mean, std, seed: int = 0) -> torch.Tensor:
    """Input, visible part and prediction pasted into it, two images a row: a picture (C, H, W) in 0..1."""
    mask = model.gen_random_mask(imgs, model.mask_ratio, torch.Generator().manual_seed(seed))
    with amp.autocast():
        visible, pasted = model.reconstruct(imgs.to(amp.device), mask)
    columns = torch.stack([imgs, visible.cpu(), pasted.float().cpu()], dim=1).flatten(0, 1)[:, :3]
    mean, std = (torch.tensor(x[: columns.shape[1]]).view(-1, 1, 1) for x in (mean, std))
    columns = columns * std + mean
    removed = mask.view(len(mask), 1, *model.grid_size(imgs)).repeat_interleave(model.patch_size, 2)
    columns[1::3] = torch.where(removed.repeat_interleave(model.patch_size, 3) > 0, 0.5, columns[1::3])
    enlarge = max(1, 128 // imgs.shape[-1])
    columns = columns.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(columns.clamp(0, 1), nrow=6, padding=4, pad_value=1.0)


def build_model(args) -> fcmae.FCMAE:
    model = getattr(fcmae, args.model)(
        mask_ratio=args.mask_ratio,
        norm_pix_loss=args.norm_pix_loss,
        decoder_depth=args.decoder_depth,
        decoder_embed_dim=args.decoder_embed_dim,
        patch_size=8 * args.stem_stride,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def build_loader(dataset: Dataset, args) -> datasets.StepLoader:
    """Steps of (image, label, mask)."""
    draw = partial(draw_mask, (args.input_size // (8 * args.stem_stride)) ** 2, args.mask_ratio)
    loader = datasets.build_train_loader(dataset, args, draw)
    log.info(
        "%d images, %d per optimizer step, %d steps per epoch",
        len(dataset), args.batch_size * args.update_freq * distributed.get_world_size(), len(loader),
    )  # fmt: skip
    return loader


def train(args, amp: Amp, interrupts: Interrupts, lock: checkpoint.OutputLock) -> None:
    """Pre-train for all epochs that are still to be done, saving and drawing pictures on the way."""
    device = amp.device
    dataset = datasets.build_pretrain_dataset(args)
    loader = build_loader(dataset, args)
    torch.manual_seed(args.seed)
    model = build_model(args).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    lr = effective_lr(args, distributed.get_world_size())
    optimizer = torch.optim.AdamW(
        param_groups(model.named_parameters(), args.weight_decay), lr=lr, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    start_epoch, partial = args.start_epoch, None
    if found := checkpoint.find(args.resume, args.auto_resume, args.output_dir):
        start_epoch, partial = checkpoint.load_training(*found, model, optimizer, amp.scaler, loader.global_batch)
        log.info("resumed from %s, going on with epoch %d", found[0], start_epoch)
    if start_epoch >= args.epochs:
        log.info("nothing to do: all %d epochs are done; a larger --epochs goes on", args.epochs)
        return
    if args.compile:
        compile_blocks(model)
    wrapped = distributed.data_parallel(model)
    log.info(
        "%s: %.2f M parameters, patches of %d pixels, lr %.3g, epochs %d to %d on %s",
        args.model, n_parameters / 1e6, model.patch_size, lr, start_epoch, args.epochs - 1, device,
    )  # fmt: skip

    picture_of = None
    if args.picture_freq and (args.output_dir or args.log_dir) and distributed.is_main_process():
        picture_of = picture_images(dataset, args)

    def save(epoch: int, partial: dict | None = None) -> None:
        state = checkpoint.training_state(model, optimizer, amp.scaler, epoch, args, partial, loader.global_batch)
        checkpoint.save_numbered(state, args.output_dir, args.save_ckpt_num)

    saves = bool(args.output_dir and args.save_ckpt)
    run_log = RunLog(args.output_dir, args.log_dir, start_epoch)
    run = Run(run_log, args.seed, partial, save if saves else None, args.save_ckpt_steps, interrupts, lock)
    begun, rates = time.perf_counter(), []
    for epoch in range(start_epoch, args.epochs):
        stats = train_one_epoch(wrapped, loader, optimizer, amp, schedule, run, epoch)
        rates.append(stats.pop("images_per_second"))
        last = epoch + 1 == args.epochs
        run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch, "n_parameters": n_parameters})
        if picture_of is not None and ((epoch + 1) % args.picture_freq == 0 or last):
            grid = reconstruction_grid(model, picture_of, amp, *datasets.mean_std(args))
            run_log.image("reconstruction", grid, epoch + 1)
            if args.output_dir:
                save_image(grid, Path(args.output_dir) / f"reconstruction-{epoch}.png")
        due = (epoch + 1) % args.save_ckpt_freq == 0 or last
        if saves and due:
            save(epoch)
        run.epoch_done(epoch, saved=due)
        spent = time.perf_counter() - begun
        left = spent / (epoch + 1 - start_epoch) * (args.epochs - epoch - 1)
        log.info("epoch %d: loss %.4f, run eta %s", epoch, stats["loss"], duration(left))
    run_log.close()
    log.info(
        "done: %d epochs in %s, %.0f img/s, loss %.4f; %s",
        len(rates), duration(time.perf_counter() - begun), sum(rates) / len(rates), stats["loss"],
        f"checkpoints, log.txt and pictures in {args.output_dir}" if args.output_dir else "nothing saved",
    )  # fmt: skip


def main(args) -> None:
    check_args(args)
    with distributed.process_group(args) as device:
        use_amp = device.type == "cuda" if args.use_amp is None else args.use_amp
        amp = Amp(device, use_amp, getattr(torch, args.amp_dtype))
        prepare_output_dir(args.output_dir)
        with checkpoint.OutputLock(args.output_dir) as lock, Interrupts() as interrupts:
            train(args, amp, interrupts, lock)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(
            "Pre-train on the embedded data set:  python main_pretrain.py @recipes/demo_pretrain.args\n"
            "or on your own:  python main_pretrain.py --data_set image_folder --data_path FOLDER --output_dir DIR\n"
            "python main_pretrain.py --help lists all arguments; recipes/ holds the published settings."
        )
    errors.run(lambda: main(get_args_parser().parse_args()))
