"""Weights for other libraries: a checkpoint of any layout as files of timm, Hugging Face or ONNX.

python tools/export.py --checkpoint output/finetune/checkpoint-best.pth --to timm --output exported/shapes.safetensors
python tools/export.py --checkpoint output/pretrain/checkpoint-799.pth --to hf --output exported/encoder

The model's size is read from the file; of a pre-training checkpoint the encoder is taken. What was written is loaded
again by the library that it is for, and has to give the same outputs on random images.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from models.convnextv2 import ConvNeXtV2, name_of
from tools.probe import add_image_arguments
from utils import layouts, weights
from utils.args import ArgumentParser, add_bool, not_negative, whole
from utils.errors import UsageError, run_cli
from utils.settings import as_trained, eval_crop

KEYS = {None: weights.MODEL_KEY, True: "model_ema", False: "model|module|state_dict"}  # --ema -> where weights are
OPSET = 18
ONE_FILE = 2**31 - 2**24  # bytes of weights that an ONNX file may hold, with room for its graph

Outputs = list[torch.Tensor]  # logits, without a head the pooled features; then, where there are some, the four maps


class Source(NamedTuple):
    """A model in evaluation mode, and what its checkpoint tells about its images and classes."""

    model: ConvNeXtV2
    input_size: int
    normalisation: dict[str, tuple[float, ...]]  # mean and std, empty where neither file nor convention tells
    crop_pct: float | None  # None: height and width are resized to input_size
    classes: list[str]  # empty where the checkpoint does not name them


class Exported(NamedTuple):
    """What an exporter leaves: files, lines of code that use them, and the model as that code loads it."""

    files: list[Path]
    recipes: list[str]
    library: str  # a package's name
    load: Callable[[], Callable[[torch.Tensor], Outputs]]  # raises ImportError where the library is not there


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


def classifier(config: weights.BackboneConfig) -> ConvNeXtV2:
    return ConvNeXtV2(**config.encoder(), num_classes=config.num_classes).eval()


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


def save_state(state: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".pth":
        torch.save(state, file)
    else:
        save_file({name: v.contiguous() for name, v in state.items()}, file, {"format": "pt"})


def save_json(content: dict, file: Path) -> Path:
    file.write_text(json.dumps(content, indent=2) + "\n")
    return file


# ---- the targets: each writes (source, file) and returns what it left ------------------------------------------------


def write_safetensors(source: Source, file: Path) -> Exported:
    """This project's names and nothing beside them."""
    save_state(source.model.state_dict(), file)

    def load():
        ours = weights.load_checkpoint(file, classifier, whole=True).model
        return lambda x: [ours(x)]

    return Exported([file], [f"safetensors.torch.load_file({str(file)!r})"], "safetensors", load)


def write_timm(source: Source, file: Path) -> Exported:
    """timm's names, and beside them the JSON that timm reads a model from (config.json in a folder)."""
    model, side = source.model, source.input_size
    save_state(layouts.to_timm(model.state_dict()), file)
    name, model_args = name_of(model), {}
    if name is None:  # any size can be built from one that has the same kind of linears
        name = "convnextv2_atto" if layouts.timm_has_conv_mlp(model.dims[0]) else "convnextv2_tiny"
        model_args |= {"depths": model.depths, "dims": model.dims}
    if model.in_chans != 3:
        model_args["in_chans"] = model.in_chans
    if model.stem_stride != 4:
        model_args["patch_size"] = model.stem_stride
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.dims[-1],
        "global_pool": "avg",
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": (model.in_chans, side, side),
            "pool_size": (side // model.patch_size,) * 2,
            "interpolation": "bicubic",
            "crop_pct": source.crop_pct or 1.0,
            "crop_mode": "center" if source.crop_pct else "squash",
            **source.normalisation,
            "num_classes": model.num_classes,
            "first_conv": "stem.0" if model.in_chans == 3 else None,  # named, timm before 1.0.31 makes it RGB's anew
            "classifier": "head.fc",
            **({"label_names": source.classes} if source.classes else {}),
        },
    }
    in_folder = file.name == TARGETS["timm"][1]
    config_file = save_json(config, file.with_name("config.json") if in_folder else file.with_suffix(".json"))
    overlay = {"file": str(file)} | {key: config["pretrained_cfg"][key] for key in ("input_size", "first_conv")}
    calls = [
        {"num_classes": model.num_classes, **model_args, "checkpoint_path": str(file)},
        {"features_only": True, **model_args, "pretrained": True, "pretrained_cfg_overlay": overlay},
    ]
    recipes = [
        f"timm.create_model({', '.join([repr(name), *(f'{key}={value!r}' for key, value in call.items())])})"
        for call in calls
    ]
    recipes[1] += "  # four feature maps, for detection and segmentation"

    def load():
        whole, features = (timm.create_model(name, **call).eval() for call in calls)
        return lambda x: [whole(x), *features(x)]

    return Exported([file, config_file], recipes, "timm", load)


