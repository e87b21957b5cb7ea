"""Pictures of what an encoder has learnt: reconstructions, feature maps, and how much its channels differ.

python tools/visualize.py --checkpoint output/pretrain/checkpoint-799.pth --reconstructions --mask_ratios 0.4 0.6 0.75
python tools/visualize.py --checkpoint finetuned.pth --features --diversity --images photos/

--reconstructions: a row per image and seed: the image, then for each mask ratio the visible part and the prediction
pasted into it. --features: a row per image: the image, then the first three principal components of each stage as red,
green and blue, the same of all images. --diversity: the paper's feature cosine distance (section 3, figure 4) of each
layer.
"""

import contextlib
import importlib.util
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from models.convnextv2 import Block, Encoder, total_stride
from models.fcmae import FCMAE, num_patches, num_visible
from tools import plot
from tools.probe import add_device_arguments, add_image_arguments, load_encoder, pick_amp
from utils import weights
from utils.amp import Amp
from utils.args import ArgumentParser, add_bool, fraction, prepared_output_dir, seed, whole
from utils.data.files import ImageTree
from utils.data.images import BadImage, Reading, decode, read_file
from utils.data.sampling import shuffled_indices
from utils.data.shapes import Shapes
from utils.distributed import setup_logging
from utils.errors import UsageError, refuse, run_cli
from utils.pictures import reconstructions, shown, tile

PICTURES = ("reconstructions", "features", "diversity")


def load_images(args) -> torch.Tensor:
    """The images as in evaluation: (N, C, height, width). Raises UsageError for a file that is no image."""
    transform, paths, imgs = datasets.build_transform(False, args), [], []
    if not args.images:
        dataset = Shapes("val", max(args.input_size), num_samples=args.max_images)
        return torch.stack([transform(dataset[i][0]) for i in range(len(dataset))])
    for path in args.images:
        refuse(not Path(path).exists(), f"--images {path}: no such file or folder")
        found = ImageTree(path, "--images", args.in_chans).paths if Path(path).is_dir() else [path]
        # some from anywhere in a folder: the first may all be of one class
        paths += [found[i] for i in sorted(shuffled_indices(found)[: args.max_images].tolist())]
    for path in paths[: args.max_images]:
        try:
            image = decode(read_file(path), path, Reading(args.in_chans, args.depth, nodata=args.nodata))
        except BadImage as error:
            raise UsageError(f"--images {error}") from error
        deep = image.dtype != torch.uint8 and not args.mean
        refuse(deep, f"--images {path}: not of 8 bits, which needs --mean and --std")
        imgs.append(transform(image))
    return torch.stack(imgs)


def load_fcmae(path: str, norm_pix_loss: bool) -> FCMAE:
    """The autoencoder of a pre-training checkpoint. Raises UsageError where the file holds no whole decoder."""

    def build(config: weights.BackboneConfig) -> FCMAE:
        needed = f"--reconstructions: needs a pre-training checkpoint, {path} holds no decoder"
        refuse(not config.decoder, needed)
        sizes = {"in_chans": config.in_chans, "depths": config.depths, "dims": config.dims, **config.decoder}
        return FCMAE(**sizes, norm_pix_loss=norm_pix_loss, patch_size=total_stride(config.stem_stride))

    return weights.load_checkpoint(path, build, "--checkpoint", whole=True).model.eval()


def reconstruction_rows(
    model: FCMAE, imgs: torch.Tensor, amp: Amp, mean, std, mask_ratios: list[float], seeds: list[int]
) -> torch.Tensor:
    """A row per image and seed: the image, then for each ratio visible part and prediction: (3, height, width)."""
    rows = []
    for number in seeds:
        triples = [reconstructions(model, imgs, amp, mean, std, ratio, number) for ratio in mask_ratios]
        rows.append(torch.cat([triples[0][:, :1], *(triple[:, 1:] for triple in triples)], dim=1))
    rows = torch.stack(rows, dim=1)  # (N, seeds, 1 + 2 * ratios, C, H, W)
    return tile(rows.flatten(0, 2), rows.shape[2])


def principal_colours(maps: torch.Tensor) -> torch.Tensor:
    """The first three principal components of all positions' features, as colours: (N, C, H, W) -> (N, 3, H, W).

    Each component runs from 0 to 1 between its 1st and 99th percentile. Its sign, which is arbitrary, is chosen so that
    the channel with the largest share counts as positive.
    """
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).cpu().double()  # (N * H * W, C)
    rows -= rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # in ascending order
    vectors = vectors[:, -3:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    components = rows @ (vectors * largest.sign())
    ranked = components.sort(dim=0).values
    low, high = (ranked[round(share * (len(ranked) - 1))] for share in (0.01, 0.99))
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(len(maps), *maps.shape[2:], 3).permute(0, 3, 1, 2).float()


@torch.no_grad()
def feature_rows(encoder: Encoder, imgs: torch.Tensor, amp: Amp, mean, std) -> torch.Tensor:
    """A row per image: the image, then the principal colours of its four stages: (3, height, width)."""
    with amp.autocast():
        stages = encoder.forward_stages(imgs.to(amp.device))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    columns = [(imgs * std + mean).clamp(0, 1)[:, : shown(imgs)].expand(-1, 3, -1, -1)]
    columns += [F.interpolate(principal_colours(stage), imgs.shape[-2:], mode="nearest") for stage in stages]
    return tile(torch.stack(columns, dim=1).flatten(0, 1), len(columns))


def cosine_distance(x: torch.Tensor) -> torch.Tensor:
    """Mean cosine distance of all pairs of channels, per image: (N, H, W, C) -> (N,), from 0 (all alike) to 1.

    As in the paper, (1 - cos) / 2 over all C * C pairs. The cosines of all pairs add up to the squared norm of the sum
    of the channels' unit vectors, so no C x C matrix is needed. A channel that is zero has the cosine 0 to every other.
    """
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=(1, 2))  # (N, C)
    total = torch.einsum("nhwc,nc->nhw", x, torch.where(norm > 0, 1 / norm, 0.0))
    return (1 - total.square().sum(dim=(1, 2)) / x.shape[-1] ** 2) / 2


