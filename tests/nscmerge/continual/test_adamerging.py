"""Continual AdaMerging on a tiny model, against a dense oracle that runs autograd over whole weights."""

import json

import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.unlabelled import Lesson, entropy, first_token
from nscmerge.errors import AdapterError, ConfigError, MethodError

SHAPES = {"body.0.fc": (7, 5), "body.1.fc": (7, 7), "body.1.norm": None, "head": (3, 7)}
LINEAR = ["body.0.fc", "body.1.fc", "head"]


class Block(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.fc, self.norm, self.unused = nn.Linear(d_in, d_out), nn.LayerNorm(d_out), nn.Linear(d_out, d_out)

    def forward(self, x):
        return self.norm(torch.tanh(self.fc(x)))


class Tiny(nn.Module):
    """Logits (N, 3); ``unused`` layers never run."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(Block(5, 7), Block(7, 7)), nn.Linear(7, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.body(x))


def expert(seed, rank=2, names=tuple(LINEAR)):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name in LINEAR:
        d_out, d_in = SHAPES[name]
        A = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
        B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
        if name in names:
            layers[name] = LowRank(A, B, 0.5)
    return Adapter(layers, "base", name=f"t{seed}")


def checkpoint(seed):
    """Deltas of weights, a bias and a norm."""
    tensors = {f"{name}.weight": layer.dense() for name, layer in expert(seed).layers.items()}
    g = torch.Generator().manual_seed(100 + seed)
    tensors["body.0.fc.bias"] = torch.randn(7, generator=g, dtype=torch.float64)
    tensors["body.1.norm.weight"] = torch.randn(7, generator=g, dtype=torch.float64)
    return Adapter(dense=tensors, base_model="base", linear=LINEAR, name=f"t{seed}")


def batches(seed, count=3):
    g = torch.Generator().manual_seed(1000 + seed)
    return [{"x": torch.randn(4, 5, generator=g, dtype=torch.float64)} for _ in range(count)]


DATA = {f"t{seed}": batches(seed) for seed in range(3)}


def oracle(deltas, inputs, *, merged, lr, steps, lam=0.3, average="entropies"):
    """Return (coefficients, M_t) of one step over ``{parameter: delta}``, by autograd and torch.optim.Adam."""
    model = Tiny().requires_grad_(False)
    names = list(deltas)
    c = torch.full((len(names),), lam, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=lr)
    base = dict(model.named_parameters())
    for step in range(steps):
        put = {n: base[n] + merged.get(n, 0) + c[i].clamp(0, 1) * deltas[n] for i, n in enumerate(names)}
        logits = torch.func.functional_call(model, put, (inputs[step % len(inputs)]["x"],))
        logits = logits.mean(0, keepdim=True) if average == "logits" else logits
        p = logits.softmax(-1)
        loss = -(p * torch.log(p + 1e-8)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    c = c.detach().clamp(0, 1)
    return c, {n: merged.get(n, 0) + c[i] * deltas[n] for i, n in enumerate(names)}


def weights(adapter):
    if adapter.dense:
        return dict(sorted(adapter.dense.items()))
    return {f"{n}.weight": x.dense() for n, x in sorted(adapter.layers.items())}


def steps(experts, variant="default", **options):
    options = {"model": Tiny(), "batches": DATA, "lr": 0.02, "steps": 7} | options
    return list(continual.steps(experts, "adamerging", variant, **options))


def whole(state, name):
    weight = state.weight(name)
    return (weight.dense() if isinstance(weight, LowRank) else weight).double()


@pytest.mark.parametrize("make", [expert, checkpoint])
@pytest.mark.parametrize("variant", ["default", "papercode"])
def test_equals_the_dense_oracle(make, variant):
    experts = [make(seed) for seed in range(3)]
    merged = {}
    for state, one in zip(steps(experts, variant), experts, strict=True):
        before = merged if variant == "default" else {}
        c, merged = oracle(weights(one), DATA[one.name], merged=before, lr=0.02, steps=7)
        log = state.absorbed[-1].log
        assert len(log) == len(c)
        torch.testing.assert_close(torch.tensor([line["lam"] for line in log.values()]).double(), c, rtol=1e-6, atol=0)
        for name, want in merged.items():
            key = name.removesuffix(".weight") if make is expert else name
            torch.testing.assert_close(whole(state, key), want, rtol=1e-6, atol=1e-7)


def test_lowers_the_entropy_and_says_so():
    log = steps([expert(0)], steps=30)[0].absorbed[0].log
    assert all(line["entropy_after"] < line["entropy_before"] - 0.01 for line in log.values())
    assert len({line["lam"] for line in log.values()}) == 3


def test_factors_and_whole_weights_agree():
    full = Adapter(dense=weights(expert(1)), base_model="base", linear=LINEAR, name="t1")
    a, b = steps([expert(1)])[0], steps([full])[0]
    for name in LINEAR:
        torch.testing.assert_close(whole(a, name), whole(b, f"{name}.weight"), rtol=1e-6, atol=1e-8)


def test_papercode_holds_the_last_expert_alone():
    alone, both = steps([expert(1)], "papercode")[-1], steps([expert(0), expert(1)], "papercode")[-1]
    for name in LINEAR:
        assert torch.equal(whole(alone, name), whole(both, name))
    # Names that only the first expert has are back at the base model.
    some = steps([expert(0), expert(1, names=("head",))], "papercode")[-1]
    assert not whole(some, "body.0.fc").any()
    kept = steps([expert(0), expert(1, names=("head",))])[-1]
    torch.testing.assert_close(whole(kept, "body.0.fc"), whole(steps([expert(0)])[0], "body.0.fc"))


def test_coefficients_are_clamped():
    log = steps([expert(0)], lr=5.0, steps=3)[0].absorbed[0].log
    assert {line["lam"] for line in log.values()} <= {0.0, 1.0}


def test_leaves_the_model_as_it_was():
    model = Tiny().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    modules = [type(m) for m in model.modules()]
    with torch.no_grad():
        steps([expert(0), expert(1)], model=model)
    assert model.training
    assert [type(m) for m in model.modules()] == modules
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    x = DATA["t0"][0]["x"]
    assert torch.equal(model(x), Tiny()(x))


def test_what_is_never_run_keeps_the_start_value():
    layers = {**expert(0).layers, "body.0.unused": LowRank(torch.ones(1, 7), torch.ones(7, 1))}
    method = continual.make("adamerging", model=Tiny(), batches=DATA, steps=3)
    state = method.start(Adapter(layers, "base", name="t0"))
    line = state.absorbed[0].log["body.0.unused"]
    assert (line["lam"], line["reached"]) == (0.3, False)
    assert state.absorbed[0].log["head"]["reached"]
    assert "1 coefficients were reached by no gradient and keep 0.3" in " ".join(method.update(state).recipe.notes)


def test_can_be_resumed_without_what_is_no_state():
    first, second = steps([expert(0), expert(1)])
    assert json.loads(json.dumps(dict(second.options))) == second.options
    assert not {"model", "batches", "tasks"} & second.options.keys()
    bare = continual.make(first.method, first.variant, **first.options)
    assert bare.update(first).delta("head").any()
    with pytest.raises(MethodError, match=r"unlabelled inputs of 't1' and has no model and no batches.*'nufilt'"):
        bare.append(first, expert(1))
    again = continual.make(first.method, first.variant, **first.options, model=Tiny(), batches=DATA)
    for name in LINEAR:
        assert torch.equal(whole(again.append(first, expert(1)), name), whole(second, name))


class Head(nn.Module):
    """Reads the model's logits, times a weight that the expert brings."""

    outputs = "classes"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def load_head(self, head, owner):
        self.load_state_dict(dict(head))

    def forward(self, model, inputs):
        return self.scale * model(**inputs)


class Values(Head):
    outputs = "values"


def test_heads_belong_to_their_experts():
    head = Head()
    plain = steps([expert(0)], tasks={"t0": head})[0]
    sharp = Adapter(expert(0).layers, "base", name="t0", head={"scale": torch.tensor([9.0], dtype=torch.float64)})
    other = steps([sharp], tasks={"t0": head})[0]
    assert not torch.equal(whole(plain, "head"), whole(other, "head"))
    assert float(head.scale.detach()) == 1.0
    assert torch.equal(whole(plain, "head"), whole(steps([expert(0)])[0], "head"))


def test_tasks_without_entropy():
    with pytest.raises(ConfigError, match="entropy is undefined for regression"):
        steps([expert(0)], tasks={"t0": Values()})
    method = continual.make("adamerging", model=Tiny(), batches=DATA, tasks={"t0": Values()}, without_entropy="start")
    state = method.start(expert(0))
    for name in LINEAR:
        torch.testing.assert_close(whole(state, name), 0.3 * expert(0).layers[name].dense())
    assert "'t0' came in at the start value 0.3" in " ".join(method.update(state).recipe.notes)


def test_the_first_token_of_an_answer():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(first_token(logits, {"attention_mask": mask}), torch.stack([logits[0, 1], logits[1, 2]]))
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(first_token(logits, {"attention_mask": left}), logits[:, 2])
    assert torch.equal(first_token(logits, {"attention_mask": mask, "decoder_input_ids": mask}), logits[:, 2])
    assert torch.equal(first_token(logits[:, 0], {}), logits[:, 0])


def test_logits_may_be_averaged_before_the_entropy():
    c, _ = oracle(weights(expert(0)), DATA["t0"], merged={}, lr=0.02, steps=7, average="logits")
    log = steps([expert(0)], average="logits")[0].absorbed[0].log
    torch.testing.assert_close(torch.tensor([line["lam"] for line in log.values()]).double(), c, rtol=1e-6, atol=0)


def test_entropy_by_hand():
    assert float(entropy(torch.tensor([[0.0, 0.0], [50.0, -50.0]]))) == pytest.approx(0.5 * 0.6931472, rel=1e-6)
    assert torch.isfinite(entropy(torch.tensor([[0.0, float("-inf")]])))


def test_batches_start_again_at_their_end():
    lesson = Lesson("t0", Tiny(), DATA["t0"], None, "entropies")
    seen = [float(batch["x"].sum()) for batch in lesson.endless(7)]
    assert seen == [float(DATA["t0"][i % 3]["x"].sum()) for i in range(7)]


class TestBadInput:
    def test_options(self):
        for name, value in (("lr", 0.0), ("steps", -1), ("lam", 1.5), ("average", "mean"), ("without_entropy", "skip")):
            with pytest.raises(MethodError, match=f"adamerging: {name} is"):
                continual.make("adamerging", **{name: value})
        with pytest.raises(MethodError, match=r"model is a str.*load_base_model"):
            continual.make("adamerging", model="bert")

    def test_batches(self):
        with pytest.raises(MethodError, match=r"batches: no task 't0'.*Known: other"):
            steps([expert(0)], batches={"other": []})
        with pytest.raises(ConfigError, match=r"task 't0': its batches are empty"):
            steps([expert(0)], batches={"t0": []})
        with pytest.raises(ConfigError, match="its batches are empty, or can be read only once"):
            steps([expert(0)], batches={"t0": iter(DATA["t0"])})
        with pytest.raises(ConfigError, match="holds labels"):
            steps([expert(0)], batches={"t0": [{"x": torch.ones(2, 5), "labels": torch.ones(2)}]})

    def test_outputs(self):
        class Deaf(Tiny):
            def forward(self, x):
                return {"hidden": x}

        with pytest.raises(ConfigError, match=r"task 't0': the output is dict; entropy needs logits.*tasks="):
            steps([expert(0)], model=Deaf())
        with pytest.raises(MethodError, match=r"tasks: no task 't0'"):
            steps([expert(0)], tasks={"t1": Head()})

    def test_another_base_model(self):
        with pytest.raises(AdapterError, match=r"'body.0.fc' of 't0' is \(7, 5\) \(d_out, d_in\), the base model's"):
            model = Tiny()
            model.body[0].fc = nn.Linear(6, 7).double()
            steps([expert(0)], model=model)
        with pytest.raises(AdapterError, match=r"tensor 'head.weight' of 't0' is \(3, 8\), the base model's is"):
            steps([Adapter(dense={"head.weight": torch.ones(3, 8)}, linear=["head"], name="t0")])
