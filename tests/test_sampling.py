"""utils/data/sampling.py: samples that depend on their key alone, steps however work is spread, streams, bad images."""

import dataclasses
import gc
import itertools
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import datasets
import main_pretrain
from tests.pictures import broken_files, finetune_args, picture, pretrain_args, save
from utils.data.balance import first_of_each_class
from utils.data.files import ImageTree
from utils.data.images import BadImage
from utils.data.sampling import StepSampler, TrainSamples, with_transform
from utils.data.shapes import Shapes
from utils.data.transforms import pretrain_transform
from utils.errors import UsageError, run_cli
from utils.seeding import seed_all, seed_words

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which torchvision announces to drop


def test_training_replaces_broken_images(spoiled, logs):
    dataset = ImageTree(str(spoiled / "train"), "--data_path")
    dataset.transform = pretrain_transform((224, 224), 3, 0.2)
    samples = TrainSamples(dataset, seed=3)
    bad = [i for i, path in enumerate(dataset.paths) if "0-" in path]
    assert len(bad) == len(broken_files())
    takers = []
    for epoch, index in itertools.product((5, 6), bad):
        ((image, _),), found = samples.__getitems__([(epoch, index)])
        assert (list(found), dataset.paths[index] in found[index]) == ([index], True)
        drawn = (seed_words(3, epoch, index, i)[0] % len(dataset) for i in itertools.count())
        takers.append(next(i for i in drawn if i not in bad))
        seed_all(3, epoch, index)  # under this sample's own seed
        assert torch.equal(image, dataset[takers[-1]][0])
    assert len({*takers}) > len(takers) / 4


def test_each_unreadable_image_is_reported_once_and_counted(spoiled, logs):
    """Over epochs and workers; what takes a place and is unreadable itself is told in its own turn."""
    flags = {"data_set": "image_folder", "data_path": spoiled / "train", "input_size": 32, "batch_size": 7}
    dataset = datasets.build_pretrain_dataset(pretrain_args(**flags))
    bad = [i for i, path in enumerate(dataset.paths) if "0-" in path]
    for workers in (0, 2):
        logs.clear()
        loader = datasets.build_train_loader(dataset, pretrain_args(num_workers=workers, **flags))
        for epoch in (0, 1):
            assert sum(len(batch.data[0]) for step in loader.steps(epoch) for batch in step) == 21
            assert sorted(loader.bad) == bad
        lines = [line for line in logs.text.splitlines() if "another takes" in line]
        assert len(lines) == len(bad)
        assert all(any(f"another takes its place: {dataset.paths[i]}" in line for line in lines) for i in bad)
    for given, allowed in (({}, 4), ({"max_bad_images": 0.01}, 0.21), ({"max_bad_images": 0.5}, 10.5)):
        loader = datasets.build_train_loader(dataset, pretrain_args(num_workers=0, **flags, **given))
        assert loader.max_bad == pytest.approx(allowed)  # a few of a small folder, where the flag is not given


