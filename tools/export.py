"""Weights for other libraries: a checkpoint of any layout as files of timm, Hugging Face or ONNX.

python tools/export.py --checkpoint output/finetune/checkpoint-best.pth --to timm --output exported/shapes.safetensors
python tools/export.py --checkpoint output/pretrain/checkpoint-799.pth --to hf --output exported/encoder
python tools/export.py --checkpoint output/finetune/checkpoint-best.pth --to onnx --output exported --check_on /data/val

The model's size is read from the file; of a pre-training checkpoint the encoder is taken. What was written is loaded
again by the library that it is for, and has to give the same outputs on random images.
"""

import importlib.util
import sys
import warnings
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from engine_finetune import evaluate
from models.convnextv2 import ConvNeXtV2, name_of
from tools.probe import add_image_arguments
from tools.targets import TARGETS, Client, Exported, Source, classifier, example
from utils import weights
from utils.amp import Amp
from utils.args import ArgumentParser, add_bool, not_negative, whole
from utils.data.sampling import path_of
from utils.errors import UsageError, refuse, run_cli
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
    depth = getattr(args, "depth", None) or 8
    crop = eval_crop(args)
    resized = args.resize_mode if crop else "squash", crop or 1.0
    source = Source(found.model, args.input_size, normalisation, *resized, classes, depth, args.multi_label)
    return source, found.report


def check_target(args, source: Source) -> None:
    """Refuse what a target cannot have, before anything is written. Raises UsageError."""
    target, library, model = args.to, TARGETS[args.to][1], source.model
    padding = "timm" if source.mode else "onnx"  # timm's transforms pad no tensors
    pads = f"it cannot pad as these images were; give --resize_mode squash and pad them before, or take {padding}"
    refuse(source.resize_mode == "pad" and target not in (padding, "onnx", "safetensors"), f"--to {target}: {pads}")
    halves = "after a stem of stride 2, as here, timm's models halve once more; hf can have it"
    refuse(target == "timm" and model.stem_stride == 2, f"--to timm: {halves}")
    old = target == "onnx" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    refuse(old, f"--to onnx: needs torch 2.7 or newer, this is {torch.__version__}")
    untold = args.check_on and target == "safetensors"
    refuse(untold, "--check_on: a file of --to safetensors does not tell how images are prepared")
    headless = args.check_on and not model.num_classes
    refuse(headless, f"--check_on: needs a classifier's head, which {args.checkpoint} has not")
    several = f"--check_on: is for one label an image; {args.checkpoint} was trained with --multi_label true"
    refuse(args.check_on and args.multi_label, several)
    needed = ["onnx", "onnxscript"] if target == "onnx" else []
    for name in [*needed, library] if args.check_on else needed:
        missing = f"{name} is not installed; pip install {' '.join([*needed, library])}"
        refuse(importlib.util.find_spec(name) is None, f"--to {target}: {missing}")
    if args.check_on and target == "hf" and not source.mode:
        old = int(version(library).split(".")[0]) < 5
        refuse(old, f"--check_on: such images need transformers 5, this is {version(library)}")


def output_file(target: str, output: str) -> Path:
    """Where the weights go, in a folder that is there and can be written. Raises UsageError where it cannot."""
    *_, name, endings = TARGETS[target]
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


def verify(source: Source, exported: Exported, args) -> str:
    """How far the exported model is from the source on random images. Raises UsageError where above --tolerance."""
    library, tolerance = TARGETS[args.to][1], args.tolerance
    try:
        client = exported.load()
    except ImportError:
        return f"NOT verified, {library} is not installed: pip install {library}"
    x = example(source, 3)  # not the number of images that a graph was traced with
    maps = zip(source.model.forward_stages(x), client.stages(x), strict=False)
    pairs = [(source.model(x), client.forward(x)), *maps]
    difference = max((a - b).abs().max().item() for a, b in pairs)
    result = f"largest absolute difference {difference:.2g} with {library} {sys.modules[library].__version__}"
    allowed = f"{tolerance:g} x the largest output"
    # not >: a difference that is not a number fails too
    if not all((a - b).abs().max() <= tolerance * a.abs().max() for a, b in pairs):
        raise UsageError(f"{exported.files[0]}: {result}, above --tolerance {allowed}; do not use it")
    return f"{result}, below --tolerance {allowed}"


