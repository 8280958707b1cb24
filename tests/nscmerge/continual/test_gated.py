"""What gates read: the tokens that count, and which layers share one."""

import pytest
import torch
from torch import nn

from nscmerge import LowRank
from nscmerge.continual.gated import Mlp, gated, mlp_of, token_sums


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x, attention_mask=None, decoder_input_ids=None):
        return self.fc2(self.fc1(x))


def test_gates_see_the_mean_over_valid_tokens():
    model, expert = Tiny(), LowRank(torch.ones(1, 2), torch.ones(3, 1))
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    gate = (torch.tensor([[1.0, 0.0]]), torch.tensor([0.25]))
    mlp = Mlp(*gate, torch.zeros(1, 2), {"fc1": {0: expert}})
    seen = {}

    def observe(entry, total, count):
        seen[entry] = (total.tolist(), count)

    with gated(model, {"fc1": mlp}, {"fc1": gate}, observe=observe):
        got = model(x=x, attention_mask=mask)
    # Means of the first feature: (0 + 2) over two tokens, (6 + 8 + 10) over three.
    assert seen == {"fc1": ([26.0, 31.0], 5.0)}
    g = 26 / 5 + 0.25
    torch.testing.assert_close(got, model.fc2(model.fc1(x) + g * x.sum(-1, keepdim=True)))
    with gated(model, {"fc1": mlp}, {"fc1": gate}, per_sample=True):
        got = model(x=x, attention_mask=mask)
    own = torch.tensor([2 / 2, 24 / 3])[:, None, None] + 0.25
    torch.testing.assert_close(got, model.fc2(model.fc1(x) + own * x.sum(-1, keepdim=True)))
    torch.testing.assert_close(model(x=x), model.fc2(model.fc1(x)))


def test_the_mask_of_an_encoder_says_nothing_about_a_decoder():
    model, gate, seen = Tiny(), (torch.ones(1, 2), torch.zeros(1)), []
    mlp = Mlp(*gate, torch.zeros(1, 2))
    batch = {"x": torch.ones(1, 3, 2), "attention_mask": torch.tensor([[1, 1, 0]])}
    with gated(model, {"fc1": mlp}, {"fc1": gate}, observe=lambda entry, total, count: seen.append(count)):
        model(**batch)
        model(**batch, decoder_input_ids=torch.ones(1, 3))
        model.get_encoder = lambda: model  # whose layers the mask is about
    with gated(model, {"fc1": mlp}, {"fc1": gate}, observe=lambda entry, total, count: seen.append(count)):
        model(**batch, decoder_input_ids=torch.ones(1, 3))
    assert seen == [2, 3, 2]


def test_padding_does_not_count():
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    sums, count = token_sums(x, mask)
    assert torch.equal(sums, torch.tensor([[2.0, 4.0], [24.0, 27.0]]))
    assert torch.equal(count, torch.tensor([2.0, 3.0]))
    assert torch.equal(token_sums(x, mask[:, :2])[1], torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize(
    ("layer", "mlp"),
    [
        ("encoder.layer.3.intermediate.dense", "encoder.layer.3"),
        ("encoder.layer.3.output.dense", "encoder.layer.3"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_0", "decoder.block.0.layer.2"),
        ("layers.1.blocks.0.mlp.fc1", "layers.1.blocks.0"),
        ("blocks.4.mlp.0", "blocks.4"),
        ("mlp.fc2", "mlp"),
        ("fc1", ""),
    ],
)
def test_layers_of_one_mlp(layer, mlp):
    assert mlp_of(layer) == mlp
