"""The hot path against the reference programs' toy network, and fused against one pass per task."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from nscmerge.batching import fuse
from nscmerge.coefficients import Coefficients
from nscmerge.errors import AdapterError, TargetError
from nscmerge.factors import LowRank
from nscmerge.geometry import residual_ratio, row_space, training_ratio
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC
from nscmerge.objectives.ratios import Basis, sample_ratios
from tests.oracles import GOLDEN, TOY_LAYERS, dense_ratio, toy

TARGETS = {"last": NSC(blocks=1, projections=["up_proj"]), "all": NSC(blocks=2, projections=["q_proj", "up_proj"])}
GROUPS = ["uniform", "scaled", "mixed"]  # equal ranks; alpha != r; ranks 2, 4, 8


def prepare(group, targets):
    model, experts, batch, golden = toy(group, targets)
    objective = NSC(TARGETS[targets].blocks, TARGETS[targets].projections)
    coefficients = Coefficients(sorted(TOY_LAYERS), list(experts), init=0.4)
    objective.prepare(model, experts)
    return attach(model, experts, coefficients), objective, coefficients, batch, golden


@pytest.mark.parametrize("targets", ["last", "all"])
@pytest.mark.parametrize("group", GROUPS)
def test_loss_and_gradient_equal_the_reference(group, targets):
    merged, objective, coefficients, batch, golden = prepare(group, targets)
    (fused,) = fuse(batch)
    losses = objective.losses(merged, fused)
    torch.testing.assert_close(
        torch.stack(list(losses.values())), golden["loss_per_task"], rtol=0, atol=2e-6, check_dtype=False
    )
    torch.stack(list(losses.values())).mean().backward()
    for layer, lam in zip(coefficients.layers, coefficients.lam, strict=True):
        want = golden[f"grad.{layer}"]
        if not want.any():
            assert lam.grad is None  # no target lies behind it
        else:
            assert (lam.grad - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("targets", ["last", "all"])
@pytest.mark.parametrize("group", GROUPS)
def test_five_steps_equal_the_reference(group, targets):
    merged, objective, coefficients, batch, golden = prepare(group, targets)
    optimizer = torch.optim.AdamW(coefficients.parameters(), lr=1e-2)
    for want in golden["trace"]:
        optimizer.zero_grad()
        loss = torch.stack(list(objective.losses(merged, fuse(batch)[0]).values())).mean()
        assert loss.item() == pytest.approx(want.item(), abs=1e-5)
        loss.backward()
        optimizer.step()
    for row, layer in enumerate(coefficients.layers):
        torch.testing.assert_close(
            coefficients.matrix()[row], golden[f"lambda_after5.{layer}"], rtol=1e-4, atol=0, check_dtype=False
        )


@pytest.mark.parametrize("group", GROUPS)
def test_merged_forward_equals_the_reference(group):
    merged, _, _, batch, golden = prepare(group, "last")
    for task, inputs in batch.items():
        torch.testing.assert_close(
            merged.model(**inputs), golden[f"output.{task}"], rtol=1e-5, atol=1e-5, check_dtype=False
        )


def bert(layers=4, width=16):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).requires_grad_(False).eval()


def random_experts(model, ranks=(2, 4, 3), names=("query", "value", "attention.output.dense"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in model.named_modules() if n.endswith(names) and isinstance(m, torch.nn.Linear)}
    return {
        f"task{k}": {
            name: LowRank(
                torch.randn(r, m.in_features, generator=generator),
                torch.randn(m.out_features, r, generator=generator) / 8,
                scaling=0.5 + k,
            )
            for name, m in linears.items()
        }
        for k, r in enumerate(ranks)
    }


def random_batch(lengths=(5, 9, 7), rows=(2, 3, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for k, (length, n) in enumerate(zip(lengths, rows, strict=True)):
        mask = torch.ones(n, length, dtype=torch.long)
        mask[0, length - k :] = 0  # padding inside a task's own batch, too
        batch[f"task{k}"] = {
            "input_ids": torch.randint(1, 50, (n, length), generator=generator),
            "attention_mask": mask,
        }
    return batch


def test_fused_truncated_equals_full_passes_per_task():
    """Oracle: unfused, untruncated, dense projector, weights W0 + sum of lambda_k s_k B_k A_k, autograd in fp64."""
    model, batch = bert().double(), random_batch()
    experts = random_experts(model)
    layers = sorted(experts["task0"])
    objective, coefficients = NSC(blocks=2), Coefficients(layers, list(experts))
    objective.prepare(model, experts)

    lam = torch.full((len(layers), 3), 0.4, dtype=torch.float64, requires_grad=True)
    weights = {
        f"{layer}.weight": model.get_submodule(layer).weight
        + sum(lam[i, k] * e[layer].dense().double() for k, e in enumerate(experts.values()))
        for i, layer in enumerate(layers)
    }
    want = {}
    for task, inputs in batch.items():
        seen = {}
        hooks = [
            model.get_submodule(t).register_forward_pre_hook(lambda m, a, t=t, s=seen: s.__setitem__(t, a[0]))
            for t in objective.targets
        ]
        torch.func.functional_call(model, weights, kwargs=dict(inputs))
        for hook in hooks:
            hook.remove()
        mask = inputs["attention_mask"].double()
        ratios = [dense_ratio(z, experts[task][t].A) * mask for t, z in seen.items()]
        want[task] = torch.stack([(r.sum(1) / mask.sum(1)).mean() for r in ratios]).mean()
    torch.stack(list(want.values())).mean().backward()

    merged = attach(model, experts, coefficients)
    groups = fuse(batch)
    assert len(groups) == 1
    losses = objective.losses(merged, groups[0])
    for task, value in losses.items():
        assert value.item() == pytest.approx(want[task].item(), rel=1e-6)
    torch.stack(list(losses.values())).mean().backward()
    for row, layer in enumerate(layers):
        got = coefficients.lam[row].grad
        if got is None:
            assert not lam.grad[row].any(), layer
        else:
            torch.testing.assert_close(got.double(), lam.grad[row], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("buckets", [2, 4, 99])
def test_buckets_change_neither_losses_nor_gradient(buckets):
    model = bert()
    experts = random_experts(model)
    coefficients = Coefficients(sorted(experts["task0"]), list(experts))
    found = []
    for count in (1, buckets):
        objective = NSC(blocks=2, buckets=count)
        objective.prepare(model, experts)
        merged = attach(model, experts, coefficients)
        losses = objective.losses(merged, fuse(random_batch())[0])
        gradients = torch.autograd.grad(sum(losses.values()), list(coefficients.parameters()), allow_unused=True)
        merged.detach()
        found.append((torch.stack(list(losses.values())), [g for g in gradients if g is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_only_coefficients_have_a_gradient_and_the_pass_stops_at_the_last_target():
    model = bert()
    experts = random_experts(model)
    coefficients = Coefficients(sorted(experts["task0"]), list(experts))
    objective = NSC(blocks=[2])
    objective.prepare(model, experts)
    merged = attach(model, experts, coefficients)
    ran = []
    for i, layer in enumerate(model.encoder.layer):
        layer.intermediate.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
    losses = objective.losses(merged, fuse(random_batch())[0])
    assert ran == [0, 1]  # block 2 ended at its output projection
    sum(losses.values()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set()
    assert any(p.grad is not None for p in coefficients.parameters())


def test_a_base_in_bf16_keeps_geometry_in_fp32():
    model = bert().bfloat16()
    experts = random_experts(model)
    objective = NSC(blocks=1)
    objective.prepare(model, experts)
    coefficients = Coefficients(sorted(experts["task0"]), list(experts)).bfloat16()
    merged = attach(model, experts, coefficients)
    losses = objective.bfloat16().losses(merged, fuse(random_batch())[0])
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert {p.dtype for p in coefficients.parameters()} == {torch.float32}
    assert coefficients.matrix()[0, 0].item() == pytest.approx(0.4, abs=1e-7)  # bf16 would read 0.4004


def test_detach_gives_the_base_back():
    model, batch = bert(), random_batch()["task0"]
    before = model(**batch).last_hidden_state
    experts = random_experts(model)
    merged = attach(model, experts, Coefficients(sorted(experts["task0"]), list(experts)))
    assert not torch.allclose(model(**batch).last_hidden_state, before)
    assert torch.equal(merged.detach()(**batch).last_hidden_state, before)


def test_layers_that_an_adapter_lacks_add_nothing():
    model, batch = bert(), random_batch()["task0"]
    experts = random_experts(model, ranks=(2, 2))
    full = {task: dict(layers) for task, layers in experts.items()}
    removed = sorted(experts["task1"])[0]
    del experts["task1"][removed]
    zero = full["task1"][removed]
    full["task1"][removed] = LowRank(zero.A, torch.zeros_like(zero.B), zero.scaling)
    outputs = []
    for version in (experts, full):
        fresh = bert()
        attach(fresh, version, Coefficients(sorted(full["task0"]), list(version)))
        outputs.append(fresh(**batch).last_hidden_state)
    torch.testing.assert_close(*outputs)


def test_says_which_layer_does_not_fit():
    model = bert()
    experts = random_experts(model)
    name = sorted(experts["task0"])[0]
    coefficients = Coefficients(sorted(experts["task0"]), list(experts))
    wide = {**experts["task1"], name: LowRank(torch.ones(2, 99), torch.ones(16, 2))}
    with pytest.raises(AdapterError, match=rf"'{name}' of 'task1' is \(16, 99\).*base model's is \(16, 16\)"):
        attach(model, {**experts, "task1": wide}, coefficients)
    with pytest.raises(AdapterError, match=r"'encoder.layers.0.query' of 'x' is not in the base model BertModel"):
        attach(model, {"x": {"encoder.layers.0.query": LowRank(torch.ones(2, 16), torch.ones(16, 2))}}, coefficients)
    with pytest.raises(AdapterError, match=r"is a LayerNorm in the base model; only nn.Linear"):
        attach(model, {"x": {"embeddings.LayerNorm": LowRank(torch.ones(2, 16), torch.ones(16, 2))}}, coefficients)
    assert isinstance(model.get_submodule(name), torch.nn.Linear)  # nothing was swapped


def test_says_when_a_task_has_no_target():
    model = bert()
    experts = random_experts(model)
    experts["task2"] = {n: e for n, e in experts["task2"].items() if ".0." in n}
    with pytest.raises(TargetError, match=r"adapter of 'task2' has none of the target layers encoder.layer.3"):
        NSC(blocks=1).prepare(model, experts)


@pytest.mark.parametrize(("reduction", "golden"), [("sample", "loss_sample_mean"), ("flat", "loss_flat_valid")])
@pytest.mark.parametrize("ratio", [training_ratio, residual_ratio])
def test_reductions_equal_the_reference(reduction, golden, ratio):
    tensors = load_file(GOLDEN / "nsc__nsc_ratio__fp64_projector.safetensors")
    rows = row_space(tensors["padding/A"])
    basis = Basis(rows, torch.zeros(len(rows), dtype=torch.long))
    z, mask = tensors["padding/z"], tensors["padding/mask"].bool()
    got = sample_ratios(
        {"l": z}, torch.zeros(len(z), dtype=torch.long), {"l": basis}, mask, reduction=reduction, ratio=ratio
    )
    assert got.mean().item() == pytest.approx(tensors[f"padding/{golden}"].item(), abs=2e-6)


def test_each_task_is_read_through_its_own_row_space_at_the_layers_it_has():
    generator = torch.Generator().manual_seed(4)
    A = {(k, t): torch.randn(r, 6, generator=generator) for k, t, r in ((0, "x", 2), (1, "x", 3), (1, "y", 1))}
    z = {t: torch.randn(5, 4, 6, generator=generator) for t in "xy"}
    row_task = torch.tensor([1, 1, 0, 0, 0])
    bases = {
        t: Basis(
            torch.cat([row_space(a) for (_, at), a in A.items() if at == t]).float(),
            torch.tensor([k for (k, at), a in A.items() if at == t for _ in a]),
        )
        for t in "xy"
    }
    got = sample_ratios(z, row_task, bases)
    assert got[2:].mean().item() == pytest.approx(dense_ratio(z["x"][2:], A[0, "x"]).mean().item(), abs=1e-6)
    want = (dense_ratio(z["x"][:2], A[1, "x"]).mean() + dense_ratio(z["y"][:2], A[1, "y"]).mean()) / 2
    assert got[:2].mean().item() == pytest.approx(want.item(), abs=1e-6)
