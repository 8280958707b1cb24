"""Files written piece by piece are what the library reads, and nothing damaged passes for whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nscmerge.adapter_files import find_deltas
from nscmerge.errors import AdapterError
from nscmerge.tensor_files import DTYPES, ShardWriter, TensorWriter, open_tensors


def example(dtype):
    values = torch.arange(24).reshape(2, 3, 4)
    return values.bool() if dtype == torch.bool else values.to(dtype)


def test_every_dtype_and_shape_is_read_back_by_the_library(tmp_path):
    tensors = {f"t.{code}": example(dtype) for code, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "ünïcode": torch.ones(2),
        "cut": torch.ones(4, 6)[:, ::2],
    }
    with TensorWriter(tmp_path / "a.safetensors", tensors, {"format": "pt", "made": "here"}) as writer:
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            writer.add(name, tensor.dtype, tensor.shape, tensor.reshape(-1).split(5))
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_blocks_must_fill_the_tensor(tmp_path):
    message = r"'w' came in 12 bytes; a \(2, 2\) tensor of torch.float32 has 16"
    with pytest.raises(AdapterError, match=message), TensorWriter(tmp_path / "a.safetensors", ["w"]) as writer:
        writer.add("w", torch.float32, (2, 2), [torch.ones(3)])


def test_what_does_not_read_back_is_an_error(tmp_path):
    (tmp_path / "other").write_bytes(bytes(1000))
    message = r"'w' does not read back as it was written"
    with pytest.raises(AdapterError, match=message), TensorWriter(tmp_path / "a.safetensors", ["w"]) as writer:
        writer._back.close()
        writer._back = (tmp_path / "other").open("rb", buffering=0)
        writer.add("w", torch.float32, (2,), [torch.ones(2)])


def test_shards_hold_at_most_the_limit_and_have_an_index(tmp_path):
    tensors = {f"l.{i}": torch.full((10,), float(i)) for i in range(5)} | {"l.big": torch.ones(100)}
    with ShardWriter(tmp_path, "delta", sorted(tensors), limit=90) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name])
    files = find_deltas(tmp_path, "me")
    assert [f.name for f in files] == [f"delta-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "delta.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 600
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert [sum(t.nbytes for t in load_file(f).values()) for f in files] == [80, 80, 40, 400]
    read = open_tensors(files, "me")
    assert list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("count", [0, 1])
def test_few_tensors_need_no_shards(tmp_path, count):
    with ShardWriter(tmp_path, "delta", ["w"]) as writer:
        for _ in range(count):
            writer.add("w", torch.ones(2))
    assert [f.name for f in tmp_path.iterdir()] == ["delta.safetensors"] * count
    assert find_deltas(tmp_path, "me") == [tmp_path / "delta.safetensors"] * count


def test_faults_of_shards_are_named(tmp_path):
    for name in "ab":
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterError, match="me: key 'w' stands in two shards"):
        open_tensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "me")
    read = open_tensors([tmp_path / "a.safetensors"], "me")
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match=r"me: a.safetensors cannot be read"):
        read["w"]
    (tmp_path / "delta.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../x.safetensors"}}))
    with pytest.raises(AdapterError, match=r"names '../x.safetensors', which is not in the folder"):
        find_deltas(tmp_path, "me")
