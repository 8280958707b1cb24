"""Adapters in LLaVA's layout and KnOTS' heads become PEFT folders; pickles that hold more than tensors do not."""

import json
import os

import pytest
import torch

from nscmerge import load_adapter
from nscmerge.cli import main
from nscmerge.convert import convert
from nscmerge.errors import AdapterError, OutputExistsError

LAYER = "layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


def tensors(seed=0, prefix="base_model.model.model."):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{LAYER}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{prefix}{LAYER}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }


@pytest.fixture
def llava(tmp_path):
    """A folder as the LLaVA trainer writes it: pickled factors, and the projector beside them."""
    folder = tmp_path / "llava"
    folder.mkdir()
    base = {"base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | base))
    torch.save(tensors(), folder / "adapter_model.bin")
    generator = torch.Generator().manual_seed(1)
    projector = {
        f"base_model.model.model.mm_projector.{i}.{part}": torch.randn(*shape, generator=generator).bfloat16()
        for i, width in ((0, 4), (2, 8))
        for part, shape in (("weight", (8, width)), ("bias", (8,)))
    }
    torch.save(projector, folder / "non_lora_trainables.bin")
    return folder, projector


def test_llava_layout_becomes_a_peft_folder_under_the_names_of_transformers(llava, tmp_path):
    folder, projector = llava
    main(["convert", str(folder), "--output", str(tmp_path / "new")])
    adapter = load_adapter(tmp_path / "new")
    assert adapter.base_model == "llava-hf/llava-1.5-7b-hf"
    (name, layer), *others = adapter.layers.items()
    assert (name, others) == (f"model.language_model.{LAYER}", [])
    A, B = tensors().values()
    torch.testing.assert_close(layer.dense(), 2 * B @ A)  # alpha / r
    start = "model.multi_modal_projector.linear_"
    assert {key: tuple(t.shape) for key, t in adapter.saved.items()} == {
        f"{start}1.weight": (8, 4),
        f"{start}1.bias": (8,),
        f"{start}2.weight": (8, 8),
        f"{start}2.bias": (8,),
    }
    assert torch.equal(adapter.saved[f"{start}2.weight"], projector["base_model.model.model.mm_projector.2.weight"])
    assert sorted(adapter.modules_to_save) == [f"{start}1", f"{start}2"]
    assert not list((tmp_path / "new").glob("*.bin"))


def test_a_projector_beside_safetensors_is_never_lost(llava, tmp_path):
    from safetensors.torch import save_file

    folder, projector = llava
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"non_lora_trainables.bin .* would be lost.*nscmerge convert"):
        load_adapter(folder)
    save_file(tensors(), folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"non_lora_trainables.bin .* would be lost.*nscmerge convert"):
        load_adapter(folder)
    assert len(load_adapter(convert(folder, tmp_path / "new")).saved) == len(projector)


def test_transformers_and_peft_run_what_was_converted(llava, tmp_path):
    """The folder is loaded by PEFT on a LLaVA of transformers: LoRA and projector arrive in its layers."""
    from peft import PeftModel
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10, head_dim=8
    )
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    path = convert(llava[0], tmp_path / "new")
    loaded = PeftModel.from_pretrained(base, path)
    state = {name.replace(".default", ""): tensor for name, tensor in loaded.state_dict().items()}
    q = f"base_model.model.model.language_model.{LAYER}"
    A, B = tensors().values()
    torch.testing.assert_close(
        state[f"{q}.lora_B.weight"] @ state[f"{q}.lora_A.weight"] * loaded.peft_config["default"].lora_alpha / 2,
        2 * B @ A,
    )
    new = loaded.base_model.model.model.multi_modal_projector.linear_2.modules_to_save["default"].weight
    torch.testing.assert_close(new.float(), llava[1]["base_model.model.model.mm_projector.2.weight"].float())


def test_heads_of_all_tasks_in_one_file(tmp_path):
    """KnOTS: sequence classification adapters without heads, and ``{task: (3, width)}`` beside them."""
    folder = tmp_path / "knots"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"task_type": "SEQ_CLS"}))
    torch.save(tensors(), folder / "adapter_model.bin")
    heads = {task: torch.randn(3, 8, generator=torch.Generator().manual_seed(i)) for i, task in enumerate("ab")}
    torch.save(heads, tmp_path / "heads.pt")
    for task in heads:
        options = ["--heads", str(tmp_path / "heads.pt"), "--task", task, "--base_model", "someone/llama"]
        main(["convert", str(folder), "--output", str(tmp_path / task), *options])
        adapter = load_adapter(tmp_path / task)
        assert adapter.base_model == "someone/llama"
        assert list(adapter.head) == ["linear.weight"]
        assert torch.equal(adapter.head["linear.weight"], heads[task])
        assert list(adapter.layers) == [f"model.{LAYER}"]
    with pytest.raises(AdapterError, match=r"no head of task 'c'.*Known: a, b\. Name one with --task"):
        convert(folder, tmp_path / "c", heads=tmp_path / "heads.pt", task="c")
    assert not (tmp_path / "c").exists()


def test_the_head_that_peft_saved_gets_the_name_that_tasks_give_it(tmp_path):
    folder = tmp_path / "seq"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"modules_to_save": ["score"]}))
    head = torch.ones(3, 8)
    torch.save({**tensors(), "base_model.model.score.weight": head}, folder / "adapter_model.bin")
    adapter = load_adapter(convert(folder, tmp_path / "new"))
    assert {name: t.tolist() for name, t in adapter.head.items()} == {"linear.weight": head.tolist()}
    assert not adapter.saved


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_bad_files_are_one_clear_error_and_leave_nothing(llava, tmp_path):
    folder, _ = llava
    new = tmp_path / "new"
    torch.save({"x": Evil()}, folder / "non_lora_trainables.bin")
    with pytest.raises(AdapterError, match=r"non_lora_trainables.bin holds more than tensors, which could run code"):
        convert(folder, new)
    torch.save({"x": [1, 2]}, folder / "non_lora_trainables.bin")
    with pytest.raises(AdapterError, match=r"holds more than tensors by name; expected a state dict"):
        convert(folder, new)
    (folder / "non_lora_trainables.bin").write_bytes(b"not a file of torch")
    with pytest.raises(AdapterError, match=r"non_lora_trainables.bin"):
        convert(folder, new)
    (folder / "non_lora_trainables.bin").unlink()
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"neither adapter_model.safetensors nor adapter_model.bin is there"):
        convert(folder, new)
    assert not new.exists()
    new.mkdir()
    with pytest.raises(OutputExistsError):
        convert(folder, new)