def labelled_images(source: Source, args) -> Dataset | None:
    """The images of --check_on as `--eval true` reads them. Raises UsageError where there are none."""
    if not args.check_on:
        return None
    flags = dict.fromkeys(("data_path", "train_list", "eval_list"))
    flags |= {"data_set": "image_folder", "eval_data_path": args.check_on, "nb_classes": source.model.num_classes}
    vars(args).update(flags, batch_size=32, num_workers=0, pin_mem=False)
    try:
        return datasets.build_dataset(False, args, source.classes or None)[0]
    except UsageError as error:
        raise UsageError(str(error).replace("--eval_data_path", "--check_on")) from error


def predict(client: Client, files: Dataset, index: int) -> int:
    """The class that an exported model gives an image; -1: Pillow, by which its library opens it, cannot."""
    try:
        image = Image.open(BytesIO(files.read(index))).convert(client.mode) if client.mode else files[index][0]
    except Exception:  # Pillow's decoders raise whatever they run into
        return -1
    return int(client.forward(client.prepare(image)[None]).argmax())


def check(source: Source, exported: Exported, files: Dataset, args) -> list[str]:
    """What `--eval true` and the exported model make of labelled images: lines for the table."""
    loader, found = datasets.build_eval_loader(files, args, spread=False), []
    amp = Amp(torch.device("cpu"), False, torch.bfloat16)
    evaluate(source.model, loader, amp, report=lambda answers, stats: found.append(answers))
    (answers,), client, files.transform = found, exported.load(), None
    theirs = torch.tensor([predict(client, files, i) for i in answers.indices])
    differ = (theirs != answers.predictions).nonzero()[:, 0].tolist()
    shares = []
    for by, classes in (("--eval true", answers.predictions), (TARGETS[args.to][1], theirs)):
        right = int((classes == answers.labels).sum())
        shares.append(f"{right} right by {by} ({100 * right / len(theirs):.2f} %)")
    same = f"{len(differ)} get another class" if differ else "each gets the same class"
    lines = [f"{len(theirs)} images of {args.check_on}: {', '.join(shares)}; {same}"]
    names = [*files.classes, "nothing, as Pillow cannot open it"]
    for k in differ[:10]:
        path = path_of(files, answers.indices[k])
        lines.append(f"{path}: {names[answers.predictions[k]]}, exported {names[theirs[k]]}")
    return lines


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="the library to write for")
    parser.add_argument("--output", required=True, help="a folder, or (not for hf) a file with the format's ending")
    add_image_arguments(parser)
    ema_help = "take the moving average of the weights (model_ema); where not given: of checkpoint-best-ema.pth"
    add_bool(parser, "--ema", None, ema_help)
    head_help = "0: no head; where not given, as in the file"
    parser.add_argument("--num_classes", type=whole(0), default=None, help=head_help)
    check_help = "labelled images (class folders, a list, tars) for the exported file to classify, beside --eval true"
    parser.add_argument("--check_on", default="", metavar="FOLDER", help=check_help)
    tolerance_help = "difference that passes, as a share of the largest output"
    parser.add_argument("--tolerance", type=not_negative, default=1e-4, help=tolerance_help)
    parser.set_defaults(multi_label=False)
    return parser


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    torch.manual_seed(0)
    source, report = read_source(args)
    check_target(args, source)
    files = labelled_images(source, args)
    file = output_file(args.to, args.output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing: the checks of the input's shape become constants, as they should
        exported = TARGETS[args.to][0](source, file)
        verified = verify(source, exported, args)
        checked = check(source, exported, files, args) if files else []
    model = source.model
    rows = {
        "checkpoint": args.checkpoint,
        **report.rows(),
        "model": f"{name_of(model) or 'of no published size'}: depths {model.depths}, dims {model.dims}, "
        f"stem stride {model.stem_stride}, {f'{model.num_classes} classes' if model.num_classes else 'no head'}",
        "images": f"{source.input_size} px, {model.in_chans} channels, {source.normalisation or 'no mean and std'}",
        "written": ", ".join(map(str, exported.files)),
        "verified": verified,
        **({"checked": "\n".join(checked)} if checked else {}),
        "use": "\n".join(exported.recipes),
    }
    for label, text in rows.items():
        print(f"{label:17}  {text}".replace("\n", f"\n{'':19}"))


if __name__ == "__main__":
    run_cli(main)
