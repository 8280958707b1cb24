"""Bad input to a growing folder: a clear error or a defined result, and never another byte in the folder."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors import SafetensorError

from nscmerge import Adapter, LowRank, continual, merge, save_adapter
from nscmerge.continual.folder import append_to, export, load_state, start_folder
from nscmerge.continual.state_files import FORMAT
from nscmerge.errors import AdapterError, OutputError, ShapeError


def adapter(seed, rank=2, d_in=8):
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(rank, d_in, generator=g), torch.randn(6, rank, generator=g), 2.0) for name in "qv"
    }
    return Adapter(layers, "base", name=f"t{seed}")


@pytest.fixture
def folder(tmp_path):
    """Two experts, in factors; the second from a folder with a hash."""
    start_folder(tmp_path / "f", continual.make("nufilt", filter_rank=3), adapter(0))
    append_to(tmp_path / "f", save_adapter(adapter(1), tmp_path / "t1"))
    return tmp_path / "f"


def content(folder):
    """Every name below a folder, what links point to, and the hash of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file():
            found[str(path)] = sha256(path.read_bytes()).hexdigest()
    return found


def zeros(expert):
    return replace(expert, layers={n: LowRank(x.A, 0 * x.B, x.scaling) for n, x in expert.layers.items()})


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda: replace(adapter(2), base_model="other"), AdapterError, "'t2' is an adapter of 'other'.*'base'"),
        (lambda: replace(adapter(2), name="t0"), AdapterError, "task 't0' is already in this merge .number 1 of 2"),
        (lambda: adapter(2, d_in=9), ShapeError, r"'q' is \(6, 9\) in 't2', \(6, 8\) in the merge so far"),
        (lambda: Adapter({"z": adapter(2).layers["q"]}, "base", name="t2"), AdapterError, "shares no name"),
        (lambda: Adapter({}, "base", name="t2"), AdapterError, "neither layers nor dense tensors"),
        (
            lambda: Adapter({"q": LowRank(adapter(2).layers["q"].A * torch.nan, torch.ones(6, 2))}, name="t2"),
            AdapterError,
            "NaN or Inf",
        ),
        (
            lambda: Adapter(dense={"q.weight": torch.zeros(6, 8), "v.weight": torch.zeros(6, 8)}, name="t2"),
            AdapterError,
            "shares no name|factors in one expert",
        ),
    ],
)
def test_an_expert_that_does_not_fit(wrong, error, said, folder):
    before = content(folder)
    with pytest.raises(error, match=said):
        append_to(folder, wrong())
    assert content(folder) == before


def test_the_same_weights_under_another_name(folder, tmp_path):
    before = content(folder)
    shutil.copytree(tmp_path / "t1", tmp_path / "other")
    with pytest.raises(AdapterError, match=r"'other' .*same weights .SHA-256 .* as 't1', which is already"):
        append_to(folder, tmp_path / "other")
    assert content(folder) == before


def test_an_adapter_that_is_not_there_or_zero(folder, tmp_path):
    before = content(folder)
    with pytest.raises(AdapterError, match="neither a folder on this machine nor a hub id"):
        append_to(folder, tmp_path / "nothing" / "here" / "at all")
    save_adapter(zeros(adapter(2)), tmp_path / "zero")
    with pytest.raises(AdapterError, match="all 2 layers are zero updates"):
        append_to(folder, tmp_path / "zero")
    assert content(folder) == before


@pytest.mark.parametrize("method", ["nufilt", "task_arithmetic"])
def test_a_zero_task_vector_from_memory_changes_no_weight(method, tmp_path):
    start_folder(tmp_path / "f", continual.make(method), adapter(0))
    before = load_state(tmp_path / "f")
    old = {name: before.weight(name).dense() for name in "qv"}
    state = append_to(tmp_path / "f", zeros(adapter(1)))
    assert [one.name for one in state.absorbed] == ["t0", "t1"]
    for name in "qv":
        torch.testing.assert_close(state.weight(name).dense(), old[name], rtol=1e-6, atol=1e-6)


def test_ranks_above_the_size_of_a_layer(tmp_path):
    """As many directions as there are, no more: the merge is finite, and the same as with the layer's own sizes."""
    huge = {"filter_rank": 5000, "task_rank": 999, "adapter_rank": 64}
    for name, options in (("huge", huge), ("fits", {**huge, "filter_rank": 6, "task_rank": 6})):
        start_folder(tmp_path / name, continual.make("nufilt", **options), adapter(0, 9))
        append_to(tmp_path / name, adapter(1, 9))
    a, b = load_state(tmp_path / "huge"), load_state(tmp_path / "fits")
    for name in "qv":
        assert bool(torch.isfinite(a.weight(name).dense()).all())
        assert torch.equal(a.weight(name).dense(), b.weight(name).dense())


