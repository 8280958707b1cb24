"""A tiny continual protocol: three text tasks, adapters of rank 2 with heads, two orders."""

import torch
from lightning import Trainer

from datamodules.joint import JointDataModule
from nscmerge import Adapter, LowRank, save_adapter
from tasks.classification import TextClassification
from tasks.continual import protocol
from tasks.continual.module import ContinualBenchmark, ContinualForm
from tasks.regression import TextRegression
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert

LAYERS = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.output.dense"]
TASKS = ["topic.a", "rating", "mood"]
ORDERS = [["mood", "topic.a", "rating"], ["rating", "mood", "topic.a"]]
METHODS = {
    "nufilt": ContinualForm("nufilt", options={"adapter_rank": 4, "steps": 5}),
    "half": ContinualForm("task_arithmetic", options={"lam": 0.5}),
    "magmax": ContinualForm("magmax"),
}


def update(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, WIDTH), (WIDTH, rank)
    return {name: LowRank(*(torch.randn(s, generator=generator) for s in shapes), 0.5) for name in LAYERS}


def heads():
    torch.manual_seed(1)
    return {
        "topic.a": TextClassification(2, WIDTH),
        "rating": TextRegression(WIDTH),
        "mood": TextClassification(2, WIDTH),
    }


def data():
    return JointDataModule(
        {
            "topic.a": FakeTextDataModule(classes=True, seed=1),
            "rating": FakeTextDataModule(seed=2, size=17),
            "mood": FakeTextDataModule(classes=True, seed=3, size=20),
        },
        test_batch_size=7,
    )


def write_experts(folder):
    """Write the three experts, each under its task's name; return the folder."""
    for seed, (name, task) in enumerate(heads().items()):
        save_adapter(Adapter(update(seed), "someone/tiny", head=task.state_dict(), name=name), folder / name)
    return folder


def module(folder, methods=METHODS, **options):
    options = {"orders": ORDERS, "output": folder / "out"} | options
    return ContinualBenchmark(tiny_bert(), heads(), f"{folder}/{{task}}", methods, **options)


def run(one):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return protocol.run(trainer, one, data())
