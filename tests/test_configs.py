"""Every shipped YAML parses as the command that it is for, and wrong ones are refused with a word."""

from pathlib import Path

import pytest
import yaml

from nscmerge.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(str(f.relative_to(CONFIGS)) for f in CONFIGS.rglob("*.yaml"))
#: Files that are laid over, or named by, a complete one.
PARTS = {
    "experts/probe.yaml": "experts/bbc.yaml",
    "data/text6.yaml": "experiments/text6_nsc.yaml",
    "data/dense20.yaml": "experiments/dense20_nsc.yaml",
    "data/synth20.yaml": "experiments/synth20_nsc.yaml",
    "experiments/text6_benchmark_methods.yaml": "experiments/text6_benchmark.yaml",
    **{
        f"experiments/{suite}_{part}.yaml": f"experiments/{suite}_{whole}.yaml"
        for suite in ("dense20", "synth20")
        for part, whole in (("benchmark_methods", "benchmark"), ("benchmark_seen", "benchmark"), ("nsc_adam", "nsc"))
    },
}


#: Folders whose ``common.yaml`` holds what their tasks share; a task's file is laid over it.
SUITES = ("experts/dense20", "experts/synth20")


def suite(file):
    """Return the files that belong together, in order, if ``file`` is part of a suite of experts."""
    folder, name = file.rsplit("/", 1)
    if folder not in SUITES or name == "base.yaml":
        return []
    return [f"{folder}/common.yaml", f"{folder}/nyud_semseg.yaml" if name == "common.yaml" else file]


def parsed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("file", FILES)
def test_parses(file, capsys):
    command = next((c for word, c in (("benchmark", "test"), ("search", "search")) if word in file), "fit")
    if file.startswith("data/"):
        got = parsed(capsys, command, "--config", str(CONFIGS / PARTS[file]), "--data", str(CONFIGS / file))
        assert list(got["data"]["init_args"]["tasks"]) == list(
            yaml.safe_load((CONFIGS / file).read_text())["init_args"]["tasks"]
        )
        return
    whole = [PARTS[file], file] if file in PARTS else suite(file) or [file]
    got = parsed(capsys, command, *(word for f in whole for word in ("--config", str(CONFIGS / f))))
    wanted = yaml.safe_load((CONFIGS / file).read_text())
    for key, value in wanted["model"]["init_args"].items():
        if isinstance(value, str | int | float):
            assert got["model"]["init_args"][key] == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.init_args.inti", "0.3"], "inti"),
        (["--model.init_args.init", "much"], "much"),
        (["--trainer.max_stops", "3"], "max_stops"),
        (["--model.init_args.accumulate", "sometimes"], "sometimes"),
    ],
)
def test_wrong_keys_and_types_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIGS / "experiments/text6_nsc.yaml"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