def write_hf(source: Source, file: Path) -> Exported:
    """A folder for from_pretrained of transformers: config.json, model.safetensors and preprocessor_config.json."""
    model, folder = source.model, file.parent
    save_state(layouts.to_huggingface(model.state_dict()), file)
    labels = source.classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    kind = "ConvNextV2ForImageClassification" if model.num_classes else "ConvNextV2Model"
    config = {
        "architectures": [kind],
        "model_type": "convnextv2",
        "num_channels": model.in_chans,
        "image_size": source.input_size,
        "patch_size": model.stem_stride,
        "num_stages": 4,
        "depths": model.depths,
        "hidden_sizes": model.dims,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        **({"id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}} if labels else {}),
    }
    preprocessor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": source.input_size},
        "crop_pct": source.crop_pct,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": bool(source.normalisation),
        **{f"image_{name}": values for name, values in source.normalisation.items()},
    }
    files = [
        file,
        save_json(config, folder / "config.json"),
        save_json(preprocessor, folder / "preprocessor_config.json"),
    ]

    def load():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        theirs = getattr(transformers, kind).from_pretrained(folder).eval()
        return lambda x: [theirs(x).logits if model.num_classes else theirs(x).pooler_output]

    recipes = [f"transformers.{name}.from_pretrained({str(folder)!r})" for name in (kind, "AutoImageProcessor")]
    if source.crop_pct and source.input_size >= 384:
        recipes[1] += f"  # which warps the whole image at this size, where training cropped {source.crop_pct} of it"
    return Exported(files, recipes, "transformers", load)


def write_onnx(source: Source, file: Path) -> Exported:
    """A graph that takes any number of images of the input size; weights above ONNX's 2 GiB go into a second file."""
    external = sum(p.nbytes for p in source.model.parameters()) > ONE_FILE
    name = "logits" if source.model.num_classes else "features"
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.7 fails without a bound
    torch.onnx.export(
        source.model, (example(source, 2),), str(file), input_names=["images"], output_names=[name],
        dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True, external_data=external, verbose=False,
    )  # fmt: skip

    def load():
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(out) for out in session.run(None, {"images": x.numpy()})]

    recipe = f"onnxruntime.InferenceSession({str(file)!r}).run(None, {{'images': images}})"
    files = [file, *([Path(f"{file}.data")] if external else [])]
    return Exported(files, [f"{recipe}  # {shape(source)}, opset {OPSET}"], "onnxruntime", load)


def example(source: Source, batch: int) -> torch.Tensor:
    return torch.randn(batch, source.model.in_chans, source.input_size, source.input_size)


def shape(source: Source) -> str:
    return f"float32 (N, {source.model.in_chans}, {source.input_size}, {source.input_size}), any N"


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


TARGETS = {  # by whom it is written, what the weights are called in a folder, and what a file of them may end in
    "timm": (write_timm, "model.safetensors", (".safetensors", ".pth")),
    "hf": (write_hf, "model.safetensors", ()),
    "safetensors": (write_safetensors, "model.safetensors", (".safetensors",)),
    "onnx": (write_onnx, "model.onnx", (".onnx",)),
}


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
        "images": f"{shape(source)}, normalised with {source.normalisation or 'an unknown mean and std'}",
        "written": ", ".join(map(str, exported.files)),
        "verified": verified,
        "use": f"\n{'':19}".join(exported.recipes),
    }
    for label, text in rows.items():
        print(f"{label:17}  {text}")


if __name__ == "__main__":
    run_cli(main)
