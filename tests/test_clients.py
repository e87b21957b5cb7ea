"""What other libraries make of exported files and real images: the classes that --eval true gives; docs/clients.md."""

import csv
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image

import main_finetune
from models.convnextv2 import SIZES, ConvNeXtV2
from tests.small_runs import TINY
from tests.test_export import READS_FOLDERS, ROOT, exported, import_onnx, randomised, tool
from tests.test_readme import blocks
from tools import export
from utils.data.images import Reading, decode
from utils.data.shapes import FIRST_INDEX, draw
from utils.data.transforms import eval_transform, mean_std

CLASSES = ["1", "10", "2", "B", "a"]  # which natural order, blind to case, has otherwise
SIDE = 40


def write_images(root, in_chans, count=20):
    """Class folders of drawn images that are not square: JPEGs and PNGs, of five channels arrays."""
    for i in range(count):
        pixels = draw(FIRST_INDEX["val"] + i, 0, 64)[:, : 64 - 7 * (i % 3)]
        file = root / CLASSES[i % 5] / f"{i:02}.{('png', 'jpg')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if in_chans == 5:
            np.save(file.with_suffix(".npy"), np.concatenate([pixels, 255 - pixels[..., :2]], axis=2))
        else:
            Image.fromarray(pixels).save(file)
    return root


def write_checkpoint(path, files, **shape):
    """A classifier whose head is fitted to files in class folders."""
    model = randomised(ConvNeXtV2(**TINY, num_classes=5, **shape))
    given = {"mean": [0.4] * 5, "std": [0.3] * 5} if model.in_chans == 5 else {}
    transform = eval_transform((SIDE, SIDE), model.in_chans, 224 / 256, *mean_std(model.in_chans, *given.values()))
    x = torch.stack([transform(decode(f.read_bytes(), f.name, Reading(model.in_chans, 8))) for f in files])
    targets = F.one_hot(torch.tensor([CLASSES.index(file.parent.name) for file in files]), 5).float()
    with torch.no_grad():
        features = model.forward_features(x)
        mean = features.mean(dim=0)
        model.head.weight.copy_(torch.linalg.pinv(features - mean, rtol=0.02).matmul(targets).T)
        model.head.bias.copy_(-model.head.weight @ mean)
    torch.save({"model": model.state_dict(), "classes": CLASSES, "args": {"input_size": SIDE, **given}}, path)
    return model


def by_eval(scripts, checkpoint, folder):
    """Path -> class, as --eval true --predictions has it."""
    answers = checkpoint.with_suffix(".csv")
    flags = ["--eval", "true", "--data_set", "image_folder", "--num_workers", 0, "--device", "cpu"]
    flags += ["--resume", checkpoint, "--eval_data_path", folder, "--predictions", answers]
    assert scripts.call(main_finetune, *flags).code == 0
    return {row["path"]: row["prediction"] for row in csv.DictReader(answers.open())}


