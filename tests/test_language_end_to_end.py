"""Every language and vision-language suite by console commands alone: the real configs on their offline twins."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from datamodules.twins.__main__ import WRITERS
from datamodules.twins.__main__ import main as write_twin
from nscmerge.cli import main
from nscmerge.update import load_update
from tests.test_language_configs import BASES, CONFIGS, SUITES, folder, read

#: The task of each suite whose expert is trained in the fast tests.
SAMPLES = {"nli6": "rte", "vlm6": "chartqa", "clip8": "dtd", "glue8": "rte", "llava4": "scienceqa"}
QUIET = ["--trainer.enable_progress_bar", "false"]
EACH = pytest.mark.parametrize("suite", SAMPLES)


@contextmanager
def working_in(place):
    """Work in a folder, from which the twins' paths start; no cache outside of it, no hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield place


@pytest.fixture
def workplace(tmp_path):
    with working_in(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def experts(request, tmp_path_factory):
    """The twin of a suite with the expert of one task, trained for a few steps, and copies of it for the others."""
    suite = request.param
    with working_in(tmp_path_factory.mktemp(suite)):
        write_twin([suite, "--output", f"runs/twins/{suite}", "--rows", "10", "--train-rows", "40"])
        few = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}
        expert = train(suite, SAMPLES[suite], *(w for k, v in few.items() for w in (f"--trainer.{k}", str(v))))
        copies(expert, SUITES[suite])
        yield expert


def configs(*files):
    return [word for file in files for word in ("--config", str(CONFIGS / file))]


def train(suite, task, *words):
    """Fine-tune the expert of one task; return its folder."""
    root, own = f"runs/twins/{suite}", f"twins/{suite}/expert_{task}.yaml"
    output = f"{root}/experts/{task}"
    main([
        "fit",
        *configs(f"experts/{folder(suite)}/common.yaml", f"experts/{folder(suite)}/{task}.yaml"),
        *configs(f"twins/{suite}/expert.yaml", *([own] if (CONFIGS / own).is_file() else [])),
        *("--data.init_args.source", f"{root}/data/{task}", "--model.init_args.output", output),
        *QUIET,
        *words,
    ])  # fmt: skip
    return Path(output)


def learn(suite, experiment, part, *words):
    """Learn a merge with an experiment and its twin's overlay."""
    main(["fit", *configs(f"experiments/{suite}_{experiment}.yaml", f"twins/{suite}/{part}.yaml"), *QUIET, *words])


def score(suite, *words):
    """Test the twin's base, experts and merges: three of closed form and the learned ones; return the candidates."""
    overlaid = configs(f"experiments/{suite}_benchmark.yaml", f"twins/{suite}/benchmark.yaml")
    merges = sorted(Path(f"runs/twins/{suite}/merges").iterdir())
    main(["test", *overlaid, *(w for m in merges for w in (f"--model.init_args.merges.{m.name}", str(m))), *words])
    return json.loads(Path(f"runs/twins/{suite}/scores/scores.json").read_text())["candidates"]


def copies(expert, tasks):
    """Write experts for all tasks of a suite: the one that was trained, with another B in every layer."""
    for number, task in enumerate(tasks):
        place = expert.parent / task
        if place == expert:
            continue
        shutil.copytree(expert, place)
        file = place / "adapter_model.safetensors"
        tensors, generator = load_file(file), torch.Generator().manual_seed(number)
        for name, tensor in tensors.items():
            if ".lora_B." in name:
                tensors[name] = (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


#: Layers of the tiny bases' four blocks that carry LoRA: q and v, all of attention, or all linear layers.
ADAPTED = {"nli6": 8, "vlm6": 8, "clip8": 16, "glue8": 24, "llava4": 28}
#: What is trained whole beside it.
PROJECTOR = [f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)]


