"""What every continual method promises, and what each promises of its own, on random experts."""

import json

import pytest
import torch
from safetensors.torch import load, save

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense, squared_norm, thin_svd
from nscmerge.continual.state import Absorbed, State
from nscmerge.update import load_update

#: Methods that see neither data nor a model.
METHODS = [name for name in continual.METHODS if name not in ("adamerging", "lora_wemoe")]
#: NUFILT's papercode is undefined on adapters.
UNDEFINED = ("nufilt", "papercode")
CASES = [(m, v) for m in METHODS for v in continual.METHODS[m].VARIANTS if (m, v) != UNDEFINED]
SHAPES = {"blocks.10.o": (14, 9), "blocks.2.q": (8, 12), "head": (10, 10)}
SMALL = {"nufilt": {"filter_rank": 4, "adapter_rank": 3, "task_rank": 2}, "wudi": {"lr": 1e-3}}
ORDER_FREE = ("weight_average", "task_arithmetic", "magmax")
FACTORS = ("weight_average", "task_arithmetic", "knots_ties", "iso_c", "tsv_m", "opcm", "nufilt")


def options(method, **more):
    return SMALL.get(method, {}) | more


def adapter(seed, rank=2, dtype=torch.float64, names=tuple(SHAPES)):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        A, B = torch.randn(rank, d_in, generator=g).to(dtype), torch.randn(d_out, rank, generator=g).to(dtype)
        if name in names:
            layers[name] = LowRank(A, B, 0.5 + seed)
    return Adapter(layers, "base", name=f"task {seed}")


def adapters(ranks=(2, 3, 1), dtype=torch.float64):
    return [adapter(seed, rank, dtype) for seed, rank in enumerate(ranks)]


def checkpoint(expert):
    """The same update as dense deltas of a full checkpoint."""
    tensors = {f"{name}.weight": layer.dense() for name, layer in expert.layers.items()}
    return Adapter(dense=tensors, base_model="base", linear=list(expert.layers), name=expert.name)


def merged(states, dtype=torch.float64):
    return [{name: dense(state.weight(name)).to(dtype) for name in state.shapes} for state in states]


def last(experts, method, variant="default", **more):
    return merged(continual.steps(experts, method, variant, **options(method, **more)))[-1]


def close(a, b, tol=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol * float(b[name].abs().max()))


