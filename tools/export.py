"""Weights for other libraries: a checkpoint of any layout as files of timm, Hugging Face or ONNX.

python tools/export.py --checkpoint output/finetune/checkpoint-best.pth --to timm --output exported/shapes.safetensors
python tools/export.py --checkpoint output/pretrain/checkpoint-799.pth --to hf --output exported/encoder

The model's size is read from the file; of a pre-training checkpoint the encoder is taken. What was written is loaded
again by the library that it is for, and has to give the same outputs on random images.
"""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from models.convnextv2 import ConvNeXtV2, name_of
from tools.probe import add_image_arguments
from tools.targets import TARGETS, Exported, Source, classifier, example
from utils import weights
from utils.args import ArgumentParser, add_bool, not_negative, whole
from utils.errors import UsageError, run_cli
from utils.settings import as_trained, eval_crop

KEYS = {None: weights.MODEL_KEY, True: "model_ema", False: "model|module|state_dict"}  # --ema -> where weights are


def read_source(args) -> tuple[Source, weights.Report]:
    """The model that a checkpoint holds. Raises UsageError where it holds none, or not what the flags ask for."""

    def build(config: weights.BackboneConfig) -> ConvNeXtV2:
        head = config.num_classes
        if args.num_classes not in (None, 0, head):
            has = f"a head of {head} classes" if head else "no head"
            raise UsageError(f"--num_classes {args.num_classes}: {args.checkpoint} has {has}; 0 leaves a head out")
        return classifier(config._replace(num_classes=head if args.num_classes is None else args.num_classes))

    flag = "--ema true:" if args.ema else "--checkpoint"
    found = weights.load_checkpoint(args.checkpoint, build, flag, model_key=KEYS[args.ema])
    if "head.weight" in found.report.missing_keys:
        raise UsageError(f"--checkpoint {args.checkpoint}: its head is more than a linear layer; give --num_classes 0")
    as_trained(args, args.checkpoint, found.content, found.config)
    try:
        normalisation = dict(zip(("mean", "std"), datasets.mean_std(args), strict=True))
    except UsageError:  # more channels than there are conventions for
        normalisation = {}
    classes = found.content.get("classes") or []
    classes = classes if len(classes) == found.model.num_classes else []
    source = Source(found.model, args.input_size, normalisation, eval_crop(args), classes)
    return source, found.report


def check_target(target: str, model: ConvNeXtV2) -> None:
    """Refuse what a target cannot have, before anything is written. Raises UsageError."""
    if target == "timm" and model.stem_stride == 2:
        raise UsageError("--to timm: after a stem of stride 2, as here, timm's models halve once more; hf can have it")
    if target == "onnx":
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
            raise UsageError(f"--to onnx: needs torch 2.7 or newer, this is {torch.__version__}")
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            needs = "pip install onnx onnxscript onnxruntime"
            raise UsageError(f"--to onnx: {error.name} is not installed; {needs}") from error


def output_file(target: str, output: str) -> Path:
    """Where the weights go, in a folder that is there and can be written. Raises UsageError where it cannot."""
    _, name, endings = TARGETS[target]
    path = Path(output)
    if path.suffix in {ending for *_, known in TARGETS.values() for ending in known} - set(endings):
        file_too = f", or a file that ends in {' or '.join(endings)}" if endings else ""
        raise UsageError(f"--output {output}: --to {target} takes a folder{file_too}")
    file = path if path.suffix in endings and not path.is_dir() else path / name
    probe = file.with_name(".writable")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror})") from error
    return file


def verify(source: Source, exported: Exported, tolerance: float) -> str:
    """How far the exported model is from the source on random images, for the table.

    Raises:
        UsageError: farther than the tolerance, a share of the largest value of an output.
    """
    library = exported.library
    try:
        theirs = exported.load()
    except ImportError:
        return f"NOT verified, {library} is not installed: pip install {library}"
    x = example(source, 3)  # not the number of images that a graph was traced with
    expected = [source.model(x), *source.model.forward_stages(x)]
    pairs = list(zip(expected, theirs(x), strict=False))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    result = f"largest absolute difference {difference:.2g} with {library} {sys.modules[library].__version__}"
    allowed = f"{tolerance:g} x the largest output"
    # not >: a difference that is not a number fails too
    if not all((a - b).abs().max() <= tolerance * a.abs().max() for a, b in pairs):
        raise UsageError(f"{exported.files[0]}: {result}, above --tolerance {allowed}; do not use it")
    return f"{result}, below --tolerance {allowed}"


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="the library to write for")
    parser.add_argument("--output", required=True, help="a folder, or (not for hf) a file with the format's ending")
    add_image_arguments(parser)
    ema_help = "take the moving average of the weights (model_ema); where not given: of checkpoint-best-ema.pth"
    add_bool(parser, "--ema", None, ema_help)
    parser.add_argument(
        "--num_classes", type=whole(0), default=None, help="0: no head; where not given, as in the file"
    )
    tolerance_help = "difference that passes, as a share of the largest output"
    parser.add_argument("--tolerance", type=not_negative, default=1e-4, help=tolerance_help)
    return parser


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    torch.manual_seed(0)
    source, report = read_source(args)
    check_target(args.to, source.model)
    file = output_file(args.to, args.output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing: the checks of the input's shape become constants, as they should
        exported = TARGETS[args.to][0](source, file)
        verified = verify(source, exported, args.tolerance)
    model = source.model
    rows = {
        "checkpoint": args.checkpoint,
        **report.rows(),
        "model": f"{name_of(model) or 'of no published size'}: depths {model.depths}, dims {model.dims}, "
        f"stem stride {model.stem_stride}, {f'{model.num_classes} classes' if model.num_classes else 'no head'}",
        "images": f"{source.input_size} px, {model.in_chans} channels, {source.normalisation or 'no mean and std'}",
        "written": ", ".join(map(str, exported.files)),
        "verified": verified,
        "use": f"\n{'':19}".join(exported.recipes),
    }
    for label, text in rows.items():
        print(f"{label:17}  {text}")


if __name__ == "__main__":
    run_cli(main)