class OnlyBroken(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        raise BadImage(f"{index}.jpg", "broken")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_ends_in_one_line(num_workers, capsys, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # or the worker is waited for for 5 s
    args = finetune_args(batch_size=4, num_workers=num_workers)
    steps = datasets.build_train_loader(OnlyBroken(), args).steps(0)
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: next(next(steps)))
    gc.collect()  # while the worker is not waited for
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1
    assert "100 unreadable images in a row" in errors[0]
    assert "Traceback" not in errors[0]


def test_first_of_each_class(folders):
    dataset, _ = datasets.build_dataset(True, finetune_args(data_set="image_folder", data_path=folders / "train"))
    own = dataset.transform
    few = first_of_each_class(dataset, 3, "it")
    chosen = [dataset.paths[i] for i in few.indices]
    expected = [folders / "train" / name / f"{j}.png" for name in ("ant", "bee", "cat") for j in range(3)]
    assert (len(few), chosen) == (9, [str(path) for path in expected])
    assert len(first_of_each_class(dataset, 99, "it")) == len(dataset)
    assert (few[4][1], few[4][0].shape) == (1, (3, 224, 224))
    whole = with_transform(dataset, torch.clone)
    np.testing.assert_array_equal(whole[0][0].permute(1, 2, 0), np.asarray(Image.open(expected[0])))
    assert dataset.transform is own


def test_first_of_each_class_of_labels_in_a_tensor():
    """As torchvision's MNIST has them: torch/mnist."""
    dataset = Stream(6)
    dataset.targets = torch.tensor([1, 0, 1, 1, 0, 0])
    assert first_of_each_class(dataset, 2, "it").indices == [0, 1, 2, 4]


def test_first_of_each_class_needs_labels(tmp_path):
    save(picture(), tmp_path / "a" / "0.png")
    files = datasets.build_dataset(True, finetune_args(data_set="torch/image_folder", data_path=tmp_path))[0]
    assert len(first_of_each_class(files, 1, "it")) == 1
    with pytest.raises(UsageError, match=r"--images_per_class 2: it does not list its labels; leave it out"):
        first_of_each_class(Stream(5), 2, "it")


def drawn(size=32, count=10):
    transform = datasets.build_transform(True, finetune_args(input_size=size))
    return Shapes("train", size=size, num_samples=count, transform=transform)


def keyed(samples):
    return lambda key: samples.__getitems__([key])[0][0]


def test_samples_depend_on_seed_epoch_and_index_alone():
    samples = keyed(TrainSamples(drawn(), seed=1, sample_mask=partial(torch.rand, 4)))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(5)]
    first = {key: samples(key) for key in keys}
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    for key in reversed(keys):
        image, label, mask = samples(key)
        assert torch.equal(image, first[key][0])
        assert label == key[1]
        assert torch.equal(mask, first[key][2])
    assert len({tuple(mask.tolist()) for _, _, mask in first.values()}) == len(keys)
    for index in range(5):
        assert not torch.equal(first[0, index][0], first[1, index][0])
        assert not torch.equal(first[0, index][0], keyed(TrainSamples(drawn(), seed=2))((0, index))[0])


def epoch_of(loader, epoch, start_step=0):
    return [[part.clone() for part in batch.data] for step in loader.steps(epoch, start_step) for batch in step]


def test_loader_does_not_depend_on_workers():
    loaders = [
        datasets.build_train_loader(
            drawn(), finetune_args(batch_size=2, update_freq=2, num_workers=n, seed=4), partial(torch.rand, 3)
        )
        for n in (0, 2)
    ]
    epochs = []
    for epoch in (0, 1):  # the workers live on
        one, other = (epoch_of(loader, epoch) for loader in loaders)
        assert len(one) == len(other) == 5
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        epochs.append(torch.cat([labels for _, labels, _ in one]).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]  # also on one process, every epoch has its own order
    again = epoch_of(loaders[1], 0, start_step=1)  # a resume in the middle
    expected = epoch_of(loaders[0], 0)[2:]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, expected, strict=True))


SPREADS = [
    (num_samples, batch_size, update_freq, world_size, batch_divisor)
    for num_samples in (1, 2, 5, 7, 8, 11, 12, 23, 24, 25, 47, 60)
    for batch_size in (1, 2, 4, 6)
    for update_freq in (1, 2, 3)
    for world_size in (1, 2, 3, 5)
    for batch_divisor in (1, 2)
    if batch_size % batch_divisor == 0
]


def by_step(sampler, start_step=0):
    """The batches of every step, as the sampler yields them one after the other."""
    batches = iter(sampler)
    steps = [[next(batches) for _ in sampler.step(step)] for step in range(start_step, sampler.steps)]
    assert next(batches, None) is None
    return steps


