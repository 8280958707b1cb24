"""A merge folded into its base: the model that PEFT would make of it, in the base's own files."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, BertModel, GPT2LMHeadModel, GPT2Model, LlamaForCausalLM

from nscmerge import Adapter, Update, merge
from nscmerge.errors import MethodError
from tests.fakes.checkpoint import UPDATE, checkpoint, low
from tests.fakes.peft_folder import IDS, QV, bert, expert, gpt2, llama


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def stored(model, folder, size="20KB"):
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


CASES = {
    "llama": (llama, {"r": 3, "lora_alpha": 7, "target_modules": [*QV, "down_proj", "lm_head"]}),
    "gpt2": (gpt2, {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (llama, {"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "q_proj"]}),
    "whole": (llama, {"r": 3, "target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["20KB", "5GB"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])  # factors, and dense layers; one alone at full density
def test_equals_what_peft_merges(tmp_path, case, size, method):
    make, options = CASES[case]
    base = make().eval()
    stored(base, tmp_path / "base", size)
    expert(tmp_path / "a", base, **options)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").merge_and_unload())
    dense = {"density": 1.0} if method == "ties" else {}
    update = merge([tmp_path / "a"], method, base=tmp_path / "base", **dense)
    audit = update.fold_into(tmp_path / "base", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(base) - expected).abs().max() > 0.02
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not audit.alarming
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == (size == "20KB")
    names = {path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*") if path.is_file()}
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {str(path) for path in names - written} == {"pytorch_model.bin"}
    assert {str(path) for path in written - names} == {"README.md", "receipt.json"}
    for path in (tmp_path / "base").glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
        with safe_open(tmp_path / "out" / path.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    for index in (tmp_path / "base").glob("*.index.json"):
        old, new = (json.loads((tmp_path / f / index.name).read_text()) for f in ("base", "out"))
        assert old == new


def test_a_bare_encoder_and_a_task_model_find_each_other(tmp_path):
    """Adapters of GPT2LMHeadModel on a GPT2Model checkpoint, and the other way round; BERT's prefix too."""
    base = gpt2().eval()
    for name, model in (("task", base), ("bare", base.transformer)):
        stored(model, tmp_path / name)
        expert(tmp_path / f"of_{name}", model, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    for of, into, loaded in (("task", "bare", GPT2Model), ("bare", "task", GPT2LMHeadModel)):
        update = merge([tmp_path / f"of_{of}"], "svd")
        update.fold_into(tmp_path / into, tmp_path / f"out_{into}")
        got = loaded.from_pretrained(tmp_path / f"out_{into}").state_dict()
        before = loaded.from_pretrained(tmp_path / into).state_dict()
        short = "h.1.attn.c_attn"
        prefix = "transformer." if into == "task" else ""
        delta = update.delta(("transformer." if of == "task" else "") + short)
        tensor = f"{prefix}{short}.weight"
        torch.testing.assert_close(got[tensor] - before[tensor], delta.T, rtol=1e-4, atol=1e-6)
    model = bert()
    stored(model.bert, tmp_path / "bert")
    expert(tmp_path / "of_bert", model, r=2, target_modules=["query"], task_type="SEQ_CLS")
    merge([tmp_path / "of_bert"], "svd").fold_into(tmp_path / "bert", tmp_path / "out_bert")
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out_bert"), BertModel)


def test_all_kinds_of_tensors_without_a_config(tmp_path):
    base = load_file(checkpoint(tmp_path / "base") / "model.safetensors")
    UPDATE.fold_into(tmp_path / "base", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(got["fc.weight"], base["fc.weight"] + low().dense() + 1)
    torch.testing.assert_close(got["conv.weight"], base["conv.weight"] + UPDATE.delta("conv").reshape(4, 2, 3))
    torch.testing.assert_close(got["fc.bias"], base["fc.bias"] + 0.5)
    assert float(got["scale"]) == 3
    assert got["steps"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("block", [1, 30, 1 << 26])
def test_blocks_change_nothing(tmp_path, monkeypatch, block):
    monkeypatch.setattr("nscmerge.fold_base._BLOCK", block)
    test_all_kinds_of_tensors_without_a_config(tmp_path)


@pytest.mark.parametrize(("own", "asked"), [("bfloat16", None), ("float32", "bfloat16"), ("float16", "float32")])
def test_what_rounding_takes_is_measured(tmp_path, own, asked):
    """Against the definition, tensor by tensor; W = W0 + delta is cast once."""
    base = load_file(checkpoint(tmp_path / "base", getattr(torch, own)) / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"dtype": own}))
    update = Update({"fc": low(scale=0.003)}, {"fc.bias": torch.full((4,), 1e-3), "scale": torch.zeros(())})
    audit = update.fold_into(tmp_path / "base", tmp_path / "out", dtype=asked)
    got = load_file(tmp_path / "out" / "model.safetensors")
    out = getattr(torch, asked or own)
    for name, delta in {"fc.weight": low(scale=0.003).dense(), "fc.bias": torch.full((4,), 1e-3)}.items():
        wide = base[name].float()
        assert torch.equal(got[name], (wide + delta).to(out))
        left = ((wide + delta).to(out).double() - base[name].to(out).double()) - delta.double()
        assert audit.losses[name].relative_error == pytest.approx(float(left.norm() / delta.double().norm()), rel=1e-4)
        vanished = ((wide + delta).to(out) == base[name].to(out)) & (delta != 0)
        assert audit.losses[name].vanished_share == pytest.approx(float(vanished.float().mean()))
    assert audit.losses["scale"].relative_error == audit.losses["scale"].vanished_share == 0
    assert audit.alarming == (out == torch.bfloat16)
    assert {t.dtype for n, t in got.items() if n != "steps"} == {out}
    assert got["steps"].dtype == torch.int64
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["precision"]["tensors"]["fc.weight"]["relative_error"] == audit.losses["fc.weight"].relative_error
    assert receipt["precision"]["worst_tensor"] == audit.worst[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": asked or own}
    assert ("keep the merge as an adapter" in (tmp_path / "out" / "README.md").read_text()) == audit.alarming


def test_a_merge_with_weights_per_task_needs_the_task(tmp_path):
    checkpoint(tmp_path / "base")
    experts = [Adapter({"fc": low(seed=k)}, name=name) for k, name in enumerate("ab")]
    update = merge(experts, "emr")
    with pytest.raises(MethodError, match=r"weights per task \(a, b\).*Name the task"):
        update.fold_into(tmp_path / "base", tmp_path / "out")
    with pytest.raises(MethodError, match=r"no task 'c'"):
        update.fold_into(tmp_path / "base", tmp_path / "out", task="c")
    with pytest.raises(MethodError, match=r"keeps no per-task weights"):
        UPDATE.fold_into(tmp_path / "base", tmp_path / "out", task="a")
    update.fold_into(tmp_path / "base", tmp_path / "out", task="b")
    base, got = (load_file(tmp_path / f / "model.safetensors")["fc.weight"] for f in ("base", "out"))
    torch.testing.assert_close(got, base + update.delta("fc", "b"))
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["task"] == "b"


@pytest.mark.parametrize(
    "change", [{"architectures": None}, {"architectures": ["GPT2Model"]}, {"architectures": ["My"]}]
)
def test_what_the_config_says_of_the_layout(tmp_path, change):
    """Square weights do not show which way round they are; without a word of the config they are as in a Linear."""
    stored(gpt2(), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
    name = "transformer.h.0.attn.c_proj"
    update = Update({name: low(d_out=32, d_in=32)})
    update.fold_into(tmp_path / "base", tmp_path / "out", dtype="float32")
    (before,), (after,) = (
        [
            load_file(f)[f"{name}.weight"]
            for f in (tmp_path / d).glob("*.safetensors")
            if f"{name}.weight" in load_file(f)
        ]
        for d in ("base", "out")
    )
    turned = change["architectures"] != ["My"]
    torch.testing.assert_close(
        after - before, update.delta(name).T if turned else update.delta(name), rtol=1e-4, atol=1e-5
    )


def test_llama_stays_a_llama(tmp_path):
    stored(llama(), tmp_path / "base")
    name = "model.layers.1.self_attn.o_proj"
    Update({name: low(d_out=32, d_in=32)}).fold_into(tmp_path / "base", tmp_path / "out", dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
