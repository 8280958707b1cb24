"""A small merge in a process of its own, so that tests can kill it, resume it, and spread it over processes.

python -m tests.fakes.fit_merge OUT.pt FOLDER [--devices N] [--kill-after STEP] [--resume CHECKPOINT]
                                [--objective nsc|entropy|anchored]
"""

import argparse
import os
import signal
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge import Adapter, LowRank, MergeModule
from nscmerge.objectives import NSC, AnchoredNSC, Entropy
from tasks.classification import TextClassification
from tests.fakes.text_tasks import WIDTH, FakeTextDataModule, tiny_bert

TASKS = ("a", "b", "c")
STEPS = 8


def adapters(model: nn.Module, seed: int = 3) -> dict[str, Adapter]:
    """Return one random adapter per task on all attention projections, ranks 2, 3, 4."""
    generator = torch.Generator().manual_seed(seed)
    names = ("query", "key", "value", "attention.output.dense")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(names)}
    return {
        task: Adapter(
            layers={
                n: LowRank(
                    torch.randn(rank, m.in_features, generator=generator),
                    torch.randn(m.out_features, rank, generator=generator) / 10,
                    scaling=0.5 * rank,
                )
                for n, m in linears.items()
            },
            base_model="tiny",
            name=task,
        )
        for rank, task in enumerate(TASKS, start=2)
    }


def heads() -> dict[str, TextClassification]:
    """Return sharp heads of 2, 3 and 5 classes: entropies well between 0 and log C."""
    torch.manual_seed(7)
    tasks = {task: TextClassification(classes, WIDTH) for task, classes in zip(TASKS, (2, 3, 5), strict=True)}
    for task in tasks.values():
        nn.init.normal_(task.linear.weight, std=0.5)
    return tasks


OBJECTIVES = {
    "nsc": lambda: NSC(blocks=1),
    "entropy": lambda: Entropy(heads()),
    "anchored": lambda: AnchoredNSC(blocks=1, penalty="squared", memory=0.9),
}


def data(batch_size: int = 4) -> JointDataModule:
    """Return the unlabelled inputs of three made-up tasks."""
    tasks = {task: FakeTextDataModule(seed=k, size=10 + k) for k, task in enumerate(TASKS)}
    return JointDataModule(tasks, batch_size=batch_size, val_samples=6, seed=5)


def module(**options) -> MergeModule:
    """Return a merge in the making with a learning rate that shows."""
    model = tiny_bert()
    options = {"objective": OBJECTIVES["nsc"](), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)} | options
    return MergeModule(model, adapters(model), **options)


class Kill(Callback):
    """Dies as a machine dies: no clean-up, no last words."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Fit and save the coefficients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--resume")
    parser.add_argument("--objective", choices=OBJECTIVES, default="nsc")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    callbacks = [ModelCheckpoint(args.folder / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)]
    if args.kill_after is not None:
        callbacks.append(Kill(args.kill_after))
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if args.devices > 1 else "auto",
        devices=args.devices,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.folder,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    merge = module(objective=OBJECTIVES[args.objective]())
    trainer.fit(merge, data(), ckpt_path=args.resume)
    if trainer.is_global_zero:
        torch.save({"lam": merge.coefficients.matrix(), "ratios": merge.validation_ratios}, args.out)


if __name__ == "__main__":
    main()
