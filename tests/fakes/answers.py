"""Models that answer, random adapters for them, and prompts of unequal lengths."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from nscmerge.factors import LowRank
from tests.fakes.peft_folder import llama

TASKS = ("ask", "tell")


def factors(base, names=("q_proj", "v_proj")):
    generator = torch.Generator().manual_seed(4)
    chosen = {n: m for n, m in base.named_modules() if n.endswith(names)}
    return {
        task: {
            n: LowRank(
                torch.randn(rank, m.in_features, generator=generator),
                torch.randn(m.out_features, rank, generator=generator) / 8,
                scaling=0.7,
            )
            for n, m in chosen.items()
        }
        for rank, task in enumerate(TASKS, start=2)
    }


def causal():
    torch.manual_seed(3)
    return llama().double().eval().requires_grad_(False)


def batch():
    """Two prompts for each task, of 4, 6, 3 and 5 tokens; the second task pads on the left, as generation does."""
    ids = torch.randint(3, 40, (2, 2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[[1, 1, 1, 1, 0, 0], [1] * 6], [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]])
    return {t: {"input_ids": ids[k] * mask[k], "attention_mask": mask[k]} for k, t in enumerate(TASKS)}


def t5():
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1,
        initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double().eval().requires_grad_(False)
