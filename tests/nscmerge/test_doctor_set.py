"""What the doctor finds between adapters, and between adapters and their base model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.bare_folder import LAYERS, PREFIX, add, change, edit, factors, write
from tests.fakes.examination import codes, look, only

Q0 = LAYERS[0]


@pytest.fixture
def three(tmp_path):
    """Three sound adapters a, b, c."""
    return [write(tmp_path / name, factors(seed)) for seed, name in enumerate("abc")]


def test_an_adapter_listed_twice_or_copied(three, tmp_path):
    a, b, _ = three
    report = look(a, b, tmp_path / "b" / ".." / "a")
    assert only(report, "listed-twice").adapters == ("a #1", "a #2")
    assert [c for s, c in codes(report) if s == "error"] == ["listed-twice"]
    copy = shutil.copytree(a, tmp_path / "copy")
    report = look(a, b, copy)
    assert only(report, "duplicate-file").adapters == ("a", "copy")
    assert "duplicate-update" not in {code for _, code in codes(report)}


def refactorised(tensors, dtype, scale=1.0):
    """The same products from other factors of twice the rank: B A = [B G, 0] [G^-1 A; noise]."""
    generator = torch.Generator().manual_seed(9)
    new = {}
    for layer in LAYERS:
        A, B = (tensors[f"{PREFIX}{layer}.lora_{part}.weight"].double() for part in "AB")
        G = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
        noise = torch.randn(4, A.shape[1], generator=generator, dtype=torch.float64)
        new[f"{PREFIX}{layer}.lora_A.weight"] = torch.cat([torch.linalg.solve(G, A), noise]).to(dtype)
        new[f"{PREFIX}{layer}.lora_B.weight"] = torch.cat([scale * B @ G, torch.zeros_like(B)], 1).to(dtype)
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_update_in_other_factors_is_a_duplicate(three, tmp_path, dtype):
    same = write(tmp_path / "same", refactorised(load_file(three[0] / "adapter_model.safetensors"), dtype))
    report = look(*three, same)
    assert only(report, "duplicate-update").adapters == ("a", "same")
    assert report.survey.distance("a", "same") > 0
    assert {"rank-deficient", "unequal-ranks"} <= {code for _, code in codes(report)}
    # A thousandth off is another adapter in fp32, rounding in half precision.
    tensors = refactorised(load_file(three[0] / "adapter_model.safetensors"), dtype, scale=1.001)
    shutil.rmtree(same)
    report = look(*three, write(same, tensors))
    expected = "parallel-updates" if dtype == torch.float32 else "duplicate-update"
    assert only(report, expected).adapters == ("a", "same")


def test_unequal_ranks_name_who_refuses(three, tmp_path):
    finding = only(look(*three, write(tmp_path / "d", factors(3, rank=2))), "unequal-ranks")
    assert finding.layers == tuple(sorted(LAYERS))
    assert "4 in 'a', 4 in 'b', 4 in 'c', 2 in 'd'. Refused by linear, robust_merge." in finding.found


def test_no_shared_layer(three, tmp_path):
    other = write(tmp_path / "other", factors(3, layers=["encoder.0.query"]))
    report = look(three[0], other)
    assert only(report, "no-shared-layer").adapters == ("a", "other")
    assert not report.ok
    # With two that share layers it is only a gap in the third.
    assert "no-shared-layer" not in {code for _, code in codes(look(*three, other))}


def test_equal_folder_names_are_told_apart(three, tmp_path):
    for name in ("first", "second"):
        write(tmp_path / name / "adapter", factors(len(name)))
    report = look(tmp_path / "first" / "adapter", tmp_path / "second" / "adapter")
    assert only(report, "same-name").adapters == ("first/adapter", "second/adapter")
    report = look(tmp_path / "first" / "adapter", tmp_path / "second" / "adapter", names=["one", None])
    assert [c.name for c in report.candidates] == ["one", "adapter"]
    assert report.findings == ()
    report = look(three[0], three[1], names=["x", "x"])
    assert only(report, "same-name").adapters == ("x #1", "x #2")
    with pytest.raises(ValueError, match="1 names for 2 adapters"):
        look(three[0], three[1], names=["x"])


def test_one_adapter_is_examined_too(three):
    report = look(three[0])
    assert codes(report) == [("note", "single-adapter")]
    assert report.survey.overlaps == {}


def test_two_adapters_of_very_different_size_are_told_once(three):
    edit("B.weight", lambda t: t * 30)(three[1])
    change(three[1], lora_alpha=100)
    report = look(*three[:2])
    assert sorted(c for _, c in codes(report)) == ["norm-outlier", "scaling-outlier"]
    assert only(report, "norm-outlier").adapters == ("b",)
    edit("B.weight", lambda t: t * 1e-7)(three[0])
    report = look(*three[:2])
    assert only(report, "near-zero-update").adapters == ("a",)
    assert "norm-outlier" not in {code for _, code in codes(report)}


def test_a_value_between_two_others_is_no_outlier(three):
    for folder, factor in zip(three, (1, 50, 2500), strict=True):
        change(folder, lora_alpha=8 * factor)
    report = look(*three)
    assert [f.adapters for f in report.findings if f.code == "scaling-outlier"] == [("a",), ("c",)]


def test_a_vocabulary_that_grew(three, tmp_path):
    add("model.embed_tokens.weight", torch.ones(50, 24), modules_to_save=["embed_tokens"])(three[0])
    add("model.embed_tokens.weight", torch.ones(53, 24), modules_to_save=["embed_tokens"])(three[1])
    finding = only(look(*three), "vocabulary-mismatch")
    assert finding.adapters == ("a", "b")
    assert "(50, 24) in 'a'; (53, 24) in 'b'" in finding.found
    # The same for LoRA on the embedding, whose factors are stored transposed, and for the head's rows.
    shutil.rmtree(tmp_path)
    embedding = {f"{PREFIX}embed_tokens.lora_embedding_A": torch.ones(4, 50), **factors(0)}
    embedding[f"{PREFIX}embed_tokens.lora_embedding_B"] = torch.ones(24, 4)
    a = write(tmp_path / "a", embedding)
    b = write(tmp_path / "b", embedding | {f"{PREFIX}embed_tokens.lora_embedding_A": torch.ones(4, 51)})
    assert "(50, 24) in 'a'; (51, 24) in 'b'" in only(look(a, b), "vocabulary-mismatch").found
    a = write(tmp_path / "c", factors(0, layers=["lm_head"], d_out=50))
    b = write(tmp_path / "d", factors(1, layers=["lm_head"], d_out=52))
    assert only(look(a, b), "vocabulary-mismatch").layers == ("lm_head",)


def test_a_layer_of_two_kinds(three, tmp_path):
    embedding = {
        f"{PREFIX}{Q0}.lora_embedding_A": torch.ones(4, 20),
        f"{PREFIX}{Q0}.lora_embedding_B": torch.ones(24, 4),
    }
    finding = only(look(three[0], write(tmp_path / "d", embedding | factors(3, layers=LAYERS[1:]))), "kind-mismatch")
    assert finding.layers == (Q0,)
    assert "linear in 'a'; embedding in 'd'" in finding.found


def base(folder, tensors, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_against_the_base_model(three, tmp_path):
    add("model.embed_tokens.weight", torch.ones(50, 24), modules_to_save=["embed_tokens"])(three[0])
    weights = {f"{layer}.weight": torch.zeros(20, 24) for layer in LAYERS}
    embedding = {"model.embed_tokens.weight": torch.zeros(50, 24)}
    fits = base(tmp_path / "fits", weights | embedding, vocab_size=50)
    assert codes(look(*three, base=fits)) == [("note", "whole-tensors")]
    # A model class may put a prefix before every name, or leave it out; GPT-2 stores weights transposed.
    bare = {name.removeprefix("model."): t for name, t in (weights | embedding).items()}
    assert codes(look(*three, base=base(tmp_path / "bare", bare)))[1:] == []
    more = {f"language.{name}": t.T.contiguous() for name, t in weights.items()} | embedding
    assert codes(look(*three, base=base(tmp_path / "more", more)))[1:] == []
    wide = base(tmp_path / "wide", weights | embedding | {f"{Q0}.weight": torch.zeros(20, 32)}, vocab_size=50)
    report = look(*three, base=wide)
    found = [f for f in report.findings if f.code == "base-width-mismatch"]
    assert [f.adapters for f in found] == [("a",), ("b",), ("c",)]
    assert f"'{Q0}': the adapter has (20, 24), the base model '{wide}' (20, 32)" in found[0].found
    few = base(tmp_path / "few", {k: t for k, t in (weights | embedding).items() if Q0 not in k})
    assert f"1 of 6 layers are not among the tensors of '{few}': '{Q0}'" in look(three[1], base=few).findings[0].found
    small = base(tmp_path / "small", {}, text_config={"vocab_size": 48})
    finding = only(look(*three, base=small), "vocabulary-mismatch")
    assert finding.adapters == ("a",)
    assert "the adapter has (50, 24)" in finding.found
    assert "(48, 24)" in finding.found
    packed = base(tmp_path / "packed", {f"{Q0}.weight": torch.zeros(240, 1)}, quantization_config={"bits": 4})
    assert only(look(*three, base=packed), "base-quantised").severity == "note"


def test_bases_that_cannot_be_read_and_bases_of_two_names(three, tmp_path):
    change(three[1], base_model_name_or_path="/models/base")
    fits = base(tmp_path / "fits", {f"{layer}.weight": torch.zeros(20, 24) for layer in LAYERS})
    report = look(*three, base=fits)
    assert codes(report) == [("warning", "base-names-differ")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    for bad in ("empty", "bad", "cut.safetensors", "no such/folder/at all"):
        report = look(*three, base=str(tmp_path / bad))
        assert "cannot be read" in only(report, "base-unreadable").found or "neither" in report.findings[0].found
        assert report.base is None
