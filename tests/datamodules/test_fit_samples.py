"""Table 13 of NSC: a merge learned from the first few samples of each shuffled validation set."""

from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.base import TaskDataModule
from datamodules.joint import JointDataModule
from nscmerge.errors import ConfigError


class Numbers(TaskDataModule):
    """Samples that say which one they are."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def dataset(self, split) -> Dataset:
        return [{"x": torch.tensor([i]), "target": torch.tensor(i)} for i in range(self.size)]


def drawn(steps, **options):
    joint = JointDataModule({"a": Numbers(20), "b": Numbers(7)}, batch_size=2, val_samples=20, **options)
    joint.setup("fit")
    batches = list(islice(joint.train_dataloader(), steps))
    return joint, {task: [i for batch in batches for i in batch[task]["x"].flatten().tolist()] for task in "ab"}


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_a_fit_sees_the_first_of_the_shuffled_split_and_no_other(samples):
    whole = drawn(10)[1]
    joint, few = drawn(30, fit_samples=samples)
    for task in "ab":
        assert set(few[task]) == set(whole[task][: min(samples, joint.tasks[task].size)])
    # Every pass is a permutation of them.
    assert sorted(few["a"][:samples]) == sorted(whole["a"][:samples])


def test_another_seed_takes_others_and_the_same_seed_the_same():
    assert drawn(9, fit_samples=3, seed=1)[1] == drawn(9, fit_samples=3, seed=1)[1]
    assert len({frozenset(drawn(9, fit_samples=3, seed=seed)[1]["a"]) for seed in range(5)}) > 1


def test_validation_keeps_the_whole_split_and_the_record_says_how_many():
    joint, _ = drawn(1, fit_samples=3)
    seen = [
        i for batch in joint.val_dataloader() for i in batch.get("a", {"x": torch.empty(0)})["x"].flatten().tolist()
    ]
    assert seen == list(range(20))
    assert joint.describe()["fit_samples"] == 3
    assert "fit_samples" not in drawn(1)[0].describe()


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="fit_samples is 0; it must be at least 1"):
        JointDataModule({"a": Numbers(3)}, fit_samples=0)
