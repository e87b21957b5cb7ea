"""What a frozen encoder knows: k-NN and linear classification by its pooled features.

python tools/probe.py --checkpoint output/demo_pretrain/checkpoint-1.pth --data_set shapes --random_init true
python tools/probe.py --checkpoint base.pth --data_set IMNET --data_path /data/imagenet --method knn --max_images 50000
python tools/probe.py --checkpoint output/demo_pretrain/checkpoint-1.pth --dense true --random_init true

The features are the last stage's on whole images, averaged over positions. The linear classifier is a logistic
regression on standardised features, its L2 penalty picked on a held-out fifth of the training images.
"""

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from engine_finetune import top_k
from models.convnextv2 import Encoder
from tools.dense import dense_probe
from utils import weights
from utils.amp import Amp
from utils.args import (
    RESIZE_MODES,
    ArgumentParser,
    add_bool,
    add_size,
    device,
    finite,
    matching,
    positive,
    prepared_files,
    seed,
    share,
    tell_idle,
    whole,
)
from utils.data.sampling import random_subset
from utils.distributed import pick_device, setup_logging
from utils.errors import UsageError, run_cli
from utils.flags import CROP_HELP, DEVICE_HELP, MODE_HELP, RESIZE_HELP, SEVERAL_HELP
from utils.knn import extract, knn_votes, pooled_features
from utils.report import average_precision, write_file
from utils.settings import as_trained

log = logging.getLogger("fcmae")

PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # the strongest first: each fit starts from the last one
LOGITS = 2**26  # computed at once: 256 MiB


def load_encoder(args) -> Encoder:
    """The encoder of --checkpoint, of any layout; `args` then tell of the images what its training did.

    Raises:
        UsageError: no checkpoint of a whole ConvNeXt V2 encoder, or flags of the images that are impossible for it.
    """
    found = weights.load_checkpoint(args.checkpoint, lambda config: Encoder(**config.encoder()), "--checkpoint")
    as_trained(args, args.checkpoint, found.content, found.config, multi_label=None)  # which the data are, or not
    return found.model.eval()


def add_image_arguments(parser: ArgumentParser) -> None:
    """--checkpoint, and the flags that it completes."""
    parser.add_argument("--checkpoint", required=True, help=".pth, .pt, .bin or .safetensors, in any layout")
    add_size(parser.add_argument, "height and width of the images in pixels; one number: a square; as in training")
    mode_help = f"as in training, else: {MODE_HELP}"
    parser.add_argument("--resize_mode", choices=RESIZE_MODES, default="crop", help=mode_help)
    parser.add_argument("--crop_pct", type=share, default=None, help=f"as in training, else: {CROP_HELP}")
    parser.add_argument("--eval_resize", type=whole(1, 65536), default=None, help=RESIZE_HELP)
    for name, kind in (("--mean", finite), ("--std", positive)):
        normalised = "of each channel; where not given: as in training, else ImageNet's"
        parser.add_argument(name, type=kind, nargs="+", default=None, help=normalised)
    parser.add_argument("--nodata", type=finite, default=None, help="value of pixels without data; as in training")


def add_device_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="auto", help=DEVICE_HELP)
    add_bool(parser, "--use_amp", None, "mixed precision; where not given: on cuda")


def pick_amp(args) -> Amp:
    """What `add_device_arguments` asks for."""
    return Amp(pick_device(args.device), args.use_amp, torch.bfloat16)


