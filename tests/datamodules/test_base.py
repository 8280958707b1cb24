from itertools import chain

import pytest
import torch

from datamodules.base import RankShare, collate, without_target
from nscmerge.errors import ShapeError
from tests.fakes.text_tasks import FakeTextDataModule, Tokens


def test_collate_pads_vectors_and_stacks_the_rest():
    samples = [
        {"ids": torch.tensor([1, 2, 3]), "image": torch.ones(2, 2), "target": torch.tensor(0.5)},
        {"ids": torch.tensor([4]), "image": torch.zeros(2, 2), "target": torch.tensor(1.5)},
    ]
    batch = collate(samples)
    assert batch["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["image"].shape == (2, 2, 2)
    assert batch["target"].tolist() == [0.5, 1.5]


def test_collate_says_what_it_cannot_stack():
    with pytest.raises(ShapeError, match=r"'image' has the shapes \[\(2, 2\), \(2, 3\)\].*Resize"):
        collate([{"image": torch.ones(2, 2)}, {"image": torch.ones(2, 3)}])
    with pytest.raises(ShapeError, match=r"sample 1 .*\['b'\].*\['a'\]"):
        collate([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_no_sample_of_an_unlabelled_split_holds_a_target():
    data = FakeTextDataModule()
    for split in ("train", "val", "test"):
        bare = data.unlabelled(split)
        assert len(bare) == 24
        assert all(set(bare[i]) == {"input_ids", "attention_mask"} for i in range(len(bare)))
    assert without_target(bare) is bare


def test_training_order_depends_on_the_seed_alone():
    def order(seed):
        torch.manual_seed(torch.seed() % 1000)
        data = FakeTextDataModule()
        data.seed = seed
        return torch.cat([batch["target"] for batch in data.train_dataloader()])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert torch.equal(order(1).sort().values, FakeTextDataModule().sets["train"].targets.sort().values)


@pytest.mark.parametrize("size", [7, 8, 1])
def test_rank_shares_hold_every_sample_once(size):
    shares = [list(RankShare(Tokens(size, 0, False), 3, rank)) for rank in range(3)]
    assert sorted(chain(*shares)) == list(range(size))
    assert [len(RankShare(Tokens(size, 0, False), 3, rank)) for rank in range(3)] == list(map(len, shares))
