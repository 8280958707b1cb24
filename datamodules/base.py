"""What every data module shares: samples as dicts of tensors, one place for loaders, one place where labels go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from nscmerge.errors import ShapeError

#: Tensors by name; the target of a generation task is a list of accepted answers instead.
Sample = dict[str, Any]
Split = Literal["train", "val", "test"]
#: Whose samples they are: one task's, or those of several tasks with the same inputs.
TaskKey = str | tuple[str, ...]
#: The one key of a sample that holds its label.
TARGET = "target"
#: Token labels that no loss counts, as torch's cross entropy has it.
IGNORED = -100


def collate(samples: Sequence[Sample]) -> Sample:
    """Return one batch: every key stacked along a new first dimension, 1-D tensors padded right if they must.

    Labels of several tasks, ``{task: tensor}``, are stacked task by task; what is no tensor, such as accepted answers,
    becomes a list with one entry per sample.

    Inputs are padded with 0, which is also what masks a token in ``attention_mask``, so a padded position is never a
    valid one; labels with ``IGNORED``.

    Raises:
        ShapeError: The samples differ in their keys, or in a shape that padding cannot mend.
    """
    keys = samples[0].keys()
    for i, sample in enumerate(samples):
        if sample.keys() != keys:
            raise ShapeError(
                f"sample {i} of a batch has the keys {sorted(sample)}, sample 0 has {sorted(keys)}; "
                "a data set must give every sample the same keys."
            )
    batch: dict[str, Any] = {}
    for key in keys:
        tensors = [sample[key] for sample in samples]
        if isinstance(tensors[0], Mapping):
            batch[key] = collate(tensors)
            continue
        if not isinstance(tensors[0], Tensor):
            batch[key] = tensors
            continue
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) == 1:
            batch[key] = torch.stack(tensors)
        elif all(t.ndim == 1 for t in tensors):
            batch[key] = pad_sequence(tensors, batch_first=True, padding_value=IGNORED if key == TARGET else 0)
        else:
            raise ShapeError(
                f"'{key}' has the shapes {sorted(shapes)} within one batch; only 1-D tensors are padded. "
                "Resize or crop in the data set."
            )
    return batch


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of samples; torch's map-style data sets have one without declaring it."""
    return len(dataset)  # type: ignore[arg-type]


class LabelledDataset(Dataset[Sample], ABC):
    """Samples whose inputs and label can be read apart, for those who need one of the two only."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def inputs(self, index: int) -> Sample:
        """Return a sample without its label; reads no label file."""

    @abstractmethod
    def target(self, index: int) -> Tensor:
        """Return a sample's label; reads no more of the inputs than it must."""

    def __getitem__(self, index: int) -> Sample:
        return {**self.inputs(index), TARGET: self.target(index)}


class WithoutTarget(Dataset[Sample]):
    """The same samples without their label; what is not there cannot be learned from."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self._labelled = dataset

    def __len__(self) -> int:
        return size_of(self._labelled)

    def __getitem__(self, index: int) -> Sample:
        if isinstance(self._labelled, LabelledDataset):
            return self._labelled.inputs(index)
        return {key: tensor for key, tensor in self._labelled[index].items() if key != TARGET}


def without_target(dataset: Dataset[Sample]) -> Dataset[Sample]:
    """Return a view of ``dataset`` whose samples hold no ``target``."""
    return dataset if isinstance(dataset, WithoutTarget) else WithoutTarget(dataset)


class RankShare(DistributedSampler[Any]):
    """Every W-th sample for this process, nothing repeated: metrics over all processes equal those of one.

    Lightning would otherwise put in a sampler that repeats samples until all processes have equally many.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.indices = range(rank, size_of(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def evenly_spaced(dataset: Dataset[Sample], samples: int | None) -> Dataset[Sample]:
    """Return at most ``samples`` of a data set, evenly spaced from the first on; all of them where None."""
    size = size_of(dataset)
    if samples is None or samples >= size:
        return dataset
    return Subset(dataset, [i * size // samples for i in range(samples)])


def evaluation_loader(
    dataset: Dataset[Sample], batch_size: int, num_workers: int = 0, *, rank: int = 0, world_size: int = 1
) -> DataLoader[Sample]:
    """Return a loader that visits every sample exactly once over all processes, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RankShare(dataset, world_size, rank),
        collate_fn=collate,
        num_workers=num_workers,
    )


class TaskDataModule(LightningDataModule, ABC):
    """One task's data: a subclass states :meth:`dataset`, and inherits the loaders.

    Args:
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order of the training samples.
    """

    #: Which inputs the task sees: tasks with equal pools have equal inputs at equal indices of a split. None: its own.
    pool: Hashable | None = None

    def __init__(self, batch_size: int = 32, eval_batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return the labelled data set of one split; called after :meth:`setup`."""

    def supervised(self, split: Split) -> Dataset[Sample]:
        """Return one split as a training sees it; generation adds the answer to the inputs. Default: the data set."""
        return self.dataset(split)

    def unlabelled(self, split: Split) -> Dataset[Sample]:
        """Return one split without labels: the only data that learning a merge gets to see."""
        return without_target(self.dataset(split))

    def describe(self) -> dict[str, Any]:
        """Return what a record of results says of the data, JSON-able; called after :meth:`setup`."""
        return {}

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled, labelled training batches; the order depends on ``seed`` alone."""
        return DataLoader(
            self.supervised("train"),
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return validation batches in order, in the form of the training's."""
        return self._in_order(self.supervised("val"))

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return labelled test batches in order."""
        return self.scored_dataloader("test")

    def scored_dataloader(self, split: Split) -> DataLoader[Sample]:
        """Return labelled batches of a split in order, in the form that metrics score."""
        return self._in_order(self.dataset(split))

    def _in_order(self, dataset: Dataset[Sample]) -> DataLoader[Sample]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return evaluation_loader(dataset, self.eval_batch_size, self.num_workers, rank=rank, world_size=world_size)
