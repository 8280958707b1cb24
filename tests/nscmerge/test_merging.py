"""merge(): inputs are checked before any work, and every tensor is merged or accounted for."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nscmerge import Adapter, LowRank, load_adapter, merge, save_adapter
from nscmerge.errors import AdapterError, MethodError, ShapeError
from nscmerge.merging import preflight
from nscmerge.peft_format import Kind


def layer(seed=1, rank=2, d_out=4, d_in=3, value=None):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LowRank(A if value is None else torch.full_like(A, value), B, 0.5)


def adapter(name="a", seed=1, base="base", **layers):
    return Adapter({"l": layer(seed)} | layers, base, name=name)


def test_a_missing_layer_is_a_zero_update_and_still_counts():
    a, b = adapter("a", m=layer(5)), adapter("b", 2)
    torch.testing.assert_close(merge([a, b], "task_arithmetic").delta("m"), layer(5).dense())
    torch.testing.assert_close(merge([a, b], "weight_average").delta("m"), layer(5).dense() / 2)
    torch.testing.assert_close(merge([a, b], "svd").delta("m"), layer(5).dense())
    with pytest.raises(AdapterError, match=r"layer 'm': adapter 'b' lacks it, and method 'linear'"):
        merge([a, b], "linear")


def test_equal_experts_give_k_times_one():
    for method, factor in (("task_arithmetic", 3), ("svd", 3), ("weight_average", 1), ("linear", 9)):
        merged = merge([adapter("a"), adapter("b"), adapter("c")], method)
        torch.testing.assert_close(merged.delta("l"), factor * layer().dense())


def test_names_come_from_the_mapping_the_adapter_or_the_position():
    named = merge({"x": adapter("a"), "y": adapter("a", 2)}, "svd")
    assert [i.name for i in named.recipe.inputs] == ["x", "y"]
    unnamed = [Adapter({"l": layer()}), Adapter({"l": layer(2)})]
    assert list(preflight(unnamed)) == ["adapter_0", "adapter_1"]
    with pytest.raises(AdapterError, match=r"2 adapters are called 'a'.*mapping"):
        merge([adapter("a"), adapter("a", 2)], "svd")


def test_paths_are_read_and_hashed(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        save_adapter(adapter(name, seed), tmp_path / name)
    update = merge([tmp_path / "a", str(tmp_path / "b")], "svd", rank=1)
    assert [i.sha256 for i in update.recipe.inputs] == [load_adapter(tmp_path / n).sha256 for n in "ab"]
    total = layer(1).dense() + layer(2).dense()
    expected = torch.linalg.matrix_norm(update.delta("l") - total) / torch.linalg.matrix_norm(total)
    assert update.recipe.relative_error["l"] == pytest.approx(float(expected), rel=1e-5)
    assert update.recipe.seconds >= 0
    assert update.recipe.peak_memory_bytes is None or update.recipe.peak_memory_bytes > 1e6
    assert update.base_model == "base"


def whole(name, value):
    return Adapter(
        {"l": layer()}, saved={"p.bias": torch.full((2,), value)}, head={"score.weight": torch.ones(1)}, name=name
    )


def test_whole_tensors_need_the_base_and_are_accounted_for(tmp_path):
    experts = [whole("a", 3.0), whole("b", 5.0)]
    with pytest.warns(UserWarning, match=r"not merged: p.bias.*Give base="):
        update = merge(experts, "weight_average")
    assert "without the base model" in update.recipe.skipped["p.bias"]
    assert "never merged" in update.recipe.skipped["score.weight"]
    assert dict(update.dense) == {}
    base = {"p.bias": torch.ones(2), "other": torch.ones(1)}
    save_file(base, tmp_path / "model.safetensors")
    for given in (base, tmp_path, tmp_path / "model.safetensors"):
        assert merge(experts, "weight_average", base=given).delta("p.bias").tolist() == [3.0, 3.0]
        assert merge(experts, "task_arithmetic", base=given, lam=0.5).delta("p.bias").tolist() == [3.0, 3.0]
    with pytest.raises(AdapterError, match=r"no safetensors file there"):
        merge(experts, "svd", base=tmp_path / "none")
    with pytest.raises(AdapterError, match=r"the base model has no tensor 'p.bias'; did you mean 'q.bias'"):
        merge(experts, "svd", base={"q.bias": torch.ones(2)})


def test_whole_tensors_that_nobody_changed_are_left_out():
    update = merge([whole("a", 3.0)], "svd", base={"p.bias": torch.full((2,), 3.0)})
    assert dict(update.dense) == {}
    assert "equal to the base model's own" in update.recipe.skipped["p.bias"]


def nan():
    return adapter("b", l=layer(value=float("nan")))


REFUSED = {
    "none": ([], {}, AdapterError, "no adapter given"),
    "one_path": ("a", {}, AdapterError, "one str given where a list"),
    "type": ([adapter(), 3], {}, AdapterError, "adapter 1 is a int"),
    "method": ([adapter()], {"method": "tie"}, MethodError, "no method 'tie'; did you mean 'ties'.*Known: .*linear"),
    "near": ([adapter()], {"method": "liner"}, MethodError, "did you mean 'linear'"),
    "option": ([adapter()], {"lamb": 1}, MethodError, "no option 'lamb'; did you mean 'lam'.*Known: energy, lam, rank"),
    "variant": ([adapter()], {"variant": "code"}, MethodError, "no variant 'code'.*Known: original, papercode"),
    "variant_option": ([adapter()], {"variant": "papercode", "density": 0.2}, MethodError, "no option 'density'"),
    "lam": ([adapter()], {"lam": float("nan")}, MethodError, "lam is nan; expected one finite number"),
    "width": ([adapter(), adapter("b", l=layer(d_in=5))], {}, ShapeError, r"'l'.*'a' is \(4, 3\), \(4, 5\) of 'b'"),
    "bases": ([adapter(), adapter("b", base="z")], {}, AdapterError, "'a' is an adapter of 'base', 'b' of 'z'"),
    "nan": ([adapter(), nan()], {}, AdapterError, "adapter 'b', layer 'l': A holds 6 NaN or Inf of 6"),
    "disjoint": ([adapter(), Adapter({"m": layer()}, name="b")], {}, AdapterError, "no two adapters share a layer"),
    "nothing": ([adapter(), Adapter(name="b")], {}, AdapterError, "'b' has neither layers nor dense"),
    "ranks": (
        [adapter(), adapter("b", l=layer(rank=3))],
        {"method": "linear"},
        ShapeError,
        r"layer 'l' of 'a', 'b'.*\[2, 3",
    ),
    "kinds": (
        [adapter(), Adapter({"l": layer()}, kinds={"l": Kind("embedding")}, name="b")],
        {},
        AdapterError,
        "layer 'l': linear in 'a', embedding in 'b'",
    ),
    "dense_shape": (
        [Adapter({"l": layer()}, dense={"p": torch.ones(n)}, name=f"n{n}") for n in (2, 3)],
        {},
        ShapeError,
        r"tensor 'p' is \(2,\) in 'n2' and \(3,\) in 'n3'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case):
    adapters, options, error, message = REFUSED[case]
    options = {"method": "svd"} | options
    with pytest.raises(error, match=message):
        merge(adapters, options.pop("method"), **options)


def test_a_named_base_settles_different_names():
    merged = merge([adapter(), adapter("b", base="z")], "svd", base_model="mine")
    assert merged.base_model == "mine"


def test_a_zero_merge_can_be_written_and_says_so(tmp_path):
    folder = merge([adapter()], "task_arithmetic", lam=0).save(tmp_path / "out")
    assert json.loads((folder / "receipt.json").read_text())["layers"]["l"]["numerical_rank"] == 0


def test_an_adapter_listed_twice_is_named(tmp_path):
    save_adapter(adapter("a"), tmp_path / "a")
    save_adapter(adapter("b", 2), tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for again in (tmp_path / "a", str(tmp_path / "b" / ".." / "a"), tmp_path / "link"):
        with pytest.raises(AdapterError, match=r"number 1 \(.*a\) and number 3 \(.*\) are one and the same"):
            merge([tmp_path / "a", tmp_path / "b", again], "svd")
        with pytest.raises(AdapterError, match=r"'x' \(.*a\) and 'y' \(.*\) are one and the same") as error:
            merge({"x": tmp_path / "a", "y": again}, "svd")
        assert error.value.code == "listed-twice"
    with pytest.raises(AdapterError, match=r"number 1 \(owner/a\) and number 2"):
        merge(["owner/a", "owner/a"], "svd")


def test_one_adapter_alone_is_a_merge(tmp_path):
    save_adapter(adapter("a"), tmp_path / "a")
    torch.testing.assert_close(merge([tmp_path / "a"], "svd").delta("l"), layer().dense())
