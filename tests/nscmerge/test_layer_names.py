"""One layer under every spelling that wrappers and versions have for it, found in the model at hand."""

import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank, load_adapter, merge
from nscmerge.aligned import aligned
from nscmerge.base_files import find_tensor
from nscmerge.errors import AdapterError
from nscmerge.layer_names import ModelNames, canonical
from nscmerge.preflight import preflight
from nscmerge.surgery import linear_layers

Q = "layers.1.self_attn.q_proj"
P1, P2 = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
#: Spellings of one block's query projection, and of the projector, by who writes them.
LLAMA = [Q, f"model.{Q}"]
LLAVA = [f"model.language_model.{Q}", f"language_model.model.{Q}", f"language_model.{Q}", f"model.{Q}"]
PROJECTOR = {
    "new": (f"model.{P1}", f"model.{P2}"),
    "old": (P1, P2),
    "original": ("model.mm_projector.0", "model.mm_projector.2"),
}


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        num_labels=3,
        pad_token_id=0,
    )


def models():
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    llava = t.LlavaConfig(vision_config=vision, text_config=llama_config())
    with torch.device("meta"):
        return {
            "LlamaModel": t.LlamaModel(llama_config()),
            "LlamaForCausalLM": t.LlamaForCausalLM(llama_config()),
            "LlamaForSequenceClassification": t.LlamaForSequenceClassification(llama_config()),
            "LlavaModel": t.LlavaModel(llava),
            "LlavaForConditionalGeneration": t.LlavaForConditionalGeneration(llava),
            "CLIPVisionModelWithProjection": t.CLIPVisionModelWithProjection(vision),
            "CLIPVisionModel": t.CLIPVisionModel(vision),
        }


MODELS = models()


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("model", ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_every_llama_spelling_is_found_in_every_llama(model, name):
    path = ModelNames(MODELS[model]).path(name)
    assert path.endswith(Q)
    assert isinstance(MODELS[model].get_submodule(path), nn.Linear)


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("model", ["LlavaModel", "LlavaForConditionalGeneration"])
def test_every_llava_spelling_is_the_language_model(model, name):
    path = ModelNames(MODELS[model]).path(name)
    assert path.endswith(f"language_model.{Q}")
    assert MODELS[model].get_submodule(path).out_features == 16


@pytest.mark.parametrize("spelling", PROJECTOR)
@pytest.mark.parametrize("model", ["LlavaModel", "LlavaForConditionalGeneration"])
def test_every_projector_spelling_is_its_layer(model, spelling):
    names = ModelNames(MODELS[model])
    assert [names.path(name).rpartition(".")[2] for name in PROJECTOR[spelling]] == ["linear_1", "linear_2"]


def test_the_vision_tower_is_not_the_language_model():
    names = ModelNames(MODELS["LlavaForConditionalGeneration"])
    for spelling in (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ):
        assert names.path(spelling) == "model.vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("model", ["CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_clip_adapters_of_either_version_fit(model):
    names = ModelNames(MODELS[model])
    layer = "encoder.layers.1.self_attn.v_proj"
    assert {names.path(f"{start}{layer}") for start in ("", "vision_model.")} == {names.path(layer)}


def test_a_name_that_could_be_two_layers_is_none():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={**tower, "image_size": 28, "patch_size": 14}, text_config=tower))
    names = ModelNames(clip)
    assert names.find("vision_model.encoder.layers.0.mlp.fc1") == "vision_model.encoder.layers.0.mlp.fc1"
    both = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.Linear(2, 2)}), "language_model": nn.ModuleDict()})
    both["language_model"]["a"] = nn.Linear(2, 2)
    assert ModelNames(both).find("vision_model.a") is None
    assert ModelNames(both).find("model.a") == "model.a"


def test_an_adapter_of_another_architecture_is_one_clear_error():
    layers = {f"encoder.layer.{i}.attention.self.query": LowRank(torch.ones(1, 16), torch.ones(16, 1)) for i in (0, 1)}
    with pytest.raises(
        AdapterError,
        match=r"'bert' is an adapter for another architecture: the base model LlamaModel has none of its 2 layers "
        r"\('encoder.layer.0.attention.self.query', ...\); layers there are called like 'layers\..*'\. Give the base",
    ):
        linear_layers(MODELS["LlamaModel"], layers, "bert")
    half = {**layers, Q: LowRank(torch.ones(1, 16), torch.ones(16, 1))}
    with pytest.raises(AdapterError, match=r"layer 'encoder.layer.0.attention.self.query' of 'bert' is not in"):
        linear_layers(MODELS["LlamaModel"], half, "bert")
    wrong = {Q: LowRank(torch.ones(1, 8), torch.ones(16, 1))}
    with pytest.raises(AdapterError, match=r"is \(16, 8\) \(d_out, d_in\), the base model's is \(16, 16\)"):
        linear_layers(MODELS["LlamaModel"], wrong, "narrow")


