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
    "experiments/text6_benchmark_methods.yaml": "experiments/text6_benchmark.yaml",
}


def parsed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("file", FILES)
def test_parses(file, capsys):
    command = next((c for word, c in (("benchmark", "test"), ("search", "search")) if word in file), "fit")
    if file == "data/text6.yaml":
        got = parsed(capsys, command, "--config", str(CONFIGS / PARTS[file]), "--data", str(CONFIGS / file))
        assert list(got["data"]["init_args"]["tasks"]) == list(
            yaml.safe_load((CONFIGS / file).read_text())["init_args"]["tasks"]
        )
        return
    whole = [PARTS[file], file] if file in PARTS else [file]
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
