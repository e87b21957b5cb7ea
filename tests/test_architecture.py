"""The rules of the rooms, read off the source: who may import whom, flags that are read, no stubs."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("*.py", "models/*.py", "utils/*.py", "utils/data/*.py", "tools/*.py")
SOURCES = [path for pattern in ROOMS for path in sorted(ROOT.glob(pattern))]
ALLOWED = {  # file -> the rooms it may import from
    "models/kernels.py": set(),
    "models/layers.py": set(),
    "models/visible.py": set(),
    "models/convnextv2.py": {"models.layers", "models.visible"},
    "models/fcmae.py": {"models.layers", "models.visible", "models.convnextv2"},
    "models/linear_probe.py": {"models.convnextv2"},
    "models/operators.py": {"models.kernels", "models.layers", "models.visible"},
    "models/fused.py": {"models.operators", "models.layers", "models.visible", "models.convnextv2"},
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join(filter(None, (package, module)))
            # `from models import fcmae` imports a module, `from models.fcmae import FCMAE` a name of one
            found |= {f"{module}.{alias.name}" for alias in node.names} if module in ("models", "utils") else {module}
    return found


def local(path: Path) -> set[str]:
    rooms = {"models", "utils", "tools", "tests", "datasets"}
    return {name for name in imports(path) if name.split(".")[0] in rooms or name.startswith(("main_", "engine_"))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path):
    name = str(path.relative_to(ROOT))
    found = local(path)
    if name in ALLOWED:
        assert found <= ALLOWED[name]
        assert not imports(path) & {"argparse", "torch.distributed"}
    elif name.startswith("models/"):
        assert path.stem == "__init__"  # every other file has its line in ALLOWED
    elif name.startswith("utils/") or name.startswith("engine_") or name == "datasets.py":
        assert all(module.startswith("utils.") for module in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_scripts_and_tools_make_the_model_fast(path):
    """Whoever else builds a model gets the plain one."""
    if "models.fused" in local(path):
        assert path.parent.name == "tools" or path.name.startswith("main_")


@pytest.mark.parametrize("path", sorted((ROOT / "utils/data").glob("*.py")), ids=lambda p: p.stem)
def test_the_room_for_data_takes_plain_values(path):
    tree = ast.parse(path.read_text())
    assert not [node.lineno for node in ast.walk(tree) if getattr(node, "id", getattr(node, "arg", "")) == "args"]
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.name


def test_the_rules_see_imports():
    assert "models.layers" in local(ROOT / "models/convnextv2.py")
    assert {"datasets", "models.fcmae", "utils.weights"} <= local(ROOT / "main_pretrain.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_asserts_prints_or_stubs(path):
    tree = ast.parse(path.read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "bare assert"
    assert not re.search(r"NotImplementedError|\bTODO\b|\bFIXME\b", path.read_text())
    if path.parent.name in ("models", "utils", "data"):
        prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not prints or path.name in ("errors.py", "slurm.py")  # they speak before there is a log


@pytest.mark.parametrize("name", ["main_pretrain", "main_finetune"])
def test_every_declared_flag_is_read(name):
    """Each flag is read as args.FLAG, flags["FLAG"], or by a getattr of its name, in the code that is given them."""
    sys.path.insert(0, str(ROOT))
    parser = __import__(name).get_args_parser()
    files = [ROOT / f"{name}.py", ROOT / "datasets.py"]
    files += [
        ROOT / "utils" / f"{file}.py" for file in ("args", "distributed", "named_files", "record", "run", "settings")
    ]
    trees = [ast.parse(file.read_text()) for file in files]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {  # getattr(args, "name", default)
        node.args[1].value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) == 3
        if isinstance(node.args[1], ast.Constant)
    }
    read |= {  # flags["name"]
        node.slice.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    declared = {action.dest for action in parser._actions} - {"help"}
    assert len(declared) >= 40
    assert declared - read == set()


SPEC_FLAGS = {
    "both": """batch_size=64 update_freq=1 model=convnextv2_base input_size=224 weight_decay=0.05 lr=None data_path=None
        output_dir= log_dir=None device=auto seed=0 resume= auto_resume=True save_ckpt=True save_ckpt_freq=1
        save_ckpt_num=3 start_epoch=0 num_workers=10 pin_mem=True crop_pct=None world_size=1 local_rank=-1
        dist_on_itp=False dist_url=env://""",
    "main_pretrain": """epochs=800 warmup_epochs=40 blr=0.00015 min_lr=0.0 mask_ratio=0.6 norm_pix_loss=True
        decoder_depth=1 decoder_embed_dim=512""",
    "main_finetune": """epochs=100 warmup_epochs=20 blr=0.0005 min_lr=1e-06 drop_path=0.0 layer_decay_type=single
        layer_decay=1.0 model_ema=False model_ema_decay=0.9999 model_ema_force_cpu=False model_ema_eval=False
        clip_grad=None warmup_steps=-1 opt=adamw opt_eps=1e-08 opt_betas=None momentum=0.9 weight_decay_end=None
        color_jitter=None aa=rand-m9-mstd0.5-inc1 smoothing=0.1 train_interpolation=bicubic reprob=0.25 remode=pixel
        recount=1 resplit=False mixup=0.0 cutmix=0.0 cutmix_minmax=None mixup_prob=1.0 mixup_switch_prob=0.5
        mixup_mode=batch finetune= head_init_scale=None model_key=model|module model_prefix= eval_data_path=None
        imagenet_default_mean_and_std=True data_set=IMNET eval=False dist_eval=True disable_eval=False""",
}


@pytest.mark.parametrize("name", ["main_pretrain", "main_finetune"])
def test_flags_and_their_defaults(name):
    args = vars(__import__(name).get_args_parser().parse_args([]))
    for words in (SPEC_FLAGS["both"], SPEC_FLAGS[name]):
        for flag, value in (word.split("=", 1) for word in words.split()):
            assert str(args[flag]) == value, flag


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.args")), ids=lambda p: p.stem)
def test_recipes_are_valid(path):
    name = "main_pretrain" if "pretrain" in path.stem or path.stem == "adapt" else "main_finetune"
    module = __import__(name)
    args = module.get_args_parser().parse_args([f"@{path}"])
    args.finetune = ""  # what it starts from is not there
    module.check_args(args)
    own_size = re.search("demo|small|adapt|linear_probe", path.stem)
    assert own_size or args.model.split("_")[1] in path.stem


SCRIPT_ROOMS = [path for path in SOURCES if path.name != "kernels.py"]  # Triton takes tables and strides one by one


@pytest.mark.parametrize("path", SCRIPT_ROOMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert node.end_lineno - node.lineno < 60, node.name
            assert len([name for name in names if name not in ("self", "cls")]) <= 8, node.name