@torch.no_grad()
def feature_diversity(encoder: Encoder, imgs: torch.Tensor, amp: Amp, batch_size: int = 16) -> list[tuple]:
    """Per block: its name, and the mean cosine distance of its expanded features before and after GRN."""
    layers = {name: (block.act, block.grn) for name, block in encoder.named_modules() if isinstance(block, Block)}
    sums = Counter()

    def add(layer, _inputs, output) -> None:
        sums[layer] += float(cosine_distance(output).sum())

    with contextlib.ExitStack() as hooks:
        for layer in chain.from_iterable(layers.values()):
            hooks.enter_context(layer.register_forward_hook(add))
        for batch in imgs.split(batch_size):
            with amp.autocast():
                encoder.forward_stages(batch.to(amp.device))
    return [(name, *(sums[layer] / len(imgs) for layer in pair)) for name, pair in layers.items()]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.set_defaults(norm_pix_loss=True, depth=None)
    add = parser.add_argument
    add_image_arguments(parser)
    add_bool(parser, "--reconstructions", False, "write reconstructions.png; of a pre-training checkpoint")
    add_bool(parser, "--features", False, "write features.png")
    add_bool(parser, "--diversity", False, "write diversity.png and print its numbers; needs matplotlib")
    add("--images", nargs="+", default=None, help="image files or folders; without, drawn shapes")
    add("--max_images", type=whole(1), default=8, help="at most so many, from anywhere in a folder")
    add("--mask_ratios", type=fraction, nargs="+", default=[0.4, 0.6, 0.75], help="of reconstructions")
    add("--seeds", type=seed, nargs="+", default=[0], help="of the masks; each has rows of its own")
    add("--output_dir", default="output/pictures", help="folder for the pictures")
    add_device_arguments(parser)
    return parser


def check_reconstructions(args, patch_size: int) -> None:
    """Refuse sizes and mask ratios that leave no whole, or no removed, patches. Raises UsageError."""
    multiple = f"--input_size {args.input_size}: must be a multiple of the model's patch size {patch_size}"
    refuse(any(side % patch_size for side in args.input_size), multiple)
    for ratio in args.mask_ratios:
        try:
            num_visible(num_patches(args.input_size, patch_size), ratio)
        except ValueError as error:
            raise UsageError(f"--mask_ratios {ratio}: {error}") from error


def main(args) -> None:
    setup_logging()
    written = {name: Path(args.output_dir, f"{name}.png") for name in PICTURES if getattr(args, name)}
    refuse(not written, "nothing to draw: give --reconstructions, --features or --diversity, or several of them")
    missing = args.diversity and importlib.util.find_spec("matplotlib") is None  # before anything is written
    refuse(missing, "--diversity: draws with matplotlib, which is missing: pip install matplotlib")
    encoder = load_encoder(args)
    if args.reconstructions:
        check_reconstructions(args, encoder.patch_size)
    amp, imgs = pick_amp(args), load_images(args)
    # bytes are drawn as they are; of other numbers nothing else tells how large they become
    mean, std = (datasets.picture_mean_std if args.depth in (16, 32) else datasets.mean_std)(args)
    with prepared_output_dir(args.output_dir):
        if args.reconstructions:
            model = load_fcmae(args.checkpoint, args.norm_pix_loss).to(amp.device)
            rows = reconstruction_rows(model, imgs, amp, mean, std, args.mask_ratios, args.seeds)
            save_image(rows, written["reconstructions"])
        encoder.to(amp.device)
        if args.features:
            save_image(feature_rows(encoder, imgs, amp, mean, std), written["features"])
        if args.diversity:
            rows = feature_diversity(encoder, imgs, amp)
            _, *columns = zip(*rows, strict=True)
            lines = {f"{when} GRN": list(enumerate(x, 1)) for when, x in zip(("before", "after"), columns, strict=True)}
            title = f"cosine distance of channels\n{Path(args.checkpoint).name}, {len(imgs)} images"
            plot.draw({title: lines}, "layer").savefig(written["diversity"], dpi=150)
            print("| layer | block | before GRN | after GRN |\n|---|---|---|---|")
            for layer, (name, before, after) in enumerate(rows, start=1):
                print(f"| {layer} | {name} | {before:.4f} | {after:.4f} |")
        print("written:", *written.values())


if __name__ == "__main__":
    run_cli(lambda: main(get_args_parser().parse_args()))
