"""What every continual method promises, and what each promises of its own, on random experts."""

import json

import pytest
import torch
from safetensors.torch import load, save

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense
from nscmerge.continual.state import Absorbed, State
from nscmerge.update import load_update
from tests.nscmerge.continual.experts import (
    CASES,
    FACTORS,
    METHODS,
    ORDER_FREE,
    SHAPES,
    adapter,
    adapters,
    checkpoint,
    close,
    last,
    merged,
    options,
)


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
