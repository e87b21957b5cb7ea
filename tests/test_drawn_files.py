"""Files as hypothesis draws them: damaged checkpoints, argument files, run.json. The same few each time, and quickly.

`DRAWN=5000 python -m pytest tests/test_drawn_files.py` draws so many others of each.
"""

import contextlib
import io
import json
import os
import re
import shlex

import pytest
import torch
from safetensors.torch import save

import main_finetune
import main_pretrain
from models.convnextv2 import ConvNeXtV2
from tests.small_runs import TINY
from tests.test_flags import VALUES
from utils import record
from utils.errors import UsageError
from utils.layouts import to_huggingface, to_timm
from utils.weights import load_checkpoint

hypothesis = pytest.importorskip("hypothesis")
given, st, example = hypothesis.given, hypothesis.strategies, hypothesis.example

drawn = hypothesis.settings(
    max_examples=int(os.environ.get("DRAWN", 40)), derandomize="DRAWN" not in os.environ, database=None, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


def model() -> ConvNeXtV2:
    torch.manual_seed(0)
    return ConvNeXtV2(num_classes=4, stem_stride=1, **TINY)


def saved(state: dict, **how) -> bytes:
    torch.save(state, file := io.BytesIO(), **how)
    return file.getvalue()


def layouts() -> dict[str, bytes]:
    """By the ends of names: zip archives, which have checksums, torch's older format, and safetensors."""
    own = dict(model().state_dict())
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "own.pth": saved({"model": own, "optimizer": optimizer, "epoch": 3, "args": {"lr": 0.1}}),
        "timm.bin": saved(to_timm(own)),
        "older.pth": saved({"model": own}, _use_new_zipfile_serialization=False),
        "own.safetensors": save(own),
        "hf.safetensors": save(to_huggingface(own)),
    }


LAYOUTS = layouts()
PLACES = st.floats(0, 1, exclude_max=True)  # shares of the file


@st.composite
def damages(draw):
    """A cut, bytes more, or flipped bits, half of them in the first 2 % and the last, where headers are."""
    kind = draw(st.sampled_from(("cut", "more", "flips", "head", "tail")))
    if kind == "cut":
        end = draw(PLACES)
        return lambda data: data[: int(end * len(data))]
    if kind == "more":
        more = draw(st.binary(min_size=1, max_size=99))
        return lambda data: data + more
    flips = draw(st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=4))

    def flipped(data: bytes) -> bytes:
        data = bytearray(data)
        for place, bit in flips:
            place = {"flips": place, "head": place / 50, "tail": 1 - (1 - place) / 50}[kind]
            data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
        return bytes(data)

    return flipped


def refusal(call) -> str:
    """What a call is refused with; '' where it is not."""
    try:
        call()
    except (UsageError, SystemExit) as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_checkpoints(name, tmp_path):
    """Refused in a line that names the file, or weights that are finite; from an archive, the whole file's own."""
    path, whole, heard = tmp_path / name, model().state_dict(), {"refused": 0, "taken": 0}

    @drawn
    @given(damages())
    @example(lambda data: data)
    def check(damage):
        path.write_bytes(damage(LAYOUTS[name]))
        loaded = model()
        line = refusal(lambda: load_checkpoint(path, loaded))
        heard["refused" if line else "taken"] += 1
        if line:
            assert re.fullmatch(rf".*{name}.{{1,400}}", line)
            return
        for key, value in loaded.state_dict().items():
            assert value.isfinite().all()
            assert path.suffix == ".safetensors" or name == "older.pth" or torch.equal(value, whole[key]), key

    check()
    assert min(heard.values()) > 0, heard


SCRIPTS = main_pretrain, main_finetune
FLAGS = sorted({flag for script in SCRIPTS for flag in script.get_args_parser()._option_string_actions})
WORDS = st.sampled_from(FLAGS) | st.sampled_from(VALUES) | st.text(max_size=9) | st.just("@x.args")
LINES = st.lists(st.lists(WORDS, max_size=4).map(shlex.join) | st.text(max_size=30), max_size=4)


def test_argument_files(tmp_path, monkeypatch):
    """Parsed, or one line and exit code 2; --help is 0."""
    monkeypatch.chdir(tmp_path)

    @drawn
    @given(LINES.map(lambda lines: "\n".join(lines).encode(errors="replace")) | st.binary(max_size=60))
    def check(content):
        (tmp_path / "x.args").write_bytes(content)
        for script in SCRIPTS:
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
                code = refusal(lambda s=script: s.get_args_parser().parse_args(["@x.args"])) or "0"
            assert re.fullmatch(r"error: [^\n]*\n" if code == "2" else "", err.getvalue())

    check()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
NAMES = ("run", "args", "resumed_from", "launch")
STARTS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON)), max_size=2)


def test_records_of_runs(tmp_path, monkeypatch):
    """A run finds what to go on from, or says that it is gone; a file that makes no sense is put aside."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = main_pretrain.get_args_parser().parse_args(["--output_dir", str(tmp_path)])

    @drawn
    @given(JSON | STARTS.map(lambda starts: {"starts": starts}), st.sampled_from(("", "absent.pth")))
    def check(content, resume):
        (tmp_path / "run.json").write_text(json.dumps(content))
        refusal(lambda: record.choose(vars(args) | {"resume": resume}))

    check()
