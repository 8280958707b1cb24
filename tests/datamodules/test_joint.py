import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from datamodules.base import without_target
from datamodules.joint import JointDataModule
from datamodules.stream import EndlessStream, SequentialBatches, stable_seed
from nscmerge.errors import ConfigError
from tests.fakes.text_tasks import FakeTextDataModule, Tokens


def numbered(size):
    """Samples that say which one they are."""
    return [{"x": torch.tensor([i]), "target": torch.tensor(i)} for i in range(size)]


def drawn(batches):
    return [{task: inputs["x"].flatten().tolist() for task, inputs in batch.items()} for batch in batches]


def reference(size, batch_size, steps, seed, task):
    """The specified draw, written out: passes of fresh permutations, cut into batches."""
    sequence = []
    for number in itertools.count():
        generator = torch.Generator().manual_seed(stable_seed(seed, task, number))
        sequence += torch.randperm(size, generator=generator).tolist()
        if len(sequence) >= steps * batch_size:
            return [sequence[t * batch_size : (t + 1) * batch_size] for t in range(steps)]


def test_stream_equals_the_specified_draw():
    sets = {"a": numbered(10), "b": numbered(7)}
    got = drawn(itertools.islice(EndlessStream(sets, 4, seed=3), 8))
    for task, size in {"a": 10, "b": 7}.items():
        assert [step[task] for step in got] == reference(size, 4, 8, 3, task)
    assert sorted(itertools.chain(*(step["a"] for step in got[:5]))) == sorted(2 * list(range(10)))  # two full passes


def test_a_seed_is_the_same_in_every_process():
    assert stable_seed(0, "bbc", 0) == 6526090706566445529  # golden: first 8 bytes of SHA-256 of '[0, "bbc", 0]', >> 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_step_draws_the_same_samples_on_any_ranks_and_workers(world_size, workers):
    sets = {"a": numbered(10), "b": numbered(7)}
    expected = drawn(itertools.islice(EndlessStream(sets, 4, seed=1), 5))
    per_rank = []
    for rank in range(world_size):
        loader = DataLoader(EndlessStream(sets, 4, rank, world_size, seed=1), batch_size=None, num_workers=workers)
        iterator = iter(loader)
        per_rank.append(drawn(itertools.islice(iterator, 5)))
        del iterator
    for step, whole in enumerate(expected):
        for task, samples in whole.items():
            shares = [ranks[step][task] for ranks in per_rank]
            assert [samples[r::world_size] for r in range(world_size)] == shares


def test_another_task_changes_nothing():
    alone = drawn(itertools.islice(EndlessStream({"a": numbered(9)}, 2), 6))
    both = drawn(itertools.islice(EndlessStream({"b": numbered(5), "a": numbered(9)}, 2), 6))
    assert [s["a"] for s in alone] == [s["a"] for s in both]


def test_a_resumed_stream_goes_on_where_it_stopped():
    data = JointDataModule({"a": FakeTextDataModule()}, batch_size=5)
    whole = list(itertools.islice(data.train_dataloader(), 7))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=2, accumulate_grad_batches=2)
    loader = data.train_dataloader()
    for batch, expected in zip(itertools.islice(loader, 3), whole[4:], strict=True):
        assert torch.equal(batch["a"]["input_ids"], expected["a"]["input_ids"])
    data.trainer.global_step = 3  # a new epoch asks again
    assert torch.equal(next(iter(loader))["a"]["input_ids"], whole[6]["a"]["input_ids"])


def test_labels_cannot_reach_fit_even_if_a_task_forgets_to_drop_them():
    class Leaky(FakeTextDataModule):
        def unlabelled(self, split):
            return self.dataset(split)

    data = JointDataModule({"a": Leaky(), "b": FakeTextDataModule(classes=True)})
    data.setup("fit")
    fit, val = data.train_dataloader(), data.val_dataloader()
    for batch in [*itertools.islice(fit, 10), *val]:
        assert list(batch) == ["a", "b"]
        assert all(set(inputs) == {"input_ids", "attention_mask"} for inputs in batch.values())
    for loader in (fit, val):
        for dataset in loader.dataset.datasets.values():
            assert all("target" not in dataset[i] for i in range(len(dataset)))
            assert without_target(dataset) is dataset


