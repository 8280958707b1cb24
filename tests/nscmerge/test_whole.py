"""Projectors and other whole tensors of adapters: deltas of the base, with coefficients of their own, and written."""

import copy

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules.twins.models import write_llava
from nscmerge import Adapter, LowRank, MergeModule, Pretrained, load_adapter, merge, save_adapter
from nscmerge.base_model import load_base_model
from nscmerge.errors import AdapterError
from nscmerge.merged_whole import MergedWhole
from nscmerge.objectives import NSC
from nscmerge.update import load_update
from nscmerge.whole import on_model, whole_linears

START = "model.multi_modal_projector.linear_"
LAYERS = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
TASKS = ("ask", "tell")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_llava(tmp_path_factory.mktemp("base") / "llava", hidden=16, layers=2)
    return load_base_model(Pretrained(str(folder), "AutoModelForImageTextToText"))


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def adapters(base, bias="tell"):
    """Two experts with LoRA and a whole projector; only one of them changed a bias, of the first layer."""
    generator = torch.Generator().manual_seed(0)
    own = base.state_dict()
    found = {}
    for k, task in enumerate(TASKS):
        layers = {}
        for name in LAYERS:
            linear = base.get_submodule(name)
            A = torch.randn(2 + k, linear.in_features, generator=generator)
            layers[name] = LowRank(A, 0.3 * torch.randn(linear.out_features, 2 + k, generator=generator), 0.5)
        saved = {}
        for name in (f"{START}1", f"{START}2"):
            weight = own[f"{name}.weight"]
            saved[f"{name}.weight"] = weight + 0.2 * torch.randn(weight.shape, generator=generator)
            saved[f"{name}.bias"] = own[f"{name}.bias"].clone()
        if task == bias:
            saved[f"{START}1.bias"] += 0.5
        modules = [f"{START}1", f"{START}2"]
        found[task] = Adapter(layers, saved=saved, modules_to_save=modules, name=task, base_model="llava")
    return found


def inputs(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 100, (2, 9), generator=generator)
    ids[:, 1:5] = model.config.image_token_id
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def module(model, **options):
    options = {"objective": NSC(blocks=1, projections=["v_proj"])} | options
    return MergeModule(model, adapters(model), **options)


def by_hand(base, experts, lam):
    """The merge as one plain model: every weight is the base's plus the weighted deltas, in fp64."""
    plain = copy.deepcopy(base).double()
    state = dict(base.double().state_dict())
    base.float()
    with torch.no_grad():
        for k, expert in enumerate(experts.values()):
            for name, factors in expert.layers.items():
                delta = lam[name][k].double() * factors.scaling * factors.B.double() @ factors.A.double()
                plain.get_submodule(name).weight += delta
            for tensor, saved in expert.saved.items():
                row = f"{tensor.rpartition('.')[0]}.weight"
                plain.get_parameter(tensor).add_(lam[row][k].double() * (saved.double() - state[tensor]))
    return plain


def test_the_merged_model_is_the_sum_by_hand(base, model):
    merge_module = module(model)
    merge_module.configure_model()
    rows = merge_module.coefficients.layers
    assert rows == (*sorted(LAYERS), f"{START}1.weight", f"{START}2.weight")
    with torch.no_grad():
        for i, row in enumerate(merge_module.coefficients.lam):
            row.copy_(torch.tensor([0.1 + 0.1 * i, 0.9 - 0.1 * i]))
    lam = {name: merge_module.coefficients.row(i).detach() for i, name in enumerate(rows)}
    plain = by_hand(base, adapters(base), lam)
    batch = inputs(base)
    wide = {**batch, "pixel_values": batch["pixel_values"].double()}
    want = plain(**wide).logits
    torch.testing.assert_close(model(**batch).logits.double(), want, rtol=1e-4, atol=1e-4)


def test_gradients_of_projector_coefficients_are_those_of_the_explicit_sum(base, model):
    merge_module = module(model)
    merge_module.configure_model()
    batch = inputs(base)
    model(**batch).logits.square().mean().backward()
    rows = merge_module.coefficients.layers
    lam = {name: merge_module.coefficients.row(i).detach() for i, name in enumerate(rows)}

    def loss(name, k, step):
        moved = {**lam, name: lam[name].double() + step * nn.functional.one_hot(torch.tensor(k), 2)}
        wide = {**batch, "pixel_values": batch["pixel_values"].double()}
        return by_hand(base, adapters(base), moved)(**wide).logits.square().mean()

    for i, name in enumerate(rows):
        if "projector" in name:
            for k in range(2):
                # Norms and rotary angles are fp32 inside, so that a smaller step would drown in rounding.
                difference = (loss(name, k, 1e-3) - loss(name, k, -1e-3)) / 2e-3
                got = merge_module.coefficients.lam[i].grad[k].double()
                torch.testing.assert_close(got, difference, rtol=2e-3, atol=1e-5)


