"""Adapters on disk -> learn a merge -> merged adapter on disk -> normalized scores, by console commands alone."""

import json

import pytest
import yaml
from transformers import BertModel

from nscmerge.cli import main
from nscmerge.update import load_update
from tests.fakes.text_tasks import tiny_bert

TASKS = {
    "count": ("tasks.regression.TextRegression", {}, {"classes": False, "seed": 1}),
    "kind": ("tasks.classification.TextClassification", {"num_classes": 2}, {"classes": True, "seed": 2}),
}
TRAINER = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
           "enable_checkpointing": False, "enable_model_summary": False}  # fmt: skip


def task(name):
    class_path, options, _ = TASKS[name]
    return {"class_path": class_path, "init_args": {**options, "hidden_size": 32}}


def data(name):
    return {
        "class_path": "tests.fakes.text_tasks.FakeTextDataModule",
        "init_args": {**TASKS[name][2], "size": 64},
    }


def joint(**options):
    return {
        "class_path": "datamodules.joint.JointDataModule",
        "init_args": {"tasks": {name: data(name) for name in TASKS}, **options},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and two experts, trained by the command line."""
    root = tmp_path_factory.mktemp("work")
    base: BertModel = tiny_bert()
    base.save_pretrained(root / "base")
    for name in TASKS:
        config = {
            "trainer": {**TRAINER, "max_epochs": 3},
            "model": {
                "class_path": "tasks.finetune.FineTune",
                "init_args": {
                    "task": task(name), "base_model": str(root / "base"), "name": name, "rank": 4, "lr": 0.01,
                    "target_modules": ["query", "value", "attention.output.dense"],
                    "output": str(root / "experts" / name),
                },
            },
            "data": data(name),
        }  # fmt: skip
        run("fit", config, root / f"{name}.yaml")
    return root


def run(command, config, file, *words):
    file.write_text(yaml.safe_dump(config))
    main([command, "--config", str(file), *words])


def merge_config(root, output):
    return {
        "seed_everything": 0,
        "trainer": {**TRAINER, "max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None},
        "model": {
            "class_path": "nscmerge.MergeModule",
            "init_args": {
                "base_model": str(root / "base"),
                "experts": {name: str(root / "experts" / name) for name in TASKS},
                "output": str(output),
            },
        },
        "data": joint(batch_size=4),
    }


def test_from_experts_to_scores(folder, capsys):
    experts = {name: folder / "experts" / name for name in TASKS}
    for name in TASKS:
        card = json.loads((experts[name] / "expert.json").read_text())
        assert card["task"]["class_path"] == TASKS[name][0]
        assert set(card["scores"]) == {"val", "test"}
    run("fit", merge_config(folder, folder / "nsc"), folder / "merge.yaml")
    main(["merge", "svd", *(f"{n}={p}" for n, p in experts.items()), "--lam", "0.5", "--output", str(folder / "svd")])
    benchmark = {
        "trainer": TRAINER,
        "model": {
            "class_path": "tasks.benchmark.Benchmark",
            "init_args": {
                "base_model": str(folder / "base"),
                "tasks": {name: task(name) for name in TASKS},
                "experts": {name: str(path) for name, path in experts.items()},
                "merges": {"nsc": str(folder / "nsc"), "svd": str(folder / "svd")},
                "output": str(folder / "scores"),
            },
        },
        "data": joint(),
    }
    run("test", benchmark, folder / "benchmark.yaml")
    out = capsys.readouterr().out
    assert "nsc" in out
    scores = json.loads((folder / "scores" / "scores.json").read_text())["candidates"]
    assert set(scores) == {"base", "expert", "nsc", "svd"}
    for name, path in experts.items():
        primary = {"count": "pearson", "kind": "accuracy"}[name]
        stated = json.loads((path / "expert.json").read_text())["scores"]["test"][primary]
        assert scores["expert"]["tasks"][name]["value"] == pytest.approx(stated, abs=1e-6)
        assert scores["expert"]["tasks"][name]["normalized"] == pytest.approx(100)
    for file in ("scores.csv", "scores.md"):
        assert "svd" in (folder / "scores" / file).read_text()
    assert load_update(folder / "nsc").recipe.options["steps"] == 4
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["base", "experts", "nsc", "scores", "svd"]


def test_nothing_is_written_where_one_stands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("fit", merge_config(folder, folder / "elsewhere"), folder / "elsewhere.yaml")
    assert list(tmp_path.iterdir()) == []


def test_validate_reports_the_ratio_per_task(folder, capsys):
    run("validate", merge_config(folder, folder / "never"), folder / "validate.yaml")
    out = capsys.readouterr().out
    assert all(f"val/omega/{name}" in out for name in TASKS)
    assert not (folder / "never").exists()


def test_an_output_that_exists_is_refused_before_the_base_is_read(folder, capsys):
    config = merge_config(folder, folder / "experts")
    config["model"]["init_args"]["base_model"] = "not/there"
    with pytest.raises(SystemExit) as stop:
        run("fit", config, folder / "refused.yaml")
    assert stop.value.code in (1, 2)
    assert "is there already" in capsys.readouterr().err


def test_a_base_that_is_not_there_is_named(folder, capsys):
    config = merge_config(folder, folder / "out")
    config["model"]["init_args"]["base_model"] = str(folder / "nowhere")
    with pytest.raises(SystemExit) as stop:
        run("fit", config, folder / "refused.yaml")
    assert stop.value.code == 1
    assert "nowhere' cannot be loaded" in capsys.readouterr().err
    assert not (folder / "out").exists()
