"""What export.py writes for each library: each function takes (source, file) and tells what it left."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from PIL import Image
from safetensors.torch import save
from torchvision.transforms.v2 import Compose, ToDtype

from models.convnextv2 import ConvNeXtV2, name_of
from utils import layouts, weights
from utils.data.transforms import eval_transform
from utils.report import write_file

OPSET = 18
SCALES = {8: "bytes / 255", 16: "8 bits / 255, 16 bits / 65535", 32: "numbers as in the files"}  # by --depth
ONE_FILE = 2**31 - 2**24  # bytes of weights that an ONNX file may hold, with room for its graph


class Source(NamedTuple):
    """A model in evaluation mode, and what its checkpoint tells about its images and classes."""

    model: ConvNeXtV2
    input_size: tuple[int, int]  # height and width
    normalisation: dict[str, tuple[float, ...]]  # mean and std, empty where neither file nor convention tells
    resize_mode: str  # see `transforms.fitted`
    crop_pct: float
    classes: list[str]  # empty where the checkpoint does not name them
    depth: int  # as --depth
    multi_label: bool  # each class has a probability of its own, the sigmoid of its logit

    @property
    def mode(self) -> str | None:
        """In which Pillow opens such images; None: in none, so that libraries are given tensors (C, H, W)."""
        return {1: "L", 3: "RGB"}.get(self.model.in_chans) if self.depth == 8 else None


class Client(NamedTuple):
    """An exported model as its library loads it, and how that prepares an image."""

    forward: Callable[[torch.Tensor], torch.Tensor]  # logits, without a head the pooled features
    prepare: Callable[[Image.Image | torch.Tensor], torch.Tensor] | None = None  # an image -> (C, H, W)
    mode: str | None = None  # in which it opens images; None: not by Pillow, it is given what --eval reads
    stages: Callable[[torch.Tensor], list[torch.Tensor]] = lambda x: []  # the four maps, where the library gives them


class Exported(NamedTuple):
    """What an exporter leaves: files, lines of code that use them, and the model as that code loads it."""

    files: list[Path]
    recipes: list[str]
    load: Callable[[], Client]  # raises ImportError where the library is not there


def classifier(config: weights.BackboneConfig) -> ConvNeXtV2:
    return ConvNeXtV2(**config.encoder(), num_classes=config.num_classes).eval()


def example(source: Source, batch: int) -> torch.Tensor:
    return torch.randn(batch, source.model.in_chans, *source.input_size)


def save_state(state: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".pth":
        return write_file(file, partial(torch.save, state))
    content = save({name: v.contiguous() for name, v in state.items()}, {"format": "pt"})
    write_file(file, lambda out: out.write(content))


def save_json(content: dict, file: Path) -> Path:
    file.write_text(json.dumps(content, indent=2) + "\n")
    return file


def write_safetensors(source: Source, file: Path) -> Exported:
    """This project's names and nothing beside them."""
    save_state(source.model.state_dict(), file)
    recipes = [f"safetensors.torch.load_file({str(file)!r})"]
    return Exported([file], recipes, lambda: Client(weights.load_checkpoint(file, classifier, whole=True).model))


def class_map(classes: list[str]) -> tuple[str, bytes]:
    """A file of the classes' numbers for timm, which strips the lines of a text in UTF-8."""
    if all(name.isprintable() and name == name.strip() for name in classes):
        return "class_map.txt", "".join(f"{name}\n" for name in classes).encode()
    return "class_map.pkl", pickle.dumps({name: i for i, name in enumerate(classes)})


