"""What cannot be folded is said before or while writing, and leaves no checkpoint behind."""

import pytest
import torch
from safetensors.torch import save_file

from nscmerge import Update
from nscmerge.errors import AdapterError, ConfigError, OutputExistsError
from tests.fakes.checkpoint import UPDATE, checkpoint, low
from tests.fakes.peft_folder import gpt2


def broken(folder, what):
    """A base checkpoint with one fault, and an update that meets it."""
    if what == "quantised":
        return checkpoint(folder, **{"fc.weight": torch.ones(4, 6, dtype=torch.int8)}), Update({"fc": low()})
    if what == "shape":
        return checkpoint(folder), Update({"fc": low(d_in=5)})
    if what == "turned":
        return checkpoint(folder), Update({"fc": low(d_out=6, d_in=4)})
    if what == "missing":
        return checkpoint(folder), Update({"fd": low()})
    if what == "ambiguous":
        return checkpoint(
            folder, **{"fc.weight": None, "a.fc.weight": torch.ones(1), "b.fc.weight": torch.ones(1)}
        ), Update({"fc": low()})
    if what == "collision":
        return checkpoint(folder), Update({"x.fc": low(), "fc": low()})
    if what == "overflow":
        return checkpoint(folder, torch.float16), Update({"fc": low(scale=1e6)})
    if what == "nothing":
        return checkpoint(folder), Update({})
    folder.mkdir()
    if what == "two":
        for name in "ab":
            save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    if what == "config":
        save_file({"fc.weight": torch.ones(4, 6)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{")
    return folder, Update({"fc": low()})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("quantised", r"'fc.weight' is stored as torch.int8.*before quantisation"),
        ("shape", r"'fc': the update is \(4, 5\), 'fc.weight' of the base checkpoint \(4, 6\)"),
        ("turned", r"'fc': the update is \(6, 4\), 'fc.weight' of the base checkpoint \(4, 6\)"),
        ("missing", r"'fd': the base checkpoint has no tensor 'fd.weight'; did you mean 'fc.weight'"),
        ("ambiguous", r"'fc': 'fc.weight' could be 'a.fc.weight' or 'b.fc.weight'"),
        ("collision", r"'x.fc' and 'fc' both mean 'fc.weight'"),
        ("overflow", r"'fc.weight': base plus update overflows torch.float16"),
        ("nothing", "nothing to fold"),
        ("two", r"a.safetensors, b.safetensors in .*expected model.safetensors"),
        ("empty", r"no safetensors file in .*expected model.safetensors"),
        ("config", r"config.json is damaged"),
    ],
)
def test_faults_are_named_and_nothing_is_left(tmp_path, what, message):
    folder, update = broken(tmp_path / "base", what)
    with pytest.raises(AdapterError, match=message):
        update.fold_into(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_shared_weights_are_refused(tmp_path):
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(
        AdapterError, match=r"'transformer.wte': the base model uses 'transformer.wte.weight' and 'lm_h"
    ):
        Update({"transformer.wte": low(d_out=40, d_in=32)}).fold_into(tmp_path / "base", tmp_path / "out")
    with pytest.raises(AdapterError, match=r"'lm_head': .*no tensor 'lm_head.weight'.*shares the embedding's weight"):
        Update({"lm_head": low(d_out=40, d_in=32)}).fold_into(tmp_path / "base", tmp_path / "out")


def test_arguments_are_checked_first(tmp_path):
    with pytest.raises(ConfigError, match=r"no dtype 'int8'.*Known: bfloat16, float16, float32, float64"):
        UPDATE.fold_into(tmp_path, tmp_path / "out", dtype="int8")
    with pytest.raises(OutputExistsError):
        UPDATE.fold_into(tmp_path, tmp_path)
    with pytest.raises(AdapterError, match="neither a folder on this machine nor a hub id"):
        UPDATE.fold_into(tmp_path / "none", tmp_path / "out")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    checkpoint(tmp_path / "base")

    def stop(items, label):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UPDATE.fold_into(tmp_path / "base", tmp_path / "out", watch=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
