"""KnOTS in factor space against a dense SVD of the updates side by side, and against the reference's own components."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError, ShapeError
from nscmerge.methods.knots import align
from nscmerge.methods.ties_space import Space, merge_by_signs, merge_by_values, trim_apart, trim_together
from tests import ties_oracle as oracle
from tests.fakes.unequal import RANKS, SHAPES, adapter, adapters, masks, tensors

GOLDEN = Path(__file__).parents[1] / "golden"
COMPONENTS = json.loads((GOLDEN / "closed_form.json").read_text())["components"]
MANY = [*RANKS, (5, 5, 5)]  # together above min(d_out, d_in)


def dense_components(experts):
    """Return U by layer, and per task C_k by layer: the SVD of dense updates, columns signed as ours are."""
    bases, components = {}, [{} for _ in experts]
    for layer, shape in SHAPES.items():
        updates = torch.cat([tensors(e)[layer].double() for e in experts], dim=1)
        u, s, vh = torch.linalg.svd(updates, full_matrices=False)
        u, s, vh = u[:, s > 1e-5], s[s > 1e-5], vh[s > 1e-5]
        sign = torch.tensor([float(column[column.abs().argmax()].sign()) for column in u.T], dtype=torch.float64)
        bases[layer] = u * sign
        for own, part in zip(components, ((sign * s)[:, None] * vh).split(shape[1], dim=1), strict=True):
            own[layer] = part.float()
    return bases, components


def expected(experts, by_tasks):
    """Return the dense merge by one of the oracles: of the components in U, of whole tensors by themselves."""
    bases, components = dense_components(experts)
    merged = by_tasks(components)
    whole = by_tasks([dict(e.dense) for e in experts])
    return {n: (bases[n] @ merged[n].double()).float() for n in SHAPES} | whole


def close(update, wanted):
    assert set(wanted) == {*update.layers, *update.dense}
    for name, tensor in wanted.items():
        torch.testing.assert_close(update.delta(name), tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


@pytest.mark.parametrize("ranks", MANY)
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("agg", ["mean", "sum"])
class TestKnotsTiesEqualsTheOracle:
    def test_original(self, ranks, density, agg):
        experts = adapters(*ranks)
        update = merge(experts, "knots_ties", density=density, agg=agg)
        close(update, expected(experts, lambda tasks: oracle.ties(tasks, density, agg)))
        for name, (d_out, d_in) in SHAPES.items():
            assert isinstance(update.layers[name], LowRank)
            assert update.layers[name].rank <= min(sum(ranks), d_out, len(ranks) * d_in)

    def test_papercode(self, ranks, density, agg):
        experts = adapters(*ranks)
        update = merge(experts, "knots_ties", variant="papercode", density=density, agg=agg)
        close(update, expected(experts, lambda tasks: oracle.ties_papercode(tasks, density, agg)))


@pytest.mark.parametrize("ranks", MANY)
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
class TestKnotsDareTiesEqualsTheOracle:
    def keep(self, experts, drop):
        """Masks in the space of components, and of whole tensors."""
        _, components = dense_components(experts)
        shapes = [c | dict(e.dense) for c, e in zip(components, experts, strict=True)]
        return {
            e.name: {
                n: torch.rand(t.shape, generator=torch.Generator().manual_seed(len(n) + k)) >= drop
                for n, t in own.items()
            }
            for k, (e, own) in enumerate(zip(experts, shapes, strict=True))
        }

    def test_original(self, ranks, drop):
        experts = adapters(*ranks)
        keep = self.keep(experts, drop)
        by_tasks = lambda tasks: oracle.ties(oracle.dare(tasks, list(keep.values()), drop), 0.2)  # noqa: E731
        close(merge(experts, "knots_dare_ties", drop=drop, keep_masks=keep), expected(experts, by_tasks))

    def test_papercode(self, ranks, drop):
        experts = adapters(*ranks)
        keep = self.keep(experts, drop)
        by_tasks = lambda tasks: oracle.ties_papercode(tasks, 0.2, "sum", list(keep.values()), drop)  # noqa: E731
        update = merge(experts, "knots_dare_ties", variant="papercode", drop=drop, keep_masks=keep)
        close(update, expected(experts, by_tasks))


@pytest.mark.parametrize("entry", COMPONENTS, ids=lambda e: e["id"])
def test_from_the_reference_components_to_its_merge(entry):
    """What can be compared for the NSC authors' code, whose result depends on the signs of an SVD."""
    golden = load_file(GOLDEN / Path(entry["file"]).name)
    layers = sorted(k.removeprefix("U.") for k in golden if k.startswith("U."))
    shapes = {n: tuple(golden[f"S.t0.{n}"].shape) for n in layers}
    space = Space(("t0", "t1", "t2"), shapes, lambda n: (golden[f"S.t{k}.{n}"] for k in range(3)))
    if entry["role"] == "papercode":
        components = merge_by_signs(trim_apart(space, 0.2), entry["hyper"]["agg"])
    else:
        components = merge_by_values(trim_together(space, 0.2)[0], "mean")
    for name in layers:
        got = golden[f"U.{name}"] @ components(name)
        assert (got - golden[name]).abs().max() <= entry["rel_tol"] * golden[name].abs().max()


