"""What README.md and docs/ tell: commands run in order, on a shrunk network; files are there; the tree is true."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import main_finetune
import main_pretrain
from models.convnextv2 import SIZES
from tests.small_runs import TINY, write_images
from utils import slurm
from utils.data import shapes
from utils.errors import run_cli

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--epochs 1 --warmup_epochs 0 --warmup_steps 0 --batch_size 8 --update_freq 1 --num_workers 0 --device cpu"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked with a language."""
    fenced = [block.split("\n", 1) for block in path.read_text().split("```")[1::2]]
    return [text for mark, text in fenced if mark == language]


def commands(*paths: Path) -> list[str]:
    lines = [line for path in paths for block in blocks(path, "bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


README, PAGES = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
MEASURED = [ROOT / "benchmarks.md", ROOT / "results.md"]


def from_script(command: str) -> list[str]:
    """The words of a command that runs a script, from the script's name on; none of another command."""
    words = shlex.split(command)
    script = [i for i, word in enumerate(words) if word.startswith(("main_", "submitit_", "tools/"))]
    return words[script[0] :] if script else []


def test_two_lines_do_everything():
    install = [command for command in commands(README) if command.startswith("pip install")]
    assert len(install) == 2
    for file in re.findall(r"-r (\S+)", " ".join(install)):
        assert (ROOT / file).is_file()
    assert any(command.startswith("python -m pytest") for command in commands(README))


def test_the_extra_for_tests_is_what_they_need():
    (extra,) = re.findall(r"^tests = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert sorted(re.findall(r'"(.*?)"', extra)) == sorted((ROOT / "tests/requirements.txt").read_text().split())


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_pins_what_is_required(python):
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    locked = [Requirement(line) for line in lines_of("tests/lock.txt")]
    here = [pin for pin in locked if pin.marker is None or pin.marker.evaluate(machine)]
    pins = {pin.name: str(pin.specifier).removeprefix("==") for pin in here}
    assert len(pins) == len(here)  # one version of each
    for wanted in map(Requirement, lines_of("requirements.txt") + lines_of("tests/requirements.txt")):
        assert wanted.specifier.contains(pins[wanted.name]), wanted


@pytest.mark.slow
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, TINY)
    monkeypatch.setattr("tools.targets.name_of", lambda model: None)  # timm's sizes are not shrunk
    monkeypatch.setattr(shapes, "NUM_SAMPLES", {"train": 16, "val": 8})
    for folder in ("images", "train", "imagenet/train", "new"):
        write_images(tmp_path / "data" / folder, "train", 16, size=32)
    write_images(tmp_path / "data/val", "val", 8, size=32)
    write_images(tmp_path / "data/small", "train", 16, size=32)
    (tmp_path / "data/scenes").mkdir()
    for i in range(16):
        np.save(tmp_path / f"data/scenes/{i}.npy", np.random.default_rng(i).integers(0, 4000, (5, 40, 40), np.uint16))
    for split in ("train", "val"):
        paths = sorted((tmp_path / "data" / split).rglob("*.png"))
        lines = [f"{path.relative_to(tmp_path / 'data')}\t{path.parent.name}\n" for path in paths]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    (tmp_path / "list.txt").write_text((tmp_path / "val.txt").read_text())
    found = [command for command in commands(README, *PAGES) if from_script(command)]
    assert len(found) >= 18
    for command in found:
        if nested := re.search(r"\$\((.*)\)", command):
            capsys.readouterr()
            run_tool(*from_script(nested[1]), monkeypatch=monkeypatch)
            command = command.replace(nested[0], capsys.readouterr().out.strip())
        name, *flags = from_script(command)
        if name.startswith("tools/"):
            run_tool(name, *flags, monkeypatch=monkeypatch)
            continue
        if name.startswith("submitit_"):
            monkeypatch.setattr("sys.argv", [name, *flags, "--dry_run", "true"])
            slurm.launch(main_pretrain if "pretrain" in name else main_finetune)
            assert "#SBATCH --nodes=" in capsys.readouterr().out
            continue
        script = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune}[name]
        flags = [re.sub(r"^/(data|shared)\b", r"\1", re.sub(r"checkpoint-\d+", "checkpoint-0", word)) for word in flags]
        small = SMALL if script is main_finetune else SMALL.replace("--warmup_steps 0", "")
        if not any("demo" in word for word in flags):
            small += " --input_size 64"
            if "data/imagenet" in flags and script is main_finetune:  # which has not 1000 classes, nor such depths
                small += " --data_set image_folder --data_path data/train --eval_data_path data/val"
                small += " --layer_decay_type single"
        elif script is main_finetune:
            small += " --finetune output/demo_pretrain/checkpoint-0.pth"
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            run_cli(lambda s=script, f=flags, e=small: s.main(s.get_args_parser().parse_args(f + e.split())))
        assert "acc1" in out.getvalue() if script is main_finetune else "done: 1 epochs" in out.getvalue(), flags
    assert (tmp_path / "output/demo_pretrain/reconstruction-0.png").is_file()


def run_tool(name: str, *flags: str, monkeypatch) -> None:
    """In this process, where the network is shrunk; matplotlib, which some ask for, may be missing."""
    flags = [re.sub(r"^/(data|shared)\b", r"\1", re.sub(r"checkpoint-\d+", "checkpoint-0", word)) for word in flags]
    flags = [re.sub(r"^base\.pth", "output/finetune/checkpoint-best.pth", word) for word in flags]
    if importlib.util.find_spec("matplotlib") is None:
        if name == "tools/plot.py":
            return
        flags = [flag for flag in flags if flag != "--diversity"]
    more = {"tools/benchmark.py": "--repeats 1 --batch_size 2 --device cpu"}.get(name, "--device cpu")
    if name in ("tools/plot.py", "tools/mean_std.py", "tools/export.py"):
        more = ""
    monkeypatch.setattr("sys.argv", [name, *flags, *more.split()])
    tool = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    takes_args = name in ("tools/predict.py", "tools/probe.py", "tools/visualize.py")
    run_cli((lambda: tool.main(tool.get_args_parser().parse_args())) if takes_args else tool.main)


def test_commands_of_measurements_are_understood():
    """Too long to run; their flags are known."""
    inline = [line for path in MEASURED for line in re.findall(r"`(python tools/[^`]+)`", path.read_text())]
    fenced = [line for path in MEASURED for block in blocks(path, "") for line in block.splitlines()]
    assert len(inline) >= 5
    assert len(fenced) >= 2
    for name, *flags in map(from_script, inline + fenced):
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        if name == "tools/benchmark.py":
            module.parse(flags)
        else:
            module.get_args_parser().parse_args(flags)


def test_recipes_of_the_table_exist():
    rows = re.findall(r"^\| ((?:\w+, )*\w+) \| [\d., ]+ M \|(.*?)\|", README.read_text(), flags=re.MULTILINE)
    named = set()
    for sizes, more in rows:
        for pattern in ("pretrain_SIZE", "finetune_SIZE", *re.findall(r"`(\w+)`", more)):
            named |= {pattern.replace("SIZE", size) for size in sizes.split(", ")}
    others = {"adapt", "linear_probe", "demo_pretrain", "demo_finetune", "pretrain_small", "finetune_small"}
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.args")} - others


def test_the_tree_is_the_one_on_disk():
    """Every source file has its line under "Reading the code", and every line a remark."""
    (tree,) = [block for block in blocks(README, "") if block.startswith("main_pretrain.py")]
    folders, files = [], []
    for line in tree.splitlines():
        name, remark = line.split(maxsplit=1) if not line.endswith("/") else (line.strip(), None)
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        assert remark or name in ("models/", "utils/", "data/", "tools/"), line
        files += ["".join(folders)]
    assert len(files) == len(set(files))
    sources = [path for pattern in ("*.py", "[mu]*/**/*.py", "tools/*.py") for path in ROOT.glob(pattern)]
    on_disk = {str(path.relative_to(ROOT)) for path in sources if path.name != "__init__.py"}
    assert {name for name in files if name.endswith(".py")} == on_disk
    assert all((ROOT / name).exists() for name in files)


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *PAGES], ids=lambda path: path.name)
def test_links_and_files_exist(path):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert all((path.parent / target).exists() for target in targets), targets
    for name in re.findall(r"`((?:models|utils|tools|tests|recipes|docs)/[\w/]+\.\w+)`", path.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_the_small_program_learns(capsys):
    """docs/minimal.md, shrunk: the loss falls, and nothing but models and torch is imported."""
    (program,) = blocks(ROOT / "docs/minimal.md", "python")
    assert set(re.findall(r"^(?:from|import) (\w+)", program, flags=re.MULTILINE)) == {"math", "torch", "models"}
    shrunk = re.sub(r"(?m)^IMAGES, EPOCHS, .*", "IMAGES, EPOCHS, BATCH, SIZE = 256, 4, 32, 32", program)
    assert shrunk != program
    exec(compile(shrunk, "minimal.py", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    assert [line for line in lines if re.fullmatch(r"linear probe on \d+ labels, pre-trained: [\d.]+%", line)]
