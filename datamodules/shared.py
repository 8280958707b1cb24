"""Tasks that see the same inputs: one set of samples for all of them, each task's label beside it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch.utils.data import Dataset

from datamodules.base import TARGET, LabelledDataset, Sample, Split, TaskDataModule, TaskKey, size_of, without_target
from nscmerge.errors import ConfigError


def pools(tasks: Mapping[str, TaskDataModule]) -> list[TaskKey]:
    """Return the tasks' names, those of equal ``pool`` as one tuple where its first stands."""
    found: dict[Hashable, list[str]] = {}
    for name, data in tasks.items():
        found.setdefault(("alone", name) if data.pool is None else ("pool", data.pool), []).append(name)
    return [names[0] if len(names) == 1 else tuple(names) for names in found.values()]


class SharedDataset(LabelledDataset):
    """``{input name: tensor, "target": {task: tensor}}``: inputs are read once, from the first task's samples.

    Args:
        datasets: Labelled samples by task, of one pool.

    Raises:
        ConfigError: They differ in length, which equal pools cannot.
    """

    def __init__(self, datasets: Mapping[str, Dataset[Sample]]) -> None:
        sizes = {task: size_of(dataset) for task, dataset in datasets.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"tasks of one pool have different numbers of samples: {sizes}. They are no pool; let their data "
                "modules state different ones, or set data.init_args.share_batches to false."
            )
        self.datasets = dict(datasets)
        self._size = next(iter(sizes.values()))
        self._inputs = without_target(next(iter(datasets.values())))

    def __len__(self) -> int:
        return self._size

    def inputs(self, index: int) -> Sample:
        """Return the inputs of one sample."""
        return self._inputs[index]

    def target(self, index: int) -> Sample:  # type: ignore[override]
        """Return one sample's label by task."""
        return {
            task: data.target(index) if isinstance(data, LabelledDataset) else data[index][TARGET]
            for task, data in self.datasets.items()
        }


def check_pool(tasks: Mapping[str, TaskDataModule], split: Split) -> None:
    """Raise unless the first and the last inputs of all tasks are equal: what equal pools promise.

    Raises:
        ConfigError: They are not, or the tasks' data differ in length.
    """
    shared = SharedDataset({task: data.dataset(split) for task, data in tasks.items()})
    for index in (0, len(shared) - 1) if len(shared) else ():
        first = shared.inputs(index)
        for task, dataset in shared.datasets.items():
            own = without_target(dataset)[index]
            if own.keys() != first.keys() or not all(torch.equal(own[name], first[name]) for name in first):
                raise ConfigError(
                    f"sample {index} of '{task}' and of '{next(iter(tasks))}' differ in the '{split}' split, though "
                    f"their data modules state the same pool. Give both the same data folder and transforms, or set "
                    "data.init_args.share_batches to false."
                )