class Recorder(LightningModule):
    """Keeps what fit hands out; learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["a"]["input_ids"].tolist())
        return self.weight * batch["a"]["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.val = set(batch["a"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LightningDataModule, steps: int, folder, checkpoint=None, **options):
    module = Recorder()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return module, trainer


def test_lightning_resumes_and_starts_epochs_in_step_with_the_stream(tmp_path):
    def data():
        return JointDataModule({"a": FakeTextDataModule()}, batch_size=5)

    whole, _ = fit(data(), 6, tmp_path)
    assert whole.val == {"input_ids", "attention_mask"}
    assert whole.seen == [b["a"]["input_ids"].tolist() for b in itertools.islice(data().train_dataloader(), 6)]
    first, trainer = fit(data(), 4, tmp_path)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    second, _ = fit(data(), 6, tmp_path, tmp_path / "at4.ckpt")
    assert first.seen + second.seen == whole.seen
    epochs, _ = fit(data(), 6, tmp_path, limit_train_batches=2)
    assert epochs.seen == whole.seen


@pytest.mark.parametrize(("world_size", "sizes"), [(1, (10, 7)), (2, (10, 7)), (2, (3, 2))])
def test_validation_sees_the_first_samples_once(world_size, sizes):
    sets = {"a": numbered(sizes[0]), "b": numbered(sizes[1])}
    seen = {"a": [], "b": []}
    for rank in range(world_size):
        batches = SequentialBatches(sets, 2, rank, world_size, samples=8)
        got = drawn(batches)
        assert len(got) == len(batches)
        assert all(len(x) <= 2 for batch in got for x in batch.values())
        for batch in got:
            for task, samples in batch.items():
                seen[task] += samples
    assert sorted(seen["a"]) == list(range(min(8, sizes[0])))
    assert sorted(seen["b"]) == list(range(min(8, sizes[1])))


def test_test_loaders_are_labelled_and_in_order():
    data = JointDataModule({"b": FakeTextDataModule(classes=True), "a": FakeTextDataModule()}, test_batch_size=7)
    assert data.task_names == ["b", "a"]
    loaders = data.test_dataloader()
    assert [next(iter(loader))["target"].dtype for loader in loaders] == [torch.int64, torch.float32]
    assert sum(len(batch["target"]) for batch in loaders[0]) == 24
    some = JointDataModule({"b": FakeTextDataModule(classes=True)}, test_samples=6).test_dataloader()[0]
    assert sum(len(batch["target"]) for batch in some) == 6


def test_a_validation_seed_draws_other_samples_and_leaves_the_test_split_alone():
    def seen(val_seed):
        data = JointDataModule({"a": FakeTextDataModule(seed=1)}, batch_size=4, val_samples=8, val_seed=val_seed)
        data.setup("validate")
        first = [batch["a"]["input_ids"].tolist() for batch in data.val_dataloader()]
        labelled = {
            split: [batch["target"].tolist() for batch in data.labelled_dataloaders(split, 6)["a"]]
            for split in ("val", "test")
        }
        return first, labelled["val"], labelled["test"]

    plain, one, again, two = seen(None), seen(1), seen(1), seen(2)
    assert one == again
    for i in (0, 1):
        assert len({str(x[i]) for x in (plain, one, two)}) == 3
    assert plain[2] == one[2] == two[2]


def test_too_few_samples_and_uneven_shares_are_refused_in_setup():
    data = JointDataModule({"a": FakeTextDataModule(), "small": FakeTextDataModule(size=6)}, batch_size=8)
    with pytest.raises(ConfigError, match=r"'small' has 6 samples in its 'val' split, 8 are needed"):
        data.setup("fit")
    data.setup("test")
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ConfigError, match=r"batch size 8 .* 3 processes.*multiple of 3"):
        data.setup("fit")


@pytest.mark.parametrize(("tasks", "message"), [({}, "no tasks"), ({"": None}, "task name ''")])
def test_every_task_has_a_name(tasks, message):
    with pytest.raises(ConfigError, match=message):
        JointDataModule({name: FakeTextDataModule() for name in tasks})


def test_tokens_are_as_tokens_should_be():
    assert {len(Tokens(24, 0, False)[i]["input_ids"]) for i in range(24)} > {3, 9}
