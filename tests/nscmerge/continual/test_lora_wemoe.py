"""Continual LoRA-WEMoE on a tiny transformer-like model, against an oracle that is written out in one class."""

import json

import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.gated import from_tensors, to_tensors
from nscmerge.continual.unlabelled import entropy
from nscmerge.errors import MethodError, TargetError
from nscmerge.update import load_update

D, HIDDEN, BLOCKS = 6, 10, 2
ATTENTION = [f"layers.{i}.attn.q" for i in range(BLOCKS)]
FC = {f"layers.{i}.mlp.fc{k}": (HIDDEN, D) if k == 1 else (D, HIDDEN) for i in range(BLOCKS) for k in (1, 2)}
SHAPES = {**dict.fromkeys(ATTENTION, (D, D)), **FC, "head": (3, D)}
LINEAR = list(SHAPES)


class Part(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, (d_out, d_in) in layers.items():
            setattr(self, name, nn.Linear(d_in, d_out))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Part(q=(D, D)), Part(fc1=(HIDDEN, D), fc2=(D, HIDDEN))

    def forward(self, x):
        x = x + torch.tanh(self.attn.q(x)).mean(1, keepdim=True)
        return x + self.mlp.fc2(torch.tanh(self.mlp.fc1(x)))


class Tiny(nn.Module):
    """Tokens (N, T, D) to logits (N, 3)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers, self.head = nn.ModuleList(Layer() for _ in range(BLOCKS)), nn.Linear(D, 3)
        self.double()

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def expert(seed, rank=2, names=(*ATTENTION, *FC)):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        A = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
        B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
        if name in names:
            layers[name] = LowRank(A, B, 0.5)
    return Adapter(layers, "base", name=f"t{seed}")


def checkpoint(seed, rank=2):
    tensors = {f"{n}.weight": x.dense() for n, x in expert(seed, rank).layers.items()}
    g = torch.Generator().manual_seed(100 + seed)
    for name in ("layers.0.attn.q.bias", "layers.1.mlp.fc2.bias", "head.bias"):
        tensors[name] = torch.randn(SHAPES[name.removesuffix(".bias")][0], generator=g, dtype=torch.float64)
    return Adapter(dense=tensors, base_model="base", linear=LINEAR, name=f"t{seed}")


def batches(seed, count=3):
    g = torch.Generator().manual_seed(1000 + seed)
    return [{"x": torch.randn(4, 3, D, generator=g, dtype=torch.float64)} for _ in range(count)]


DATA = {f"t{seed}": batches(seed) for seed in range(3)}


def method(variant="default", **options):
    options = {"model": Tiny(), "batches": DATA, "lr": 0.02, "steps": 7} | options
    return continual.make("lora_wemoe", variant, **options)


def steps(experts, variant="default", **options):
    made = method(variant, **options)
    state = None
    for one in experts:
        state = made.start(one) if state is None else made.append(state, one)
        yield state


def last(experts, variant="default", **options):
    return list(steps(experts, variant, **options))[-1]


class Oracle(nn.Module):
    """The whole method in dense matrices: attention added up, one gate per MLP, all experts kept."""

    def __init__(self, per_sample=False):
        super().__init__()
        self.base, self.per_sample = Tiny().requires_grad_(False), per_sample
        self.gates = [(torch.zeros(0, D), torch.zeros(0)) for _ in range(BLOCKS)]
        self.experts = [[] for _ in range(BLOCKS)]

    def forward(self, x):
        for layer, (weight, bias), experts in zip(self.base.layers, self.gates, self.experts, strict=True):
            x = x + torch.tanh(layer.attn.q(x)).mean(1, keepdim=True)
            mean = x.mean(1) if self.per_sample else x.mean((0, 1), keepdim=False)[None].expand(len(x), -1)
            g = mean @ weight.double().T + bias.double()  # (N, E)
            fc1 = layer.mlp.fc1.weight + torch.einsum("ne,eij->nij", g, torch.stack([e[0] for e in experts]))
            fc2 = layer.mlp.fc2.weight + torch.einsum("ne,eij->nij", g, torch.stack([e[1] for e in experts]))
            hidden = torch.tanh(torch.einsum("nij,ntj->nti", fc1, x) + layer.mlp.fc1.bias)
            x = x + torch.einsum("nij,ntj->nti", fc2, hidden) + layer.mlp.fc2.bias
        return self.base.head(x.mean(1))

    def absorb(self, deltas, rows, inputs, *, lam=0.3, lr=0.02, steps=7):
        """``rows``: the new row of every gate."""
        for i, layer in enumerate(self.base.layers):
            layer.attn.q.weight += lam * deltas[f"layers.{i}.attn.q"]
            self.experts[i].append([deltas[f"layers.{i}.mlp.fc1"], deltas[f"layers.{i}.mlp.fc2"]])
            weight, bias = self.gates[i]
            weight, bias = torch.cat([weight, rows[i]]), torch.cat([bias, torch.tensor([lam])])
            self.gates[i] = (weight.requires_grad_(), bias.requires_grad_())
        optimizer = torch.optim.Adam([p for pair in self.gates for p in pair], lr=lr)
        for step in range(steps):
            loss = entropy(self(inputs[step % len(inputs)]["x"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.gates = [(w.detach(), b.detach()) for w, b in self.gates]


@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_dense_oracle(per_sample):
    model, oracle = Tiny(), Oracle(per_sample)
    made = method(model=model, per_sample=per_sample)
    state = None
    x = batches(9)[0]["x"]
    for seed in range(3):
        one = expert(seed)
        rows = [made._row(f"layers.{i}.mlp.fc1", seed, D) for i in range(BLOCKS)]
        oracle.absorb({n: layer.dense() for n, layer in one.layers.items()}, rows, DATA[one.name])
        state = made.start(one) if state is None else made.append(state, one)
        mlps = from_tensors(state.tensors)
        assert list(mlps) == ["layers.0.mlp.fc1", "layers.1.mlp.fc1"]
        for mlp, (weight, bias) in zip(mlps.values(), oracle.gates, strict=True):
            torch.testing.assert_close(mlp.weight, weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mlp.bias, bias, rtol=1e-4, atol=1e-5)
        with made.attached(state, model), torch.no_grad():
            torch.testing.assert_close(model(x=x), oracle(x), rtol=1e-4, atol=1e-5)
    # Batch-averaged gates make a prediction depend on its neighbours, gates per sample do not.
    with made.attached(state, model), torch.no_grad():
        alone, together = model(x=x[:1]), model(x=x)[:1]
    assert torch.allclose(alone, together, atol=1e-9) == per_sample


def test_lowers_the_entropy_and_says_so():
    state = last([expert(0)], steps=40)
    log = state.absorbed[0].log
    assert set(log) == set(FC)
    assert all(line["entropy_after"] < line["entropy_before"] - 1e-3 for line in log.values())
    assert json.loads(json.dumps(log)) == log


def test_starts_as_task_arithmetic():
    made = method(steps=0, gate_std=0.0)
    state = made.append(made.start(expert(0)), expert(1))
    update = made.update(state)
    for name in (*ATTENTION, *FC):
        want = 0.3 * (expert(0).layers[name].dense() + expert(1).layers[name].dense())
        torch.testing.assert_close(update.delta(name).double(), want, rtol=1e-6, atol=1e-6)


def bare(seed):
    """A checkpoint without biases."""
    weights = {name: x for name, x in checkpoint(seed).dense.items() if name.endswith(".weight")}
    return Adapter(dense=weights, base_model="base", linear=LINEAR, name=f"t{seed}")


def test_a_checkpoint_is_the_same_where_ranks_allow():
    a, b = (method().update(last([make(0), make(1)])) for make in (expert, bare))
    for name in (*ATTENTION, *FC):
        torch.testing.assert_close(a.delta(name), b.delta(f"{name}.weight"), rtol=1e-4, atol=1e-4)


def test_which_tensors_of_a_checkpoint_take_part():
    update = method().update(last([checkpoint(0), checkpoint(1)]))
    want = 0.3 * sum(checkpoint(k).dense["layers.0.attn.q.bias"] for k in range(2))
    torch.testing.assert_close(update.delta("layers.0.attn.q.bias").double(), want, rtol=1e-6, atol=1e-6)
    assert not update.delta("layers.1.mlp.fc2.bias").any()
    assert not update.delta("head.bias").any()


def test_experts_are_cut_to_rank():
    full = checkpoint(0, rank=5)
    (mlp, _) = from_tensors(last([full], rank=3).tensors).values()
    name = "layers.0.mlp.fc1.weight"
    cut = mlp.experts[name][0]
    u, s, vh = torch.linalg.svd(full.dense[name], full_matrices=False)
    torch.testing.assert_close(cut.dense().double(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-5, atol=1e-5)
    later = last([expert(0, rank=20), expert(1, rank=20)], "papercode")
    ranks = {e: x.rank for e, x in from_tensors(later.tensors)["layers.0.mlp.fc1"].experts["layers.0.mlp.fc2"].items()}
    assert ranks == {0: 20, 1: 6}  # numerical rank of a (6, 10) matrix, below 16
    assert last([expert(0, rank=20)], rank=5).tensors["expert|layers.0.mlp.fc1|layers.0.mlp.fc2|0|A"].shape == (5, 10)


def test_the_update_holds_the_gates_at_each_tasks_mean():
    """One batch, so that the batch's own mean is the recorded one: the fixed weights then run as the gates do."""
    data = {task: own[:1] for task, own in DATA.items()}
    made, model = method(batches=data), Tiny()
    state = made.append(made.start(expert(0)), expert(1))
    update = made.update(state)
    assert set(update.per_task) == {"t0", "t1"}
    with made.attached(state, model), torch.no_grad():
        want = model(**data["t1"][0])
    fixed = {f"{name}.weight": update.delta(name, "t1").double() for name in (*ATTENTION, *FC)}
    base = dict(model.named_parameters())
    with torch.no_grad():
        got = torch.func.functional_call(model, {n: base[n] + x for n, x in fixed.items()}, (data["t1"][0]["x"],))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.equal(update.delta("layers.0.mlp.fc1", "t0"), update.delta("layers.0.mlp.fc1", "t1"))
    assert torch.equal(update.delta(ATTENTION[0], "t0"), update.delta(ATTENTION[0]))
    assert any("attached runs the gates" in note for note in update.recipe.notes)


@pytest.mark.parametrize("make", [expert, checkpoint])
def test_the_update_can_be_written(make, tmp_path):
    made = method()
    update = made.update(last([make(0), make(1)]))
    read = load_update(update.save(tmp_path / "merge"))
    for name in (*ATTENTION, *FC):
        key = name if make is expert else f"{name}.weight"
        for task in (None, "t0", "t1"):
            torch.testing.assert_close(read.delta(key, task), update.delta(key, task), rtol=0, atol=0)


def test_without_mlps_it_is_task_arithmetic_and_needs_no_model():
    some = [expert(seed, names=ATTENTION) for seed in range(2)]
    updates = continual.run(some, "lora_wemoe")
    plain = continual.run(some, "task_arithmetic")
    for ours, theirs in zip(updates, plain, strict=True):
        assert not ours.per_task
        assert all(torch.equal(ours.delta(name), theirs.delta(name)) for name in ATTENTION)
    assert "no gate, nothing learned" in updates[-1].recipe.notes[0]


def test_an_mlp_that_comes_later():
    state = last([expert(0, names=ATTENTION), expert(1, names=[*ATTENTION, "layers.1.mlp.fc2"])])
    (entry,) = from_tensors(state.tensors)
    # The gate reads the MLP's input, though only its second layer is adapted.
    assert entry == "layers.1.mlp.fc1"
    mlp = from_tensors(state.tensors)[entry]
    assert list(mlp.experts) == ["layers.1.mlp.fc2"]
    assert list(mlp.experts["layers.1.mlp.fc2"]) == [1]
    assert mlp.weight.shape == (2, D)
    assert method().update(state).delta("layers.1.mlp.fc2").any()


def test_can_be_resumed_without_what_is_no_state():
    first, second = steps([expert(0), expert(1)])
    bare = continual.make("lora_wemoe", **(options := json.loads(json.dumps(dict(first.options)))))
    assert bare.update(first).delta("layers.0.mlp.fc1").any()
    with pytest.raises(MethodError, match="unlabelled inputs of 't1' and has no model"):
        bare.append(first, expert(1))
    again = continual.make("lora_wemoe", **options, model=Tiny(), batches=DATA).append(first, expert(1))
    assert again.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(again.tensors[k], second.tensors[k]) for k in second.tensors)
    rebuilt = to_tensors(from_tensors(second.tensors))
    assert all(torch.equal(rebuilt[k], second.tensors[k]) for k in second.tensors)


