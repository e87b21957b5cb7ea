"""What a classifier says of each image: a row of classes and probabilities, features, a picture.

python tools/predict.py --checkpoint output/finetune/checkpoint-best.pth --images photos/ --output answers.csv
python tools/predict.py --checkpoint base.pth --images shard.tar --embeddings features.npy --grid uncertain.png
torchrun --nproc_per_node=8 tools/predict.py --checkpoint base.pth --images list.txt --data_path /data --json

Names of the classes, size, crop and normalisation of the images are those of the checkpoint. An image that cannot be
read is told, counted and left out.
"""

import json
import logging
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from engine_finetune import classify
from models.convnextv2 import ConvNeXtV2, Encoder
from tools.probe import add_device_arguments, add_image_arguments
from utils import distributed, weights
from utils.amp import Amp
from utils.args import ArgumentParser, add_bool, matching, prepared_files, whole
from utils.data.files import ImageFiles, ImageList, ImageTree
from utils.data.images import EXTENSIONS, Reading, Unreadable
from utils.data.tars import TARS, open_tar, tar_shards
from utils.errors import refuse, run_cli
from utils.knn import pooled_features
from utils.metrics import Progress
from utils.pictures import captioned, shortened
from utils.report import as_csv, gathered, write_file
from utils.settings import as_trained

log = logging.getLogger("fcmae")


def load(args) -> tuple[nn.Module, list[str]]:
    """The model of --checkpoint, an encoder where that has no head, and its classes; `args` then are as in training."""

    def build(config: weights.BackboneConfig) -> nn.Module:
        sizes = config.encoder()
        return ConvNeXtV2(**sizes, num_classes=config.num_classes) if config.num_classes else Encoder(**sizes)

    found = weights.load_checkpoint(args.checkpoint, build, "--checkpoint", whole=True)
    as_trained(args, args.checkpoint, found.content, found.config)
    count = found.config.num_classes
    asks_classes = not count and (args.grid or not args.embeddings)
    needs = "without a classifier's head, which gives --embeddings alone; fine-tune it for classes"
    refuse(asks_classes, f"--checkpoint {args.checkpoint}: an encoder {needs}")
    classes = list(map(str, found.content.get("classes") or range(count)))
    return found.model.eval(), classes


def open_images(args) -> ImageFiles:
    """The images of --images, with the transform of evaluation. Raises UsageError where there are none."""
    path, flag = args.images, "--images"
    refuse(not (os.path.exists(path) or tar_shards(path)), f"{flag} {path}: no such file, and no folder or tars either")
    if os.path.isfile(path) and path.lower().endswith(EXTENSIONS):
        dataset = ImageFiles([path], [0], args.in_chans, f"{flag} {path}", Counter())
    elif os.path.isfile(path) and not path.lower().endswith(TARS):
        dataset = ImageList(path, flag, args.data_path or os.path.dirname(path), in_chans=args.in_chans)
    elif tar_shards(path):
        dataset = open_tar(path, flag, args.in_chans, labelled=False)
    else:
        dataset = ImageTree(path, flag, args.in_chans)
    try:
        datasets.detect_bit_depth(dataset, args)
    except Unreadable as error:  # each is told then
        log.warning("%s", error)
        depth = args.depth or (32 if args.mean else 8)
        dataset.reading = Reading(args.in_chans, depth, nodata=args.nodata)
    dataset.transform = datasets.build_transform(False, args)
    return dataset


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader, amp: Amp, top_k: int, several: bool = False, patches: bool = False
) -> tuple[torch.Tensor, ...]:
    """Of all readable images, in their order: numbers (N,), features (N, D), top classes and probabilities (N, k).

    All processes call it together; the last two have no columns without a head. several: classes are independent.
    Then how certain the least certain class is, or else the first (N, 1), and with `patches` the last stage's features
    at each position (N, D, h, w).
    """
    model.to(amp.device)
    maps: list[torch.Tensor] = []  # (B, h, w, D)
    if patches:
        model.stages[-1].register_forward_hook(lambda *call: maps.append(call[-1]))
    rows, progress = [], Progress("predict", len(loader), amp.device)
    for step, (imgs, _) in progress(loader):
        imgs = imgs.to(amp.device, non_blocking=True)
        if isinstance(model, ConvNeXtV2):
            features, logits = classify(model, imgs, amp)
        else:
            with amp.autocast():
                features, logits = pooled_features(model, imgs), imgs.new_empty(len(imgs), 0)
        highest = logits.topk(min(top_k, logits.shape[1]), dim=1).indices
        shares = logits.sigmoid() if several else logits.softmax(1)
        certain = (
            ((shares - 0.5).abs() if several else shares).topk(min(1, logits.shape[1]), largest=not several).values
        )
        positions = [maps.pop().permute(0, 3, 1, 2).float()] if patches else []
        rows.append([x.cpu() for x in (features, highest, shares.gather(1, highest), certain, *positions)])
        progress.samples += len(imgs)
        if progress.due(step):
            progress.line(step)
    mine = [torch.tensor(loader.read), *map(torch.cat, zip(*rows, strict=True))] if rows else []
    return gathered(mine) or (torch.empty(0, dtype=torch.int64), *(torch.empty(0, 0) for _ in range(4)))


