"""Null-space ratios against numbers from an explicit fp64 projector, and at every edge."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nscmerge.errors import NSCMergeError, ShapeError
from nscmerge.geometry import gram_ratio, null_space_ratio, residual_ratio, row_space, token_mean, training_ratio

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "nsc__nsc_ratio__fp64_projector.safetensors")
CASES = sorted({k.rpartition("/")[0] for k in GOLDEN if k.endswith("/omega")} - {"reduce"})
DEFICIENT = {"duplicate_row": 3, "zero_row": 3}  # the manifest's rank rule


@pytest.mark.parametrize("case", [c for c in CASES if c != "padding"])
def test_reported_ratio_equals_the_fp64_projector(case):
    z, A, omega = (GOLDEN[f"{case}/{k}"] for k in ("z", "A", "omega"))
    got = null_space_ratio(z, A)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), omega, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("padding", "reduce")])
def test_training_ratio_differs_only_by_its_floor(case):
    z, A, omega = (GOLDEN[f"{case}/{k}"] for k in ("z", "A", "omega"))
    # Near omega = 0 the fp32 form 1 - q carries 1e-7, that is 3e-4 in omega.
    atol = 1e-3 if case in ("row_space", "mixture") else 2e-6
    torch.testing.assert_close(training_ratio(z, row_space(A)).double(), omega, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_numerical_rank_drops_dependent_rows(case):
    A = GOLDEN[f"{case}/A"]
    basis = row_space(A)
    assert len(basis) == DEFICIENT.get(case, len(A))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["base.layers.0.attn.q_proj", "rank2.layers.1.mlp.up_proj", "collinear0.01"])
def test_gram_form_equals_the_orthonormal_one(case):
    z, A = GOLDEN[f"{case}/z"], GOLDEN[f"{case}/A"]
    torch.testing.assert_close(gram_ratio(z, A), GOLDEN[f"{case}/omega"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", ["collinear0.0001", "duplicate_row", "zero_row"])
def test_gram_form_refuses_what_it_cannot_do(case):
    with pytest.raises(NSCMergeError, match=r"condition number.*Use null_space_ratio"):
        gram_ratio(GOLDEN[f"{case}/z"], GOLDEN[f"{case}/A"])


def test_gradient_equals_the_golden_one():
    z = GOLDEN["grad/z"].clone().requires_grad_()
    training_ratio(z, row_space(GOLDEN["grad/A"])).mean().backward()
    want = GOLDEN["grad/dmean_dz"]
    assert (z.grad.double() - want).abs().max() <= 1e-4 * want.abs().max()


def test_gradient_equals_the_closed_form_in_fp64():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(5, 9, dtype=torch.float64, generator=generator).requires_grad_()
    Q = row_space(torch.randn(3, 9, generator=generator))
    omega = training_ratio(z, Q)
    omega.sum().backward()
    energy = z.detach().square().sum(-1, keepdim=True)
    residual = z.detach() - z.detach() @ Q.T @ Q
    want = residual / (energy * omega.detach()[:, None]) - omega.detach()[:, None] * z.detach() / energy
    torch.testing.assert_close(z.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "z", "omega"),
    [
        ("inside the row space", [[3.0, -2.0, 0.0, 0.0]], 1e-4),  # the floor, where the true value is 0
        ("outside it", [[0.0, 0.0, 5.0, 1.0]], 1.0),
        ("the zero vector", [[0.0, 0.0, 0.0, 0.0]], 1.0),
        ("tiny", [[0.0, 1e-30, 1e-30, 0.0]], 2**-0.5),
    ],
)
def test_edges_have_finite_values_and_gradients(name, z, omega):
    A = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    z = torch.tensor(z, requires_grad=True)
    got = training_ratio(z, row_space(A))
    got.sum().backward()
    assert torch.isfinite(z.grad).all()
    if name != "tiny":  # |z|^2 underflows in fp32: the reported form is the exact one there
        assert got.item() == pytest.approx(omega, abs=1e-6)
    exact = 0.0 if name == "inside the row space" else omega
    assert null_space_ratio(z.detach(), A).item() == pytest.approx(exact, abs=1e-6)


def test_an_all_zero_adapter_discards_everything():
    assert null_space_ratio(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [1.0, 1.0]


def test_autocast_does_not_touch_geometry():
    z, A = GOLDEN["base.layers.0.attn.q_proj/z"], GOLDEN["base.layers.0.attn.q_proj/A"]
    basis = row_space(A).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = training_ratio(z, basis), residual_ratio(z, basis)
    assert torch.equal(inside[0], training_ratio(z, basis))
    assert torch.equal(inside[1], residual_ratio(z, basis))


def test_padding_is_left_out():
    z, A, mask = GOLDEN["padding/z"], GOLDEN["padding/A"], GOLDEN["padding/mask"].bool()
    omega = null_space_ratio(z, A, mask)
    torch.testing.assert_close(omega[mask].double(), GOLDEN["padding/omega"][mask], rtol=0, atol=2e-6)
    assert (omega[~mask] == 0).all()
    torch.testing.assert_close(token_mean(omega, mask).double(), GOLDEN["padding/per_sample"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("A", [torch.ones(2, 4), torch.ones(2, 2)])
def test_says_which_widths_differ(A):
    with pytest.raises(ShapeError, match=rf"\(5, 3\) and A is \(2, {A.shape[1]}\)"):
        null_space_ratio(torch.ones(5, 3), A)


def test_says_when_the_mask_does_not_fit():
    with pytest.raises(ShapeError, match=r"mask is \(4,\); expected one entry per token, \(5,\)"):
        null_space_ratio(torch.ones(5, 3), torch.ones(1, 3), torch.ones(4, dtype=torch.bool))