def write_timm(source: Source, file: Path) -> Exported:
    """timm's names, and beside them the JSON that timm reads a model from (config.json in a folder)."""
    model = source.model
    save_state(layouts.to_timm(model.state_dict()), file)
    name, model_args = name_of(model), {}
    if name is None:  # any size can be built from one that has the same kind of linears
        name = "convnextv2_atto" if layouts.timm_has_conv_mlp(model.dims[0]) else "convnextv2_tiny"
        model_args = {"depths": model.depths, "dims": model.dims}
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
            "input_size": (model.in_chans, *source.input_size),
            "pool_size": tuple(side // model.patch_size for side in source.input_size),
            "interpolation": "bicubic",
            "crop_pct": source.crop_pct,
            "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[source.resize_mode],
            **source.normalisation,
            "num_classes": model.num_classes,
            "first_conv": "stem.0" if model.in_chans == 3 else None,  # named, timm before 1.0.31 makes it RGB's anew
            "classifier": "head.fc",
        },
        **({"label_names": source.classes} if source.classes else {}),  # where timm and transformers look
    }
    in_folder = file.name == "model.safetensors"
    files = [file, save_json(config, file.with_name("config.json") if in_folder else file.with_suffix(".json"))]
    if in_folder and hasattr(timm.models._hub, "load_model_config_from_path"):  # from timm 1.0.26 on
        name, call = f"local-dir:{file.parent}", {"pretrained": True}
    else:  # the overlay tells timm.data.resolve_model_data_config of the images
        overlay = {"file": str(file), **config["pretrained_cfg"]}
        call = {"num_classes": model.num_classes, **model_args, "pretrained": True, "pretrained_cfg_overlay": overlay}
    features_call = {"features_only": True, **{k: v for k, v in call.items() if k != "num_classes"}}
    recipes = [
        f"timm.create_model({', '.join([repr(name), *(f'{key}={value!r}' for key, value in kwargs.items())])})"
        for kwargs in (call, features_call)
    ]
    recipes[1] += "  # four feature maps, for detection and segmentation"
    if source.mode != "RGB":
        instead = "images.convert('L')" if source.mode else f"float tensors (C, H, W), {SCALES[source.depth]}"
        recipes.append(f"# timm's scripts open pictures as RGB; give its transforms {instead}")
    if source.classes:
        kind, content = class_map(source.classes)
        files.append(file.with_name(kind if in_folder else f"{file.stem}.{kind}"))
        files[-1].write_bytes(content)
        order = "timm's scripts number class folders in another order"
        recipes.append(f"validate.py and train.py with --class-map {files[-1]}  # {order}")

    def load():
        whole, features = (timm.create_model(name, **kwargs).eval() for kwargs in (call, features_call))
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(whole))
        return Client(whole, Compose([ToDtype(torch.float32, scale=True), transform]), source.mode, features)

    return Exported(files, recipes, load)


def load_hf(source: Source, folder: Path, kind: str) -> Client:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = getattr(transformers, kind).from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def prepare(image) -> torch.Tensor:
        if source.mode == "RGB":
            image = transformers.image_utils.load_image(image)  # as pipelines do: turned as EXIF data say
        return processor(image, return_tensors="pt")["pixel_values"][0]

    output = "logits" if source.model.num_classes else "pooler_output"
    return Client(lambda x: getattr(theirs(x), output), prepare, source.mode)


