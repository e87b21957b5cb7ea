"""Runs that are killed at random moments, for real (SIGKILL), and end with the bits of a run that never was.

`pytest tests/test_faults.py --kills 200` kills more often than the default.
"""

import os
import random
import signal
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

import engine_finetune
import main_finetune
import main_pretrain
from tests.small_runs import STEPS, load, records, same
from utils import checkpoint
from utils.amp import Amp
from utils.interrupts import EXIT_CODE
from utils.metrics import RunLog

pytestmark = pytest.mark.slow

FLAGS = {
    main_pretrain: "--epochs 3 --save_ckpt_steps 2 --save_ckpt_num 1 --vis_freq 0",
    main_finetune: "--epochs 3 --save_ckpt_steps 2 --save_ckpt_num 1 --mixup 0.8 --drop_path 0.3 --model_ema true "
    "--model_ema_decay 0.9 --model_ema_eval true",
}


class Moments:
    """Counts the moments at which a run can be hit, and hits it at one of them."""

    def __init__(self, target: int | None = None, number: int = signal.SIGKILL):
        self.target, self.number, self.passed = target, number, []

    def __call__(self, kind: str) -> None:
        self.passed.append(kind)
        if len(self.passed) - 1 == self.target:
            os.kill(os.getpid(), self.number)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Hooks in the step, in validation, inside the writing, renaming and pruning of checkpoints, and in log.txt."""
        step, torch_save, replace, unlink = Amp.step, torch.save, os.replace, Path.unlink
        classify, write_epoch = engine_finetune.classify, RunLog.epoch

        def hooked_step(*args, **kwargs):
            self("before a step")
            result = step(*args, **kwargs)
            self("after a step")
            return result

        def hooked_save(state, file):
            torch_save(state, file)
            size = file.tell()
            file.truncate(size // 2)
            self("while writing a checkpoint")  # with half of it on disk
            file.seek(0)
            file.truncate()
            torch_save(state, file)

        def hooked_replace(source, target):
            self("before the rename")
            replace(source, target)
            self("after the rename")

        def hooked_unlink(path, *args, **kwargs):
            unlink(path, *args, **kwargs)
            if path.name.startswith("checkpoint"):
                self("while pruning")

        def hooked_classify(*args):
            self("in validation")
            return classify(*args)

        def hooked_epoch(log, record):
            write_epoch(log, record)
            self("after a line of log.txt")

        patch.setattr(Amp, "step", hooked_step)
        patch.setattr(checkpoint.torch, "save", hooked_save)
        patch.setattr(os, "replace", hooked_replace)
        patch.setattr(Path, "unlink", hooked_unlink)
        patch.setattr(engine_finetune, "classify", hooked_classify)
        patch.setattr(RunLog, "epoch", hooked_epoch)


def start(scripts, script, output_dir: Path, moments: Moments) -> int:
    """Run a script in a forked process, which costs no import of torch; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            with pytest.MonkeyPatch.context() as patch:
                moments.install(patch)
                run = scripts.pretrain if script is main_pretrain else scripts.finetune
                result = run(*FLAGS[script].split(), "--output_dir", output_dir)
                code = result.code
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module", params=[main_pretrain, main_finetune], ids=["pretrain", "finetune"])
def undisturbed(request, scripts, tmp_path_factory):
    """A script, the folder of a run that nobody disturbed, and the moments that it passed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    moments = Moments()
    with pytest.MonkeyPatch.context() as patch:
        moments.install(patch)
        run = scripts.pretrain if request.param is main_pretrain else scripts.finetune
        assert run(*FLAGS[request.param].split(), "--output_dir", folder).code == 0
    return request.param, folder, moments.passed


def assert_same_end(folder: Path, other: Path) -> None:
    a, b = load(folder / "checkpoint-2.pth"), load(other / "checkpoint-2.pth")
    for key in a.keys() - {"args", "run"}:
        assert same(a[key], b[key]), key
    assert records(folder) == records(other)
    assert not list(folder.glob(".lock"))


def test_killed_runs_lose_nothing(undisturbed, scripts, tmp_path, pytestconfig):
    script, folder, passed = undisturbed
    kills, rng, hit, attempt = pytestconfig.getoption("kills") // 2, random.Random(0), Counter(), 0
    while hit.total() < kills:
        attempt += 1
        output_dir = tmp_path / f"run{attempt}"
        while True:  # the same command again and again, until it gets through
            target = rng.randrange(len(passed)) if hit.total() < kills else None
            code = start(scripts, script, output_dir, Moments(target))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            hit[target] += 1
        assert_same_end(output_dir, folder)
    assert len(hit) > kills / 3, "the moments were always the same few"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("kind", ["before a step", "after a step", "while writing a checkpoint", "in validation"])
def test_signals_stop_at_a_step_boundary(undisturbed, scripts, tmp_path, number, kind):
    script, folder, passed = undisturbed
    if kind not in passed:
        pytest.skip("pre-training has no validation")
    where = [i for i, moment in enumerate(passed) if moment == kind]
    code = start(scripts, script, tmp_path, Moments(where[len(where) // 2], number))
    assert code == EXIT_CODE
    epoch, step, _ = checkpoint.numbered(tmp_path)[0]
    steps = passed[: where[len(where) // 2]].count("before a step") + (kind == "before a step")
    if steps % STEPS == 0 and kind in ("while writing a checkpoint", "in validation"):
        assert (epoch, step) == (steps // STEPS - 1, float("inf"))
    else:  # the signal is seen when the step is done; one that comes while its checkpoint is written, after the next
        late = kind == "while writing a checkpoint"
        assert epoch * STEPS + step == steps + late
    assert not list(tmp_path.glob(".lock"))
    assert start(scripts, script, tmp_path, Moments()) == 0
    assert_same_end(tmp_path, folder)


def test_every_kind_of_moment_is_passed(undisturbed):
    script, _, passed = undisturbed
    expected = {"before a step", "after a step", "while writing a checkpoint", "before the rename", "after the rename"}
    expected |= {"while pruning", "after a line of log.txt"} | ({"in validation"} if script is main_finetune else set())
    assert set(passed) == expected


def test_a_signal_in_validation_saves_an_epoch_that_was_not_due(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_finetune, "score", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), {})[1])
        assert scripts.finetune("--output_dir", tmp_path, "--save_ckpt_freq", 5).code == EXIT_CODE
    assert [path.name for *_, path in checkpoint.numbered(tmp_path)] == ["checkpoint-0.pth"]
