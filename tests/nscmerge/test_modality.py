"""Vision-language inputs: what NSC sees of text alone, images alone and both; the vision tower keeps no graph."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.factors import LowRank
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC
from tests.oracles import dense_ratio

IMAGE = 39
TASKS = ("vqa", "captions", "text")


def llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def experts(model):
    generator = torch.Generator().manual_seed(4)
    names = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj")) and "language_model" in n]
    return {
        task: {
            n: LowRank(torch.randn(3, 32, generator=generator), torch.randn(32, 3, generator=generator) / 8)
            for n in names
        }
        for task in TASKS
    }


def batch(seed=1):
    """A question about an image, an image without words, and a question alone."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 38, (2, 5), generator=generator)
    image = torch.full((2, 4), IMAGE)
    pixels = torch.randn(2, 2, 3, 28, 28, generator=generator)
    start = torch.ones(2, 1, dtype=torch.long)
    made = {
        "vqa": {"input_ids": torch.cat([start, image, words], 1), "pixel_values": pixels[0]},
        "captions": {"input_ids": torch.cat([start, image, start], 1), "pixel_values": pixels[1]},
        "text": {"input_ids": torch.cat([start, words], 1)},
    }
    return {t: {**own, "attention_mask": torch.ones_like(own["input_ids"])} for t, own in made.items()}


def learnable(model, **options):
    own = experts(model)
    objective = NSC(blocks=1, **options)
    objective.prepare(model, own)
    coefficients = Coefficients(sorted(own["text"]), TASKS)
    return objective, attach(model, own, coefficients), coefficients, own


def test_images_and_text_count_token_by_token_and_tasks_with_images_share_a_pass():
    model = llava()
    objective, merged, coefficients, own = learnable(model)
    groups = fuse(batch())
    assert [list(group.rows) for group in groups] == [["vqa", "captions"], ["text"]]
    losses = {}
    for group in groups:
        losses |= objective.losses(merged, group)
    for task, inputs in batch().items():
        seen = merged.capture(inputs, objective.targets)
        (target,) = seen
        # Every position counts, of the image too: 1 + 4 + 5, 1 + 4 + 1 and 1 + 5 of them.
        assert seen[target].shape[1] == {"vqa": 10, "captions": 6, "text": 6}[task]
        assert losses[task].item() == pytest.approx(
            dense_ratio(seen[target], own[task][target].A).mean().item(), rel=1e-5
        )
    torch.stack(list(losses.values())).mean().backward()
    assert sum(lam.grad is not None and bool(lam.grad.abs().min() > 0) for lam in coefficients.lam) == 6


def test_text_alone_is_what_the_language_model_sees_alone():
    model = llava()
    objective, merged, _, own = learnable(model)
    inputs = batch()["text"]
    ran = []
    model.model.vision_tower.register_forward_pre_hook(lambda m, args: ran.append(m))
    got = objective.losses(merged, fuse({"text": inputs})[0])["text"]
    assert not ran
    seen = []
    (target,) = objective.targets
    merged.layers[target].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.model.language_model(**inputs)
    assert got.item() == pytest.approx(dense_ratio(seen[0], own["text"][target].A).mean().item(), rel=1e-5)


def test_what_is_dropped_has_no_say():
    objective, merged, _, _ = learnable(llava())
    first, second = batch(1), batch(2)

    def losses(**inputs):
        return objective.losses(merged, fuse({"vqa": inputs})[0])["vqa"].item()

    both = losses(**first["vqa"])
    assert losses(**{**first["vqa"], "pixel_values": second["vqa"]["pixel_values"]}) != pytest.approx(both, rel=1e-4)
    assert losses(**{**first["vqa"], "input_ids": second["vqa"]["input_ids"]}) != pytest.approx(both, rel=1e-4)
    assert losses(**first["captions"]) != pytest.approx(both, rel=1e-4)


def test_the_frozen_vision_tower_keeps_no_graph():
    model = llava()
    objective, merged, _, _ = learnable(model)
    found = []
    for name in ("vision_tower", "multi_modal_projector"):
        model.model.get_submodule(name).register_forward_hook(lambda m, args, out: found.append(out))
    objective.losses(merged, fuse({"vqa": batch()["vqa"]})[0])["vqa"].backward()
    tower, projected = found
    assert not any(t.requires_grad for t in tower.values() if isinstance(t, torch.Tensor))
    assert not projected.requires_grad


@pytest.mark.parametrize("position", ["last_token", "full_sequence"])
def test_answers_about_an_image_are_decoded_with_the_image_once(position):
    """The cached answer equals ``generate``'s; and the weighted pass equals every step with the image by itself."""
    model = llava()
    objective, merged, _, own = learnable(model, position=position, max_new_tokens=6)
    inputs = {n: v[:1] for n, v in batch()["vqa"].items()}
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda m, args: calls.append(1))
    got = objective.report(merged, fuse({"vqa": inputs})[0])["vqa"].item()
    assert len(calls) == 2  # one to decode, one to measure
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 10:]
    assert answer.tolist() == [[5, 4, 2]]  # the language model's own end of an answer
    (target,) = objective.targets
    steps = []
    for t in range(3):
        ids = torch.cat([inputs["input_ids"], answer[:, :t]], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        z = merged.capture(whole, objective.targets)[target]
        steps.append(dense_ratio(z, own["vqa"][target].A).mean().item())
    want = steps[-1] if position == "last_token" else sum(steps) / 3
    assert got == pytest.approx(want, rel=1e-5)