def write_hf(source: Source, file: Path) -> Exported:
    """A folder for from_pretrained of transformers: config.json, model.safetensors and preprocessor_config.json."""
    model, folder, (height, width), crop = source.model, file.parent, source.input_size, source.crop_pct
    save_state(layouts.to_huggingface(model.state_dict()), file)
    labels = source.classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    kind = "ConvNextV2ForImageClassification" if model.num_classes else "ConvNextV2Model"
    config = {
        "architectures": [kind],
        "model_type": "convnextv2",
        "num_channels": model.in_chans,
        "image_size": height if height == width else [height, width],
        "patch_size": model.stem_stride,
        "num_stages": 4,
        "depths": model.depths,
        "hidden_sizes": model.dims,
        "hidden_act": "gelu",
        "problem_type": "multi_label_classification" if source.multi_label else None,
        "layer_norm_eps": model.norm.eps,
        **({"id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}} if labels else {}),
    }
    covered = {name: int(side / crop) for name, side in (("height", height), ("width", width))}
    crops = source.resize_mode == "crop"
    keeps_ratio = crops and height == width  # which it does by the short side alone
    preprocessor = {  # CLIP's crops at any size, where ConvNext's warps from 384 px on
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": covered["height"]} if keeps_ratio else covered,
        "do_center_crop": crops or crop < 1,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": model.in_chans == 3,
        "resample": 3,  # bicubic
        "do_rescale": source.depth == 8,
        "rescale_factor": 1 / 255,
        "input_data_format": None if source.mode else "channels_first",  # which it cannot guess of five channels
        "do_normalize": bool(source.normalisation),
        **{f"image_{name}": values for name, values in source.normalisation.items()},
    }
    files = [file, save_json(config, folder / "config.json")]
    files.append(save_json(preprocessor, folder / "preprocessor_config.json"))
    recipes = [f"transformers.{name}.from_pretrained({str(folder)!r})" for name in (kind, "AutoImageProcessor")]
    if crops and not keeps_ratio:
        recipes[1] += f"  # warps images that are not {height} : {width}, which --eval crops"
    elif crops or crop < 1:
        recipes[1] += "  # where its crop has no exact centre, it begins a pixel before that of --eval"
    if model.num_classes:
        recipes.append(f"transformers.pipeline('image-classification', model={str(folder)!r})")
    if source.mode != "RGB":
        instead = "give the processor images.convert('L'), pipelines" if source.mode else "give processor and pipelines"
        values = f", {SCALES[source.depth]}" if source.depth != 8 else ""
        recipes.append(
            f"# pipelines open pictures as RGB; {instead} tensors (C, H, W){values} (from transformers 5 on)"
        )
    return Exported(files, recipes, partial(load_hf, source, folder, kind))


def write_onnx(source: Source, file: Path) -> Exported:
    """A graph for any number of images of any size, with what it was trained on in its metadata.

    Weights above ONNX's 2 GiB go into a second file.
    """
    model, name = source.model, "logits" if source.model.num_classes else "features"
    external = sum(p.nbytes for p in model.parameters()) > ONE_FILE
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.7 fails without a bound
    sides = {i: torch.export.Dim(n, min=model.patch_size, max=2**15) for i, n in ((2, "height"), (3, "width"))}
    program = torch.onnx.export(
        model, (example(source, 2),), input_names=["images"], output_names=[name],
        dynamic_shapes=({0: batch, **sides},), opset_version=OPSET, dynamo=True, verbose=False,
    )  # fmt: skip
    told = {name: value for name, value in source._asdict().items() if name not in ("model", "normalisation")}
    told |= {"interpolation": "bicubic", **source.normalisation}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in told.items()})
    program.save(str(file), external_data=external)

    def load():
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        read = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}

        def prepare(image) -> torch.Tensor:
            size, *of_image = (read[key] for key in ("input_size", "crop_pct", "mean", "std", "resize_mode"))
            return eval_transform(size, model.in_chans, *of_image)(image)

        return Client(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), prepare)

    recipe = f"onnxruntime.InferenceSession({str(file)!r}).run(None, {{'images': images}})"
    files = [file, *([Path(f"{file}.data")] if external else [])]
    shape = f"float32 (N, {model.in_chans}, H, W), any N, H and W from {model.patch_size} on"
    meta = f"its get_modelmeta().custom_metadata_map has {', '.join(told)} as JSON"
    return Exported(files, [f"{recipe}  # {shape}; opset {OPSET}", meta], load)


TARGETS = {  # by whom it is written, for which package, the file in a folder, and what a file of weights may end in
    "timm": (write_timm, "timm", "model.safetensors", (".safetensors", ".pth")),
    "hf": (write_hf, "transformers", "model.safetensors", ()),
    "safetensors": (write_safetensors, "safetensors", "model.safetensors", (".safetensors",)),
    "onnx": (write_onnx, "onnxruntime", "model.onnx", (".onnx",)),
}
