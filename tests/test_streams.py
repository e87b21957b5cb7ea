"""wds/ streams of real shards, through the entry scripts; without webdataset there is nothing to test here."""

import io
import json
import tarfile
from collections import Counter

import pytest
import torch

import datasets
import main_pretrain
from models.fcmae import FCMAE
from tests.small_runs import COMMON, records
from tests.test_distributed import launch

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def shards(scripts, tmp_path_factory):
    """40 training images in 3 shards, 22 for validation in 2; each shard holds a class or two of its own."""
    root, splits = tmp_path_factory.mktemp("shards"), {}
    for split, source, count in (("train", scripts.train, 3), ("validation", scripts.val, 2)):
        files, names, lengths = sorted(source.glob("*/*.png")), [], []
        for shard in range(count):
            names.append(f"{split}-{shard:04}.tar")
            mine = [file for file in files if int(file.parent.name[1:]) % count == shard]
            lengths.append(len(mine))
            with tarfile.open(root / names[-1], "w") as tar:
                for file in mine:
                    for ending, content in (("png", file.read_bytes()), ("cls", file.parent.name[1:].encode())):
                        info = tarfile.TarInfo(f"{file.stem}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(files)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def stream(shards):
    return ["--data_set", "wds/x", "--data_path", shards, "--eval_data_path", shards]


def test_pre_training(shards, scripts, tmp_path, monkeypatch):
    """Masks are drawn anew for every batch, step and epoch, and differ between processes."""
    masks, draw = [], FCMAE.gen_random_mask

    def drawn(self, imgs, mask_ratio, generator=None):
        masks.append(draw(self, imgs, mask_ratio, generator))
        return masks[-1]

    monkeypatch.setattr(FCMAE, "gen_random_mask", drawn)
    flags = ("--data_path", shards, "--data_set", "wds/x", "--input_size", 32, "--epochs", 2, "--vis_freq", 0)
    for rank in (0, 1):
        monkeypatch.setattr("engine_pretrain.get_rank", lambda r=rank: r)
        result = scripts.pretrain(*flags, "--update_freq", 2, "--batch_size", 4, "--num_workers", 8)
        assert result.code == 0, result.err
        assert "--num_workers 8: lowered to 3, for 3 shards in all" in result.out
        assert "40 images, 8 per optimizer step, 5 steps per epoch" in result.out
    assert [mask.shape for mask in masks] == [(4, 16)] * (2 * 2 * 5 * 2)
    rows = [tuple(row.tolist()) for row in torch.cat(masks)]
    assert {sum(row) for row in rows} == {10}  # 6 of 16 stay visible
    assert len(set(rows)) > 0.95 * len(rows)  # of 8008 there are, 160 are drawn


def test_pictures_leave_each_worker_its_own_shards(shards):
    flags = [*COMMON.split(), *stream(shards)[:4], "--batch_size", 5, "--num_workers", 3]
    args = main_pretrain.get_args_parser().parse_args([str(flag) for flag in flags])
    dataset = datasets.build_pretrain_dataset(args)
    loader = datasets.build_train_loader(dataset, args)
    assert main_pretrain.picture_images(dataset, args).shape == (8, 3, 16, 16)
    labels = Counter(int(label) for step in loader.steps(0) for batch in step for label in batch.data[1])
    assert sum(labels.values()) == 40
    assert set(labels) == {0, 1, 2, 3}


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2), (3, 1)])
def test_evaluation_counts_every_image_once(processes, workers, shards, scripts, tmp_path):
    """Two shards, so the third process has none; trained on three, so that each has one."""
    flags = ["--nb_classes", 4, "--num_workers", workers, "--epochs", 2, "--batch_size", 4, "--warmup_epochs", 0]
    done = launch(scripts, "main_finetune", processes, tmp_path, *stream(shards), *flags, "--lr", 0, "--min_lr", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("(22 images)") == 2
    assert "40 images of 4 classes" in done.stdout
    alone = scripts.finetune(
        *stream(shards), *flags, "--lr", 0, "--min_lr", 0, "--epochs", 1, "--output_dir", tmp_path / "alone"
    )
    assert alone.code == 0, alone.err
    for line in records(tmp_path):
        assert line["test_loss"] == pytest.approx(records(tmp_path / "alone")[0]["test_loss"], rel=1e-6)


def test_fewer_shards_than_processes_is_one_line(shards, scripts, tmp_path):
    done = launch(scripts, "main_pretrain", 4, tmp_path, *stream(shards)[:4], "--batch_size", 2)
    assert done.returncode != 0
    assert done.stderr.count("error: --data_set wds/x: 3 shards for 4 processes; start 3, or write more") == 4
