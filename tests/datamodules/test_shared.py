"""Tasks of one pool: one set of inputs for all of them, drawn once, labels beside it, and no label in fit."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.base import LabelledDataset, TaskDataModule, collate, without_target
from datamodules.joint import JointDataModule
from datamodules.shared import SharedDataset, pools
from datamodules.stream import EndlessStream
from nscmerge.errors import ConfigError, ShapeError
from tests.fakes.pools import pooled_data, pooled_tasks


def test_pools_are_tasks_of_equal_pool_where_the_first_stands():
    tasks = pooled_tasks()
    assert pools(tasks) == [("a", "b"), "c"]
    tasks["c"].pool = "texts of others"  # as a data set's images with people alone
    assert pools(tasks) == [("a", "b"), "c"]
    tasks["c"].pool = "texts"
    assert pools(tasks) == [("a", "c", "b")]
    assert pools({"x": pooled_tasks()["c"], "y": pooled_tasks()["c"]}) == ["x", "y"]  # no pool is no pool


def test_off_is_one_set_of_inputs_per_task():
    data = pooled_data(share=False)
    assert data.batch_keys == ["a", "c", "b"]
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == ["a", "c", "b"]
    assert not torch.equal(batch["a"]["input_ids"], batch["b"]["input_ids"])  # each draws for itself


def test_fit_and_validate_give_every_pool_once_and_no_label():
    data = pooled_data(share=True)
    data.setup("fit")
    for batch in [*itertools.islice(data.train_dataloader(), 6), *data.val_dataloader()]:
        assert set(batch) <= {("a", "b"), "c"}
        assert all(set(inputs) == {"input_ids", "attention_mask"} for inputs in batch.values())
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for dataset in loader.dataset.datasets.values():
            assert all("target" not in dataset[i] for i in range(len(dataset)))


def test_a_label_does_not_slip_through_a_pool_whose_tasks_forget_to_drop_it():
    tasks = pooled_tasks()
    for task in tasks.values():
        task.unlabelled = task.dataset
    data = JointDataModule(tasks, batch_size=2, share_batches=True)
    for batch in [next(iter(data.train_dataloader())), *data.val_dataloader()]:
        assert all("target" not in inputs for inputs in batch.values())


def test_a_pool_draws_its_own_order_once_on_any_ranks_and_workers():
    sets = {
        ("a", "b"): [{"x": torch.tensor([i])} for i in range(10)],
        "c": [{"x": torch.tensor([i])} for i in range(7)],
    }
    alone = EndlessStream({"a": sets["a", "b"], "c": sets["c"]}, 4, seed=3)
    expected = [alone.batch(step) for step in range(6)]
    for world_size, workers in itertools.product((1, 2), (0, 2)):
        for rank in range(world_size):
            stream = EndlessStream(sets, 4, rank, world_size, seed=3)
            got = itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), 6)
            for batch, whole in zip(got, expected, strict=True):
                assert torch.equal(batch["a", "b"]["x"], whole["a"]["x"][rank::world_size])
                assert torch.equal(batch["c"]["x"], whole["c"]["x"][rank::world_size])


def test_labelled_loaders_hold_one_target_per_task_beside_the_same_inputs():
    shared, plain = pooled_data(share=True, val_seed=3), pooled_data(share=False, val_seed=3)
    for split, samples in (("val", 6), ("test", None), ("test", 4)):
        together = shared.labelled_dataloaders(split, samples)
        apart = plain.labelled_dataloaders(split, samples)
        assert list(together) == [("a", "b"), "c"]
        for batch, a, b in zip(together["a", "b"], apart["a"], apart["b"], strict=True):
            assert set(batch["target"]) == {"a", "b"}
            assert torch.equal(batch["input_ids"], a["input_ids"])
            assert torch.equal(batch["input_ids"], b["input_ids"])
            assert torch.equal(batch["target"]["a"], a["target"])
            assert torch.equal(batch["target"]["b"], b["target"])
        for batch, c in zip(together["c"], apart["c"], strict=True):
            assert torch.equal(batch["target"], c["target"])
    assert [len(loader.dataset) for loader in shared.test_dataloader()] == [10, 12]


class Images(LabelledDataset):
    """Counts what is read."""

    def __init__(self, label):
        self.label, self.read = label, {"inputs": 0, "target": 0}

    def __len__(self):
        return 3

    def inputs(self, index):
        self.read["inputs"] += 1
        return {"x": torch.full((2,), float(index))}

    def target(self, index):
        self.read["target"] += 1
        return torch.tensor(self.label + index)


def test_images_are_read_once_and_labels_only_where_they_are_asked_for():
    sets = {"a": Images(10), "b": Images(20)}
    shared = SharedDataset(sets)
    batch = collate([shared[i] for i in range(3)])
    assert batch["x"][:, 0].tolist() == [0, 1, 2]
    assert {task: target.tolist() for task, target in batch["target"].items()} == {"a": [10, 11, 12], "b": [20, 21, 22]}
    assert [sets["a"].read, sets["b"].read] == [{"inputs": 3, "target": 3}, {"inputs": 0, "target": 3}]
    assert list(without_target(shared)[1]) == ["x"]
    assert sets["b"].read == {"inputs": 0, "target": 3}


def test_labels_of_different_shape_within_a_batch_are_named():
    samples = [{"x": torch.zeros(2), "target": {"a": torch.zeros(n, 2)}} for n in (1, 2)]
    with pytest.raises(ShapeError, match=r"'a' has the shapes"):
        collate(samples)


def test_pools_that_are_none_are_refused():
    tasks = pooled_tasks()
    tasks["c"].pool = "texts"  # twelve texts, the others have ten
    with pytest.raises(ConfigError, match=r"different numbers of samples: \{'a': 10, 'c': 12, 'b': 10\}"):
        JointDataModule(tasks, share_batches=True).setup("test")
    tasks = pooled_tasks()
    other = pooled_tasks()["c"]
    other.sets = {split: [*samples][:10] for split, samples in other.sets.items()}
    other.pool = "texts"
    for stage, split in (("fit", "val"), ("test", "test")):
        with pytest.raises(ConfigError, match=rf"sample 0 of 'c' and of 'a' differ in the '{split}' split"):
            JointDataModule(tasks | {"c": other}, share_batches=True, batch_size=2).setup(stage)
    JointDataModule(tasks | {"c": other}, batch_size=2).setup("fit")  # nothing is shared, nothing is promised


def test_too_few_samples_of_a_pool_are_named():
    data = pooled_data(share=True, batch_size=11)
    with pytest.raises(ConfigError, match=r"'a, b' has 10 samples in its 'val' split, 11 are needed"):
        data.setup("fit")


def test_the_record_says_what_the_data_are():
    class Named(TaskDataModule):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def dataset(self, split):
            return Images(0)

        def describe(self):
            return {"data": self.name, "samples": 3}

    data = JointDataModule({"a": Named("made up"), "b": Named("made up"), "c": Named("real")}, share_batches=True)
    assert data.note == "made up; real"
    assert data.describe()["tasks"]["a"] == {"data": "made up", "samples": 3}
    assert data.describe()["share_batches"] is True
    assert JointDataModule({"a": Named("made up")}, note="scenes").note == "scenes"
    plain = pooled_data(share=False)
    plain.trainer = SimpleNamespace(global_rank=0, world_size=1)
    assert plain.note is None
    assert plain.describe()["tasks"] == {"a": {}, "c": {}, "b": {}}
