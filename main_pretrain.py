"""FCMAE pre-training of ConvNeXt V2.

python main_pretrain.py @recipes/demo_pretrain.args
python main_pretrain.py @recipes/pretrain_base.args --data_path /data/imagenet --output_dir output/base
"""

import itertools
import logging
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.utils import make_grid, save_image

import datasets
from engine_pretrain import train_one_epoch
from models import fcmae, weights
from models.convnextv2 import SIZES, Encoder, compile_blocks
from utils import checkpoint, distributed, errors
from utils.amp import Amp
from utils.args import (
    ArgumentParser,
    add_bool,
    add_shared_arguments,
    check_shared_arguments,
    effective_lr,
    prepared_output_dir,
)
from utils.errors import UsageError
from utils.interrupts import Interrupts
from utils.knn import knn_accuracy
from utils.lr_sched import Schedule
from utils.metrics import duration
from utils.param_groups import param_groups
from utils.record import open_log, record_end
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
        "--initial_checkpoint", default="",
        help="weights to start from, in any layout; the decoder is fresh unless the file has one that fits; ignored "
        "once a checkpoint of --output_dir is resumed",
    )  # fmt: skip
    add_bool(group, "--stem_average", False, "average the checkpoint's stem over its channels where --in_chans differs")
    group.add_argument(
        "--picture_freq", type=int, default=10, help="epochs between reconstruction pictures in --output_dir; 0: none"
    )
    group = parser.add_argument_group("k-NN accuracy of the encoder", "on labelled images; training never sees labels")
    group.add_argument("--knn_freq", type=int, default=0, help="epochs between k-NN evaluations; 0: none")
    group.add_argument("--knn_images", type=int, default=5000, help="at most so many that vote, and so many tested")
    group.add_argument(
        "--eval_data_path", default=None, help="class folders of test images; without, image_folder holds a fifth out"
    )
    group.add_argument("--nb_classes", type=int, default=None, help="number of classes, where the data does not tell")
    return parser