def test_coefficient_one_for_one_task_is_that_expert_and_detach_is_the_base(base, model):
    batch = inputs(base)
    merge_module = module(model)
    merge_module.configure_model()
    for k, (task, expert) in enumerate(adapters(base).items()):
        one = {name: torch.eye(2)[k] for name in merge_module.coefficients.layers}
        want = by_hand(base, {t: a for t, a in adapters(base).items()}, one)
        wide = {**batch, "pixel_values": batch["pixel_values"].double()}
        with merge_module.merged.alone(k), torch.no_grad():
            torch.testing.assert_close(model(**batch).logits.double(), want(**wide).logits, rtol=1e-4, atol=1e-4)
        assert expert.name == task
    plain = merge_module.merged.detach()
    assert not any(isinstance(m, MergedWhole) for m in plain.modules())
    assert torch.equal(plain(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize(
    ("options", "rows", "scalars"),
    [
        ({}, [f"{START}1.weight", f"{START}2.weight"], 2 * 6),
        ({"projector_coeff": "per_projector"}, ["model.multi_modal_projector"], 2 * 5),
        ({"granularity": "task"}, [f"{START}1.weight", f"{START}2.weight"], 2),
    ],
)
def test_rows_of_the_projector(model, options, rows, scalars):
    merge_module = module(model, **options)
    merge_module.configure_model()
    assert list(merge_module.coefficients.layers[4:]) == rows
    assert sum(p.numel() for p in merge_module.coefficients.parameters()) == scalars
    assert {p.dtype for p in merge_module.coefficients.parameters()} == {torch.float32}


def test_a_fit_moves_the_projector_and_writes_it(base, model, tmp_path):
    """NSC has no term at the projector; what it learns there comes through the language model."""
    merge_module = module(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), output=tmp_path / "merge")
    batch = {task: inputs(base, seed) for seed, task in enumerate(TASKS)}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, limit_val_batches=0, default_root_dir=tmp_path, enable_model_summary=False,
        **quiet,
    )  # fmt: skip
    trainer.fit(merge_module, DataLoader([batch] * 3, batch_size=None))
    moved = (merge_module.coefficients.matrix() - 0.4).abs().max(1).values
    rows = merge_module.coefficients.layers
    assert all(moved[i] > 1e-3 for i, name in enumerate(rows) if "projector" in name)
    update = load_update(tmp_path / "merge")
    assert sorted(update.dense) == [f"{START}1.bias", f"{START}1.weight", f"{START}2.weight"]
    lam = merge_module.coefficients.matrix()[rows.index(f"{START}1.weight")]
    experts = on_model(base, adapters(base))
    want = sum(value * experts[task].dense[f"{START}1.weight"] for value, task in zip(lam, TASKS, strict=True))
    torch.testing.assert_close(update.delta(f"{START}1.weight"), want)
    torch.testing.assert_close(update.delta(f"{START}1.bias"), lam[1] * torch.full((16,), 0.5))
    recipe = update.recipe
    assert recipe.coefficients["tell"][f"{START}1.weight"] == pytest.approx(float(lam[1]))
    assert recipe.options["projector_coeff"] == "per_linear"
    assert not recipe.skipped


def test_a_merge_of_memory_alone_loads_the_base_for_its_projector(base, model):
    update = module(model).update()
    experts = on_model(base, adapters(base))
    want = 0.4 * sum(experts[task].dense[f"{START}2.weight"] for task in TASKS)
    torch.testing.assert_close(update.delta(f"{START}2.weight"), want)


def test_a_bias_that_only_was_rounded_is_no_change(base):
    """A projector trained in bf16 beside an fp32 base: the frozen bias comes back rounded, and counts as kept."""
    experts = adapters(base)
    ask = experts["ask"]
    half = {name: tensor.bfloat16() for name, tensor in ask.saved.items()}
    rounded = Adapter(ask.layers, saved=half, modules_to_save=ask.modules_to_save, name="ask")
    own = copy.deepcopy(base)
    own.get_parameter(f"{START}1.bias").data.normal_(generator=torch.Generator().manual_seed(3))
    half[f"{START}1.bias"] = own.get_parameter(f"{START}1.bias").bfloat16()
    assert sorted(on_model(own, {"ask": rounded})["ask"].dense) == [f"{START}1.weight", f"{START}2.weight"]
    assert [linear.row for linear in whole_linears(own, on_model(own, {"ask": rounded}))] == [
        f"{START}1.weight",
        f"{START}2.weight",
    ]


