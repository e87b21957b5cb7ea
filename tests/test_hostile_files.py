"""Files that nobody would write on purpose, and some that somebody would: one line, exit code 2, nothing executed."""

import codecs
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import zipfile
from functools import partial

import pytest
import torch
from safetensors.torch import save

import main_finetune
from models.convnextv2 import ConvNeXtV2
from tests.small_runs import TINY, killed_after, load, same
from utils.errors import UsageError
from utils.report import write_file

NAME = "stages.2.1.grn.gamma"
MATRIX = "stages.0.0.pwconv1.weight"


def state_dict() -> dict:
    torch.manual_seed(0)
    return dict(ConvNeXtV2(num_classes=4, stem_stride=1, **TINY).state_dict())


class Gadget:
    """Unpickled by a reader that lets it, it calls."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def gadgets(touched: str) -> dict:
    code = f"open({touched!r}, 'w')"
    calls = [
        (os.system, f"touch {touched}"), (os.popen, f"touch {touched}"), (os.mkdir, touched), (os.putenv, "A", "b"),
        (subprocess.call, ["touch", touched]), (subprocess.Popen, ["touch", touched]), (eval, code), (exec, code),
        (subprocess.getoutput, f"touch {touched}"), (compile, code, "x", "exec"), (open, touched, "w"),
        (__import__, "os"), (getattr, str, "join"), (codecs.open, touched, "w"),
        (torch.load, touched), (torch.hub.load, "a/b", "c"), (torch.save, 1, touched), (torch.compile, print),
        (pickle.loads, b"."), (torch.jit.load, touched),
    ]  # fmt: skip
    return {
        f"calls {i} {call[0].__name__}": {"model": state_dict(), "x": Gadget(*call)} for i, call in enumerate(calls)
    }


def changed(name: str, change) -> dict:
    state = state_dict()
    return state | {name: change(state[name])}


def odd_states() -> dict:
    """What torch.save writes, and what the line has to say of it."""
    quantised = torch.quantize_per_tensor(state_dict()[MATRIX], 0.01, 0, torch.qint8)
    return {
        "integer keys": (dict(enumerate(state_dict().values())), ""),
        "an integer key": ({"model": state_dict() | {3: torch.ones(1)}}, ""),
        "a tuple for a key": ({"model": state_dict() | {(1, 2): torch.ones(1)}}, ""),
        "bytes for a key": ({"model": state_dict() | {b"x": torch.ones(1)}}, ""),
        "meta": (changed(MATRIX, lambda x: x.to("meta")), MATRIX),
        "all meta": ({k: v.to("meta") for k, v in state_dict().items()}, "meta"),
        "sparse": (changed(MATRIX, lambda x: x.to_sparse()), MATRIX),
        "csr": (changed(MATRIX, lambda x: x.to_sparse_csr()), MATRIX),
        "quantised": (state_dict() | {MATRIX: quantised}, MATRIX),
        "int8": (changed(MATRIX, lambda x: x.to(torch.int8)), MATRIX),
        "bool": (changed(MATRIX, lambda x: x > 0), MATRIX),
        "complex": (changed(MATRIX, lambda x: x.to(torch.complex64)), MATRIX),
        "nested": (state_dict() | {MATRIX: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, ""),
        "NaN": (changed(NAME, lambda x: x * torch.nan), NAME),
        "infinite": (changed(NAME, lambda x: x + torch.inf), NAME),
        "no dimension": (changed(MATRIX, lambda x: x.sum()), ""),
        "expanded": (changed(MATRIX, lambda x: torch.ones(1).expand(10**7, 10**7)), MATRIX),
        "no number": (changed(MATRIX, lambda x: x[:0]), MATRIX),
    }


def test_what_a_file_holds_a_part_of_takes_no_memory(scripts, tmp_path):
    """Nor where a folder's newest checkpoint is looked for, or a model is built as the file's shapes tell."""
    name = "downsample_layers.0.0.weight"
    torch.save({"model": changed(name, lambda x: x[:, :1].expand(-1, 10**9, 1, 1))}, tmp_path / "checkpoint-0.pth")
    for flags in (("--output_dir", tmp_path), ("--eval", "true", "--resume", tmp_path / "checkpoint-0.pth")):
        result = scripts.finetune(*flags)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err


def headers() -> dict[str, bytes]:
    whole = save({"x": torch.ones(2, 3)})
    entry = lambda **more: {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | more}  # noqa: E731

    def packed(header, data=bytes(24), size=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if size is None else size) + text + data

    return {
        "beyond": packed(entry(data_offsets=[0, 10**12])), "backwards": packed(entry(data_offsets=[24, 0])),
        "negative": packed(entry(data_offsets=[-8, 16])), "overlap": packed(entry() | {"y": entry()["x"]}),
        "short": packed(entry(shape=[2, 4])), "huge": packed(entry(shape=[2**40, 2**40])),
        "kind": packed(entry(dtype="X")),
        "length": packed(entry(), size=2**63), "cut": whole[:-1], "more": whole + b"x", "no JSON": packed(b"{" * 20),
        "list": packed([1]), "deep": packed(b"[" * 100_000), "large": packed(b" " * 101_000_000),
        "text": packed({"x": "y"}),
        "not UTF-8": packed(b'{"\xff": 1}'), "pickle": pickle.dumps({"x": 1}), "empty": b"",
    }  # fmt: skip


def refused(scripts, path, message="", flag="--finetune"):
    result = scripts.finetune(flag, path)
    assert result.code == 2, (path.name, result)
    assert re.fullmatch(r"error: [^\n]{1,400}\n", result.err), (path.name, result.err)
    assert path.name in result.err
    assert message in result.err, (path.name, result.err)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--finetune", "--resume"])
@pytest.mark.parametrize("name", odd_states())
def test_tensors_that_are_no_weights(name, flag, scripts, tmp_path):
    state, message = odd_states()[name]
    torch.save(state if flag == "--finetune" else {"model": state, "optimizer": {}, "epoch": 0}, tmp_path / "x.pth")
    refused(scripts, tmp_path / "x.pth", message if flag == "--finetune" else "", flag)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_called(zipped, scripts, tmp_path):
    for name, state in gadgets(str(tmp_path / "touched")).items():
        path = tmp_path / f"{name}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        refused(scripts, path, "not a checkpoint of tensors and plain values")
    refused(scripts, tmp_path / "calls 0 system.pth", f"({os.system.__module__}.system)")
    assert not (tmp_path / "touched").exists()


def test_headers_of_safetensors(scripts, tmp_path):
    for name, content in headers().items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        refused(scripts, path)


def test_zip_bombs_and_storages_that_are_too_small(scripts, tmp_path):
    """What is compressed is not unpacked; torch.save compresses nothing."""
    torch.save({"model": state_dict()}, tmp_path / "whole.pth")
    parts = {"bomb": ("data.pkl", bytes(10**8), zipfile.ZIP_DEFLATED), "small": ("data/0", b"1", zipfile.ZIP_STORED)}
    for name, (part, content, kind) in parts.items():
        with (
            zipfile.ZipFile(tmp_path / "whole.pth") as whole,
            zipfile.ZipFile(tmp_path / f"{name}.pth", "w", kind) as file,
        ):
            for entry in whole.namelist():
                file.writestr(entry, content if entry.endswith(part) else whole.read(entry))
        refused(scripts, tmp_path / f"{name}.pth", "compressed" if name == "bomb" else "larger than what it holds")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--epochs 3\r\n--seed 7\r\n", ""), (b"\xef\xbb\xbf--epochs 3 --seed 7", ""),
        (bytes(range(256)), "can't decode"),
        ("--epochs 3".encode("utf-16"), "can't decode"), (b"\0\0", "unknown argument|unrecognized|cannot"),
        (b"@x.args", "reads itself"), (b"@y.args", "reads itself"), (b"@absent.args", "absent.args: cannot be read"),
        (b"@/dev/zero", "argument file /dev/zero: cannot be read"),
        (b"@.", "argument file .: cannot be read"), (b"@", "argument file : cannot be read"),
        (b"--seed '", "No closing"),
    ],
)  # fmt: skip
def test_argument_files(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.args").write_bytes(content)
    (tmp_path / "y.args").write_bytes(b"@x.args")
    parse = partial(main_finetune.get_args_parser().parse_args, ["@x.args"])
    if not message:
        assert (parse().epochs, parse().seed) == (3, 7)
        return
    with pytest.raises(SystemExit, match="2"):
        parse()
    assert re.fullmatch(rf"error: .*({message}).*\n", capsys.readouterr().err)


def test_places_that_cannot_be(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long, address = "x" * 300, "http://127.0.0.1:9/x"
    for flags in (("--output_dir", long), ("--log_dir", long), ("--log_dir", address)):
        result = scripts.finetune("--epochs", 1, "--warmup_epochs", 0, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert flags[1] in result.err
    with pytest.raises(UsageError, match="cannot be written"):
        write_file(tmp_path / long, print)


ODD_FIELDS = {
    "epoch": -1, "classes": 5, "best": "0.9", "order": [1], "scaler": torch.ones(2), "model_ema": "x", "rollbacks": "x",
    "global_batch": None, "partial": {"averages": []}, "step": {},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_fields_that_no_run_writes(name, scripts, tmp_path):
    flags = "--model_ema", "true", "--save_ckpt_steps", 2, "--output_dir", tmp_path
    with killed_after(3):
        scripts.finetune(*flags)
    state = load(tmp_path / "checkpoint-0-step2.pth")
    torch.save(state | {name: ODD_FIELDS[name]}, tmp_path / "x.pth")
    refused(scripts, tmp_path / "x.pth", f"its {name} is ", "--resume")


@pytest.mark.slow
def test_states_of_an_optimizer_that_do_not_fit(scripts, tmp_path):
    """Settings that a checkpoint's groups have otherwise are the command line's."""
    assert scripts.finetune("--output_dir", tmp_path, "--epochs", 2).code == 0
    state = load(tmp_path / "checkpoint-0.pth")
    path, held, groups = tmp_path / "x.pth", state["optimizer"]["state"], state["optimizer"]["param_groups"]
    for name, odd in itertools.product(("exp_avg", "exp_avg_sq"), (held[0]["exp_avg"][:1], None, "x", 3)):
        torch.save(state | {"optimizer": {"state": held | {0: held[0] | {name: odd}}, "param_groups": groups}}, path)
        refused(scripts, path, "its optimizer does not fit", "--resume")
    torch.save(state | {"args": state["args"] | {"depth": (1, 2), "multi_label": torch.ones(2)}}, path)
    assert scripts.finetune("--output_dir", tmp_path / "depth", "--epochs", 2, "--resume", path).code == 0
    odd = [group | {"amsgrad": True, "maximize": 1, "differentiable": 1.5, "fused": None} for group in groups]
    torch.save(state | {"optimizer": {"state": held, "param_groups": odd}}, path)
    assert scripts.finetune("--output_dir", tmp_path / "on", "--epochs", 2, "--resume", path).code == 0
    ended, whole = (load(folder / "checkpoint-1.pth") for folder in (tmp_path / "on", tmp_path))
    assert same(ended["model"], whole["model"])