@pytest.mark.parametrize(("method", "variant"), CASES)
class TestEveryMethod:
    def test_is_finite_and_leaves_its_inputs_alone(self, method, variant):
        experts, fresh = adapters(dtype=torch.float32), adapters(dtype=torch.float32)
        for update in continual.run(experts, method, variant, **options(method)):
            for name in SHAPES:
                assert bool(torch.isfinite(update.delta(name)).all())
                weight = update.weight(name)
                for tensor in (weight.A, weight.B) if isinstance(weight, LowRank) else (weight,):
                    tensor.fill_(7.0)  # a result that shares memory with an input or a state would change it here
        for before, after in zip(fresh, experts, strict=True):
            for name, layer in before.layers.items():
                assert torch.equal(layer.A, after.layers[name].A)
                assert torch.equal(layer.B, after.layers[name].B)

    def test_does_not_depend_on_the_order_of_layers(self, method, variant):
        experts = adapters()
        turned = [Adapter(dict(reversed(e.layers.items())), "base", name=e.name) for e in experts]
        for a, b in zip(
            merged(continual.steps(experts, method, variant, **options(method))),
            merged(continual.steps(turned, method, variant, **options(method))),
            strict=True,
        ):
            assert all(torch.equal(a[name], b[name]) for name in SHAPES)

    def test_resumed_from_disk_goes_on_bit_for_bit(self, method, variant):
        made = continual.make(method, variant, **options(method))
        first, second, third = adapters(dtype=torch.float32)
        state = made.append(made.start(first), second)
        resumed = stored(state)
        again = continual.make(resumed.method, resumed.variant, **resumed.options)
        a, b = made.append(state, third), again.append(resumed, third)
        for name in SHAPES:
            assert torch.equal(dense(a.weight(name)), dense(b.weight(name)))
        assert a.scalars == b.scalars
        assert [one.log for one in a.absorbed] == [one.log for one in b.absorbed]

    def test_a_step_changes_no_state(self, method, variant):
        made = continual.make(method, variant, **options(method))
        first, second, third = adapters()
        state = made.append(made.start(first), second)
        before = merged([state])[0]
        made.append(state, third)
        assert all(torch.equal(before[name], x) for name, x in merged([state])[0].items())

    def test_a_tensor_that_nobody_changed_stays_zero(self, method, variant):
        experts = adapters()
        zeros = {"blocks.2.q": LowRank(torch.zeros(2, 12), torch.zeros(8, 2))}
        experts = [Adapter({**e.layers, **zeros}, "base", {"extra.bias": torch.zeros(4)}, name=e.name) for e in experts]
        for state in continual.steps(experts, method, variant, **options(method)):
            assert not bool(dense(state.weight("blocks.2.q")).any())
            assert not bool(dense(state.weight("extra.bias")).any())

    def test_nothing_but_zeros_gives_zero(self, method, variant):
        zeros = [
            Adapter({n: LowRank(0 * x.A, x.B) for n, x in e.layers.items()}, "base", name=e.name) for e in adapters()
        ]
        for update in continual.run(zeros, method, variant, **options(method)):
            assert all(not bool(update.delta(name).any()) for name in SHAPES)

    def test_a_missing_layer_is_a_zero_update(self, method, variant):
        whole = adapters()
        part = [whole[0], adapter(1, 3, names=("head", "blocks.2.q")), adapter(2, 1, names=("head", "blocks.10.o"))]
        filled = [whole[0], *(with_zeros(e) for e in part[1:])]
        close(last(part, method, variant), last(filled, method, variant))

    def test_the_saved_folder_holds_the_update(self, method, variant, tmp_path):
        update = continual.run(adapters(dtype=torch.float32), method, variant, **options(method))[-1]
        read = load_update(update.save(tmp_path / "merge"))
        for name in SHAPES:
            torch.testing.assert_close(read.delta(name), update.delta(name), rtol=1e-6, atol=1e-6)
        assert (read.recipe.method, read.recipe.variant) == (method, variant)
        assert [one.name for one in read.recipe.inputs] == ["task 0", "task 1", "task 2"]
        assert read.recipe.extra["continual"]["t"] == 3


def with_zeros(expert):
    """The expert with zero factors in the layers that it lacks."""
    zeros = {n: LowRank(torch.zeros(1, i), torch.zeros(o, 1)) for n, (o, i) in SHAPES.items() if n not in expert.layers}
    return Adapter({**expert.layers, **zeros}, "base", name=expert.name)


def stored(state):
    """The state through bytes and JSON, as a folder would hold it."""
    tensors, weights = {}, {}
    for name, weight in state.merged.items():
        if isinstance(weight, LowRank):
            tensors |= {f"A/{name}": weight.A.contiguous(), f"B/{name}": weight.B.contiguous()}
            weights[name] = weight.scaling
        else:
            tensors[f"M/{name}"] = weight.contiguous()
    tensors |= {f"T/{name}": x.contiguous() for name, x in state.tensors.items()}
    text = json.dumps(
        {
            "options": state.options,
            "weights": weights,
            "scalars": state.scalars,
            "absorbed": [[one.name, one.source, one.sha256, one.log, one.skipped] for one in state.absorbed],
        }
    )
    tensors, content = load(save(tensors)), json.loads(text)
    low = {n: LowRank(tensors[f"A/{n}"], tensors[f"B/{n}"], s) for n, s in content["weights"].items()}
    whole = {key[2:]: x for key, x in tensors.items() if key.startswith("M/")}
    return State(
        state.method,
        state.variant,
        content["options"],
        state.t,
        {**low, **whole},
        state.shapes,
        state.layers,
        state.kinds,
        content["scalars"],
        {key[2:]: x for key, x in tensors.items() if key.startswith("T/")},
        tuple(Absorbed(*entry) for entry in content["absorbed"]),
        state.base_model,
        state.linear,
    )


