"""Growing folders of methods that look at unlabelled inputs: the model and the inputs come anew with each step."""

import pytest
import torch
from torch import nn

from nscmerge import Adapter, LowRank, continual
from nscmerge.continual.folder import append_to, export, load_state, start_folder
from nscmerge.errors import MethodError
from nscmerge.update import load_update

LAYERS = {"layers.0.attn.q": (6, 6), "layers.0.mlp.fc1": (10, 6), "layers.0.mlp.fc2": (6, 10)}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.q, self.mlp.fc1, self.mlp.fc2 = nn.Linear(6, 6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        x = x + torch.tanh(self.attn.q(x)).mean(1, keepdim=True)
        return x + self.mlp.fc2(torch.tanh(self.mlp.fc1(x)))


class Tiny(nn.Module):
    """Tokens (N, T, 6) to logits (N, 3)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers, self.head = nn.ModuleList([Layer()]), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def expert(seed):
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(2, d_in, generator=g), torch.randn(d_out, 2, generator=g), 0.5)
        for name, (d_out, d_in) in LAYERS.items()
    }
    return Adapter(layers, "base", name=f"t{seed}")


def batches(seed):
    g = torch.Generator().manual_seed(1000 + seed)
    return [{"x": torch.randn(4, 3, 6, generator=g)} for _ in range(2)]


@pytest.mark.parametrize("method", [m for m, kind in continual.METHODS.items() if "model" in kind.OBJECTS])
def test_goes_on_bit_for_bit(method, tmp_path):
    folder, options = tmp_path / "f", {"lr": 1e-2, "steps": 4}
    objects = {"model": Tiny(), "batches": {f"t{k}": batches(k) for k in range(3)}}
    made = continual.make(method, **options, **objects)
    state = made.start(expert(0))
    start_folder(folder, made, expert(0))
    for k in (1, 2):
        state = made.append(state, expert(k))
        got = append_to(folder, expert(k), **objects)
        assert got.scalars == state.scalars
        assert [one.log for one in got.absorbed] == [one.log for one in state.absorbed]
        for name in state.shapes:
            assert torch.equal(got.weight(name).dense(), state.weight(name).dense())
        assert got.tensors.keys() == state.tensors.keys()
        assert all(torch.equal(got.tensors[name], x) for name, x in state.tensors.items())
    export(folder, tmp_path / "out")
    shown, update = load_update(tmp_path / "out"), made.update(state)
    for name in LAYERS:
        torch.testing.assert_close(shown.delta(name), update.delta(name), rtol=1e-6, atol=1e-6)


def test_without_the_model_nothing_is_absorbed(tmp_path):
    data = {f"t{k}": batches(k) for k in range(2)}
    start_folder(tmp_path / "f", continual.make("adamerging", model=Tiny(), batches=data), expert(0))
    with pytest.raises(MethodError, match="has no model and no batches"):
        append_to(tmp_path / "f", expert(1))
    assert load_state(tmp_path / "f").t == 1
