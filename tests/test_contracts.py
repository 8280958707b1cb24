"""What every closed-form method promises, whichever it is: run over the table, so that a new one is held to it."""

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.methods import METHODS

CASES = [(name, variant) for name, method in METHODS.items() for variant in method.variants]
SHAPES = {"blocks.10.o": (7, 9), "blocks.2.q": (8, 9), "head": (6, 5)}

#: What a method needs to give the same for the adapters in reverse order: LEGO pools units in the order of adapters, so
#: the same start of k-means (unit 0 of "a", unit 1 of "b", of two each) has other places there.
IN_ORDER = {"lora_lego": {"init_perm": {layer: torch.tensor([0, 3]) for layer in SHAPES}}}
REVERSED = {"lora_lego": {"init_perm": {layer: torch.tensor([4, 3]) for layer in SHAPES}}}


def adapter(name, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: LowRank(
            torch.randn(2, d_in, generator=generator).to(dtype),
            torch.randn(d_out, 2, generator=generator).to(dtype),
            scale * (0.5 + seed),
        )
        for layer, (d_out, d_in) in SHAPES.items()
    }
    dense = {"projector.bias": torch.randn(4, generator=generator).to(dtype)}
    return Adapter(layers, "base", dense, name=name)


def adapters(**options):
    return [adapter(name, seed, **options) for seed, name in enumerate("abc")]


def deltas(update):
    names = [*update.layers, *update.dense]
    per_task = {(task, name): update.delta(name, task) for task in update.per_task for name in names}
    return {name: update.delta(name) for name in names} | per_task


def close(a, b, factor=1.0):
    assert set(a) == set(b)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, factor * b[name], rtol=1e-5, atol=1e-5 * float(b[name].abs().max()))


@pytest.mark.parametrize(("method", "variant"), CASES)
class TestEveryMethod:
    def test_leaves_its_inputs_alone(self, method, variant):
        inputs, fresh = adapters(), adapters()
        update = merge(inputs, method, variant=variant)
        for layer in update.layers.values():
            tensors = (layer.A, layer.B) if isinstance(layer, LowRank) else (layer,)
            for tensor in tensors:
                tensor.zero_()  # a result that shares memory with an input would change it here
        for tensor in update.dense.values():
            tensor.zero_()
        for before, after in zip(fresh, inputs, strict=True):
            for name, layer in before.layers.items():
                assert torch.equal(layer.A, after.layers[name].A)
                assert torch.equal(layer.B, after.layers[name].B)
                assert layer.scaling == after.layers[name].scaling
            assert torch.equal(before.dense["projector.bias"], after.dense["projector.bias"])

    def test_order_of_tasks_does_not_matter(self, method, variant):
        plain = merge(adapters(), method, variant=variant, **IN_ORDER.get(method, {}))
        turned = merge(adapters()[::-1], method, variant=variant, **REVERSED.get(method, {}))
        close(deltas(turned), deltas(plain))

    def test_order_of_layers_does_not_matter(self, method, variant):
        turned = [Adapter(dict(reversed(a.layers.items())), a.base_model, a.dense, name=a.name) for a in adapters()]
        update, other = merge(adapters(), method, variant=variant), merge(turned, method, variant=variant)
        assert list(update.layers) == list(other.layers) == sorted(SHAPES)
        for name in SHAPES:
            assert torch.equal(update.delta(name), other.delta(name))

    def test_scaling_every_alpha_scales_the_merge(self, method, variant):
        plain, scaled = merge(adapters(), method, variant=variant), merge(adapters(scale=3.0), method, variant=variant)
        close({n: scaled.delta(n) for n in SHAPES}, {n: plain.delta(n) for n in SHAPES}, factor=3.0)

    def test_the_merge_is_linear_in_lam(self, method, variant):
        unit, half = merge(adapters(), method, variant=variant), merge(adapters(), method, variant=variant, lam=0.5)
        close(deltas(half), deltas(unit), factor=0.5)

    def test_bf16_equals_its_fp32_upcast(self, method, variant):
        half = adapters(dtype=torch.bfloat16)
        wide = [
            Adapter(
                {n: LowRank(e.A.float(), e.B.float(), e.scaling) for n, e in a.layers.items()},
                a.base_model,
                {n: t.float() for n, t in a.dense.items()},
                name=a.name,
            )
            for a in half
        ]
        a, b = deltas(merge(half, method, variant=variant)), deltas(merge(wide, method, variant=variant))
        assert all(torch.equal(a[name], b[name]) for name in b)

    def test_saved_and_loaded_it_is_the_same(self, method, variant, tmp_path):
        from nscmerge.update import load_update

        update = merge(adapters(), method, variant=variant)
        read = load_update(update.save(tmp_path / "out"))
        close(deltas(read), deltas(update))
        assert (read.recipe.method, read.recipe.variant) == (method, variant)
        assert dict(read.recipe.options) == dict(update.recipe.options)
