"""Shared batches against one pass per task on the same inputs: same losses, gradients and reports, fewer rows run."""

import copy

import lightning
import pytest
import torch

from nscmerge import MergeModule
from nscmerge.batching import fuse, tasks_of
from nscmerge.coefficients import Coefficients
from nscmerge.errors import ConfigError
from nscmerge.heads import predictions
from nscmerge.merged_linear import attach
from nscmerge.objectives import NSC, AnchoredNSC, Entropy
from nscmerge.search import NullSpaceRatio, Reading
from tests.fakes.fit_merge import adapters, heads
from tests.fakes.pools import pooled_data
from tests.fakes.text_tasks import tiny_bert


def texts(rows, length, seed, short=0):
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - short :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def batches():
    """The same inputs as a shared batch and as one of a copy per task; 'a' and 'c' share, 'b' is alone."""
    common, alone = texts(5, 9, seed=1, short=4), texts(3, 6, seed=2, short=2)
    return {("a", "c"): common, "b": alone}, {"a": common, "b": alone, "c": copy.deepcopy(common)}


def set_up(objective):
    model = tiny_bert()
    experts = {task: adapter.layers for task, adapter in adapters(model).items()}
    del experts["b"]["encoder.layer.1.attention.output.dense"]  # a task that lacks one of the targets
    coefficients = Coefficients(sorted(experts["a"]), list(experts), init=0.4)
    objective.bind(adapters(model))
    objective.prepare(model, experts)
    return attach(model, experts, coefficients), coefficients


