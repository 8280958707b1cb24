"""The doctor names every fault of deliberately broken adapters, goes on after it, and leaves sound ones alone."""

import json
import re
import shutil
import warnings

import pytest
import torch

from nscmerge import merge
from nscmerge.doctor import KINDS
from nscmerge.errors import NSCMergeError
from tests.fakes.bare_folder import LAYERS, PREFIX, add, change, drop, edit, factors, write
from tests.fakes.examination import codes, look, only

Q0, Q1 = LAYERS[0], LAYERS[2]
KEY_A, KEY_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@pytest.fixture
def three(tmp_path):
    """Three sound adapters a, b, c."""
    return [write(tmp_path / name, factors(seed)) for seed, name in enumerate("abc")]


def config(**options):
    return lambda folder: change(folder, **options)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def gone(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def unsharded(folder):
    gone("adapter_model.safetensors")(folder)
    index = {"weight_map": {KEY_A: "adapter_model-00001-of-00001.safetensors"}}
    text("adapter_model.safetensors.index.json", json.dumps(index).encode())(folder)


def zeros_in_a(t):
    return t * 0


def twin_rows(t):
    return torch.cat([t[:1], t[:1], t[2:]])


NAN = float("nan")
WIDE = torch.ones(50, 24)
#: What is done to adapter b, the code that must come, whom it names, and words of the message.
BROKEN = {
    "folder": (shutil.rmtree, "not-found", "b", "neither a folder on this machine nor a hub id"),
    "no_config": (gone("adapter_config.json"), "config-missing", "b", "adapter_config.json is missing"),
    "no_json": (text("adapter_config.json", b"{"), "config-damaged", "b", "is not valid JSON"),
    "not_utf8": (text("adapter_config.json", b"\xff\xfe\x00"), "config-damaged", "b", "is not valid JSON"),
    "a_list": (text("adapter_config.json", b"[]"), "config-damaged", "b", "holds a list"),
    "alpha": (config(lora_alpha="8"), "config-value", "b", "gives alpha '8'"),
    "patterns": (config(rank_pattern=[4]), "config-value", "b", r"rank_pattern .* is \[4\]; expected an object"),
    "saved": (config(modules_to_save="head"), "config-value", "b", "modules_to_save .* is 'head'; expected a list"),
    "no_weights": (gone("adapter_model.safetensors"), "weights-missing", "b", "adapter_model.safetensors is missing"),
    "truncated": (cut, "weights-damaged", "b", "adapter_model.safetensors cannot be read"),
    "garbage": (text("adapter_model.safetensors", b"\0" * 99), "weights-damaged", "b", "cannot be read"),
    "pickle": (pickled, "pickle-only", "b", "adapter_model.bin is a pickle"),
    "shard": (unsharded, "shard-missing", "b", "names 'adapter_model-00001-of-00001.safetensors', which is not in"),
    "ia3": (config(peft_type="IA3"), "not-lora", "b", "peft_type in adapter_config.json is 'IA3'; expected 'LORA'"),
    "dora": (config(use_dora=True), "dora", "b", "use_dora is set, that is DoRA"),
    "dora_key": (add(f"{Q0}.lora_magnitude_vector", torch.ones(20)), "dora", "b", "belongs to DoRA"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "changed-base", "b", "init_lora_weights is 'pissa_niter_4'"),
    "olora": (config(init_lora_weights="olora"), "changed-base", "b", "init_lora_weights is 'olora'"),
    "lora_bias": (config(lora_bias=True), "unsupported-lora", "b", "lora_bias is set"),
    "other_key": (add("model.norm.weight", torch.ones(3)), "unknown-key", "b", "unknown key .*model.norm.weight"),
    "half": (drop(KEY_A), "missing-half", "b", f"layer '{Q0}': lora_A is missing"),
    "flat": (edit(KEY_A, torch.flatten), "flat-factor", "b", r"A is \(96,\)"),
    "rank": (config(r=8), "rank-conflict", "b", "the config says rank 8.*the tensors have rank 4"),
    "nan": (edit(KEY_B, lambda t: t * NAN), "not-finite", "b", f"layer '{Q0}': lora_B.weight holds 80 NaN or Inf"),
    "overflow": (edit(Q0 + ".lora_B.weight", lambda t: t * 1e38), "not-finite", "b", f"'{Q0}' overflows fp32"),
    "integers": (edit(KEY_B, lambda t: t.int()), "dtype", "b", "is torch.int32; expected fp16"),
    "zero": (edit("lora_B.weight", zeros_in_a), "zero-update", "b", "All 6 layers are zero updates"),
    "alpha_0": (config(lora_alpha=0), "zero-update", "b", "All 6 layers are zero updates"),
    "base": (config(base_model_name_or_path="owner/other"), "base-mismatch", "abc", "'owner/other' of 'b'"),
    "no_base": (config(base_model_name_or_path=None), "base-unknown", "b", "No base model is named in 'b'"),
    "width": (edit(KEY_A, lambda t: t[:, :7]), "width-mismatch", "abc", rf"'{Q0}': \(20, 24\) in 'a', 'c'; \(20, 7\)"),
    "layer_gone": (drop((KEY_A, KEY_B)), "missing-layers", "b", f"1 layers are lacking.*'{Q0}'.*linear.* refuse"),
    "small": (
        edit("B.weight", lambda t: t * 1e-5),
        "near-zero-update",
        "b",
        r"1\.\de-05 of the others' median",
    ),
    "large": (
        edit("B.weight", lambda t: t * 50),
        "norm-outlier",
        "b",
        r"5\d\.\d times the others' median",
    ),
    "alpha_big": (config(lora_alpha=128), "scaling-outlier", "b", "is 32, 16.0 times the others' median"),
    "alpha_small": (config(lora_alpha=0.5), "scaling-outlier", "b", "is 0.125, 1 / 16.0 of the others' median"),
    "negative": (config(lora_alpha=-8), "negative-scaling", "b", "Scaling is -2 .*refused by .*linear"),
    "zero_layer": (edit(KEY_B, zeros_in_a), "zero-layers", "b", f"1 layers are zero updates: '{Q0}'"),
    "deficient": (edit(KEY_A, twin_rows), "rank-deficient", "b", f"1 layers .*: 3 of 4 in '{Q0}'"),
    "half_type": (edit("weight", torch.Tensor.half), "mixed-dtypes", "abc", "float16 in 'b'"),
    "head": (
        add("score.weight", torch.ones(2, 24), modules_to_save=["score"]),
        "task-head",
        "b",
        "1 tensors belong to task heads: 'score.weight'",
    ),
    "whole": (
        add("model.norm.weight", torch.ones(24), modules_to_save=["norm"]),
        "whole-tensors",
        "b",
        "1 tensors are stored whole .*'model.norm.weight'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_named_and_the_others_are_examined_all_the_same(three, case):
    damage, code, named, words = BROKEN[case]
    damage(three[1])
    report = look(*three)
    finding = next(f for f in report.findings if f.code == code)
    assert set(finding.adapters) == set(named)
    assert re.search(words, finding.found, flags=re.DOTALL), finding.found
    assert finding.advice
    assert finding.severity == KINDS[code].severity
    assert report.ok == (not any(severity == "error" for severity, _ in codes(report)))
    # One fault, one name: nothing else is wrong with these folders, and nobody else is blamed.
    assert [c for s, c in codes(report) if s == "error"] == ([code] if finding.severity == "error" else [])
    facts = {fact["name"]: fact for fact in report.facts()}
    assert (facts["a"]["layers"], facts["c"]["ranks"]) == (6, [4])
    assert report.survey.overlaps["a", "c"].layers == 6
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] == report.ok


@pytest.mark.parametrize("case", sorted(set(BROKEN) - {"overflow"}))  # factors merge exactly; their product is Inf
def test_an_error_is_what_merge_refuses_too(three, case):
    BROKEN[case][0](three[1])
    try:
        with warnings.catch_warnings(action="ignore"):
            merge(three, "task_arithmetic")
    except NSCMergeError:
        refused = True
    else:
        refused = False
    assert look(*three).ok is not refused


def test_sound_adapters_have_no_findings(three):
    report = look(*three)
    assert report.findings == ()
    assert report.ok
    assert {name for row in report.ranks().values() for name in row} == {"a", "b", "c"}


def test_every_fault_of_one_adapter_is_told(three):
    a, b, c = three
    change(b, use_dora=True, init_lora_weights="pissa")
    drop(KEY_A)(b)
    edit(f"{Q1}.lora_B.weight", lambda t: t * NAN)(b)
    gone("adapter_config.json")(c)
    cut(c)
    report = look(a, b, c)
    errors = {(f.code, f.adapters) for f in report.findings if f.severity == "error"}
    assert errors == {
        *((code, ("b",)) for code in ("dora", "changed-base", "missing-half", "not-finite")),
        *((code, ("c",)) for code in ("config-missing", "weights-damaged")),
    }
    # What is sound of b is still compared; its broken layers are not said to be lacking.
    assert report.survey.overlaps["a", "b"].layers == 4
    assert "missing-layers" not in {code for _, code in codes(report)}


def test_one_fault_in_many_layers_is_one_finding(three):
    edit("lora_B.weight", lambda t: t * NAN)(three[1])
    finding = only(look(*three), "not-finite")
    assert finding.layers == tuple(sorted(LAYERS))
    assert "The same in 'model.layers.0.self_attn.v_proj'" in finding.found
    assert finding.found.endswith("and 2 more.")