def check_args(args) -> None:
    """Refuse impossible arguments before anything is built. Raises UsageError."""
    check_shared_arguments(args, list(SIZES))
    datasets.mean_std(args)
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
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UsageError(f"--initial_checkpoint {args.initial_checkpoint}: no such file")
    if args.initial_checkpoint and args.resume:
        raise UsageError("--initial_checkpoint and --resume: give one; the first starts a run, --resume continues one")
    for name in ("decoder_depth", "picture_freq", "knn_freq"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("decoder_embed_dim", "knn_images"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")


def draw_mask(num_patches: int, mask_ratio: float) -> torch.Tensor:
    """One sample's mask (L,), drawn beside its augmentation under the sample's own seed."""
    return fcmae.random_mask(torch.rand(num_patches), mask_ratio)


def picture_images(dataset: Dataset, args, count: int = 8) -> torch.Tensor:
    """The first few images, not augmented where the data set can be read twice: (count, C, H, W)."""
    if not isinstance(dataset, IterableDataset):
        dataset = datasets.EvalSamples(datasets.with_transform(dataset, datasets.build_transform(False, args)))
        samples = (dataset[i] for i in range(len(dataset)))
    else:
        samples = iter(dataset)
    readable = list(itertools.islice((sample[0] for sample in samples if sample is not None), count))
    if not readable:
        raise UsageError(f"--data_path {args.data_path}: none of its images can be read")
    readable = torch.stack(readable)
    if isinstance(dataset, IterableDataset):  # as in training
        return datasets.build_prepare(dataset, args, readable.device)(readable)
    return readable


def shown(imgs: torch.Tensor) -> int:
    """How many of the channels of (N, C, H, W) a picture has room for: three, else one."""
    return 3 if imgs.shape[1] >= 3 else 1


def reconstructions(
    model: fcmae.FCMAE, imgs: torch.Tensor, amp: Amp, mean, std, mask_ratio: float, seed: int = 0
) -> torch.Tensor:
    """Input, visible part and prediction pasted into it: (N, C, H, W) -> (N, 3, 3 or 1, H, W) in 0..1."""
    mask = model.gen_random_mask(imgs, mask_ratio, torch.Generator().manual_seed(seed))
    with amp.autocast():
        visible, pasted = model.reconstruct(imgs.to(amp.device), mask)
    columns = torch.stack([imgs, visible.cpu(), pasted.float().cpu()], dim=1)[:, :, : shown(imgs)]
    mean, std = (torch.tensor(x[: columns.shape[2]]).view(-1, 1, 1) for x in (mean, std))
    columns = columns * std + mean
    removed = mask.view(len(mask), 1, *model.grid_size(imgs)).repeat_interleave(model.patch_size, 2)
    columns[:, 1] = torch.where(removed.repeat_interleave(model.patch_size, 3) > 0, 0.5, columns[:, 1])
    return columns.clamp(0, 1)


def tile(pictures: torch.Tensor, columns: int) -> torch.Tensor:
    """Pictures in rows of so many, small ones enlarged: (N, C, H, W) -> (3, height, width)."""
    enlarge = max(1, 128 // pictures.shape[-1])
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return make_grid(pictures, nrow=columns, padding=4, pad_value=1.0)


def reconstruction_grid(model: fcmae.FCMAE, imgs: torch.Tensor, amp: Amp, mean, std, seed: int = 0) -> torch.Tensor:
    """Input, visible part and prediction pasted into it, two images a row: a picture (C, H, W) in 0..1."""
    return tile(reconstructions(model, imgs, amp, mean, std, model.mask_ratio, seed).flatten(0, 1), 6)


def labelled_splits(args) -> tuple[Dataset, Dataset]:
    """Training and test images with their labels, not augmented, whatever the first are otherwise trained on.

    Of class folders without --eval_data_path, every fifth image of a class is a test image and no training image.

    Raises:
        UsageError: images without labels, one class alone, no test images, or a data set that is only streamed.
    """
    if args.data_set not in ("IMNET", "image_folder"):
        train = datasets.build_pretrain_dataset(args)
        if isinstance(train, IterableDataset):
            raise UsageError(f"--data_set {args.data_set}: is streamed; a data set whose images have indices is needed")
        train.transform = datasets.build_transform(False, args)
        return train, datasets.build_dataset(False, args)[0]
    train = datasets.labelled_files(True, args)
    train.transform = datasets.build_transform(False, args, datasets.settle_depth(train, args))
    source = args.train_list or args.data_path
    if len(train.classes) < 2:
        raise UsageError(f"{source}: has one class folder, {train.classes[0]}; at least two are needed")
    if args.data_set == "IMNET" or args.eval_data_path or args.eval_list:
        return train, datasets.build_dataset(False, args, train.classes)[0]
    count, parts = Counter(), ([], [])
    for i, label in enumerate(train.targets):
        count[label] += 1
        parts[count[label] % 5 == 0].append(i)
    if not parts[1]:
        raise UsageError(f"{source}: fewer than five images in each class; give --eval_data_path")
    return Subset(train, parts[0]), Subset(train, parts[1])


def random_subset(dataset: Dataset, count: int | None) -> Dataset:
    """At most `count` images, the same ones in every run, so that runs can be compared."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    return Subset(dataset, order.sort().values.tolist())


def knn_loaders(args) -> tuple[DataLoader, DataLoader] | None:
    """What --knn_freq classifies by, and what it classifies."""
    if not args.knn_freq:
        return None
    try:
        splits = labelled_splits(args)
    except UsageError as error:
        raise UsageError(f"--knn_freq {args.knn_freq}: needs labelled images; {error}") from error
    return tuple(datasets.build_eval_loader(random_subset(x, args.knn_images), args, spread=True) for x in splits)


def pooled_features(encoder: Encoder, imgs: torch.Tensor) -> torch.Tensor:
    """The last stage on whole images, averaged over its positions: (N, C, H, W) -> (N, dims[-1]), float32."""
    return encoder.forward_stages(imgs)[-1].mean(dim=(2, 3), dtype=torch.float32)


def knn_acc1(encoder: Encoder, loaders: tuple[DataLoader, DataLoader], amp: Amp) -> float:
    """k-NN accuracy of the encoder as it is now, in percent; the random generators are left as they were."""
    encoder.eval()
    # whole images would have compiled blocks compiled once more for each of their shapes
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        return knn_accuracy(partial(pooled_features, encoder), encoder.dims[-1], *loaders, amp)


def build_model(args) -> fcmae.FCMAE:
    model = getattr(fcmae, args.model)(
        in_chans=args.in_chans,
        mask_ratio=args.mask_ratio,
        norm_pix_loss=args.norm_pix_loss,
        decoder_depth=args.decoder_depth,
        decoder_embed_dim=args.decoder_embed_dim,
        patch_size=8 * args.stem_stride,
    )
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def load_initial(model: fcmae.FCMAE, path: str | Path, stem_average: bool = False) -> None:
    """Start from the weights of a file of any layout; say which keys were loaded, dropped and missing.

    Raises:
        UsageError: the file's backbone is of another size, or incomplete.
    """
    name, content = f"--initial_checkpoint {path}", checkpoint.read(path)
    try:
        report = weights.load(model, weights.unwrap(content), stem_average)
    except weights.Misfit as error:
        hint = f"; give --in_chans {error.size.in_chans} or --stem_average true"
        hint = hint if error.size.in_chans != model.in_chans else ""
        raise UsageError(f"{name}: not for this --model or --stem_stride; {error}{hint}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    log.info("%s: %d of %d tensors", name, len(report.loaded), len(model.state_dict()))
    for label, names in report.rows().items():
        log.info("  %s: %s", label, names)


def build_loader(dataset: Dataset, args, device: torch.device) -> datasets.StepLoader:
    """Steps of (image, label, mask)."""
    prepare = datasets.build_prepare(dataset, args, device)
    draw = partial(draw_mask, (args.input_size // (8 * args.stem_stride)) ** 2, args.mask_ratio)
    loader = datasets.build_train_loader(dataset, args, draw, prepare=prepare)
    log.info(
        "%d images, %d per optimizer step, %d steps per epoch",
        len(dataset), args.batch_size * args.update_freq * distributed.get_world_size(), len(loader),
    )  # fmt: skip
    return loader


def train(args, amp: Amp, interrupts: Interrupts, lock: checkpoint.OutputLock) -> None:
    """Pre-train for all epochs that are still to be done, saving and drawing pictures on the way."""
    device = amp.device
    dataset = datasets.in_memory(datasets.build_pretrain_dataset(args), args, datasets.pretrain_draw(args))
    loader = build_loader(dataset, args, device)
    labelled = knn_loaders(args)
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
    elif args.initial_checkpoint:
        load_initial(model, args.initial_checkpoint, args.stem_average)
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
    if args.picture_freq and (args.output_dir or args.log_dir or args.wandb) and distributed.is_main_process():
        picture_of = picture_images(dataset, args)

    def save(epoch: int, partial: dict | None = None) -> None:
        state = checkpoint.training_state(model, optimizer, amp.scaler, epoch, args, partial, loader.global_batch)
        checkpoint.save_numbered(state, args.output_dir, args.save_ckpt_num)

    saves = bool(args.output_dir and args.save_ckpt)
    share = partial["step"] / len(loader) if partial else 0.0
    run_log = open_log(args, device, found, start_epoch, share)
    run = Run(run_log, args.seed, partial, save if saves else None, args.save_ckpt_steps, interrupts, lock)
    begun, rates = time.perf_counter(), []
    for epoch in range(start_epoch, args.epochs):
        stats = train_one_epoch(wrapped, loader, optimizer, amp, schedule, run, epoch)
        rates.append(stats.pop("images_per_second"))
        last = epoch + 1 == args.epochs
        record = {f"train_{k}": v for k, v in stats.items()}
        if labelled and ((epoch + 1) % args.knn_freq == 0 or last):
            record["test_knn_acc1"] = knn_acc1(model.encoder, labelled, amp)
            run_log.scalars(epoch + 1, **{"test/knn_acc1": record["test_knn_acc1"]})
            log.info("epoch %d: k-NN acc1 %.2f", epoch, record["test_knn_acc1"])
        record |= {"epoch": epoch, "n_parameters": n_parameters}
        run_log.epoch(record)
        if picture_of is not None and ((epoch + 1) % args.picture_freq == 0 or last):
            grid = reconstruction_grid(model, picture_of, amp, *datasets.picture_mean_std(args))
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
    record_end(args.output_dir, time.perf_counter() - begun, record)
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
        lock = checkpoint.OutputLock(args.output_dir)
        with prepared_output_dir(args.output_dir), lock, Interrupts() as interrupts:
            train(args, amp, interrupts, lock)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(
            "Pre-train on the embedded data set:  python main_pretrain.py @recipes/demo_pretrain.args\n"
            "or on your own:  python main_pretrain.py --data_set image_folder --data_path FOLDER --output_dir DIR\n"
            "python main_pretrain.py --help lists all arguments; recipes/ holds the published settings."
        )
    errors.run(lambda: main(get_args_parser().parse_args()))