def test_leaves_the_model_as_it_was():
    model = Tiny().train()
    modules = [type(m) for m in model.modules()]
    made = method(model=model)
    with torch.no_grad():
        state = made.start(expert(0))
        with made.attached(state, model):
            assert not torch.equal(model(x=DATA["t0"][0]["x"]), Tiny()(DATA["t0"][0]["x"]))
    assert [type(m) for m in model.modules()] == modules
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model(x=DATA["t0"][0]["x"]), Tiny()(DATA["t0"][0]["x"]))


def test_bad_input():
    for name, value in (("rank", 0), ("gate_std", -1.0), ("per_sample", 1), ("steps", 1.5)):
        with pytest.raises(MethodError, match=f"lora_wemoe: {name} is"):
            continual.make("lora_wemoe", **{name: value})
    with pytest.raises(MethodError, match="mlp is 'fc1'; expected a list"):
        continual.make("lora_wemoe", mlp="fc1")
    with pytest.raises(TargetError, match=r"none of the 1 layers or tensors \('head', ...\) is attention"):
        continual.run([expert(0, names=["head"])], "lora_wemoe")
    model = Tiny()
    model.forward = lambda x: model.head(x.mean(1))  # skips every MLP
    with pytest.raises(TargetError, match=r"MLP of layer 'layers.0.mlp.fc1' never runs for task 't0'"):
        method(model=model).start(expert(0))
