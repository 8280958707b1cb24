"""Tasks that see the same texts: one pool of two tasks, and a task of its own that is larger."""

from datamodules.joint import JointDataModule
from tests.fakes.text_tasks import FakeTextDataModule

#: Name of the pool by task; tasks without one are alone.
POOLS = {"a": "texts", "b": "texts"}


def pooled_tasks() -> dict[str, FakeTextDataModule]:
    """Return three tasks: ``a`` and ``b`` label the same ten texts, as a class and as a number; ``c`` has twelve."""
    tasks = {
        "a": FakeTextDataModule(classes=True, size=10, seed=1),
        "c": FakeTextDataModule(classes=True, size=12, seed=2),
        "b": FakeTextDataModule(classes=False, size=10, seed=1),
    }
    for name, pool in POOLS.items():
        tasks[name].pool = pool
    return tasks


def pooled_data(share: bool, **options) -> JointDataModule:
    """Return them joined, with shared batches or without."""
    options = {"batch_size": 4, "val_samples": 6, "test_batch_size": 5, "seed": 5} | options
    return JointDataModule(pooled_tasks(), share_batches=share, **options)
