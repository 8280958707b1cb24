"""The class that a task does not have, left out of its entropy: the reference's numbers, and no gradient."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nscmerge.batching import fuse
from nscmerge.errors import ConfigError
from nscmerge.objectives import Entropy
from tasks.sequence_classification import SequenceClassification
from tests.fakes.fit_merge import adapters, heads
from tests.fakes.text_tasks import WIDTH, tiny_bert
from tests.nscmerge.test_entropy import batch, merged

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/metric_nli_and_entropy.json").read_text())


class Fixed(nn.Module):
    """Returns the golden logits, whatever it is asked; its task lacks a class or has all."""

    outputs = "classes"

    def __init__(self, mask_class):
        super().__init__()
        self.mask_class = mask_class
        self.logits = nn.Parameter(torch.tensor(GOLDEN["logits"], dtype=torch.float64), requires_grad=False)

    def forward(self, model, inputs):
        return self.logits


@pytest.mark.parametrize("class_mask", [False, True])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["task"])
def test_class_masks_equal_the_reference(case, class_mask):
    model = tiny_bert()
    factors = {t: a.layers for t, a in adapters(model).items()}
    handle, objective, _ = merged(model, {"a": Fixed(case["mask_class"])}, {"a": factors["a"]})
    objective.class_mask = class_mask
    got = objective.losses(handle, fuse({"a": batch(1)["a"]})[0])["a"]
    want = case["expected"]["entropy_masked" if class_mask else "entropy_all_logits"]
    assert got.item() == pytest.approx(want, abs=GOLDEN["tolerance"]["abs"])
    assert Entropy(heads(), class_mask=class_mask).options()["class_mask"] is class_mask


def test_a_masked_class_has_no_say_in_the_gradient():
    model = tiny_bert()
    factors = {t: a.layers for t, a in adapters(model).items()}
    head = SequenceClassification(3, WIDTH, mask_class=1)
    nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(2))
    slopes = []
    for height in (0.0, 50.0):
        with torch.no_grad():
            head.linear.weight[1] += height
        handle, _, coefficients = merged(tiny_bert(), {"a": head}, {"a": factors["a"]})
        objective = Entropy({"a": head}, class_mask=True)
        objective.losses(handle, fuse({"a": batch(1)["a"]})[0])["a"].backward()
        slopes.append(torch.stack([row.grad for row in coefficients.lam]))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=0)
    assert slopes[0].abs().max() > 1e-4
    head.mask_class = 3
    with pytest.raises(ConfigError, match="task 'a': mask_class is 3; its head has classes 0 to 2"):
        Entropy({"a": head}, class_mask=True).losses(handle, fuse({"a": batch(1)["a"]})[0])
