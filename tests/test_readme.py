"""The README's commands run, one after the other as a reader would type them, on a shrunk network and a few images."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import numpy as np

import main_finetune
import main_pretrain
from models.convnextv2 import SIZES
from tests.small_runs import TINY, write_images
from utils import slurm
from utils.data import shapes
from utils.errors import run_cli

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--epochs 1 --warmup_epochs 0 --warmup_steps 0 --batch_size 8 --update_freq 1 --num_workers 0 --device cpu"


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]


def from_script(command: str) -> list[str]:
    """The words of a command that runs a script, from the script's name on; none of another command."""
    words = shlex.split(command)
    script = [i for i, word in enumerate(words) if word.startswith(("main_", "submitit_", "tools/"))]
    return words[script[0] :] if script else []


def test_two_lines_do_everything():
    install = [command for command in readme_commands() if command.startswith("pip install")]
    assert len(install) == 2
    for file in re.findall(r"-r (\S+)", " ".join(install)):
        assert (ROOT / file).is_file()
    assert "python -m pytest" in readme_commands()


def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, TINY)
    monkeypatch.setattr(shapes, "NUM_SAMPLES", {"train": 16, "val": 8})
    for folder in ("images", "train", "imagenet/train"):
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
    commands = [command for command in readme_commands() if from_script(command)]
    assert len(commands) >= 18
    for command in commands:
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
        flags = [re.sub(r"^/data\b", "data", re.sub(r"checkpoint-\d+", "checkpoint-0", word)) for word in flags]
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
    flags = [re.sub(r"^/data\b", "data", re.sub(r"checkpoint-\d+", "checkpoint-0", word)) for word in flags]
    if importlib.util.find_spec("matplotlib") is None:
        if name == "tools/plot.py":
            return
        flags = [flag for flag in flags if flag != "--diversity"]
    more = {"tools/benchmark.py": "--memory false --repeats 1 --batch_size 2 --device cpu"}.get(name, "--device cpu")
    if name in ("tools/plot.py", "tools/mean_std.py", "tools/benchmark_loader.py", "tools/export.py"):
        more = ""
    monkeypatch.setattr("sys.argv", [name, *flags, *more.split()])
    tool = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    takes_args = name in ("tools/probe.py", "tools/visualize.py")
    run_cli((lambda: tool.main(tool.get_args_parser().parse_args())) if takes_args else tool.main)


def test_recipes_of_the_table_exist():
    table = re.findall(r"`((?:pretrain|finetune)_\w+)`", (ROOT / "README.md").read_text())
    others = ("demo_pretrain", "demo_finetune", "linear_probe")
    assert set(table) == {path.stem for path in (ROOT / "recipes").glob("*.args")} - set(others)