def samples_of_steps(num_samples, batch_size, update_freq, world_size, batch_divisor):
    """The samples of each step over all processes, weights checked; and how many batches were another process's."""
    samplers = [
        StepSampler(num_samples, batch_size, update_freq, rank, world_size, seed=5, batch_divisor=batch_divisor)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(3)
    found, borrowed = [], 0
    for step, ranks in enumerate(zip(*map(by_step, samplers), strict=True)):
        assert len(set(map(len, ranks))) == 1  # or gradients could not be averaged
        assert 1 <= len(ranks[0]) <= update_freq
        weights = [weight for sampler in samplers for *_, weight in sampler.step(step)]
        batches = [keys for batches in ranks for keys in batches]
        samples = [key for keys, weight in zip(batches, weights, strict=True) if weight for key in keys]
        assert len(set(samples)) == len(samples)
        for keys, weight in zip(batches, weights, strict=True):
            assert 0 < len(keys) <= batch_size
            assert len(keys) % batch_divisor == 0
            if weight:  # every sample has the same part in the mean of the gradients over processes
                assert weight / len(keys) / world_size == pytest.approx(1 / len(samples))
            else:
                assert len(keys) == batch_divisor
                assert set(keys) <= set(samples)
                borrowed += 1
        found.append(set(samples))
    return found, borrowed


def test_steps_hold_the_same_samples_however_they_are_spread():
    """Every way to make up a global batch; the rest is a step from a quarter of it on."""
    borrowed, cases = 0, Counter()
    for total in (1, 2, 4, 6, 8, 12, 16, 30):
        for num_samples in {*range(total, 2 * total), 3 * total + total // 4}:
            for batch_divisor in {1, 2 - total % 2}:
                full, rest = divmod(num_samples, total)
                rest -= rest % batch_divisor
                sizes = [total] * full + [rest] * (rest >= total / 4)
                expected = None
                sides = itertools.product(range(batch_divisor, total + 1, batch_divisor), range(1, total + 1))
                for batch_size, world_size in sides:
                    if total % (batch_size * world_size):
                        continue
                    update_freq = total // (batch_size * world_size)
                    found, more = samples_of_steps(num_samples, batch_size, update_freq, world_size, batch_divisor)
                    expected, borrowed = expected or found, borrowed + more
                    assert list(map(len, found)) == sizes, (num_samples, batch_size, update_freq, world_size)
                    assert found == expected, (num_samples, batch_size, update_freq, world_size)
                    cases[rest > 0, len(sizes) > full] += 1
    assert borrowed
    assert min(cases[False, False], cases[True, False], cases[True, True]) > 0


def test_epochs_and_seeds_have_their_own_order():
    sampler = StepSampler(50, 10)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler.seed = seed
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for _, index in batch])
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    sampler.set_epoch(0)
    assert orders[2] == [index for batch in sampler for _, index in batch]