@pytest.mark.parametrize("ranks", [(2,), (2, 0, 3), (5, 5, 5), (9, 1)])
def test_the_basis_is_exact_orthonormal_and_signed(ranks):
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    experts = [LowRank(torch.randn(r, 6, **draw), torch.randn(7, r, **draw), 0.5 - k) for k, r in enumerate(ranks)]
    aligned = align(experts)
    rho = min(7, sum(min(r, 6) for r in ranks))
    assert len(aligned.sigma) == aligned.basis.shape[1] == rho
    torch.testing.assert_close(aligned.basis.T @ aligned.basis, torch.eye(rho, dtype=torch.float64))
    side_by_side = torch.cat([e.dense() for e in experts], dim=1)
    torch.testing.assert_close(aligned.sigma, torch.linalg.svdvals(side_by_side)[:rho])
    for expert, component in zip(experts, aligned.components(), strict=True):
        assert component.dtype == torch.float32
        torch.testing.assert_close(aligned.basis.float() @ component, expert.dense().float(), rtol=1e-5, atol=1e-5)
    assert all(column[column.abs().argmax()] > 0 for column in aligned.basis.T)
    turned = align(experts[::-1])
    torch.testing.assert_close(turned.basis, aligned.basis)
    for a, b in zip(turned.components(), reversed(list(aligned.components())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match=r"\(7, 6\), \(7, 5\).*same base model"):
        align([LowRank(torch.ones(1, 6), torch.ones(7, 1)), LowRank(torch.ones(1, 5), torch.ones(7, 1))])


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare_ties"])
@pytest.mark.parametrize("variant", ["original", "papercode"])
class TestEdges:
    def options(self, method):
        return {"density": 1.0} | ({"drop": 0.0} if "dare" in method else {})

    def test_without_trim_equal_experts_give_their_update(self, method, variant):
        (one,) = adapters(3)
        for names in ("x", "xyz"):
            update = merge({k: one for k in names}, method, variant=variant, agg="mean", **self.options(method))
            close(update, tensors(one))

    def test_zero_updates(self, method, variant, tmp_path):
        zero = Adapter({n: LowRank(torch.zeros(2, i), torch.zeros(o, 2)) for n, (o, i) in SHAPES.items()}, name="z")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is lost where nothing is
            update = merge([zero], method, variant=variant)
        assert all(torch.equal(update.delta(n), torch.zeros(s)) for n, s in SHAPES.items())
        update.save(tmp_path / "out")
        mixed = merge([zero, *adapters(2)], method, variant=variant)
        assert all(bool(mixed.delta(n).isfinite().all()) for n in SHAPES)

    def test_what_the_cut_takes_is_told(self, method, variant):
        layer = "blocks.2.q"
        both = [adapter("a", 2, 0), replaced(adapter("s", 2, 1, scale=1e-7), layer)]
        with pytest.warns(UserWarning, match=rf"{method}: 1 of 3 layers lose .*'{layer}': .*% of the norm.*use ties"):
            report = merge(both, method, variant=variant, **self.options(method)).recipe.extra
        assert set(report["cut_components"]) == {layer}
        line = report["cut_components"][layer]
        exact = [(e.layers[layer].B.double() * e.layers[layer].scaling) @ e.layers[layer].A.double() for e in both]
        s = torch.linalg.svdvals(torch.cat(exact, dim=1))
        lost = s[(s <= 1e-5) & (s > 1e-8 * s[0])]
        assert (line["kept"], line["cut"]) == (int((s > 1e-5).sum()), len(lost))
        assert line["largest_cut"] == pytest.approx(float(lost[0]), rel=1e-5)
        assert line["share_of_norm"] == pytest.approx(float(lost.norm() / s.norm()), rel=1e-4)

    def test_an_adapter_below_the_cut_merges_to_nothing(self, method, variant):
        with pytest.warns(UserWarning, match="3 of 3 layers lose .*100.00% of the norm"):
            update = merge(adapters(2, scale=1e-9), method, variant=variant)
        assert all(torch.equal(update.delta(n), torch.zeros(s)) for n, s in SHAPES.items())

    def test_equal_singular_values_are_told(self, method, variant):
        eye = Adapter({"l": LowRank(torch.eye(3), torch.eye(3))}, name="a")
        report = merge([eye], method, variant=variant).recipe.extra
        assert report["nearly_equal_singular_values"]["l"] < 1e-6
        assert "nearly_equal_singular_values" not in merge(adapters(3, 2), method, variant=variant).recipe.extra


def replaced(small, layer):
    """The adapter with every layer but one taken from another, larger one."""
    return Adapter({**adapter("a", 2, 0).layers, layer: small.layers[layer]}, name=small.name)


def test_thresholds_of_components_and_of_whole_tensors_are_apart():
    experts = adapters(2, 3)
    report = merge(experts, "knots_ties").recipe.extra
    _, components = dense_components(experts)
    for e, own in zip(experts, components, strict=True):
        for key, space in (("thresholds", own), ("whole_thresholds", dict(e.dense))):
            magnitudes = oracle.flat(space).abs().sort().values
            wanted = magnitudes[len(magnitudes) - int(0.2 * len(magnitudes)) - 1]
            assert report[key][e.name] == pytest.approx(float(wanted), rel=1e-5)


def test_masks_have_the_shape_of_components():
    experts = adapters(2, 3)
    with pytest.raises(MethodError, match=r"\['blocks.10.o'\] is \(7, 9\); expected a bool tensor \(5, 9\)"):
        merge(experts, "knots_dare_ties", keep_masks=masks(experts, 0.5))
