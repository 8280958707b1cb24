"""What each baseline promises of its own: by hand, or against the formula as written."""

import pytest
import torch

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.algebra import dense, squared_norm, thin_svd
from tests.nscmerge.continual.experts import SHAPES, adapter, adapters, checkpoint, close, last


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