class TestPaths:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 2), (3, 6, 5, 2)])  # the last outgrows min(d_out, d_in)
    def test_factors_and_dense_agree(self, method, ranks):
        experts = adapters(ranks)
        whole = [checkpoint(e) for e in experts]
        low = merged(continual.steps(experts, method, **options(method)))
        full = merged(continual.steps(whole, method, **options(method)))
        for a, b in zip(low, full, strict=True):
            close(a, {name.removesuffix(".weight"): x for name, x in b.items()}, 1e-8)

    @pytest.mark.parametrize("method", FACTORS)
    def test_the_rank_is_bounded_by_the_sum_of_ranks_and_by_the_layer(self, method):
        ranks = [2, 3, 1, 4, 2, 5]
        for t, state in enumerate(continual.steps(adapters(ranks), method, **options(method)), start=1):
            for name, (d_out, d_in) in SHAPES.items():
                weight = state.weight(name)
                assert isinstance(weight, LowRank)
                assert weight.rank <= min(sum(ranks[:t]), d_out, d_in)

    @pytest.mark.parametrize("method", ORDER_FREE)
    def test_order_free_methods_are(self, method):
        experts = adapters((2, 3, 1, 2))
        want = last(experts, method)
        for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
            close(last([experts[i] for i in order], method), want, 1e-12)

    @pytest.mark.parametrize("method", ["iso_c", "tsv_m", "opcm", "nufilt"])
    @pytest.mark.parametrize("form", [lambda e: e, checkpoint], ids=["factors", "dense"])
    def test_a_change_of_basis_changes_nothing_else(self, method, form):
        # NUFILT's adapter is drawn in the input basis, so the filter alone.
        only = {"adapter_rank": 0} if method == "nufilt" else {}
        g = torch.Generator().manual_seed(9)
        turns = {
            name: tuple(torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for d in shape)
            for name, shape in SHAPES.items()
        }
        experts = adapters()
        turned = [
            Adapter(
                {n: LowRank(x.A @ turns[n][1].T, turns[n][0] @ x.B, x.scaling) for n, x in e.layers.items()},
                "base",
                name=e.name,
            )
            for e in experts
        ]
        a = last([form(e) for e in experts], method, **only)
        b = last([form(e) for e in turned], method, **only)
        turns |= {f"{name}.weight": both for name, both in turns.items()}
        back = {n: turns[n][0].T @ x @ turns[n][1] for n, x in b.items()}
        close(back, a, 1e-11)


class TestOpcm:
    @pytest.mark.parametrize("form", [lambda e: e, checkpoint], ids=["factors", "dense"])
    @pytest.mark.parametrize("variant", ["default", "papercode"])
    def test_the_norm_is_the_mean_norm_of_the_experts(self, form, variant):
        experts = [form(e) for e in adapters((2, 3, 1, 4))]
        norms = []
        for expert, state in zip(experts, continual.steps(experts, "opcm", variant), strict=True):
            own = expert.layers or expert.dense
            norms.append(sum(squared_norm(x) for x in own.values()) ** 0.5)
            norm = sum(squared_norm(state.weight(name)) for name in state.shapes) ** 0.5
            assert norm == pytest.approx(sum(norms) / len(norms), rel=1e-12)

    def test_thin_form_equals_full_bases(self):
        first, second = adapters((3, 4))[:2]
        name, alpha = "blocks.10.o", 0.5
        M, delta = first.layers[name].dense(), second.layers[name].dense()
        u, s, vh = torch.linalg.svd(M)  # full bases
        c = u.T @ delta @ vh.T
        split = int((s.cumsum(0) / s.sum() <= alpha).sum())
        c[:split, :split] = 0
        for i in range(3):
            c[i, i] = 0
        states = list(continual.steps([first, second], "opcm", alpha=alpha))
        want = (M + u @ c @ vh) / states[-1].scalars["lam"]
        torch.testing.assert_close(dense(states[-1].weight(name)), want, rtol=1e-12, atol=1e-12)

    def test_a_zero_expert_first_is_defined(self):
        first = Adapter({n: LowRank(0 * x.A, x.B) for n, x in adapter(0).layers.items()}, "base", name="zero")
        state = list(continual.steps([first, adapter(1)], "opcm"))[-1]
        assert state.scalars["lam"] == pytest.approx(2.0)
        torch.testing.assert_close(dense(state.weight("head")), adapter(1).layers["head"].dense() / 2)