@pytest.mark.parametrize("experts", SAMPLES, indirect=True)
def test_an_expert_is_trained_a_merge_learned_and_both_are_tested(experts):
    suite = experts.parents[1].name
    card = json.loads((experts / "expert.json").read_text())
    config = read("experts", folder(suite), f"{SAMPLES[suite]}.yaml")["model"]["init_args"]
    assert card["task"]["class_path"] == config["task"]["class_path"]
    assert set(card["scores"]) == {"val", "test"}
    assert "stand-in" in card["data"]["data"]
    learn(suite, "nsc", "merge", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    update = load_update(f"runs/twins/{suite}/merges/nsc")
    assert len(update.layers) == ADAPTED[suite]
    assert sorted(update.dense) == (PROJECTOR if "llava" in BASES[suite][0] else [])
    assert all(bool(torch.isfinite(update.delta(name)).all()) for name in update.layers)
    assert update.recipe.options["steps"] == 2
    # What the learning was about, not what it found: some coefficient of every task has moved from 0.4.
    coefficients = json.loads(Path(f"runs/twins/{suite}/merges/nsc/receipt.json").read_text())["coefficients"]
    for task in SUITES[suite]:
        assert any(abs(lam - 0.4) > 1e-5 for lam in coefficients[task].values()), task
    candidates = score(suite, "--data.init_args.test_samples", "2")
    assert set(candidates) == {"base", "expert", "task_arithmetic", "ties", "knots_ties", "nsc"}
    assert all(list(found["tasks"]) == SUITES[suite] for found in candidates.values())


@pytest.mark.slow
@EACH
def test_from_data_to_scores(suite, workplace):
    """Experts of all tasks, NSC, AdaMerging and three closed-form merges, a search of scales, the table."""
    write_twin([suite, "--output", f"runs/twins/{suite}"])
    for task in SUITES[suite]:
        few = ["--trainer.max_epochs", "1"] if task == "imagenet" else []  # a hundred names spelled in bytes
        train(suite, task, *few)
    learn(suite, "nsc", "merge")
    learn(suite, "adamerging", "adamerging")
    scores = score(suite)
    assert set(scores) == {"base", "expert", "task_arithmetic", "ties", "knots_ties", "nsc", "adamerging"}
    learned = 0
    for task in SUITES[suite]:
        primary = json.loads(Path(f"runs/twins/{suite}/experts/{task}/expert.json").read_text())
        stated = primary["scores"]["test"][primary["metric"]["primary"]]
        assert scores["expert"]["tasks"][task]["value"] == pytest.approx(stated, abs=1e-5)
        learned += stated > scores["base"]["tasks"][task]["value"]
    # Tiny models on a few rows: most experts, not all, beat the untrained base.
    assert learned > len(SUITES[suite]) / 2
    main(["search", *configs(f"experiments/{suite}_search.yaml", f"twins/{suite}/search.yaml")])
    assert len(list(Path(f"runs/twins/{suite}/search/merges").iterdir())) == 10


@pytest.mark.parametrize("experts", ["vlm6"], indirect=True)
@pytest.mark.parametrize(
    "overlay", ["vlm6_last_token", "vlm6_full_sequence", "vlm6_text_only", "vlm6_image_only", "samples_1"]
)
def test_ablations_run_on_the_twin(overlay, experts):
    suite = "vlm6"
    # Short answers where whole ones are read.
    short = (
        ["--model.init_args.objective.init_args.max_new_tokens", "4"] if "token" in overlay or "full" in overlay else []
    )
    learn(
        suite, "nsc", "merge", *configs(f"experiments/{overlay}.yaml"), "--model.init_args.output", overlay, *short,
        *("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.init_args.val_samples", "1"),
    )  # fmt: skip
    if short:
        options = load_update(overlay).recipe.options
        assert options["objective"]["position"] == overlay.removeprefix("vlm6_")
    logged = "runs/twins/vlm6/" if overlay == "samples_1" else f"runs/vlm6/{overlay.removeprefix('vlm6_')}/"
    config = max(Path(logged).glob("version_*/config.yaml"), key=lambda file: file.stat().st_mtime_ns)
    data = yaml.safe_load(config.read_text())["data"]["init_args"]
    modality = {"vlm6_text_only": "text", "vlm6_image_only": "image"}.get(overlay, "both")
    assert {own["init_args"]["modality"] for own in data["tasks"].values()} == {modality}
    assert data["fit_samples"] == (1 if overlay == "samples_1" else None)


@pytest.mark.parametrize("experts", ["vlm6"], indirect=True)
def test_adamerging_reads_whole_answers_on_the_twin(experts):
    learn(
        "vlm6", "adamerging", "adamerging", *configs("experiments/vlm6_adamerging_full.yaml"),
        *("--model.init_args.output", "full", "--model.init_args.objective.init_args.max_new_tokens", "2"),
        *("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.init_args.val_samples", "1"),
    )  # fmt: skip
    recipe = load_update("full").recipe
    assert recipe.method == "entropy"
    assert (recipe.options["objective"]["mode"], recipe.options["objective"]["max_new_tokens"]) == ("full_token", 2)


def test_the_command_refuses_a_folder_that_is_there_and_an_unknown_suite(workplace, capsys):
    (workplace / "here").mkdir()
    with pytest.raises(SystemExit, match="here is there already"):
        write_twin(["nli6", "--output", "here"])
    with pytest.raises(SystemExit):
        write_twin(["nli7", "--output", "new"])
    assert "nli6" in capsys.readouterr().err
    assert not (workplace / "new").exists()
    assert set(WRITERS) == {"nli6", "vlm6", "clip", "glue8", "llava4"}
