"""Base models by class: what is loaded, in what form, and what is said when it cannot be had."""

import hashlib
import json

import pytest
import torch
from torch import nn

from nscmerge import Pretrained
from nscmerge.base_model import load_base_model, source_of, weights_sha256
from nscmerge.errors import ConfigError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


IDS = torch.arange(6)[None]


def test_the_class_decides_what_comes(llama):
    decoder = load_base_model(Pretrained(llama))
    causal = load_base_model(Pretrained(llama, "AutoModelForCausalLM", dtype="float32"))
    assert [type(m).__name__ for m in (decoder, causal)] == ["LlamaModel", "LlamaForCausalLM"]
    torch.testing.assert_close(causal.model(IDS).last_hidden_state, decoder(IDS).last_hidden_state)
    for model in (decoder, causal):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    half = load_base_model(Pretrained(llama, dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert source_of(Pretrained(llama)) == llama == source_of(llama)
    assert source_of(nn.Linear(1, 1)) == "Linear"


def test_hash_and_dtype_may_stand_in_either_place_but_not_differ(llama, tmp_path):
    known = weights_sha256(llama)
    assert weights_sha256(Pretrained(llama, "AutoModelForCausalLM")) == known
    load_base_model(Pretrained(llama, sha256=known), sha256=known)
    with pytest.raises(ConfigError, match=r"SHA-256 .*expected 00"):
        load_base_model(Pretrained(llama, sha256="00"))
    with pytest.raises(ConfigError, match=r"dtype is 'float16' in base_model and 'bfloat16' beside it"):
        load_base_model(Pretrained(llama, dtype="float16"), "bfloat16")
    with pytest.raises(ConfigError, match="dtype 'float33'"):
        load_base_model(Pretrained(llama, dtype="float33"))
    (tmp_path / "model.gguf").write_bytes(b"x")
    spec = Pretrained(str(tmp_path), gguf_file="model.gguf")
    assert weights_sha256(spec) == hashlib.sha256(b"x").hexdigest()


def test_weights_that_would_be_random_are_refused(llama):
    with pytest.raises(ConfigError, match=r"no weights for 1 tensors of LlamaForSequenceClassification \(score.weight"):
        load_base_model(Pretrained(llama, "LlamaForSequenceClassification"))


def test_unknown_and_unfit_classes(llama):
    with pytest.raises(
        ConfigError, match=r"no model class 'AutoModelForCausalML'; did you mean 'AutoModelForCausalLM'"
    ):
        load_base_model(Pretrained(llama, "AutoModelForCausalML"))
    with pytest.raises(ConfigError, match=r"cannot be loaded as AutoModelForSeq2SeqLM: .*LlamaConfig"):
        load_base_model(Pretrained(llama, "AutoModelForSeq2SeqLM"))


def test_a_hub_that_is_not_asked_says_so(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'someone/no-such-model-here' cannot be loaded .*hub cannot be reached"):
        load_base_model(Pretrained("someone/no-such-model-here", "AutoModelForCausalLM"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", r"gives access on request \(gated\).*HF_TOKEN"),
        ("RepositoryNotFoundError", r"the hub has no such model, or it is private"),
        ("LocalEntryNotFoundError", r"the hub cannot be reached from here"),
    ],
)
def test_errors_of_the_hub_are_told_apart(error, said, monkeypatch):
    import transformers
    from huggingface_hub import errors

    kind = getattr(errors, error)
    cause = kind.__new__(kind)  # its constructor wants a whole answer of the hub

    def refuse(*_, **__):
        raise OSError("something long") from cause

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=rf"'meta-llama/x' cannot be loaded as AutoModel: .*{said}"):
        load_base_model(Pretrained("meta-llama/x"))


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"quantize and gguf_file are both set"):
        Pretrained("x", quantize="8bit", gguf_file="y")
    with pytest.raises(ConfigError, match=r"'timm:x': model_class, quantize is for models of transformers"):
        Pretrained("timm:x", "AutoModelForCausalLM", quantize="4bit")


def test_yaml_takes_a_name_a_class_or_a_description(llama):
    from jsonargparse import ArgumentParser

    from nscmerge.base_model import BaseModel

    parser = ArgumentParser()
    parser.add_argument("--base", type=BaseModel)
    spec = {"source": llama, "model_class": "AutoModelForCausalLM"}
    named = {"class_path": "nscmerge.Pretrained", "init_args": spec}
    for value in (spec, named):
        config = parser.instantiate_classes(parser.parse_args([f"--base={json.dumps(value)}"]))
        assert config.base == Pretrained(llama, "AutoModelForCausalLM")
    assert parser.parse_args([f"--base={llama}"]).base == llama


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_bases_stay_near(llama, bits):
    pytest.importorskip("bitsandbytes")
    exact = load_base_model(Pretrained(llama, "AutoModelForCausalLM"))
    model = load_base_model(Pretrained(llama, "AutoModelForCausalLM", dtype="float32", quantize=bits))
    linear = model.model.layers[0].self_attn.q_proj
    assert linear.weight.dtype in (torch.int8, torch.uint8)
    want, got = (m(IDS).logits.float() for m in (exact, model))
    assert 0 < (want - got).norm() / want.norm() < (0.05 if bits == "8bit" else 0.3)