def test_tensors_of_another_base_are_one_clear_error(base):
    wrong = Adapter({}, saved={f"{START}3.weight": torch.ones(2, 2)}, name="x")
    with pytest.raises(AdapterError, match=r"layer '.*linear_3' of 'x' is not in the base model Llava"):
        on_model(base, {"x": wrong})
    wide = Adapter({}, saved={f"{START}1.weight": torch.ones(2, 2)}, name="x")
    with pytest.raises(AdapterError, match=r"'.*linear_1.weight' is \(2, 2\), the base model's \(16, 16\)"):
        on_model(base, {"x": wide})
    delta = Adapter({}, dense={f"{START}1.weight": torch.ones(2, 2)}, name="x")
    with pytest.raises(AdapterError, match=r"of 'x' is \(2, 2\), the base model's \(16, 16\)"):
        whole_linears(base, {"x": delta})


def test_small_deltas_survive_a_half_precision_base():
    """Added to a bf16 weight of 1, a delta of 1e-3 would vanish; beside it, it does not."""
    base = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight.fill_(1.0)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    x[:, ::2] = -1  # the base's part is zero, so what is left is the delta's
    delta = 1e-3 * x.float().expand(8, 64)
    layer = MergedWhole(base, [delta], [None], lambda: torch.ones(1), torch.bfloat16).requires_grad_(False)
    assert layer(x).float().tolist() == [pytest.approx([0.064] * 8, rel=0.01)]
    assert not nn.functional.linear(x, base.weight + delta.bfloat16()).any()


def test_closed_forms_take_whole_tensors_from_a_checkpoint_in_the_old_spelling(base, tmp_path):
    """What transformers writes for a LLaVA still has the names of before 4.52."""
    base.save_pretrained(tmp_path / "base")
    folders = [save_adapter(adapter, tmp_path / task) for task, adapter in adapters(base).items()]
    assert load_adapter(folders[0]).saved
    merged = merge(folders, "task_arithmetic", base=tmp_path / "base", lam=0.5)
    experts = on_model(base, adapters(base))
    want = 0.5 * sum(experts[task].dense[f"{START}2.weight"] for task in TASKS)
    torch.testing.assert_close(merged.delta(f"{START}2.weight"), want)


def test_folded_into_a_checkpoint_it_is_the_merged_model(base, model, tmp_path):
    base.save_pretrained(tmp_path / "base")
    merge_module = module(model)
    merge_module.update().fold_into(tmp_path / "base", tmp_path / "folded")
    folded = load_base_model(Pretrained(str(tmp_path / "folded"), "AutoModelForImageTextToText"))
    batch = inputs(base)
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_what_lies_before_the_projector_keeps_no_graph(model):
    merge_module = module(model)
    merge_module.configure_model()
    seen = {}
    projector = model.get_submodule("model.multi_modal_projector")
    projector.register_forward_hook(lambda _, args, out: seen.update(before=args[0], after=out))
    assert model(**inputs(model)).logits.requires_grad
    assert seen["before"].grad_fn is None
    assert seen["after"].grad_fn is not None


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_projectors_beside_a_quantised_base(bits, tmp_path):
    """The delta is that to the weight as it is held, so that coefficient 1 gives the expert's own projector."""
    pytest.importorskip("bitsandbytes")
    folder = str(write_llava(tmp_path / "llava", hidden=64, layers=2))
    kind = "AutoModelForImageTextToText"
    exact = load_base_model(Pretrained(folder, kind))
    experts = {task: Adapter(saved=a.saved, modules_to_save=a.modules_to_save) for task, a in adapters(exact).items()}
    held = load_base_model(Pretrained(folder, kind, dtype="float32", quantize=bits))
    assert not held.get_parameter(f"{START}1.weight").is_floating_point()
    found = on_model(held, experts)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    for (task, expert), linear in zip(experts.items(), whole_linears(held, found)[:1] * 2, strict=True):
        k = TASKS.index(task)
        one = torch.eye(2)[k]
        layer = MergedWhole(held.get_submodule(linear.layer), linear.weights, linear.biases, one.clone, torch.float32)
        want = nn.functional.linear(x, expert.saved[f"{linear.layer}.weight"], expert.saved[f"{linear.layer}.bias"])
        got = layer(x)
        assert float((got - want).norm() / want.norm()) < 0.03
