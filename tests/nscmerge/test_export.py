"""Dense merges go to the disk and back one layer at a time; per-task masks are stored as what they are made of."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from nscmerge import Adapter, LowRank, Update, merge
from nscmerge.errors import AdapterError
from nscmerge.folders import sha256_file
from nscmerge.lazy import Lazy
from nscmerge.masked import MaskedWeights
from nscmerge.peft_format import Kind
from nscmerge.tensor_files import ShardWriter
from nscmerge.update import load_update

SHAPES = {"b.0.q": (7, 9), "b.1.q": (8, 6), "conv": (4, 6)}


def experts():
    generator = torch.Generator().manual_seed(5)
    found = []
    for k, task in enumerate("abc"):
        names = [n for n in SHAPES if (task, n) != ("b", "b.1.q")]  # b lacks a layer
        layers = {
            n: LowRank(
                torch.randn(k + 1, SHAPES[n][1], generator=generator).bfloat16(),
                torch.randn(SHAPES[n][0], k + 1, generator=generator).bfloat16(),
                0.3,
            )
            for n in names
        }
        dense = {"p.bias": torch.randn(5, generator=generator)}
        found.append(Adapter(layers, "base", dense, name=task, kinds={"conv": Kind("conv", (2, 3))}))
    return found


class Counted:
    """Computes layers, and says which and how many were alive at once."""

    def __init__(self):
        self.calls, self.alive, self.most = [], 0, 0

    def __call__(self, name):
        self.calls.append(name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        tensor = torch.full(SHAPES[name], float(len(name)))
        weakref.finalize(tensor, self.let_go)
        return tensor

    def let_go(self):
        self.alive -= 1


def test_each_dense_layer_is_computed_once_and_let_go(tmp_path):
    counted, seen = Counted(), []

    def watch(items, label):
        for item in items:
            seen.append((label, item))
            yield item

    update = Update(Lazy(list(SHAPES), counted))
    folder = update.save(tmp_path / "out", watch=watch)
    assert counted.calls == sorted(SHAPES)
    assert counted.most <= 2  # the next one may be there before the last one's name is bound to it
    assert seen == [("writing", name) for name in sorted(SHAPES)]
    assert set(load_file(folder / "delta.safetensors")) == {f"{name}.weight" for name in SHAPES}


def test_shards_are_read_back_lazily_and_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("nscmerge.export.ShardWriter", lambda *args: ShardWriter(*args, limit=300))
    update = merge(experts(), "ties", density=0.7)
    folder = update.save(tmp_path / "out")
    shards = sorted(path.name for path in folder.glob("delta-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "delta.safetensors.index.json").is_file()
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["files"] == {name: sha256_file(folder / name) for name in shards}
    assert receipt["writing"]["seconds"] >= 0
    assert receipt["writing"]["peak_memory_bytes"] >= receipt["peak_memory_bytes"] > 0
    assert receipt["dense"] == {"p.bias": [5]}
    read = load_update(folder)
    assert isinstance(read.layers, Lazy)
    assert (list(read.layers), list(read.dense)) == (sorted(SHAPES), ["p.bias"])
    for name in (*SHAPES, "p.bias"):
        assert torch.equal(read.delta(name), update.delta(name))
    merged_again = merge([folder], "task_arithmetic", lam=2.0)  # a merge folder is an adapter too
    assert torch.equal(merged_again.delta("b.0.q.weight"), 2 * update.delta("b.0.q"))
    (folder / shards[0]).unlink()
    with pytest.raises(AdapterError, match=r"which is not in the folder. Copy all shards"):
        load_update(folder)


@pytest.mark.parametrize("lam", [1.0, -0.5])
def test_masks_are_stored_as_adapters_and_rescalers(tmp_path, lam):
    update = merge(experts(), "emr", lam=lam)
    folder = update.save(tmp_path / "out")
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["masked"] == {t: {"rescaler": update.per_task[t].rescaler, "flipped": lam < 0} for t in "abc"}
    assert "rescaler in `receipt.json`" in (folder / "README.md").read_text()
    for task in "abc":
        own = folder / "tasks" / task
        assert set(load_file(own / "delta.safetensors")) == {"p.bias"}  # nothing dense of the layers
    read = load_update(folder)
    assert all(isinstance(weights, MaskedWeights) for weights in read.per_task.values())
    for task in "abc":
        for name in (*SHAPES, "p.bias"):
            assert torch.equal(read.delta(name, task), update.delta(name, task))
            torch.testing.assert_close(read.scaled(-2).delta(name, task), -2 * update.delta(name, task))
    assert not update.delta("b.1.q", "b").any()


def test_dense_experts_per_task_are_streamed_too(tmp_path):
    counted = Counted()
    shared = {"b.0.q": torch.ones(7, 9), "b.1.q": LowRank(torch.ones(1, 6), torch.ones(8, 1))}
    update = Update(shared, {"p.bias": torch.ones(5)}, per_task={"a": Lazy(["b.0.q", "b.1.q"], counted)})
    read = load_update(update.save(tmp_path / "out"))
    assert counted.calls == ["b.0.q", "b.1.q"]
    assert torch.equal(read.delta("b.1.q", "a"), torch.full((8, 6), 5.0))
    assert torch.equal(read.delta("p.bias", "a"), torch.ones(5))


def test_what_cannot_be_written_is_named(tmp_path):
    cases = [
        (Update({"l": torch.full((2, 2), float("nan"))}), "merged, layer 'l' holds 4 NaN or Inf"),
        (Update({"l": torch.ones(2, 2)}, {"l.weight": torch.ones(2, 2)}), "'l.weight' comes twice"),
        (
            Update({"l": torch.ones(2, 2)}, per_task={"a": {"m": LowRank(torch.ones(1, 2), torch.ones(2, 1))}}),
            "'m' has",
        ),
    ]
    for update, message in cases:
        with pytest.raises(AdapterError, match=message):
            update.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_receipt_is_named(tmp_path):
    folder = merge(experts(), "emr").save(tmp_path / "out")
    receipt = json.loads((folder / "receipt.json").read_text())
    for damage in ({"masked": {"a": {}}}, {"layers": {"b.0.q": {"kind": {"name": "linear"}}}}, {"masked": 3}):
        (folder / "receipt.json").write_text(json.dumps(receipt | damage))
        with pytest.raises(AdapterError, match=r"receipt.json is damaged"):
            load_update(folder)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(items, label):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(experts(), "ties").save(tmp_path / "out", watch=stop)
    assert list(tmp_path.iterdir()) == []