@pytest.mark.parametrize(("world_size", "batch_divisor"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_a_start_in_the_middle_goes_on_as_before(world_size, batch_divisor):
    sampler = StepSampler(45, 4, 2, 0, world_size, seed=1, batch_divisor=batch_divisor)
    whole = by_step(sampler)
    assert len(sampler) == sum(map(len, whole))
    for start in range(len(whole) + 1):
        sampler.set_epoch(0, start)
        assert by_step(sampler, start) == whole[start:]
        assert len(sampler) == sum(map(len, whole[start:]))
        assert sampler.steps == len(whole)


class Numbers(Dataset):
    def __init__(self, count):
        self.values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index], index


def test_loss_weights_weigh_every_sample_of_a_step_alike(monkeypatch):
    for num_samples, batch_size, update_freq, world_size, batch_divisor in SPREADS:
        if num_samples not in (11, 25) or num_samples < batch_size * update_freq * world_size:
            continue
        monkeypatch.setattr(datasets, "get_world_size", lambda n=world_size: n)
        args = finetune_args(batch_size=batch_size, update_freq=update_freq, num_workers=0)
        loaders = []
        for rank in range(world_size):
            monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
            loaders.append(datasets.build_train_loader(Numbers(num_samples), args, batch_divisor=batch_divisor))
        assert len({len(loader) for loader in loaders}) == 1
        count = 0
        for steps in zip(*(loader.steps(0) for loader in loaders), strict=True):
            spread = [list(step) for step in steps]
            batches = [batch for step in spread for batch in step]
            values = torch.cat([batch.data[0] for batch in batches if batch.loss_weight])
            # the mean over processes of the sum over batches, as gradients are combined
            combined = sum(batch.loss_weight * batch.data[0].mean() for batch in batches) / world_size
            torch.testing.assert_close(combined, values.mean())
            assert sum(batch.loss_weight for batch in batches) / world_size == pytest.approx(1)
            for step in spread:
                assert [batch.last for batch in step] == [False] * (len(step) - 1) + [True]
            count += 1
        assert count == len(loaders[0])


def test_fewer_images_than_a_step():
    with pytest.raises(UsageError, match=r"--batch_size 4: a step takes 12 images .* has 11"):
        datasets.build_train_loader(Numbers(11), finetune_args(batch_size=4, update_freq=3, num_workers=0))
    assert len(datasets.build_train_loader(Numbers(12), finetune_args(batch_size=4, update_freq=3, num_workers=0))) == 1


def test_batches_are_loaded_when_they_are_asked_for():
    read = []

    class Watched(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = datasets.build_train_loader(Watched(24), finetune_args(batch_size=2, update_freq=3, num_workers=0))
    for step, batches in enumerate(loader.steps(0)):
        for i, batch in enumerate(batches):
            assert len(read) == 6 * step + 2 * i + 2
            assert batch.last == (i == 2)
    assert len(read) == 24


class Stream(IterableDataset):
    """Gives `count` samples (epoch, number) and claims `claimed`; as its own reader, as timm's, of shards with `wds/`.

    Shards are spread over processes and workers, and cut or repeated to one length on several processes, as timm does.
    """

    def __init__(self, count, claimed=None, shards=1):
        self.count, self.num_samples, self.epoch, self.workers = count, claimed or count, None, None
        self.reader, self.ds, self.dist_rank, self.dist_num_replicas = self, None, 0, 1
        self.split_info = SplitInfo([range(i, count, shards) for i in range(shards)])

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.ds is None:
            first, every = self.dist_rank * workers + worker, self.dist_num_replicas * workers
            self.ds = [number for shard in self.split_info.filenames[first::every] for number in shard]
        numbers = iter(self.ds)
        if self.dist_num_replicas > 1:
            numbers = itertools.islice(numbers, -(-self.count // (self.dist_num_replicas * workers)))
        return ((torch.tensor(-1 if self.epoch is None else self.epoch), number) for number in numbers)


@dataclasses.dataclass
class SplitInfo:
    filenames: list
    shard_lengths: tuple = ()


@pytest.mark.parametrize(
    ("count", "claimed", "steps"),
    [
        (12, None, 3),
        (11, None, 3),  # the rest of 3 is more than a quarter
        (9, None, 3),
        (4, None, 1),
        (11, 16, 4),  # the stream ends before its word
        (19, 11, 3),  # and after it
    ],
)
def test_streams(count, claimed, steps):
    """As many full steps as there are of files, also where the stream has to be read on from its beginning."""
    args = finetune_args(batch_size=2, update_freq=2, num_workers=0)
    stream = Stream(count, claimed)
    loader = datasets.build_train_loader(stream, args, batch_divisor=1)
    assert stream.workers is None
    for epoch in (0, 5):
        found = [list(step) for step in loader.steps(epoch)]
        assert len(found) == len(loader) == steps
        for step in found:
            assert [batch.loss_weight for batch in step] == [0.5, 0.5]
            assert [batch.last for batch in step] == [False, True]
        numbers = torch.cat([batch.data[1] for step in found for batch in step]).tolist()
        again = list(range(count // 2 * 2))
        assert numbers == (again * 9)[: 4 * steps]
        assert {e for step in found for batch in step for e in batch.data[0].tolist()} == {epoch}
        resumed = [batch.data[1].tolist() for step in loader.steps(epoch, start_step=1) for batch in step]
        assert [n for batch in resumed for n in batch] == numbers[4:]


def test_the_steps_of_a_stream_depend_on_the_global_batch_alone(monkeypatch):
    """Processes whose parts differ take the same number of batches, or their collectives would not meet."""
    for claimed in (12, 14, 15, 16, 40):
        for processes, batch_size, update_freq in ((1, 12, 1), (2, 6, 1), (3, 2, 2), (1, 3, 4)):
            monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
            args = finetune_args(batch_size=batch_size, update_freq=update_freq, num_workers=0)
            for count in (12, 13, 29):
                loader = datasets.build_train_loader(Stream(count, claimed), args)
                taken = [len(list(step)) for step in loader.steps(0)]
                assert taken == [update_freq] * (claimed // 12 + (claimed % 12 >= 3))


def test_a_stream_without_a_batch_is_one_line():
    loader = datasets.build_train_loader(Stream(3, 9), finetune_args(batch_size=4, num_workers=0))
    with pytest.raises(UsageError, match="--batch_size 4: no loader process has as many images of the stream"):
        next(next(loader.steps(0)))


def test_streams_know_the_loader_processes():
    stream = Stream(12)
    datasets.build_train_loader(stream, finetune_args(batch_size=2, num_workers=2))
    assert stream.workers == 2
    with pytest.raises(UsageError, match=r"--batch_size 64: .* has 12"):
        datasets.build_train_loader(stream, finetune_args(num_workers=0))


@pytest.mark.parametrize(
    ("shards", "processes", "workers", "lowered"),
    [(4, 2, 2, None), (4, 2, 3, 2), (5, 2, 3, 2), (1, 1, 10, 1), (2, 2, 0, None), (7, 3, 1, None)],
)
def test_each_loader_process_has_a_shard(shards, processes, workers, lowered, monkeypatch, logs):
    monkeypatch.setattr(datasets, "get_world_size", lambda: processes)
    args = finetune_args(data_set="wds/x", batch_size=2, num_workers=workers)
    stream = Stream(40, shards=shards)
    loader = datasets.build_train_loader(stream, args).loader
    assert loader.num_workers == (stream.workers or 0) == (workers if lowered is None else lowered)
    line = f"--num_workers {workers}: lowered to {lowered}, for {shards} shards in all"
    assert (line in logs.text) == (lowered is not None)
    assert args.num_workers == workers


def test_fewer_shards_than_processes(monkeypatch):
    monkeypatch.setattr(datasets, "get_world_size", lambda: 3)
    for workers in (0, 4):
        args = finetune_args(data_set="wds/x", batch_size=2, num_workers=workers)
        with pytest.raises(UsageError, match="--data_set wds/x: 2 shards for 3 processes; start 2, or write more"):
            datasets.build_train_loader(Stream(40, shards=2), args)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_shards_counts_every_image_once(workers, monkeypatch):
    args = finetune_args(data_set="wds/x", batch_size=4, num_workers=workers)
    for processes, shards in [(n, s) for n in (1, 2, 3) for s in (1, 2, 3, 5)] if not workers else [(2, 3), (2, 1)]:
        monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
        seen, claimed = [], 0
        for rank in range(processes):
            monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
            stream = Stream(23, shards=shards)
            stream.dist_rank, stream.dist_num_replicas = rank, processes  # as timm finds them
            stream.split_info.shard_lengths = [len(shard) for shard in stream.split_info.filenames]
            loader = datasets.build_eval_loader(stream, args, spread=True)
            seen += [number for batch in loader for number in batch[1].tolist()]
            claimed += len(loader.dataset)
        assert sorted(seen) == list(range(23)), (processes, shards)
        assert claimed == 23


def test_evaluation_of_other_streams_says_what_it_cannot(monkeypatch, logs):
    for processes, told in ((1, False), (2, True)):
        monkeypatch.setattr(datasets, "get_world_size", lambda n=processes: n)
        datasets.build_eval_loader(Stream(9), finetune_args(data_set="tfds/x", num_workers=0), spread=True)
        assert ("--data_set tfds/x: on several processes, images may count twice" in logs.text) == told


class Begun(Stream):
    def __iter__(self):
        self.reader.ds = "begun"
        return iter([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 9)


def test_pictures_do_not_begin_the_stream():
    """A reader that has begun before its workers are forked gives each of them the same part."""
    stream = Begun(40)
    assert main_pretrain.picture_images(stream, pretrain_args(data_set="wds/x", input_size=32)).shape == (8, 3, 32, 32)
    assert stream.reader.ds is None


def test_loaders_compare_the_number_of_images_between_processes(monkeypatch):
    compared = []
    monkeypatch.setattr(datasets, "check_same", lambda *values: compared.append(values))
    args = finetune_args(batch_size=4, num_workers=0)
    datasets.build_train_loader(Numbers(12), args)
    datasets.build_train_loader(Stream(9), args)
    datasets.build_eval_loader(Numbers(5), args, spread=True)
    assert compared == [(12, "training images"), (9, "training images"), (5, "evaluation images")]


@pytest.mark.parametrize(("count", "world_size"), [(11, 1), (11, 2), (11, 3), (2, 3)])
def test_evaluation_sees_every_image_once(monkeypatch, count, world_size):
    args = finetune_args(batch_size=4, num_workers=0)
    monkeypatch.setattr(datasets, "get_world_size", lambda: world_size)
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(datasets, "get_rank", lambda r=rank: r)
        for batch in datasets.build_eval_loader(Numbers(count), args, spread=True):
            assert len(batch[1]) <= 4
            seen += batch[1].tolist()
        whole = datasets.build_eval_loader(Numbers(count), args, spread=False)
        assert [i for batch in whole for i in batch[1].tolist()] == list(range(count))
    assert sorted(seen) == list(range(count))


def test_evaluation_does_not_depend_on_workers():
    transform = datasets.build_transform(False, finetune_args(input_size=32))
    dataset = Shapes("val", size=32, num_samples=7, transform=transform)
    one, other = (
        list(datasets.build_eval_loader(dataset, finetune_args(batch_size=3, num_workers=n), True)) for n in (0, 2)
    )
    assert [len(labels) for _, labels in one] == [3, 3, 1]
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
