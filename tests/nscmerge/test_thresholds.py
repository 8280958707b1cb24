"""Streamed order statistics against a sort of everything at once."""

import pytest
import torch

from nscmerge import thresholds
from nscmerge.thresholds import kth_magnitudes


class Stream:
    """Layers of K tensors, made anew at every pass; remembers the passes."""

    def __init__(self, layers):
        self.layers, self.passes = layers, []

    def __call__(self, label):
        self.passes.append(label)
        return (iter(tensors) for tensors in self.layers)


def exact(layers, task, index):
    """The oracle: everything in one vector, sorted."""
    flat = torch.cat([tensors[task].flatten().abs() for tensors in layers]).sort().values
    k = index(len(flat))
    return float(flat[k - 1]) if k else 0.0


def random_layers(shapes, tasks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-30, 30, (tasks,), generator=generator).tolist()  # tasks of very different magnitude
    return [[torch.randn(shape, generator=generator) * 2.0**e for e in scale] for shape in shapes]


INDICES = {
    "smallest": lambda n: 1,
    "largest": lambda n: n,
    "middle": lambda n: n // 2,
    "top_fifth": lambda n: n - int(0.2 * n),
    "none": lambda n: 0,
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_equals_a_sort(name, piece, monkeypatch):
    monkeypatch.setattr(thresholds, "_PIECE", piece)
    layers = random_layers([(5, 7), (3,), (2, 2, 9), (1, 1)])
    found = kth_magnitudes(Stream(layers), 3, INDICES[name])
    assert found == [exact(layers, task, INDICES[name]) for task in range(3)]


def test_every_rank_of_awkward_numbers():
    """Zeros of both signs, subnormals, repeated values, neighbours that differ in the last bit, and infinity."""
    one = torch.tensor(1.0)
    near = torch.nextafter(one, 2 * one)
    values = [0.0, -0.0, 1e-45, -1e-45, 3e-40, 1.0, -1.0, float(near), -float(near), 1.0, 65504.0, float("-inf"), 1e-38]
    layers = [[torch.tensor(values)], [torch.tensor([[2.5], [-0.0]])]]
    for k in range(1, 16):
        assert kth_magnitudes(Stream(layers), 1, lambda n, k=k: k) == [exact(layers, 0, lambda n, k=k: k)]


def test_the_second_pass_is_made_once_and_only_where_needed():
    sparse = [[torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 3.0, 2.0])]]
    stream = Stream(sparse)
    assert kth_magnitudes(stream, 2, lambda n: 2) == [0.0, 0.0]
    assert len(stream.passes) == 1
    stream = Stream(sparse)
    assert kth_magnitudes(stream, 2, lambda n: 3) == [0.0, 2.0]
    assert len(stream.passes) == 2


def test_nothing_at_all():
    assert kth_magnitudes(Stream([]), 2, lambda n: n) == [0.0, 0.0]
    assert kth_magnitudes(Stream([[torch.zeros(0, 4), torch.zeros(0, 4)]]), 2, lambda n: n) == [0.0, 0.0]


def test_inputs_are_left_alone():
    layers = random_layers([(4, 4)])
    before = [t.clone() for t in layers[0]]
    kth_magnitudes(Stream(layers), 3, lambda n: n // 2)
    assert all(torch.equal(a, b) for a, b in zip(before, layers[0], strict=True))
