"""The suites of twenty dense tasks say the same of a task wherever they name it."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = CONFIGS / "experiments"
TASKS = [
    *(f"nyud_{task}" for task in ("semseg", "depth", "normal", "edge")),
    *(f"pascal_{task}" for task in ("semseg", "parts", "saliency", "normal", "edge")),
    *(f"tax_{task}" for task in ("de", "dz", "eo", "et", "k2", "k3", "n", "c", "r", "s2", "s25")),
]
#: Table 4 of the NSC paper.
SEEN = [
    *("nyud_semseg", "nyud_edge", "pascal_parts", "pascal_saliency"),
    *("tax_dz", "tax_et", "tax_k3", "tax_n", "tax_r", "tax_s25"),
]
SUITES = pytest.mark.parametrize("suite", ["dense20", "synth20"])


def read(file):
    return yaml.safe_load(file.read_text())


def model(suite, name):
    return read(EXPERIMENTS / f"{suite}_{name}.yaml")["model"]["init_args"]


def trained(suite, task):
    return read(CONFIGS / "experts" / suite / f"{task}.yaml")


@SUITES
def test_every_task_has_the_data_and_the_head_that_its_expert_was_trained_with(suite):
    data = read(CONFIGS / "data" / f"{suite}.yaml")["init_args"]["tasks"]
    seen = read(EXPERIMENTS / f"{suite}_seen.yaml")["data"]["init_args"]["tasks"]
    heads = {
        "test": model(suite, "benchmark")["tasks"],
        "search": model(suite, "search")["criteria"]["loss"]["init_args"]["tasks"],
    }
    assert list(data) == TASKS
    assert list(seen) == SEEN
    for tasks in heads.values():
        assert list(tasks) == TASKS
    for task in TASKS:
        expert = trained(suite, task)
        for found in (data, *([seen] if task in SEEN else [])):
            assert found[task]["class_path"] == expert["data"]["class_path"]
            wanted = {k: v for k, v in expert["data"]["init_args"].items() if k != "batch_size"}
            assert found[task]["init_args"] == wanted
        for tasks in heads.values():
            assert tasks[task]["class_path"] == expert["model"]["init_args"]["task"]["class_path"]
            own = {k: v for k, v in tasks[task].get("init_args", {}).items() if k not in ("workers", "thresholds")}
            assert own == expert["model"]["init_args"]["task"].get("init_args", {})


@SUITES
def test_every_experiment_merges_the_same_experts_of_the_same_base(suite):
    base = read(CONFIGS / "experts" / suite / "common.yaml")["model"]["init_args"]["base_model"]
    for name in ("nsc", "anchored", "benchmark", "search", "seen"):
        found = model(suite, name)
        assert found["base_model"] == base
        assert list(found["experts"]) == (SEEN if name == "seen" else TASKS)
        for task, folder in found["experts"].items():
            assert folder.removeprefix("package:") == trained(suite, task)["model"]["init_args"]["output"]


@SUITES
def test_groups_are_the_data_sets_or_seen_and_unseen(suite):
    groups = model(suite, "benchmark")["groups"]
    assert list(groups) == TASKS
    counts = Counter(groups.values())
    assert sorted(counts.values()) == [4, 5, 11]
    assert len({(task.partition("_")[0], group) for task, group in groups.items()}) == 3
    overlaid = model(suite, "benchmark_seen")
    assert {task for task, group in overlaid["groups"].items() if group == "seen"} == set(SEEN)
    assert list(overlaid["groups"]) == TASKS
    assert all(merge["only"] == SEEN for merge in overlaid["merges"].values())


def test_the_stand_in_is_called_what_it_is():
    assert read(CONFIGS / "data" / "synth20.yaml")["init_args"]["note"] == "synthetic ray-cast scenes (project)"
    for file in EXPERIMENTS.glob("synth20_*.yaml"):
        assert not {"NYUD", "PASCAL", "Taskonomy"} & set(model("synth20", file.stem[8:]).get("groups", {}).values())


@pytest.mark.parametrize("suite", ["synth20"])
def test_every_method_is_in_the_table_and_in_the_search(suite):
    from nscmerge.methods import METHODS

    tested = {merge["method"] for merge in model(suite, "benchmark_methods")["merges"].values()}
    assert tested == set(METHODS)
    searched = {merge["method"] for merge in model(suite, "search")["methods"].values()}
    assert searched == set(METHODS) - {"emr", "weight_average"}  # which have no scale to choose