def gradients(objective, batch):
    """Return losses, reports and the gradient of the total, and how many rows went through the model."""
    merged, coefficients = set_up(objective)
    rows = []
    merged.model.register_forward_pre_hook(lambda m, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    losses = {}
    for group in fuse(batch):
        losses |= objective.losses(merged, group)
    seen = sum(rows)
    objective.total(list(losses.values())).backward()
    reports = {}
    for group in fuse(batch):
        reports |= objective.report(merged, group)
    gradient = [torch.zeros(3) if lam.grad is None else lam.grad for lam in coefficients.lam]
    return losses, reports, torch.stack(gradient), seen


OBJECTIVES = {
    "nsc": lambda: NSC(blocks=1, projections=["query", "attention.output.dense"]),
    "nsc, tokens pooled": lambda: NSC(blocks=2, projections=["attention.output.dense"], reduction="flat"),
    "nsc, by length": lambda: NSC(blocks=1, projections=["query", "attention.output.dense"], buckets=3),
    "anchored": lambda: AnchoredNSC(blocks=1, projections=["query", "value"], penalty="squared", memory=0.9),
    "anchored, by length": lambda: AnchoredNSC(blocks=1, projections=["query"], penalty="absolute", buckets=2),
    "entropy": lambda: Entropy(heads()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_one_pass_per_task_on_equal_inputs(name):
    shared, apart = batches()
    losses, reports, gradient, rows = gradients(OBJECTIVES[name](), shared)
    expected_losses, expected_reports, expected_gradient, expected_rows = gradients(OBJECTIVES[name](), apart)
    assert set(losses) == {"a", "b", "c"}
    for task in losses:
        torch.testing.assert_close(losses[task], expected_losses[task], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(reports[task], expected_reports[task], rtol=1e-6, atol=1e-6)
    scale = expected_gradient.abs().max()
    assert scale > 0
    assert (gradient - expected_gradient).abs().max() <= 1e-6 + 1e-5 * scale
    # An anchor is one more pass per expert, shared or not: every expert is a model of its own.
    anchors = 13 if name.startswith("anchored") else 0
    assert (rows, expected_rows) == (8 + anchors, 13 + anchors)


def module(accumulate="fused", objective=None, share=True):
    model = tiny_bert()
    merge = MergeModule(model, adapters(model), objective=objective or NSC(blocks=1), accumulate=accumulate)
    merge.configure_model()
    return merge


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulating_graph_by_graph_gives_the_same_gradient(name):
    found = []
    for accumulate in ("fused", "task"):
        merge = module(accumulate, OBJECTIVES[name]())
        losses = merge._losses(batches()[0])
        merge.objective.total(list(losses.values())).backward()
        grads = [torch.zeros(3) if lam.grad is None else lam.grad for lam in merge.coefficients.lam]
        found.append((torch.stack([losses[task] for task in "abc"]).detach(), torch.stack(grads)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    assert (found[0][1] - found[1][1]).abs().max() <= 1e-6 + 1e-5 * found[0][1].abs().max()


def test_a_fit_with_shared_batches_learns_and_says_so(tmp_path):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = tiny_bert()
    merge = MergeModule(model, adapters(model), objective=NSC(blocks=1), output=tmp_path / "merge")
    data = pooled_data(share=True)
    lightning.Trainer(
        max_steps=3, enable_checkpointing=False, num_sanity_val_steps=-1, limit_val_batches=2, **options
    ).fit(merge, data)
    assert set(merge.validation_ratios) == {"a", "b", "c"}
    assert (merge.coefficients.matrix() - 0.4).abs().max() > 1e-3
    assert '"share_batches": true' in (tmp_path / "merge" / "receipt.json").read_text()


def test_validation_means_equal_those_of_one_pass_per_task():
    means = []
    for share in (True, False):
        merge = module()
        for batch in pooled_data(share).val_dataloader():
            merge.validation_step(batch, 0)
        means.append([float(metric.compute()) for metric in merge.ratios])
    assert means[0] == pytest.approx(means[1], abs=1e-6)


def test_the_search_reads_the_same_ratios_from_one_pass_for_all():
    model = tiny_bert()
    experts = adapters(model)
    shared, apart = batches()
    values, passes = [], []
    for batch in (shared, apart):
        criterion = NullSpaceRatio(1, ["attention.output.dense"], also={"q": Reading(2, ["query"], match=True)})
        criterion.prepare(model, experts)
        seen = []
        handle = model.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(1))
        for key, inputs in batch.items():
            criterion.update(model, tasks_of(key), inputs)
        handle.remove()
        values.append(criterion.compute())
        passes.append(len(seen))
    for curve, of_task in values[0].items():
        assert of_task == pytest.approx(values[1][curve], abs=1e-6)
    assert passes == [2, 3]


def test_rows_are_whose_they_are():
    shared, apart = batches()
    (group,) = fuse(shared)
    assert group.rows == {"a": slice(0, 5), "c": slice(0, 5), "b": slice(5, 8)}
    assert group.owners == [(slice(0, 5), ["a", "c"]), (slice(5, 8), ["b"])]
    assert group.shared
    assert not fuse(apart)[0].shared
    assert len(group.inputs["input_ids"]) == 8


def test_a_task_in_two_keys_and_a_label_in_a_shared_batch_are_refused():
    inputs = texts(2, 3, seed=0)
    with pytest.raises(ConfigError, match="inputs of b twice"):
        fuse({("a", "b"): inputs, "b": inputs})
    with pytest.raises(ConfigError, match="'a, b': the batch holds labels"):
        fuse({("a", "b"): {**inputs, "target": {"a": torch.ones(2)}}})
    with pytest.raises(ConfigError, match=r"\['x'\] without an expert"):
        module().training_step({("a", "x"): inputs}, 0)


def test_heads_that_read_the_same_share_one_pass_and_others_do_not():
    class Head(torch.nn.Module):
        def __init__(self, layer, factor):
            super().__init__()
            self.layer, self.factor = layer, factor

        def reads(self):
            return self.layer

        def features(self, model, inputs):
            return model(inputs["x"]) + self.layer

        def predict(self, features, inputs):
            return self.factor * features

    class Bare(torch.nn.Module):
        def forward(self, model, inputs):
            return -model(inputs["x"])

    calls = []

    def backbone(x):
        calls.append(1)
        return x

    made = {"a": Head(1, 2), "b": Head(1, 3), "c": Head(5, 1), "d": Bare()}
    found = {name: float(value) for name, value in predictions(backbone, made, {"x": torch.tensor(1.0)})}
    assert found == {"a": 4, "b": 6, "c": 6, "d": -1}
    assert len(calls) == 3
