"""Unreadable images through the entry scripts: replaced, left out, counted, listed; too many of them end the run."""

import shutil

import pytest

from tests.small_runs import STEPS, killed_after, load, records, same
from tests.test_distributed import launch

BAD = ("c0/000.png", "c1/005.png", "c3/039.png")  # of 40 for training, and the first two of 22 for validation


@pytest.fixture
def damaged(scripts, tmp_path):
    for split, folder in (("train", scripts.train), ("val", scripts.val)):
        shutil.copytree(folder, tmp_path / split)
        for name in BAD:
            if (path := tmp_path / split / name).exists():
                path.write_bytes(path.read_bytes()[:100])
    return "--data_path", tmp_path / "train", "--epochs", 2


def names_in(path):
    return sorted(name for line in path.read_text().splitlines() for name in BAD if f"train/{name}: " in line)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_with_bad_images_resumes_bit_for_bit(stage, scripts, damaged, tmp_path):
    """From inside an epoch; the images met before count in its end."""
    flags = (*damaged, "--save_ckpt_steps", 1, "--max_bad_images", 0.075)
    flags += ("--eval_data_path", tmp_path / "val") if stage == "finetune" else ("--vis_freq", 0)
    run = getattr(scripts, stage)
    whole = run(*flags, "--output_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    for name in BAD:
        assert whole.out.count(f"another takes its place: {tmp_path / 'train' / name}: ") == 1
    with killed_after(STEPS + 4):
        run(*flags, "--output_dir", tmp_path / "parts")
    result = run(*flags, "--output_dir", tmp_path / "parts", "--num_workers", 2)
    assert "resumed from" in result.out, result.err
    assert "3 of 40 images were unreadable in epoch 1" in result.out
    one, other = (load(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "parts"))
    assert all(same(one[key], other[key]) for key in ("model", "optimizer"))
    assert records(tmp_path / "whole")[-1] == records(tmp_path / "parts")[-1]
    assert names_in(tmp_path / "parts/bad_images.txt") == [*BAD]
    if stage == "finetune":
        assert whole.out.count("(20 images), 2 unreadable left out") == 2
        assert whole.out.count("unreadable image, not evaluated: ") == 2  # not once an epoch


@pytest.mark.slow
def test_too_many_end_the_run_after_the_epoch(scripts, damaged, tmp_path):
    flags = (*damaged, "--output_dir", tmp_path / "out", "--save_ckpt_freq", 2)
    result = scripts.pretrain(*flags, "--max_bad_images", 0.05)
    (line,) = result.err.splitlines()
    assert result.code == 2
    assert "--max_bad_images 0.05: 3 of 40 images were unreadable in epoch 0" in line
    assert line.endswith("out/bad_images.txt; mend them, or give 0.075")
    assert names_in(tmp_path / "out/bad_images.txt") == [*BAD]
    result = scripts.pretrain(*flags, "--max_bad_images", 0.075)  # as the line says
    assert (result.code, "resumed from" in result.out) == (0, True), result.err
    assert scripts.pretrain(*damaged, "--output_dir", tmp_path / "all").code == 0  # a few may be, where nothing is said
    assert same(*(load(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("out", "all")))


@pytest.mark.slow
def test_two_processes_are_as_one(scripts, damaged, tmp_path):
    flags = (*damaged, "--eval_data_path", tmp_path / "val", "--max_bad_images", 0.075)
    for processes in (1, 2):
        done = launch(
            scripts, "main_finetune", processes, tmp_path / str(processes), *flags, "--batch_size", 8 // processes,
            "--mixup", 0, "--drop_path", 0,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("(20 images), 2 unreadable left out") == 2
        assert done.stdout.count("3 of 40 images were unreadable") == 2
        assert done.stdout.count("another takes its place: ") == 3
        assert names_in(tmp_path / str(processes) / "bad_images.txt") == [*BAD]
    for one, other in zip(*(records(tmp_path / name) for name in "12"), strict=True):
        for key in ("train_loss", "test_loss", "test_acc1", "test_acc5"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)
    done = launch(scripts, "main_finetune", 2, tmp_path / "3", *flags[:-1], 0.05, "--batch_size", 4)
    assert done.returncode != 0
    assert done.stderr.count("error: --max_bad_images 0.05: 3 of 40 images were unreadable in epoch 0") == 2
