"""A merge on a tiny LLaMA in processes of their own, under any strategy.

python -m tests.fakes.fit_llama OUT.pt FOLDER [--strategy auto|ddp|sharded|split] [--devices N] [--objective NAME]
                                [--checkpointing] [--val-samples N]
"""

import argparse
from pathlib import Path

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.joint import JointDataModule
from nscmerge import Adapter, LowRank, MergeModule
from nscmerge.checkpointing import checkpoint_blocks
from nscmerge.objectives import NSC, AnchoredNSC
from nscmerge.strategies import ShardedBase, SplitBase
from tests.fakes.text_tasks import FakeTextDataModule

TASKS = ("a", "b", "c")
STEPS = 5
OBJECTIVES = {
    "nsc": lambda: NSC(blocks=2),
    "full_sequence": lambda: NSC(blocks=2, position="full_sequence", max_new_tokens=4, eos_token_id=list(range(12))),
    "anchored": lambda: AnchoredNSC(blocks=1),
}
STRATEGIES = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "sharded": ShardedBase,
    "split": lambda: SplitBase(["cpu"] * 3),
}


def llama():
    """Return a frozen random LLaMA of four blocks with its language head."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapters(model, seed=3):
    """Return random adapters of ranks 2, 3, 4 on q and v of every block."""
    generator = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    return {
        task: Adapter(
            {
                n: LowRank(
                    torch.randn(rank, m.in_features, generator=generator),
                    torch.randn(m.out_features, rank, generator=generator) / 8,
                    scaling=0.7,
                )
                for n, m in linears.items()
            },
            name=task,
        )
        for rank, task in enumerate(TASKS, start=2)
    }


def data(val_samples=6):
    """Return the unlabelled inputs of three made-up tasks."""
    tasks = {task: FakeTextDataModule(seed=k, size=10 + k) for k, task in enumerate(TASKS)}
    return JointDataModule(tasks, batch_size=4, val_samples=val_samples, seed=5)


def main() -> None:
    """Fit and save what was learned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", choices=STRATEGIES, default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--objective", choices=OBJECTIVES, default="nsc")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--val-samples", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    model = llama()
    if args.checkpointing:
        checkpoint_blocks(model)
    merge = MergeModule(
        model,
        adapters(model),
        objective=OBJECTIVES[args.objective](),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    trainer = lightning.Trainer(
        accelerator="cpu", strategy=STRATEGIES[args.strategy](), devices=args.devices, max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=args.folder,
        val_check_interval=STEPS, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(merge, data(args.val_samples))
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in merge.base.parameters())
    torch.save(
        {"lam": merge.coefficients.matrix(), "ratios": merge.validation_ratios, "held": held},
        args.out.with_suffix(f".{trainer.global_rank}.pt"),
    )


if __name__ == "__main__":
    main()