def test_what_peft_saves_of_each_wrapping_is_found_in_the_plain_decoder(tmp_path):
    """SEQ_CLS, causal and bare adapters as PEFT itself writes them."""
    import peft
    import transformers as t

    for kind, task in (("LlamaForSequenceClassification", "SEQ_CLS"), ("LlamaForCausalLM", None), ("LlamaModel", None)):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
        model = peft.get_peft_model(getattr(t, kind)(llama_config()), config)
        model.save_pretrained(tmp_path / kind)
        adapter = load_adapter(tmp_path / kind)
        found = linear_layers(MODELS["LlamaModel"], adapter.layers, kind)
        assert sorted(path for path, _ in found.values()) == [f"layers.{i}.self_attn.q_proj" for i in (0, 1)]
        assert list(adapter.head) == (["score.weight"] if task else [])
    # Though the three spell their layers in two ways, they are one merge.
    kinds = ["LlamaForSequenceClassification", "LlamaModel"]
    merged = merge([tmp_path / kind for kind in kinds], "task_arithmetic", base_model="llama")
    assert sorted(merged.layers) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    expected = sum(
        load_adapter(tmp_path / kind).layers[f"{start}{Q}"].dense()
        for kind, start in zip(kinds, ("model.", ""), strict=True)
    )
    torch.testing.assert_close(merged.delta(f"model.{Q}"), expected)


def test_mixed_spellings_are_aligned_to_the_first_and_ambiguous_ones_left_alone():
    factors = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    tensor = torch.ones(4, 4)
    first = Adapter({f"model.{Q}": factors}, saved={f"model.{P1}.weight": tensor}, modules_to_save=[f"model.{P1}"])
    other = Adapter({Q: factors}, saved={"mm_projector.0.weight": tensor}, modules_to_save=["mm_projector.0"])
    found = aligned({"a": first, "b": other})
    assert found["a"] is first
    assert list(found["b"].layers) == [f"model.{Q}"]
    assert list(found["b"].saved) == [f"model.{P1}.weight"]
    assert found["b"].modules_to_save == [f"model.{P1}"]
    twice = Adapter({f"model.{Q}": factors, f"vision_model.{Q}": factors})
    assert list(preflight({"a": twice, "b": Adapter({Q: factors, f"model.{Q}": factors})})["b"].layers) == [
        Q,
        f"model.{Q}",
    ]


def test_checkpoints_in_the_old_spelling_take_updates_of_the_new_one():
    stored = [f"language_model.model.{Q}.weight", f"{P1}.weight", "language_model.lm_head.weight"]
    assert find_tensor(f"model.language_model.{Q}.weight", stored, "x") == stored[0]
    assert find_tensor(f"model.{P1}.weight", stored, "x") == stored[1]
    with pytest.raises(AdapterError, match="has no tensor"):
        find_tensor(f"model.{P2}.weight", stored, "x")


def test_canonical_forms():
    assert len({canonical(name) for name in [*LLAMA, *LLAVA]}) == 1
    assert len({canonical(names[0]) for names in PROJECTOR.values()}) == 1
    assert canonical("transformer.h.0.attn.c_attn") == "transformer.h.0.attn.c_attn"
    assert canonical("encoder.block.0.layer.0.SelfAttention.q") == "encoder.block.0.layer.0.SelfAttention.q"


def test_doctor_sees_one_merge_where_adapters_spell_their_layers_differently(tmp_path):
    from safetensors.torch import save_file

    from nscmerge import save_adapter
    from nscmerge.doctor.examine import examine

    for name, layer in {"a": LLAVA[0], "b": LLAVA[1], "c": LLAVA[3]}.items():
        generator = torch.Generator().manual_seed(ord(name))
        factors = LowRank(torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator))
        save_adapter(Adapter({layer: factors}, "llava", name=name), tmp_path / name)
    (tmp_path / "base").mkdir()
    save_file({f"language_model.model.{Q}.weight": torch.ones(16, 16)}, tmp_path / "base" / "model.safetensors")
    report = examine([tmp_path / name for name in "abc"], base=str(tmp_path / "base"))
    assert [
        f.code for f in report.findings if f.code in ("layers-not-in-base", "no-shared-layer", "missing-layers")
    ] == []
    assert all(overlap.layers == 1 for overlap in report.survey.overlaps.values())
