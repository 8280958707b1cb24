"""The language and vision-language suites say the same of a task wherever they name it; twins run just that."""

from pathlib import Path

import pytest
import yaml

from datamodules.nli import nli_tasks
from nscmerge.methods import METHODS

CONFIGS = Path(__file__).parents[1] / "configs"
CLIP = [
    *("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
    *("oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"),
    *("cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"),
]
SUITES = {
    "nli6": ["mnli", "qnli", "snli", "rte", "sick", "scitail"],
    "vlm6": ["vizwiz", "iconqa", "chartqa", "docvqa", "coco", "flickr30k"],
    "clip8": CLIP[:8],
    "clip14": CLIP[:14],
    "clip20": CLIP,
    "glue8": ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"],
    "llava4": ["iconqa", "imagenet", "scienceqa", "vizwiz_caption"],
}
BASES = {
    "nli6": ("meta-llama/Meta-Llama-3-8B", "AutoModel"),
    "vlm6": ("llava-hf/llava-1.5-7b-hf", "AutoModelForImageTextToText"),
    "clip8": ("openai/clip-vit-base-patch32", "CLIPVisionModelWithProjection"),
    "glue8": ("google/flan-t5-base", "AutoModelForSeq2SeqLM"),
    "llava4": ("llava-hf/llava-1.5-7b-hf", "AutoModelForImageTextToText"),
}
EXPERIMENTS = ("nsc", "adamerging", "search", "benchmark")
EACH = pytest.mark.parametrize("suite", SUITES)


def read(*parts):
    return yaml.safe_load(CONFIGS.joinpath(*parts).read_text())


def model(suite, experiment):
    return read("experiments", f"{suite}_{experiment}.yaml")["model"]["init_args"]


def heads(suite):
    """Where the heads of the tasks are stated."""
    return {
        "benchmark": model(suite, "benchmark")["tasks"],
        "search": model(suite, "search")["criteria"]["loss"]["init_args"]["tasks"],
        "adamerging": model(suite, "adamerging")["objective"]["init_args"]["tasks"],
    }


def folder(suite):
    return "clip" if suite.startswith("clip") else suite


@EACH
def test_every_experiment_has_the_suites_tasks_on_the_suites_base(suite):
    source, model_class = BASES["clip8" if suite.startswith("clip") else suite]
    assert list(read("data", f"{suite}.yaml")["init_args"]["tasks"]) == SUITES[suite]
    for experiment in EXPERIMENTS:
        found = model(suite, experiment)
        assert list(found["experts"]) == SUITES[suite]
        base = found["base_model"]["init_args"]
        assert (base["source"], base["model_class"]) == (source, model_class)
        assert read("experiments", f"{suite}_{experiment}.yaml")["data"] == f"../data/{suite}.yaml"
    common = read("experts", folder(suite), "common.yaml")["model"]["init_args"]["base_model"]["init_args"]
    assert (common["source"], common["model_class"]) == (source, model_class)
    for tasks in heads(suite).values():
        assert list(tasks) == SUITES[suite]


@EACH
def test_every_task_has_the_data_and_the_head_that_its_expert_is_trained_with(suite):
    data = read("data", f"{suite}.yaml")["init_args"]["tasks"]
    for task in SUITES[suite]:
        expert = read("experts", folder(suite), f"{task}.yaml")
        own = {k: v for k, v in expert["data"]["init_args"].items() if not k.endswith("batch_size")}
        assert data[task] == {"class_path": expert["data"]["class_path"], "init_args": own}
        for tasks in heads(suite).values():
            assert tasks[task] == expert["model"]["init_args"]["task"]
        assert expert["model"]["init_args"]["output"] == f"experts/{folder(suite)}/{task}"
        assert expert["model"]["init_args"]["name"] == task


def test_two_way_tasks_of_nli_mask_the_class_that_their_data_never_have():
    for task, settings in model("nli6", "benchmark")["tasks"].items():
        assert settings["init_args"].get("mask_class") == nli_tasks()[task].mask_class


def test_public_adapters_are_filled_in():
    assert model("nli6", "nsc")["experts"]["scitail"] == "hoffman-lab/KnOTS-Llama3_8B_lora_R16_scitail"
    assert list(model("vlm6", "nsc")["experts"].values()) == [
        f"wylee01/LLaVA-1.5-7B-{name}-LoRA"
        for name in ("VizWizVQA", "IconQA", "ChartQA", "DocVQA", "COCO", "Flickr30k")
    ]
    assert model("glue8", "nsc")["experts"] == {t: f"tanganke/flan-t5-base_glue-{t}_lora-16" for t in SUITES["glue8"]}
    b16 = read("experiments", "clip8_b16.yaml")["model"]["init_args"]
    assert b16["experts"] == {t: f"tanganke/clip-vit-base-patch16_{t}_lora-16" for t in CLIP[:8]}
    assert b16["base_model"]["init_args"]["source"] == "openai/clip-vit-base-patch16"


@pytest.mark.parametrize(("suite", "batch", "lr", "steps"), [("nli6", 2, 3e-4, 500), ("vlm6", 1, 3e-4, 500)])
def test_merges_are_learned_in_the_papers_settings(suite, batch, lr, steps):
    """Spec, section 1.6 and 2.6: AdamW with torch's weight decay, start 0.4, values of the last quarter."""
    for experiment in ("nsc", "adamerging"):
        config, found = read("experiments", f"{suite}_{experiment}.yaml"), model(suite, experiment)
        assert config["trainer"]["max_steps"] == steps
        assert found["init"] == 0.4
        assert found["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
    objective = model(suite, "nsc")["objective"]["init_args"]
    assert (objective["blocks"], objective["projections"]) == ("last_quarter", ["v_proj"])
    assert read("data", f"{suite}.yaml")["init_args"]["batch_size"] == batch


@EACH
def test_every_method_is_in_the_table_and_in_the_search(suite):
    tested = model(suite, "benchmark_methods")["merges"]
    assert set(tested) == set(METHODS)
    searched = model(suite, "search")
    assert {m["method"] for m in searched["methods"].values()} == set(METHODS) - {"emr", "weight_average"}
    for name in searched["methods"]:
        assert tested[name] == f"{searched['output']}/merges/{name}.loss"


def strings(value):
    """Return every string in nested YAML."""
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    return [s for v in value for s in strings(v)] if isinstance(value, list) else [value] * isinstance(value, str)


def overlaid(under, over):
    """Return ``over`` laid over ``under`` as the command line does: a mapping of tasks holds those named last alone."""
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            merged[key] = overlaid(under[key], over[key])
            if key in ("tasks", "experts"):
                merged[key] = {task: merged[key][task] for task in over[key]}
    return merged


@EACH
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_twin_leaves_nothing_of_the_real_base_experts_and_data(suite, experiment):
    part = "merge" if experiment == "nsc" else experiment
    real = read("experiments", f"{suite}_{experiment}.yaml")
    twin = overlaid(real, read("twins", suite, f"{part}.yaml"))
    root = f"runs/twins/{suite}/"
    found = twin["model"]["init_args"]
    assert (
        found["base_model"]["init_args"] | {"source": root + "base", "dtype": "float32"}
        == (found["base_model"]["init_args"])
    )
    assert found["experts"] == {task: f"{root}experts/{task}" for task in SUITES[suite]}
    assert found["output"].startswith(root)
    assert twin["trainer"]["accelerator"] == "cpu"
    places = [s for s in strings(twin["model"]) if "/" in s]
    assert all(place.startswith(root) for place in places), places
    assert twin["data"] == "data.yaml"  # beside the overlay
    # What is merged, and how, is the real experiment's.
    for key in {"objective", "init", "accumulate", "optimizer", "methods"} & real["model"]["init_args"].keys():
        kept = {k: v for k, v in found[key].items() if k != "init_args"} if isinstance(found[key], dict) else found[key]
        wanted = real["model"]["init_args"][key]
        assert kept == ({k: v for k, v in wanted.items() if k != "init_args"} if isinstance(wanted, dict) else wanted)


@EACH
def test_the_twins_data_are_the_real_ones_read_from_elsewhere(suite):
    real, twin = (read(*f)["init_args"] for f in (("data", f"{suite}.yaml"), ("twins", suite, "data.yaml")))
    root = f"runs/twins/{suite}"
    for task, own in real["tasks"].items():
        where = {k: f"{root}/base" for k in ("tokenizer", "processor") if k in own["init_args"]}
        options = {**own["init_args"], **where, "source": f"{root}/data/{task}"}
        assert twin["tasks"].pop(task) == {**own, "init_args": options}
    assert not twin["tasks"]
    assert twin["split"] == real["split"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("last_token", "position", "last_token"), ("full_sequence", "position", "full_sequence")],
)
def test_ablations_of_table_8_change_the_position_alone(name, key, value):
    overlay = read("experiments", f"vlm6_{name}.yaml")
    assert set(overlay["model"]["init_args"]) == {"objective", "output"}
    assert overlay["model"]["init_args"]["objective"]["init_args"] == {key: value, "max_new_tokens": 128}
    assert set(overlay) == {"trainer", "model"}


@pytest.mark.parametrize("modality", ["text", "image"])
def test_ablations_of_table_9_change_what_merges_see(modality):
    overlay = read("experiments", f"vlm6_{modality}_only.yaml")
    own = {"init_args": {"modality": modality}}
    assert overlay["data"]["init_args"]["tasks"] == {t: own for t in SUITES["vlm6"]}
    assert set(overlay["model"]["init_args"]) == {"output"}


@pytest.mark.parametrize("samples", [1, 10, 100])
def test_table_13_keeps_so_many_samples(samples):
    options = read("experiments", f"samples_{samples}.yaml")["data"]["init_args"]
    assert options.pop("batch_size", 2) <= samples
    assert options == {"fit_samples": samples}


def test_vision_language_experts_train_the_projector_whole_and_captions_once():
    common = read("experts", "vlm6", "common.yaml")
    assert common["trainer"]["max_epochs"] == 5
    assert common["model"]["init_args"]["modules_to_save"] == [
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    ]
    for task in SUITES["vlm6"]:
        assert read("experts", "vlm6", f"{task}.yaml")["trainer"].get("max_epochs", 5) == (
            1 if task in ("coco", "flickr30k") else 5
        )