def table(paths: list[str], names: list[list[str]], shares: list[list[float]], as_json: bool) -> bytes:
    """A CSV with a header, or JSON lines: of each image its path, then classes and probabilities, likeliest first."""
    images = list(zip(paths, names, shares, strict=True))
    if as_json:
        return "".join(json.dumps({"path": p, "classes": n, "probabilities": s}) + "\n" for p, n, s in images).encode()
    count = len(names[0]) if names else 0
    rows = [["path", *(f"{what}{i + 1}" for i in range(count) for what in ("class", "probability"))]]
    for path, *pairs in images:
        rows.append([path, *(text for name, share in zip(*pairs, strict=True) for text in (name, f"{share:.6f}"))])
    return as_csv(rows)


def least_certain(dataset: Dataset, columns: tuple[torch.Tensor, ...], classes: list[str], args):
    """A picture of at most --grid_images images with their names and probabilities, the least certain first."""
    indices, _, top, probabilities, certain = columns[:5]
    first = certain[:, 0].argsort(stable=True)[: args.grid_images].tolist()
    pictures = torch.stack([dataset[i][0] for i in indices[first].tolist()])
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in datasets.picture_mean_std(args))
    captions = []
    for row in first:
        pairs = zip(top[row, :2].tolist(), probabilities[row, :2].tolist(), strict=True)
        captions.append([f"{100 * share:.1f} % {shortened(classes[i], i, 16)}" for i, share in pairs])
    return captioned((pictures * std + mean).clamp(0, 1), captions)


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_image_arguments(parser)
    images_help = "folder, however nested, .tar shards, a glob of them, list with a path per line, or an image"
    parser.add_argument("--images", required=True, help=images_help)
    parser.add_argument("--data_path", default=None, help="folder that paths of a list are below, if not its own")
    parser.add_argument("--output", default=None, help="file to write; predictions.csv or .jsonl where not given")
    add_bool(parser, "--json", False, "write JSON lines instead of a CSV")
    parser.add_argument("--top_k", type=whole(1), default=5, help="classes per image, the likeliest first")
    tables = matching(r"(?s).+\.(npy|safetensors)", "a file that ends in .npy or .safetensors")
    features_help = "write pooled features: .npy, and FILE.npy.paths.json beside it; or .safetensors with the paths"
    parser.add_argument("--embeddings", type=tables, default=None, metavar="FILE", help=features_help)
    patches_help = "write the last stage's (images, channels, height, width), too; needs --embeddings FILE.safetensors"
    add_bool(parser, "--patch_features", False, patches_help)
    png = matching(r"(?s).+\.png", "a file that ends in .png")
    grid_help = "draw images with their names and probabilities, the least certain first"
    parser.add_argument("--grid", type=png, default=None, metavar="FILE.png", help=grid_help)
    parser.add_argument("--grid_images", type=whole(1, 10000), default=64, help="at most so many are drawn")
    parser.add_argument("--batch_size", type=whole(1), default=64, help="images per process and forward pass")
    parser.add_argument("--num_workers", type=whole(0, 1024), default=10, help="loader processes")
    add_bool(parser, "--pin_mem", True, "page-locked host memory for faster copies to the GPU")
    add_device_arguments(parser)
    launched = {"world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://", "dist_timeout": None}
    parser.set_defaults(data_set="image_folder", depth=None, multi_label=False, **launched)
    return parser


def write_all(args, dataset: ImageFiles, classes: list[str], columns: tuple[torch.Tensor, ...]) -> None:
    """The files that were asked for. Raises UsageError for one that cannot be written."""
    indices, features, top, probabilities, _, *patches = columns
    paths = [dataset.paths[i] for i in indices.tolist()]
    names = [[classes[i] for i in row] for row in top.tolist()]
    content = table(paths, names, probabilities.tolist(), args.json)
    write_file(args.output, lambda file: file.write(content))
    if args.embeddings and args.embeddings.endswith(".npy"):
        write_file(args.embeddings, lambda file: np.save(file, features.numpy()))
        write_file(f"{args.embeddings}.paths.json", lambda file: file.write(json.dumps(paths).encode()))
    elif args.embeddings:
        found = {name: x.contiguous() for name, x in zip(("features", "patches"), (features, *patches), strict=False)}
        packed = safetensors.torch.save(found, {"paths": json.dumps(paths)})
        write_file(args.embeddings, lambda file: file.write(packed))
    if args.grid and paths:
        picture = least_certain(dataset, columns, classes, args)
        write_file(args.grid, partial(picture.save, format="png"))


def main(args) -> None:
    args.output = args.output or ("predictions.jsonl" if args.json else "predictions.csv")
    packs = (args.embeddings or "").endswith(".safetensors")
    refuse(args.patch_features and not packs, "--patch_features true: needs --embeddings FILE.safetensors")
    with distributed.process_group(args) as device:
        model, classes = load(args)
        dataset = open_images(args)
        loader = datasets.build_eval_loader(dataset, args, spread=True)
        loader.bad.fate = "left out"
        with prepared_files(args, ["output", "embeddings", "grid"], ["checkpoint", "images"]):
            amp, several = Amp(device, args.use_amp, torch.bfloat16), args.multi_label
            columns = predict(model, loader, amp, args.top_k, several, args.patch_features)
            bad = sum(distributed.gather(len(loader.bad)))
            if distributed.is_main_process():
                write_all(args, dataset, classes, columns)
        log.info("%d images", len(columns[0]))
        if bad and distributed.is_main_process():
            log.warning("%d of %d images are unreadable and left out, see above", bad, len(dataset))


if __name__ == "__main__":
    run_cli(lambda: main(get_args_parser().parse_args()))