@pytest.mark.parametrize(
    "file",
    [
        "state.json",
        "state.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "receipt.json",
        "README.md",
    ],
)
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_named(file, fault, folder):
    path = folder / "current" / file
    data = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data) if fault == "flipped" else bytes(data[: len(data) // 2]))
    before = content(folder)
    said = f"merge folder .*: {file} is {'missing' if fault == 'gone' else 'damaged'}.*backup"
    for use in (load_state, lambda f: append_to(f, adapter(2)), lambda f: export(f, f.parent / "out")):
        with pytest.raises(AdapterError, match=said):
            use(folder)
    assert content(folder) == before
    assert not (folder.parent / "out").exists()


def test_damaged_hashes_and_pointers(folder):
    sums = folder / "current" / "SHA256SUMS"
    text = sums.read_text()
    for wrong, said in [
        ("nonsense\n" + text, "SHA256SUMS is damaged"),
        (text.replace("  state.json", "  ../state.json"), "SHA256SUMS is damaged"),
        ("\n".join(line for line in text.splitlines() if "state.json" not in line) + "\n", "does not list state.json"),
    ]:
        sums.write_text(wrong)
        with pytest.raises(AdapterError, match=said):
            load_state(folder)
    sums.unlink()
    with pytest.raises(AdapterError, match="SHA256SUMS cannot be read"):
        load_state(folder)
    sums.write_text(text)
    assert load_state(folder).t == 2
    for target in ("steps/0009", "../elsewhere", "/etc"):
        (folder / "current").unlink()
        (folder / "current").symlink_to(target)
        with pytest.raises(AdapterError, match=r"'current' names .*expected an existing steps/NNNN"):
            append_to(folder, adapter(2))


def test_a_newer_format(folder):
    path = folder / "current" / "state.json"
    path.write_text(json.dumps({"format": FORMAT + 1, "nscmerge": "9.1", "anything": "else"}))
    before = content(folder)
    for use in (load_state, lambda f: append_to(f, adapter(2))):
        with pytest.raises(AdapterError, match=rf"format {FORMAT + 1}, written by nscmerge 9.1.*Update nscmerge"):
            use(folder)
    assert content(folder) == before


def test_what_is_no_growing_folder(folder, tmp_path):
    with pytest.raises(AdapterError, match=r"is not there.*continual start"):
        load_state(tmp_path / "nowhere")
    merge([adapter(0), adapter(1)], "task_arithmetic").save(tmp_path / "plain")
    with pytest.raises(AdapterError, match=r"is no growing merge folder.*continual start"):
        append_to(tmp_path / "plain", adapter(2))
    # What a process left that was killed while it wrote: the step is not complete.
    (tmp_path / "partial" / "steps" / "0001").mkdir(parents=True)
    with pytest.raises(AdapterError, match="is no growing merge folder"):
        load_state(tmp_path / "partial")


def test_leftovers_are_ignored_and_removed_by_the_next_append(folder):
    (folder / "steps" / ".0003.abcd.partial").mkdir()
    (folder / "steps" / ".0003.abcd.partial" / "state.json").write_text("{")
    shutil.copytree(folder / "steps" / "0002", folder / "steps" / "0003")  # complete, but nobody ever pointed to it
    (folder / ".current.abcd.partial").symlink_to("steps/0003")
    (folder / "delta.safetensors").symlink_to("current/delta.safetensors")
    (folder / "notes.txt").write_text("mine")
    assert load_state(folder).t == 2
    assert append_to(folder, adapter(2)).t == 3
    assert [p.name for p in (folder / "steps").iterdir()] == ["0003"]
    shown = {"README.md", "adapter_config.json", "adapter_model.safetensors", "receipt.json"}
    assert {p.name for p in folder.iterdir()} == shown | {"current", "notes.txt", "steps"}


#: What the library of the format says of a full disk; it has no error numbers.
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("nscmerge.continual.state_files.ShardWriter.add", OSError(28, "No space left on device")),
        ("nscmerge.adapters.write_tensors", RUST),
    ],
)
def test_a_full_disk_says_so(place, error, folder, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, full)
    before = content(folder)
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        append_to(folder, adapter(2))
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        start_folder(folder.parent / "new", continual.make("opcm"), adapter(2))
    assert content(folder) == before
    assert not (folder.parent / "new").exists()
