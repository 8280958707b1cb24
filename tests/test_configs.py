"""Every shipped YAML parses as the command that it is for, and wrong ones are refused with a word."""

from pathlib import Path

import pytest
import yaml

from nscmerge.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
#: Those of ``python -m tasks.continual``, which is no command of the console script, have tests of their own.
FILES = sorted(
    file for f in CONFIGS.rglob("*.yaml") if not (file := str(f.relative_to(CONFIGS))).startswith("continual/")
)
#: Suites of language and vision-language tasks, and a task of each.
LANGUAGE = {
    "nli6": "rte",
    "vlm6": "chartqa",
    "clip8": "dtd",
    "clip14": "dtd",
    "clip20": "dtd",
    "glue8": "rte",
    "llava4": "scienceqa",
    "words4": "bbc",
}
#: Folders whose ``common.yaml`` holds what their tasks share, with one of those tasks; a task's file is laid over it.
SUITES = {
    "experts/dense20": "nyud_semseg",
    "experts/synth20": "nyud_semseg",
    **{f"experts/{'clip' if 'clip' in suite else suite}": task for suite, task in LANGUAGE.items()},
}
#: Files that are laid over, or named by, a complete one.
PARTS = {
    "experts/probe.yaml": "experts/bbc.yaml",
    **{f"data/{s}.yaml": f"experiments/{s}_nsc.yaml" for s in ("text6", "dense20", "synth20", *LANGUAGE)},
    **{f"experiments/{s}_benchmark_methods.yaml": f"experiments/{s}_benchmark.yaml" for s in LANGUAGE},
    **{f"experiments/{s}_own.yaml": f"experiments/{s}_nsc.yaml" for s in ("nli6", "vlm6", "glue8")},
    **{
        f"experiments/vlm6_{part}.yaml": "experiments/vlm6_nsc.yaml"
        for part in ("last_token", "full_sequence", "text_only", "image_only")
    },
    "experiments/vlm6_adamerging_full.yaml": "experiments/vlm6_adamerging.yaml",
    "experiments/clip8_b16.yaml": "experiments/clip8_nsc.yaml",
    **{f"experiments/samples_{n}.yaml": "experiments/nli6_nsc.yaml" for n in (1, 10, 100)},
    "experiments/text6_benchmark_methods.yaml": "experiments/text6_benchmark.yaml",
    **{
        f"experiments/{suite}_{part}.yaml": f"experiments/{suite}_{whole}.yaml"
        for suite in ("dense20", "synth20")
        for part, whole in (("benchmark_methods", "benchmark"), ("benchmark_seen", "benchmark"), ("nsc_adam", "nsc"))
    },
}


def whole(file):
    """Return the files that belong together, in order, the last of them ``file`` wherever it completes a command."""
    folder, name = file.rsplit("/", 1)
    if folder in SUITES and name != "base.yaml":
        return [f"{folder}/common.yaml", f"{folder}/{SUITES[folder]}.yaml" if name == "common.yaml" else file]
    if folder.startswith("twins/"):
        suite, part = folder.removeprefix("twins/"), name.removesuffix(".yaml")
        if part.startswith("expert"):
            task = part.removeprefix("expert").removeprefix("_") or LANGUAGE[suite]
            return [*whole(f"experts/{'clip' if 'clip' in suite else suite}/{task}.yaml"), file]
        return [f"experiments/{suite}_{'nsc' if part in ('merge', 'data') else part}.yaml", file]
    if folder == "trainer":
        return ["experiments/nli6_nsc.yaml", file]
    return [PARTS[file], file] if file in PARTS else [file]


def parsed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return yaml.safe_load(out)


def checked_elsewhere(file):
    """Whether fast tests hold a file to its like (test_language_configs) or run it (test_language_end_to_end)."""
    folder, name = file.rsplit("/", 1)
    if folder in SUITES and folder.removeprefix("experts/") in {*LANGUAGE, "clip"}:
        return name not in ("common.yaml", f"{SUITES[folder]}.yaml")
    return "clip14" in file or "clip20" in file or (folder.startswith("twins/") and folder != "twins/nli6")


def marked(file):
    """Parsing takes seconds where there are many tasks, so what is checked elsewhere is parsed in slow tests alone."""
    return pytest.param(file, marks=pytest.mark.slow) if checked_elsewhere(file) else file


@pytest.mark.parametrize("file", map(marked, FILES))
def test_parses(file, capsys):
    if file.startswith("trainer/"):
        got = parsed(capsys, "fit", "--config", str(CONFIGS / whole(file)[0]), "--trainer", str(CONFIGS / file))
        for key, value in yaml.safe_load((CONFIGS / file).read_text()).items():
            assert got["trainer"][key] == value or got["trainer"][key]["class_path"] == value["class_path"]
        return
    command = next((c for word, c in (("benchmark", "test"), ("search", "search")) if word in file), "fit")
    files = [str(CONFIGS / f) for f in whole(file)]
    if file.endswith("data.yaml") or file.startswith("data/"):
        got = parsed(capsys, command, "--config", files[0], "--data", files[1])
        assert list(got["data"]["init_args"]["tasks"]) == list(
            yaml.safe_load((CONFIGS / file).read_text())["init_args"]["tasks"]
        )
        return
    got = parsed(capsys, command, *(word for f in files for word in ("--config", f)))
    wanted = yaml.safe_load((CONFIGS / file).read_text())
    for key, value in wanted.get("model", {}).get("init_args", {}).items():
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