def read(path, in_chans):
    """An image as processors and transforms take it: Pillow's, of five channels a tensor."""
    if in_chans == 5:
        return decode(Path(path).read_bytes(), path, Reading(5, 8))
    return Image.open(path).convert("L" if in_chans == 1 else "RGB")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("stem_stride", [4, 2, 1])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_every_library_gives_the_classes_of_evaluation(in_chans, stem_stride, scripts, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = write_images(tmp_path / "val", in_chans)
    files = sorted(file for file in folder.rglob("*.*"))
    write_checkpoint(tmp_path / "a.pth", files, in_chans=in_chans, stem_stride=stem_stride)
    expected = by_eval(scripts, tmp_path / "a.pth", folder)
    assert len(set(expected.values())) >= 3

    exported(tmp_path / "a.pth", "hf", hf := str(tmp_path / "hf"), "--check_on", folder)
    pipeline = transformers.pipeline("image-classification", model=hf)
    processor = transformers.AutoImageProcessor.from_pretrained(hf)
    model = transformers.AutoModelForImageClassification.from_pretrained(hf)
    for path, name in expected.items():
        image = read(path, in_chans)
        logits = model(**processor(image, return_tensors="pt")).logits
        assert model.config.id2label[int(logits.argmax())] == name
        assert pipeline(path if in_chans == 3 else to_image(image))[0]["label"] == name

    if stem_stride == 2:  # which timm cannot hold
        assert tool("--checkpoint", tmp_path / "a.pth", "--to", "timm", "--output", tmp_path / "timm").code == 2
    elif READS_FOLDERS:
        exported(tmp_path / "a.pth", "timm", tmp_path / "timm", "--check_on", folder)
        model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        for path, name in expected.items():
            image = read(path, in_chans)
            image = to_dtype(image, torch.float32, scale=True) if in_chans == 5 else image
            assert model.pretrained_cfg["label_names"][int(model(transform(image)[None]).argmax())] == name


def test_check_on_with_transformers_4(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    folder = write_images(tmp_path / "val", 5, count=10)
    write_checkpoint(tmp_path / "a.pth", sorted(folder.rglob("*.*")), in_chans=5, stem_stride=1)
    monkeypatch.setattr(export, "version", lambda name: "4.57.6")
    flags = ["--checkpoint", tmp_path / "a.pth", "--to", "hf", "--output", tmp_path / "hf"]
    result = tool(*flags, "--check_on", folder)
    assert (result.code, result.err) == (2, "error: --check_on: such images need transformers 5, this is 4.57.6\n")
    assert tool(*flags).code == 0


LIBRARIES = [("timm", "timm"), ("hf", "transformers")]


@pytest.mark.parametrize(
    ("target", "library"), [*LIBRARIES, pytest.param("onnx", "onnxruntime", marks=pytest.mark.slow)]
)
def test_check_on(target, library, scripts, tmp_path):
    """Of folders, lists and tars; right answers are counted from --eval true --predictions."""
    import_onnx() if target == "onnx" else pytest.importorskip(library)
    folder = write_images(tmp_path / "val", 3)
    write_checkpoint(tmp_path / "a.pth", sorted(folder.rglob("*.*")), stem_stride=1)
    expected = by_eval(scripts, tmp_path / "a.pth", folder)
    right = sum(path.split("/")[-2] == name for path, name in expected.items())
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\t{path.split('/')[-2]}\n" for path in expected))
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(folder, arcname=".")
    for source in (listed,) if target == "onnx" else (folder, listed, tmp_path / "val.tar"):  # an ONNX file takes long
        out = exported(tmp_path / "a.pth", target, tmp_path / "out", "--check_on", source)
        share = f"({5 * right:.2f} %)"
        line = f"20 images of {source}: {right} right by --eval true {share}, {right} right by {library} {share}"
        assert f"checked            {line}; each gets the same class\n" in out


@pytest.mark.parametrize(("target", "library"), LIBRARIES)
def test_check_on_tells_what_a_library_sees_otherwise(target, library, tmp_path):
    pytest.importorskip(library)
    folder = write_images(tmp_path / "val", 3)
    files = sorted(folder.rglob("*.*"))
    write_checkpoint(tmp_path / "a.pth", files, stem_stride=1)
    for file in files:  # transformers turns such pictures, timm and this project do not
        (image := Image.open(file)).getexif()[0x0112] = 6
        image.save(file, exif=image.getexif())
    out = exported(tmp_path / "a.pth", target, tmp_path / "out", "--check_on", folder)
    told = re.findall(r"^ +(\S+): (\S+), exported (\S+)$", out, flags=re.MULTILINE)
    count = re.search(r"; (\d+) get another class\n", out)
    assert len(told) == (min(int(count[1]), 10) if target == "hf" else 0)
    assert all(Path(path) in files and ours != theirs for path, ours, theirs in told)
    assert ("; each gets the same class\n" in out) == (target == "timm")
    for file in files:
        np.save(file.with_suffix(".npy"), np.asarray(Image.open(file)))
        file.unlink()
    out = exported(tmp_path / "a.pth", target, tmp_path / "out", "--check_on", folder)
    assert f", 0 right by {library} (0.00 %); 20 get another class\n" in out
    assert out.count("exported nothing, as Pillow cannot open it\n") == 10


MISTAKES = [
    ("--to timm --check_on $absent", "--check_on .*absent: no such folder"),
    ("--to timm --check_on $empty", "--check_on .*empty: holds no class folders"),
    ("--to timm --check_on $deep", "--check_on .*deep: .* has 5 channels .*; give --in_chans 5 in training"),
    ("--to timm --check_on $other", "--check_on .*other: class folder 'c' is not among the 5 training classes"),
    (
        "--to safetensors --check_on $val",
        "--check_on: a file of --to safetensors does not tell how images are prepared",
    ),
    ("--to hf --check_on $val --num_classes 0", "--check_on: needs a classifier's head, which .*a.pth has not"),
    ("--to hf --check_on $val", "--to hf: transformers is not installed; pip install transformers"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistakes(flags, message, tmp_path, monkeypatch):
    """Told in one line before anything is written."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = write_images(tmp_path / "val", 3, count=5)
    write_checkpoint(tmp_path / "a.pth", sorted(folder.rglob("*.*")), stem_stride=1)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "deep", 5, count=5)
    (folder / "a").rename(tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "c").rename(tmp_path / "other/c")
    words = re.sub(r"\$(\w+)", rf"{tmp_path}/\1", flags).split()
    result = tool("--checkpoint", tmp_path / "a.pth", "--output", tmp_path / "out", *words)
    assert result.code == 2
    assert re.fullmatch(rf"error: {message}.*\n", result.err), result.err
    assert not (tmp_path / "out").exists()


# ---- docs/clients.md

PAGE = ROOT / "docs/clients.md"
LINES = re.findall(r"^\| .* \| `(.*)` \|$", PAGE.read_text(), flags=re.MULTILINE)


def made(line, model, images, photo):
    """What a line of the table gives, and what it should be."""
    names = {"model": model, "images": images, "dataset": [{"pixel_values": images[0], "labels": 1}] * 8}
    if "model)" in line:
        names["model"] = timm.create_model("local-dir:exported/timm", pretrained=True)
    library = line.split(".")[0]
    result = eval(line, {library: sys.modules[library], **names})
    stage, picture = model.forward_stages(images)[-1], Image.open("photo.jpg")
    by_channel = stage.permute(0, 2, 3, 1)
    found = {
        "Unet": lambda: (result.eval().encoder(images)[-1], stage),
        "features_only": lambda: (result.eval()(images)[-1], stage),
        "Backbone": lambda: (result(images).feature_maps[-1].permute(0, 2, 3, 1), F.layer_norm(by_channel, [16])),
        "create_model": lambda: (result.eval()(images), model(images)),
        "create_transform": lambda: (result(picture), photo),
        "Processor": lambda: (result(picture, return_tensors="pt")["pixel_values"][0], photo),
        "pipeline": lambda: (torch.tensor(CLASSES.index(result[0]["label"])), model(photo[None])[0].argmax()),
        "Trainer": lambda: (torch.tensor(result.training_loss).isfinite(), torch.tensor(True)),
        "onnxruntime": lambda: (torch.from_numpy(result[0]), model(images)),
        "openvino": lambda: (torch.from_numpy(result), model(images)),
        "peft": lambda: (torch.tensor(sum("lora" in name for name, _ in result.named_parameters())), torch.tensor(20)),
    }
    return next(check for word, check in found.items() if word in line)()


@pytest.mark.parametrize("line", [pytest.param(x, marks=[pytest.mark.slow] * ("onnx" in x)) for x in LINES])
def test_lines_of_the_page(line, tmp_path, monkeypatch):
    for name in [line.split(".")[0], *["accelerate"] * ("Trainer" in line)]:
        pytest.importorskip(name)
    if ("local-dir:" in line or "model)" in line) and not READS_FOLDERS:
        pytest.skip("this timm cannot load from a folder")
    monkeypatch.chdir(tmp_path)
    files = sorted(write_images(tmp_path / "val", 3).rglob("*.*"))
    model = write_checkpoint(tmp_path / "a.pth", files, stem_stride=4)
    Image.fromarray(draw(FIRST_INDEX["val"], 0, 64)).save("photo.jpg")
    for target in ("timm", "hf", "onnx"):
        if f"exported/{target}" in line or (target == "timm" and "model)" in line):
            exported(tmp_path / "a.pth", target, f"exported/{target}")
    transform = eval_transform((SIDE, SIDE), 3, 224 / 256, *mean_std(3))
    photo = transform(decode(Path("photo.jpg").read_bytes(), "", Reading(3, 8)))
    theirs, ours = made(line, model, torch.stack([photo, photo.flip(2)]), photo)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0.04 if ours is photo else 1e-4)  # two of 255 levels


@pytest.mark.slow
def test_the_detector_of_the_page_learns(tmp_path, monkeypatch):
    (program,) = blocks(PAGE, "python")
    monkeypatch.setitem(SIZES, "convnextv2_tiny", TINY)
    monkeypatch.chdir(tmp_path)
    torch.save(ConvNeXtV2(**TINY, num_classes=5).state_dict(), "checkpoint-best.pth")
    exec(program.replace("path/to/this/clone", str(ROOT)), names := {"__name__": "detector"})
    target = {"boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": torch.tensor([1])}
    names["detector"].transform.min_size = (64,)  # not 800
    losses = names["detector"]([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in names["encoder"].stages.parameters())