class TestTies:
    def test_by_hand(self):
        a, b = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5]), torch.tensor([-5.0, -1.0, 3.0, 0.2, 4.0])
        experts = [Adapter(dense={"w": a}, name="a"), Adapter(dense={"w": b}, name="b")]
        # Kept of five at density 0.2: int(1) + 1 = 2 each, of M = a and of b. Signs elected by the sum.
        u = torch.tensor([-5.0, -3.0, 0.0, 0.0, 4.0])
        got = continual.run(experts, "ties", lam=1.0)[-1].delta("w")
        torch.testing.assert_close(got, a + u)

    def test_the_mean_divides_by_those_that_agree(self):
        experts = [Adapter(dense={"w": torch.tensor([4.0, -3.0, 1.0])}, name="a")]
        experts.append(Adapter(dense={"w": torch.tensor([2.0, 1.0, 5.0])}, name="b"))
        got = continual.run(experts, "ties", lam=1.0, density=1.0, agg="mean")[-1].delta("w")
        torch.testing.assert_close(got, torch.tensor([4.0 + 3.0, -3.0 - 3.0, 1.0 + 3.0]))


class TestWudi:
    def test_equals_autograd_and_torch_adam(self):
        first, second = adapters((2, 3))[:2]
        got = last([first, second], "wudi", lr=1e-2)
        for name in SHAPES:
            slots = [first.layers[name].dense(), second.layers[name].dense()]
            x = sum(slots).clone().requires_grad_()
            optimizer = torch.optim.Adam([x], lr=1e-2)
            for _ in range(50):
                loss = sum(((x - tau) @ tau.T).square().sum() / tau.square().sum() for tau in slots)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.testing.assert_close(got[name], x.detach(), rtol=1e-7, atol=1e-7)

    def test_goes_dense_and_says_so_or_is_cut(self):
        update = continual.run(adapters(), "wudi")[-1]
        assert isinstance(update.weight("head"), torch.Tensor)
        assert any("dense" in note for note in update.recipe.notes)
        cut = continual.run(adapters(), "wudi", rank=3)[-1]
        assert cut.weight("head").rank == 3
        assert not cut.recipe.notes
        whole, low = (continual.run(adapters()[:2], "wudi", rank=rank)[-1].delta("head") for rank in (None, 3))
        u, s, vh = torch.linalg.svd(whole.double())
        torch.testing.assert_close(low.double(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-5, atol=1e-5)


class TestTwoSlot:
    def test_iso_c_is_flat(self):
        state = list(continual.steps(adapters(), "iso_c"))[-1]
        for name in SHAPES:
            s = thin_svd(state.weight(name))[1]
            torch.testing.assert_close(s, s.mean().expand(len(s)), rtol=1e-12, atol=0)

    def test_tsv_m_survives_the_same_expert_twice(self):
        first = adapter(0)
        update = continual.run({"a": first, "b": first}, "tsv_m")[-1]
        assert bool(torch.isfinite(update.delta("head")).all())

    def test_what_is_no_matrix_fades(self):
        ones = [Adapter(dense={"b": torch.ones(3) * k}, name=str(k)) for k in (4, 2, 1)]
        for method in ("iso_c", "tsv_m", "wudi"):
            deltas = [update.delta("b")[0].item() for update in continual.run(ones, method)]
            assert deltas == [4.0, 3.0, 2.0]


def test_magmax_keeps_the_largest():
    experts = [Adapter(dense={"w": torch.tensor(x)}, name=str(i)) for i, x in enumerate([[1.0, -4.0], [-2.0, 3.0]])]
    updates = continual.run(experts, "magmax", lam=0.5)
    assert updates[1].delta("w").tolist() == [-1.0, -2.0]
    assert not continual.run(experts, "magmax", lam=0.0)[1].delta("w").any()


def test_papercode_of_task_arithmetic_restarts():
    experts = adapters()
    got = last(experts, "task_arithmetic", "papercode", lam=0.3)
    close(got, {n: 0.3 * x.dense() for n, x in experts[-1].layers.items()}, 1e-12)


def test_papercode_of_ties_loses_the_first_expert():
    experts = adapters()
    assert not continual.run(experts, "ties", "papercode")[0].delta("head").any()
