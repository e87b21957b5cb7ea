"""The entry scripts as people type them: end to end, what is printed and written, and what happens to mistakes."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from models import fcmae
from models.convnextv2 import ConvNeXtV2
from tests import small_runs
from tests.small_runs import STEPS, TINY, Scripts, load, records, same, snapshot, write_images
from utils.amp import Amp
from utils.param_groups import decays
from utils.weights import load_checkpoint, summarise_names


@pytest.fixture(scope="module")
def journey(scripts, tmp_path_factory):
    """Pre-training, fine-tuning from it, evaluation: the three results, and the two folders."""
    pre, fine = tmp_path_factory.mktemp("pre"), tmp_path_factory.mktemp("fine")
    results = [
        scripts.pretrain("--output_dir", pre, "--vis_freq", 2),
        scripts.finetune("--output_dir", fine, "--finetune", pre / "checkpoint-2.pth", "--model_ema", "true"),
        scripts.finetune("--eval", "true", "--output_dir", fine),
    ]
    assert [result.code for result in results] == [0, 0, 0], [result.err for result in results]
    return results, pre, fine


def event_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return steps, events.Tags()["images"]


# ---- end to end


def test_pretraining_leaves_its_files(journey):
    (result, _, _), out, _ = journey
    assert {path.name.split(".tfevents")[0].split("events")[0] or "events" for path in out.iterdir()} == {
        "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth", "log.txt", "summary.csv", "reconstruction-1.png",
        "reconstruction-2.png", "run.json", "events",
    }  # fmt: skip
    model = fcmae.FCMAE(**TINY, decoder_embed_dim=16, patch_size=8)
    for epoch, record in enumerate(records(out)):
        assert list(record) == ["train_loss", "train_lr", "epoch", "n_parameters"]
        assert record["epoch"] == epoch
        assert record["n_parameters"] == sum(p.numel() for p in model.parameters())
    state = load(out / "checkpoint-2.pth")
    assert set(state) == {"model", "optimizer", "epoch", "scaler", "args", "run", "order"}
    assert state["epoch"] == 2
    assert state["args"]["mask_ratio"] == 0.6
    model.load_state_dict(state["model"])
    steps, images = event_tags(out)
    assert set(steps) == {"train/loss", "train/grad_norm", "train/lr", "train/images_per_second"}
    assert steps["train/loss"] == [200, 1000, 1200, 2000, 2200, 3000]  # thousandths of an epoch
    assert images == ["reconstruction"]
    assert re.search(r"epoch 2 \[5/5\]  eta 0:00:00  lr \S+  loss \d.\d+  grad_norm \S+  time \S+  data \S+  img/s \d+",
                     result.out)  # fmt: skip
    assert re.match(r"done: 3 epochs in \S+, loss \d\.\d+; .* in " + str(out), result.out.splitlines()[-1])
    assert result.err == ""


def test_the_reconstruction_picture(journey):
    """Eight images in rows of two: input, visible part, prediction; 16 pixels enlarged to 128, gaps of 4."""
    _, out, _ = journey
    picture = Image.open(out / "reconstruction-2.png")
    assert picture.size == (6 * 132 + 4, 4 * 132 + 4)
    pixels = np.asarray(picture).astype(int)
    tiles = [
        [pixels[4 + 132 * row : 132 + 132 * row, 4 + 132 * column : 132 + 132 * column] for column in range(6)]
        for row in range(4)
    ]
    for row in tiles:
        for original, visible, pasted in (row[:3], row[3:]):
            assert original.std() > 10
            gray = (abs(visible - 127.5) <= 1).all(axis=2)
            assert gray.mean() == pytest.approx(0.75, abs=0.02)  # 3 of 4 patches are removed
            assert (visible == original)[~gray].all()
            assert (pasted == original)[~gray].all()
            assert not (pasted == original)[gray].all()
    assert (pixels[:4] == 255).all()


def test_finetuning_leaves_its_files(journey):
    (_, result, _), _, out = journey
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth", "log.txt"} <= names
    for record in records(out):
        assert list(record) == [
            "train_loss", "train_class_acc", "train_lr", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters",
        ]  # fmt: skip
    state = load(out / "checkpoint-2.pth")
    kept = {"model", "optimizer", "scaler", "model_ema", "epoch", "args", "run", "order", "best", "classes"}
    assert set(state) == kept
    best = max(record["test_acc1"] for record in records(out))
    assert state["best"]["acc1"] == pytest.approx(best)
    assert f"best acc1 {best:.2f}" in result.out.splitlines()[-1]
    steps, _ = event_tags(out)
    assert steps["test/acc1"] == [1000, 2000, 3000]
    assert "train/class_acc" in steps


def test_the_averages_evaluation_goes_into_the_log(scripts, tmp_path):
    flags = ("--model_ema", "--model_ema_eval", "--model_ema_decay", 0.5, "--mixup", 0.5)
    scripts.finetune("--output_dir", tmp_path, "--epochs", 2, *flags)
    for record in records(tmp_path):
        assert list(record) == [
            *("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"),
            *("test_loss_ema", "test_acc1_ema", "test_acc5_ema", "epoch", "n_parameters"),
        ]
        assert record["test_loss"] != record["test_loss_ema"]
    assert (tmp_path / "checkpoint-best-ema.pth").exists()


def test_evaluation_prints_the_accuracy(journey):
    (_, _, result), _, out = journey
    best = max(record["test_acc1"] for record in records(out))
    assert f"eval {out}/checkpoint-best.pth: acc1 {best:.2f}" in result.out


def test_disable_eval_needs_no_validation_data(scripts, tmp_path):
    result = scripts.finetune("--output_dir", tmp_path, "--disable_eval", "true", "--eval_data_path", "/nowhere")
    assert result.code == 0, result.err
    assert "test_acc1" not in records(tmp_path)[0]
    assert "acc1" not in result.out


def test_log_dir_takes_the_curves(scripts, tmp_path):
    scripts.pretrain("--output_dir", tmp_path / "out", "--log_dir", tmp_path / "curves", "--epochs", 2)
    assert list((tmp_path / "curves").glob("events*"))
    assert not list((tmp_path / "out").glob("events*"))


def test_images_of_224_pixels(scripts, tmp_path, monkeypatch):
    """Patches of 32 pixels, 49 of them, 19 visible: what the defaults come to."""
    masks, forward = [], fcmae.FCMAE.forward

    def watched(model, imgs, mask, mask_ratio):
        masks.append(mask)
        return forward(model, imgs, mask=mask, mask_ratio=mask_ratio)

    monkeypatch.setattr(fcmae.FCMAE, "forward", watched)
    flags = ("--input_size", 224, "--stem_stride", 4, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 20)
    result = scripts.pretrain("--output_dir", tmp_path, *flags)
    assert result.code == 0, result.err
    assert [tuple(mask.shape) for mask in masks] == [(20, 49)] * 2
    assert all((mask == 0).sum(1).tolist() == [19] * 20 for mask in masks)
    assert re.search(r"patches of 32 pixels, lr \S+, warm-up 0, epochs 0 to 0 on cpu$", result.out, re.M)
    assert load(tmp_path / "checkpoint-0.pth")["model"]["pred.weight"].shape == (32 * 32 * 3, 16, 1, 1)


# ---- --finetune


def test_the_report_of_loaded_keys(journey):
    (_, result, _), pre, _ = journey
    lines = result.out.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("--finetune")))
    total = len(ConvNeXtV2(**TINY).state_dict())
    assert lines[start : start + 5] == [
        f"--finetune {pre}/checkpoint-2.pth: {total - 4} of {total} tensors",
        "  loaded: downsample_layers.*, stages.*",
        "  dropped: mask_token, proj.*, decoder.*, pred.*",
        "  fresh: norm.*, head.*",
        "  layout: fcmae",
    ]


def test_summarise_names_lists_exactly_the_names():
    among = ["a.x.weight", "a.x.bias", "a.y.weight", "b", "c.weight", "c.bias"]
    assert summarise_names(among, among) == "a.*, b, c.*"
    assert summarise_names(["a.x.weight", "a.x.bias", "c.bias"], among) == "a.x.*, c.bias"
    assert summarise_names(["a.x.weight", "b"], among) == "a.x.weight, b"
    assert summarise_names([], among) == "none"


def dense(classes=10, seed=1, **kwargs):
    torch.manual_seed(seed)
    model = ConvNeXtV2(**{**TINY, **kwargs}, num_classes=classes, stem_stride=kwargs.get("stem_stride", 1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # GRN's start at zero, which would hide their loss
    return model


@pytest.mark.parametrize("classes", [10, 4], ids=["other head", "same head"])
def test_finetuning_from_a_dense_checkpoint_keeps_grn(classes, tmp_path, caplog):
    source, model = dense(classes), ConvNeXtV2(**TINY, num_classes=4, stem_stride=1)
    torch.save({"model": source.state_dict()}, tmp_path / "dense.pth")
    caplog.set_level("INFO", "fcmae")
    main_finetune.log.propagate = True
    load_checkpoint(tmp_path / "dense.pth", model, fresh_head=True)
    expected = source.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, expected[name]), name
    assert sum(name.endswith(("grn.gamma", "grn.beta")) for name in expected) == 2 * sum(TINY["depths"])
    assert "dropped: head.*" in caplog.text
    assert "fresh: head.*" in caplog.text


def test_model_key_and_model_prefix(tmp_path):
    a, b = dense(4, seed=1), dense(4, seed=2)
    content = {"model": a.state_dict(), "teacher": {f"net.{k}": v for k, v in b.state_dict().items()}}
    torch.save(content, tmp_path / "both.pth")
    for where, expected in (({}, a), ({"model_key": "teacher", "model_prefix": "net."}, b)):
        model = ConvNeXtV2(**TINY, num_classes=4, stem_stride=1)
        load_checkpoint(tmp_path / "both.pth", model, **where)
        assert torch.equal(model.stages[2][1].grn.gamma, expected.stages[2][1].grn.gamma)


def test_head_init_scale(scripts, tmp_path):
    def head(*flags):
        args = main_finetune.get_args_parser().parse_args(["--model", "convnextv2_atto", *flags])
        torch.manual_seed(0)
        return main_finetune.build_model(args, 7).head.weight

    torch.testing.assert_close(head("--head_init_scale", "0.5"), 500 * head("--finetune", "x.pth"))
    assert torch.equal(head("--head_init_scale", "1"), head())
    assert head().std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_head_is_new_also_where_the_file_has_one_that_fits(scale, scripts, tmp_path):
    """With std 0.02 * --head_init_scale, 2e-5 where that is not given; a learning rate of 0 leaves it so."""
    torch.save(dense(4).state_dict(), tmp_path / "dense.pth")
    flags = ("--finetune", tmp_path / "dense.pth", "--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0)
    flags += () if scale is None else ("--head_init_scale", scale)
    result = scripts.finetune(*flags, "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    saved, source = load(tmp_path / "out" / "checkpoint-0.pth")["model"], dense(4).state_dict()
    assert saved["head.weight"].std().item() == pytest.approx(0.02 * (scale or 0.001), rel=0.3)
    assert not saved["head.bias"].any()
    assert same(*({n: v for n, v in state.items() if not n.startswith("head.")} for state in (saved, source)))


def test_a_new_head_is_not_drawn_twice(scripts, tmp_path):
    """Loading takes no random numbers: the head is the one that the seed gives without --finetune."""
    torch.save(dense(4).state_dict(), tmp_path / "dense.pth")
    heads = []
    for name, more in (("with", ("--finetune", tmp_path / "dense.pth")), ("without", ())):
        flags = ("--epochs", 1, "--warmup_epochs", 0, "--lr", 0, "--min_lr", 0, "--output_dir", tmp_path / name)
        assert scripts.finetune(*flags, "--head_init_scale", 0.1, *more).code == 0
        heads.append(load(tmp_path / name / "checkpoint-0.pth")["model"]["head.weight"])
    assert torch.equal(*heads)


# ---- optimizers and precision


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adamp", "rmsprop", "Adan", "lookahead_adamw"])
def test_optimizers_take_a_step(name):
    args = main_finetune.get_args_parser().parse_args(["--opt", name, "--layer_decay", "0.7"])
    model = ConvNeXtV2(**TINY, num_classes=3, stem_stride=1)
    optimizer = main_finetune.build_optimizer(model, args, lr=1e-2)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not same(before, list(model.parameters()))
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.05 if group["decays"] else 0)
        assert {group["decays"]} == {decays(n, p) for n, p in zip(group["names"], group["params"], strict=True)}


def test_optimizer_flags_arrive():
    model = ConvNeXtV2(**TINY, num_classes=3, stem_stride=1)

    def group(*flags):
        args = main_finetune.get_args_parser().parse_args([str(flag) for flag in flags])
        return main_finetune.build_optimizer(model, args, lr=0.1).param_groups[0]

    assert group("--opt_eps", 1e-3, "--opt_betas", 0.8, 0.95)["eps"] == 1e-3
    assert group("--opt_betas", 0.8, 0.95)["betas"] == (0.8, 0.95)
    assert group()["betas"] == (0.9, 0.999)
    assert group("--opt", "sgd", "--momentum", 0.7)["momentum"] == 0.7


@pytest.mark.slow
def test_amp_on_the_cpu(scripts, tmp_path):
    weights = []
    for stage in (scripts.pretrain, scripts.finetune):
        for use in ("true", "false"):
            out = tmp_path / f"{stage.__name__}-{use}"
            result = stage("--use_amp", use, "--amp_dtype", "bfloat16", "--epochs", 2, "--output_dir", out)
            assert result.code == 0, result.err
            weights.append(load(out / "checkpoint-1.pth")["model"])
            assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights[-1].values())
        assert not same(*weights[-2:])
    result = scripts.finetune("--eval", "true", "--use_amp", "true", "--output_dir", out)
    assert "acc1" in result.out


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(("stage", "flags"), [("pretrain", ("--decoder_depth", 0)), ("finetune", ("--drop_path", 0.2))])
def test_compile_on_the_cpu(stage, flags, scripts, tmp_path, monkeypatch):
    """Model and loss run as the code that the compiler made of them, and learn the same; pictures compile nothing."""
    monkeypatch.setattr(small_runs, "TINY", {**TINY, "depths": (0, 0, 1, 0)})  # each block takes seconds
    compile, ran, graphs = torch.compile, [], []

    def backend(graph, inputs, options=None):
        graphs.append(graph.code)
        compiled = torch._dynamo.lookup_backend("inductor")(graph, inputs, config_patches=options)
        return lambda *args: (ran.append(1), compiled(*args))[1]

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))

    def call(compiled, *more):
        ran.clear(), graphs.clear()
        torch._dynamo.reset()
        result = getattr(scripts, stage)("--compile", compiled, "--output_dir", tmp_path / compiled, *flags, *more)
        assert result.code == 0, result.err
        return len(ran), len(graphs)

    steps = ("--epochs", 2, "--batch_size", 16)
    assert call("true", *steps) == (6, 2)  # 16, 16, and 8 images
    assert call("false", *steps) == (0, 0)
    states = [load(tmp_path / compiled / "checkpoint-1.pth")["model"] for compiled in ("true", "false")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=2e-3, msg=name)
    if stage == "finetune":
        assert call("true", "--eval", "true", "--batch_size", 11) == (2, 1)


# ---- in a process of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["main_pretrain.py", "main_finetune.py"])
def test_without_arguments(name, script, tmp_path):
    result = script(name)
    assert result.returncode not in (0, None)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) <= 10
    for words in ("@recipes/demo_", "--data_path", "--help lists all flags"):
        assert words in result.stderr


@pytest.mark.slow
def test_mistakes_end_a_process_with_one_line(script, scripts, tmp_path):
    """Found by a loader's worker, whose exception arrives wrapped in a traceback."""
    broken = tmp_path / "broken" / "c0"
    broken.mkdir(parents=True)
    for i in range(16):
        (broken / f"{i}.png").write_bytes(b"no image")
    result = script(
        "main_pretrain.py", "--data_set", "image_folder", "--data_path", broken, "--model", "convnextv2_atto",
        *("--input_size", 16, "--stem_stride", 1, "--batch_size", 8, "--epochs", 2, "--warmup_epochs", 1),
        *("--num_workers", 1),
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "unreadable" in result.stderr
    assert "Traceback" not in result.stdout


# ---- mistakes


@pytest.fixture
def broken(tmp_path, scripts, journey):
    """Things that are wrong, by name: $NAME in a flag below stands for its path."""
    _, pre, fine = journey
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "c0").mkdir(parents=True)
    (tmp_path / "texts" / "c0" / "notes.txt").write_text("not an image")
    shutil.copytree(scripts.train, tmp_path / "hollow")
    (tmp_path / "hollow" / "c9").mkdir()
    shutil.copytree(scripts.val, tmp_path / "alien")
    write_images(tmp_path / "alien" / "c11", "val", 1, classes=1)
    for i, path in enumerate(sorted(scripts.train.rglob("*.png"))):
        target = tmp_path / "corrupt" / f"c{i % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[:60])
    (tmp_path / "file").write_text("")
    (tmp_path / "nonsense.pth").write_text("this is no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "mlp.pth")
    torch.save(dense(depths=(1, 1, 1, 1)).state_dict(), tmp_path / "shallow.pth")
    torch.save(dense(dims=(8, 8, 16, 24)).state_dict(), tmp_path / "wide.pth")
    torch.save({k: v for k, v in dense().state_dict().items() if k.startswith("stages.2")}, tmp_path / "part.pth")
    cut = (fine / "checkpoint-2.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "bad.args").write_text("--epochs three\n")
    paths = {path.stem: path for path in tmp_path.iterdir()}
    return paths | {"pre": pre / "checkpoint-2.pth", "fine": fine / "checkpoint-2.pth", "missing": tmp_path / "missing"}


PRETRAIN_MISTAKES = [
    ("--data_path $missing", "--data_path .*missing: no such folder"),
    ("--data_path $empty", "--data_path .*empty: holds no images"),
    ("--data_path $texts", "--data_path .*texts: holds no images"),
    ("--data_path $corrupt", "unreadable|can be read"),
    ("--data_path $corrupt --vis_freq 0", "unreadable"),
    ("--data_set IMNET", "--data_path .*'train'.*image_folder"),
    ("--data_set CIFAR10 --data_path $missing", "--data_path .*missing"),
    ("--data_set CIFRA10", r"--data_set CIFRA10: unknown \(did you mean CIFAR10\?\)"),
    ("--data_set IMNET --data_path $missing", "--data_path"),
    ("--batch_size 41", "--batch_size 41: .*40"),
    ("--update_freq 6", "48 images .*40"),
    ("--model convnextv2_ato", r"--model convnextv2_ato: unknown \(did you mean convnextv2_atto\?\)"),
    ("--input_size 20", "--input_size 20: must be a multiple of the patch size 8"),
    ("--input_size 0", "--input_size 0"),
    ("--input_size 8", "--mask_ratio 0.6: .*larger --input_size"),
    *((f"--mask_ratio {ratio}", f"--mask_ratio {ratio}") for ratio in ("0", "0.0", "1", "1.5", "-0.1", "nan", "0.999")),
    ("--epochs 3 --warmup_epochs 3", "--warmup_epochs 3: must be less than --epochs 3"),
    ("--epochs 0", "--epochs 0"),
    ("--lr -1", "--lr -1"),
    ("--lr -1e-3", "--lr -1e-3: must be a number from 0 to 1e9"),
    ("--min_lr -inf", "--min_lr -inf: must be"),
    ("--mean -1e-3 -.5 -2 --std -1e-3 1 1", "--std -1e-3: must be a number above 0"),
    ("--lr nan", "--lr nan"),
    ("--blr nan --lr 1", "--blr nan"),
    ("--batch_size 0", "--batch_size 0"),
    ("--num_workers -1", "--num_workers -1"),
    *((f"--seed {seed}", f"--seed {seed}: .* to 4294967295") for seed in (2**32, -1, "1.0")),
    ("--min_crop 0", "--min_crop 0"),
    ("--resume $missing", "--resume .*missing: no such file"),
    ("--resume $empty", "--resume .*empty: is a folder; give a file in it"),
    ("--resume convnextv2_atto.fcmae", "--resume convnextv2_atto.fcmae: no such file$"),
    ("--resume $nonsense", "nonsense.pth"),
    ("--resume $cut", "cut.pth: .*truncated"),
    ("--resume $list", "list.pth"),
    ("--resume $wide", "wide.pth: has no .*optimizer"),
    ("--resume $fine", "checkpoint-2.pth: was written by main_finetune.py; give it to --initial_checkpoint"),
    ("--resume $pre --decoder_embed_dim 32", "checkpoint-2.pth: a checkpoint of another model"),
    ("--output_dir $file", "--output_dir .*file: cannot be written"),
    ("--device cuad", "--device cuad"),
    ("--device cuda:99", "--device cuda:99"),
    ("--norm_pix_loss maybe", "--norm_pix_loss maybe: must be true or false"),
    ("--mask_ration 0.5", r"--mask_ration \(did you mean --mask_ratio\?\)"),
    ("--epochs", "epochs"),
    ("--epochs three", "three"),
    ("@$missing", "missing"),
    ("@$bad", "three"),
    ("--stem_stride 3", "stem_stride"),
    ("--decoder_depth -1", "--decoder_depth -1"),
    ("--decoder_embed_dim 0", "--decoder_embed_dim 0"),
]

FINETUNE_MISTAKES = [
    ("--data_path $missing", "--data_path .*missing: no such folder"),
    ("--data_path $empty", "--data_path .*empty: holds no class folders"),
    ("--data_path $texts", "--data_path .*texts"),
    ("--data_path $hollow", "--data_path .*hollow: .*c9"),
    ("--data_path $corrupt --eval_data_path $corrupt", "unreadable"),
    ("--eval_data_path $missing", "--eval_data_path .*missing: no such folder"),
    ("--eval_data_path $empty", "--eval_data_path .*empty"),
    ("--eval_data_path $alien", "--eval_data_path .*'c11' is not among the 4 training classes"),
    ("--data_set imnet", r"--data_set imnet: unknown"),
    ("--data_set IMNET --data_path $missing", "--data_path"),
    ("--nb_classes 10", "--nb_classes 10: .* 4 classes"),
    ("--batch_size 41", "--batch_size 41: .*40; give a smaller --batch_size$"),
    ("--batch_size 8 --update_freq 50", "--batch_size 8: .*40; give a smaller --batch_size or --update_freq$"),
    ("--cutmix_minmax 0.6 0.2", "--cutmix_minmax 0.6 0.2: the smaller side comes first"),
    ("--cutmix_minmax 0.5 0.55", "--cutmix_minmax 0.5 0.55: .* a pixel of --input_size 16 apart"),
    ("--input_size 7", "--input_size 7"),
    ("--model atto", "--model atto: unknown"),
    ("--opt adamx", r"--opt adamx: unknown to timm \(did you mean adam"),
    ("--opt adahessian", "--opt adahessian"),
    ("--opt_betas 0.9", "--opt_betas: has 1 numbers, --opt adamw needs 2"),
    ("--opt_betas 0.9 0.9 0.9 --opt lion", "--opt_betas: has 3 numbers, --opt lion needs 2"),
    ("--opt_betas 0.9 0.9 --opt lookahead_adan", "--opt_betas: has 2 numbers, --opt lookahead_adan needs 3"),
    ("--epochs 3 --warmup_epochs 4", "--warmup_epochs 4"),
    ("--epochs 3 --warmup_steps 15", "--warmup_steps 15: .*15 steps"),
    ("--layer_decay_type group --layer_decay 0.6", "--layer_decay_type group: .*--layer_decay_type single"),
    ("--layer_decay 0", "--layer_decay 0"),
    ("--layer_decay 1.5", "--layer_decay 1.5"),
    ("--drop_path 1.5", "--drop_path 1.5"),
    ("--smoothing -0.1", "--smoothing -0.1"),
    ("--clip_grad 0", "--clip_grad 0"),
    ("--mixup 0.8 --batch_size 7", "--batch_size 7: must be even"),
    ("--model_ema_eval true", "--model_ema_eval true"),
    ("--aa nonsense", "--aa nonsense"),
    ("--aa rand-mxx", "--aa rand-mxx: no policy"),
    ("--finetune $missing", "--finetune .*missing: no such file"),
    ("--finetune $empty", "--finetune .*empty: is a folder; give a file in it"),
    ("--finetune $nonsense", "nonsense.pth"),
    ("--finetune $cut", "cut.pth: .*truncated"),
    ("--finetune $list", "list.pth"),
    ("--finetune $mlp", "mlp.pth: not a ConvNeXt V2"),
    ("--finetune $part", "--finetune .*part.pth"),
    ("--finetune $shallow", r"--finetune .*shallow.pth: not for this --model .*depths \(1, 1, 1, 1\)"),
    ("--finetune $wide", r"--finetune .*wide.pth: not for this --model .*dims \(8, 8, 16, 24\)"),
    ("--finetune $pre --stem_stride 2", "--finetune .*checkpoint-2.pth: .*stem stride 1"),
    ("--finetune $pre --model_key weights", "--model_key weights"),
    ("--finetune $pre --model_prefix backbone.", "--model_prefix backbone."),
    ("--finetune $pre --resume $fine", "--finetune and --resume"),
    ("--resume $missing", "--resume .*missing: no such file"),
    ("--resume $pre", "checkpoint-2.pth: was written by main_pretrain.py; give it to --finetune"),
    ("--resume $cut", "cut.pth: .*truncated"),
    ("--resume $fine --opt lamb", "--opt lamb: .*adamw"),
    ("--eval true", "--eval true: needs a checkpoint"),
    ("--eval true --resume $pre", "checkpoint-2.pth holds an encoder without"),
    ("--eval true --resume $cut", "cut.pth: .*truncated"),
    ("--eval true --resume $mlp", "mlp.pth"),
    ("--eval true --resume $fine --model convnextv2_femto", "checkpoint-2.pth: a checkpoint of another model"),
    ("--eval true --resume $fine --eval_data_path $alien", "'c11' is not among"),
    ("--eval true --resume $fine --disable_eval true", "--eval true and --disable_eval true"),
    ("--eval true --resume $shallow --model_ema_eval true --data_path $missing", "shallow.pth"),
    ("--eval maybe", "--eval maybe"),
    ("--modle convnextv2_atto", "--modle"),
]


def check_mistake(run, flags, message, broken, out):
    before = snapshot(out)
    flags = re.sub(r"\$(\w+)", lambda match: str(broken[match[1]]), flags).split()
    result = run("--output_dir", out, *flags)
    assert result.code == 2, result.out + result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.out
    after = snapshot(out)
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith(("events.", "run.json")) for name in after.keys() - before.keys())


@pytest.fixture
def used_folder(tmp_path):
    """An output_dir with what somebody cares for, and nothing to resume from."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("lr 1e-3 was best")
    (out / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    (out / "reconstruction-0.png").write_bytes(b"picture")
    (out / "checkpoint-best-of-all.pth").write_bytes(b"weights")
    return out


@pytest.mark.parametrize(("flags", "message"), PRETRAIN_MISTAKES, ids=[flags for flags, _ in PRETRAIN_MISTAKES])
def test_mistakes_in_pretraining(flags, message, scripts, broken, used_folder):
    check_mistake(scripts.pretrain, flags, message, broken, used_folder)


@pytest.mark.parametrize(("flags", "message"), FINETUNE_MISTAKES, ids=[flags for flags, _ in FINETUNE_MISTAKES])
def test_mistakes_in_finetuning(flags, message, scripts, broken, used_folder):
    check_mistake(scripts.finetune, flags, message, broken, used_folder)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_damaged_image_is_reported_and_the_run_goes_on(stage, tmp_path):
    scripts = Scripts(tmp_path)
    damaged = [sorted(folder.rglob("*.png"))[3] for folder in (scripts.train, scripts.val)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:200])
    result = getattr(scripts, stage)("--epochs", 2)
    assert result.code == 0, result.err
    assert str(damaged[0]) in result.out
    if stage == "finetune":
        assert f"unreadable image, not evaluated: {damaged[1]}" in result.out
        assert "(21 images)" in result.out
    assert result.out.count(f"[{STEPS}/{STEPS}]") == 2


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_interruption_from_the_keyboard(stage, scripts, monkeypatch):
    def step(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Amp, "step", step)
    result = getattr(scripts, stage)()
    assert result.code == 130
    assert result.err.startswith("interrupted; ")
    assert result.err.count("\n") == 1


def test_the_older_name_of_a_flag_is_understood():
    assert main_pretrain.get_args_parser().parse_args(["--picture_freq", "3"]).vis_freq == 3