def percentages(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """top-1 and top-5 of scores (N, classes) and labels (N,); mAP of several labels an image, (N, classes)."""
    if labels.dim() == 2:
        return {"mAP": 100 * float(average_precision(labels > 0, scores).mean())}
    return {f"top-{k}": float(top_k(scores, labels, k)) for k in (1, 5)}


def fit_linear(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float, start: list | None = None
) -> list[torch.Tensor]:
    """Logistic regression by L-BFGS: (N, D), (N,) -> weight (num_classes, D) and bias (num_classes,).

    They minimise mean cross entropy + penalty / 2 * |weight|^2, which is convex, in at most 200 steps from `start`; a
    weak penalty may be stopped short. Labels (N, num_classes), several an image: the sum of binary cross entropies.
    """
    start = start or [features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)]
    weight, bias = parameters = [x.clone().requires_grad_() for x in start]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )
    rows = max(1, LOGITS // num_classes)
    entropy = F.binary_cross_entropy_with_logits if labels.dim() == 2 else F.cross_entropy

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = penalty / 2 * weight.square().sum()
        total.backward()
        for x, y in zip(features.split(rows), labels.split(rows), strict=True):
            loss = entropy(F.linear(x, weight, bias), y, reduction="sum") / len(features)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    return [x.detach() for x in parameters]


def linear_scores(
    features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Logits (Q, num_classes) of a linear classifier trained on (N, D), (N,); says which penalty it picked."""
    deviation, mean = torch.std_mean(features, dim=0)
    deviation[deviation == 0] = 1.0
    features, queries = (features - mean) / deviation, (queries - mean) / deviation
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    path, found = [], None
    for penalty in PENALTIES:
        found = fit_linear(features[kept], labels[kept], num_classes, penalty, found)
        score = next(iter(percentages(F.linear(features[held_out], *found), labels[held_out]).values()))
        path.append((score, penalty, found))
    score, penalty, found = max(path, key=lambda entry: entry[0])
    log.info("linear: L2 penalty %g of %s, %.2f on held-out training images", penalty, PENALTIES, score)
    return F.linear(queries, *fit_linear(features, labels, num_classes, penalty, found))


def probe(encoder: Encoder, loaders: tuple[DataLoader, DataLoader], methods: dict[str, Callable], amp: Amp) -> dict:
    """Per method its percentages, with chance, and seconds; under "images" what was read: (training, test, classes)."""
    begun = time.perf_counter()
    encode = partial(pooled_features, encoder.to(amp.device))
    (features, labels), (queries, truth) = (extract(encode, loader, encoder.dims[-1], amp) for loader in loaders)
    if len(labels) < 5 or not len(truth):
        raise UsageError(f"{len(labels)} training and {len(truth)} test images could be read: too few to probe with")
    log.info("features of %d images in %.1f s", len(labels) + len(truth), time.perf_counter() - begun)
    counts = labels.sum(0) if labels.dim() == 2 else labels.bincount()
    chance = next(iter(percentages(counts.expand(len(truth), -1), truth).values()))  # all images scored alike
    results = {"images": (len(labels), len(truth), len(counts))}
    for name, method in methods.items():
        begun = time.perf_counter()
        found = percentages(method(features, labels, queries, len(counts)), truth)
        results[name] = (found | {"chance": chance}, time.perf_counter() - begun)
    return results


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_image_arguments(parser)
    parser.add_argument("--method", choices=("knn", "linear", "both"), default="both", help="classifier to use")
    parser.add_argument("--k", type=whole(1), default=20, help="nearest training images that vote")
    parser.add_argument("--temperature", type=positive, default=0.07, help="of the votes' weights")
    add_bool(parser, "--random_init", False, "compare with random weights of the same shapes")
    parser.add_argument("--max_images", type=whole(10), default=None, help="of each split so many, picked at random")
    parser.add_argument("--data_set", default="shapes", help=datasets.DATA_SETS_HELP)
    parser.add_argument("--data_path", default=None, help="folder of the training data")
    parser.add_argument(
        "--eval_data_path", default=None, help="class folders of test images; without, image_folder holds a fifth out"
    )
    for name, of in (("--train_list", "--data_path"), ("--eval_list", "--eval_data_path if given")):
        parser.add_argument(name, default=None, help=f"file with a line per image: its path below {of}, and its label")
    parser.add_argument("--nb_classes", type=whole(1), default=None, help="number of classes, if not told")
    add_bool(parser, "--multi_label", False, SEVERAL_HELP)
    parser.add_argument("--batch_size", type=whole(1), default=64, help="images per forward pass")
    parser.add_argument("--num_workers", type=whole(0, 1024), default=10, help="loader processes")
    add_bool(parser, "--pin_mem", True, "page-locked host memory for faster copies to the GPU")
    add_device_arguments(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the random weights")
    add_bool(parser, "--dense", False, "label pixels, not images, by a 1x1 convolution on all stages")
    for name, of in (("--masks", "--data_path"), ("--eval_masks", "--eval_data_path")):
        masks_help = f"for --dense: a PNG for each image below {of}, of the same name: classes, 255 is ignored"
        parser.add_argument(name, default=None, help=masks_help)
    parser.add_argument("--epochs", type=whole(1), default=10, help="for --dense: passes over the training images")
    png = matching(r"(?s).+\.png", "a file that ends in .png")
    picture_help = "for --dense: where test images, masks and predictions are drawn"
    parser.add_argument("--picture", type=png, default="output/dense.png", metavar="FILE.png", help=picture_help)
    return parser


def main(args) -> None:
    setup_logging()
    idle = ("masks eval_masks epochs picture", not args.dense, "without --dense")
    read_whole = "method k temperature resize_mode crop_pct eval_resize nb_classes multi_label train_list eval_list"
    drawn = ("data_path eval_data_path masks eval_masks", args.data_set == "shapes", "with --data_set shapes")
    rows = [idle, (f"{read_whole} batch_size num_workers pin_mem", args.dense, "with --dense"), drawn]
    tell_idle(args, rows)
    encoder, amp = load_encoder(args), pick_amp(args)
    fresh = None
    if args.random_init:
        torch.manual_seed(args.seed)
        fresh = Encoder(encoder.in_chans, encoder.depths, encoder.dims, stem_stride=encoder.stem_stride).eval()
    if args.dense:
        with prepared_files(args, ["picture"], ["checkpoint"]):
            rows, drawn = dense_probe({"IoU": encoder} | ({"random weights": fresh} if fresh else {}), args, amp)
            write_file(args.picture, partial(save_image, drawn, format="png"))
        print_table(rows)
        return
    splits = (random_subset(x, args.max_images) for x in datasets.labelled_splits(args))
    loaders = tuple(datasets.build_eval_loader(split, args, spread=False) for split in splits)
    methods = {"knn": partial(knn_votes, k=args.k, temperature=args.temperature), "linear": linear_scores}
    methods = {name: method for name, method in methods.items() if args.method in (name, "both")}
    results = probe(encoder, loaders, methods, amp)
    baseline = probe(fresh, loaders, methods, amp) if fresh else {}
    train, test, num_classes = results.pop("images")
    print(
        f"{args.checkpoint}: depths {encoder.depths}, dims {encoder.dims}, {args.input_size} px; "
        f"{train} training and {test} test images of {num_classes} classes"
    )
    rows = []
    for name, (found, seconds) in results.items():
        found |= {"random weights": next(iter(baseline[name][0].values()))} if baseline else {}
        rows = rows or [["method", *found, "seconds"], ["---"] * (len(found) + 2)]
        rows.append([name, *(f"{x:.2f}" for x in found.values()), f"{seconds:.1f}"])
    print_table(rows)


def print_table(rows: list[list[str]]) -> None:
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    run_cli(lambda: main(get_args_parser().parse_args()))
