"""Every shipped configuration parses as a protocol, and holds what the paper's protocol says."""

import json
from pathlib import Path

import pytest
import yaml

from tasks.continual.cli import parse
from tasks.continual.orders import PUBLISHED

CONFIGS = Path(__file__).parents[3] / "configs" / "continual"
FILES = sorted(file.name for file in CONFIGS.glob("*.yaml"))
#: Files that are laid over another one.
OVER = {
    "clip_b16.yaml": "clip20.yaml",
    "clip_l14.yaml": "clip14.yaml",
    "twin_clip8.yaml": "clip8.yaml",
    **{f"text6_{part}.yaml": "text6.yaml" for part in ("ablation", "learned", "ranks", "steps")},
}


def parsed(name, capsys, *words):
    files = [OVER[name], name] if name in OVER else [name]
    with pytest.raises(SystemExit) as stop:
        parse([*(w for f in files for w in ("--config", str(CONFIGS / f))), *words, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("file", FILES)
def test_parses(file, capsys):
    got, written = parsed(file, capsys), yaml.safe_load((CONFIGS / file).read_text())
    for key, value in written["model"].items():
        if isinstance(value, str | int | float):
            assert got["model"][key] == value
    assert list(got["model"]["methods"]) == list(written["model"].get("methods", got["model"]["methods"]))
    assert set(got["data"]["init_args"]["tasks"]) == set(got["model"]["tasks"])
    assert "{task}" in got["model"]["experts"]


@pytest.mark.parametrize("n", [8, 14, 20])
def test_the_suites_of_clip_are_the_printed_ones(n, capsys):
    got = parsed(f"clip{n}.yaml", capsys)["model"]
    assert list(got["tasks"]) == [task["key"] for task in json.loads(PUBLISHED.read_text())["tasks"][:n]]
    assert got["orders"] == f"clip_{n}"
    lam = {name: got["methods"][name]["options"].get("lam", 0.3) for name in ("task_arithmetic", "ties", "knots_ties")}
    assert set(lam.values()) == {0.3 if n == 8 else 0.1}  # Table 9
    assert got["methods"]["nufilt"]["options"] == {"layers": ["*attn*", "*fc1*"]}


def test_wrong_words_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--config", str(CONFIGS / "text6.yaml"), "--model.ordres", "3"])
    assert stop.value.code == 2
    assert "ordres" in capsys.readouterr().err
