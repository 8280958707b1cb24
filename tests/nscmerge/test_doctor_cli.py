"""``nscmerge doctor`` as a user meets it: exit status, tables, JSON, and no traceback on any bytes whatever."""

import json
import random
import shutil

import pytest

from nscmerge.cli import main
from nscmerge.commands.doctor import split
from tests.fakes.bare_folder import LAYERS, change, edit, factors, write
from tests.fakes.examination import look


@pytest.fixture
def three(tmp_path):
    """Three sound adapters a, b, c."""
    return [write(tmp_path / name, factors(seed)) for seed, name in enumerate("abc")]


def called(capsys, *words):
    """Return exit status, stdout and stderr of one call."""
    status = 0
    try:
        main(["doctor", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_sound_adapters_print_tables_and_exit_0(three, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = called(capsys, *three)
    assert status == 0
    assert "nothing found; these adapters can be merged." in out
    assert "base model: owner/base" in out
    assert "model.layers.[0-2].self_attn.q_proj" in out
    assert all(name in out for name in ("Adapters", "Ranks by layer", "Overlap of pairs", "Cost of each method", "svd"))
    assert max(map(len, out.splitlines())) <= 100
    _, out, _ = called(capsys, *three, "--all_layers")
    assert all(layer in out for layer in LAYERS)


def test_an_error_exits_1_and_names_fault_adapter_and_remedy(three, capsys):
    change(three[1], use_dora=True)
    status, out, _ = called(capsys, f"first={three[0]}", three[1], f"third={three[2]}")
    assert status == 1
    assert "error dora  b" in out
    assert "Train this adapter as plain LoRA." in out
    assert "1 error; these adapters cannot be merged as they are." in out
    assert "first" in out


def test_warnings_and_notes_exit_0(three, capsys):
    change(three[1], lora_alpha=-8, base_model_name_or_path=None)
    status, out, _ = called(capsys, *three)
    assert status == 0
    assert "1 warning, 1 note; these adapters can be merged." in out


def test_json_says_the_same(three, tmp_path, capsys):
    edit("B.weight", lambda t: t * 50)(three[1])
    (tmp_path / "c" / "adapter_config.json").unlink()
    status, out, _ = called(capsys, *three, "--format", "json")
    report = json.loads(out)
    assert status == 1
    assert report["ok"] is False
    assert [(f["severity"], f["code"], f["adapters"]) for f in report["findings"]] == [
        ("error", "config-missing", ["c"]),
        ("warning", "norm-outlier", ["b"]),
    ]
    assert all(f["found"] and f["advice"] for f in report["findings"])
    assert report["ranks"][LAYERS[0]] == {"a": {"stored": 4, "numerical": 4}, "b": {"stored": 4, "numerical": 4}}
    assert report["overlaps"][0]["adapters"] == ["a", "b"]
    assert 0 < report["overlaps"][0]["rows"] < 1
    facts = {fact["name"]: fact for fact in report["adapters"]}
    assert facts["a"]["ranks"] == [4]
    assert facts["a"]["scalings"] == [2.0]
    assert facts["a"]["parameters"] == 6 * 4 * (24 + 20)
    assert len(facts["a"]["sha256"]) == 64
    assert facts["c"]["layers"] is None
    assert facts["c"]["bytes"] == (three[2] / "adapter_model.safetensors").stat().st_size


def test_names_with_brackets_are_no_markup(three, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    odd = shutil.copytree(three[0], three[0].with_name("[bold]x[nothing]"))
    _, out, _ = called(capsys, odd, three[1])
    assert "[bold]x[nothing]" in out


def test_wrong_usage_exits_2(capsys):
    status, _, err = called(capsys)
    assert status == 2
    assert "adapters" in err
    assert called(capsys, "x", "--format", "yaml")[0] == 2


def test_names_are_split_off_folders(tmp_path):
    assert split("a=b/c") == ("a", "b/c")
    assert split("b/c") == (None, "b/c")
    assert split("=b") == (None, "=b")
    (tmp_path / "r=8").mkdir()
    assert split(str(tmp_path / "r=8")) == (None, str(tmp_path / "r=8"))


ODD = [None, True, -1, 0, 3.5, 10**400, 1e308, "x", "(", "\0", [], [1], {}, {"(": 1}, {"q_proj": 10**400}, [["a"]]]
FIELDS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
    "modules_to_save", "base_model_name_or_path", "bias", "target_modules", "layer_replication",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_the_config_ends_in_a_traceback(three, field):
    for value in ODD:
        change(three[1], **{field: value})
        report = look(*three)
        assert json.dumps(report.as_dict(), allow_nan=False)
        assert not [f for f in report.findings if f.severity == "error" and f.adapters == ("a",)]


def test_no_damage_to_the_bytes_ends_in_a_traceback(three):
    generator = random.Random(0)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = three[1] / name
        whole = file.read_bytes()
        # Mostly in the header, where a byte means something.
        for _ in range(60):
            damaged = bytearray(whole[: generator.choice([len(whole), generator.randrange(len(whole))])])
            for _ in range(generator.randrange(4) if damaged else 0):
                damaged[generator.randrange(min(len(damaged), 900))] = generator.randrange(256)
            file.write_bytes(damaged)
            assert json.dumps(look(*three).as_dict(), allow_nan=False)
        file.write_bytes(whole)
    assert look(*three).findings == ()
