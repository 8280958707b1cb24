"""CLIP's zero-shot heads: the golden, CLIP's own logits, and the published class names and prompts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from datamodules.twins.models import write_clip, write_llama
from nscmerge.base_model import load_base_model
from nscmerge.errors import ConfigError
from nscmerge.pretrained import Pretrained
from tasks.zero_shot import ZeroShotClassification, zero_shot_head, zero_shot_logits
from tasks.zero_shot_prompts import read_prompts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metric_clip_zero_shot_head.json").read_text())
#: Classes and prompts of the 20 sets, in their order (fusion-bench), and one prompt of each.
SETS = {
    "sun397": (397, 2, "a photo of a {c}."),
    "stanford-cars": (196, 8, "i love my {c}!"),
    "resisc45": (45, 18, "aerial photo of the {c}."),
    "eurosat": (10, 3, "a centered satellite photo of {c}."),
    "svhn": (10, 1, 'a photo of the number: "{c}".'),
    "gtsrb": (43, 3, 'a zoomed in photo of a "{c}" traffic sign.'),
    "mnist": (10, 1, 'a photo of the number: "{c}".'),
    "dtd": (47, 8, "a photo of the {c} object."),
    "oxford_flowers102": (102, 1, "a photo of a {c}, a type of flower."),
    "pcam": (2, 1, "this is a photo of {c}"),
    "fer2013": (7, 6, "look at how {c} they are."),
    "oxford-iiit-pet": (37, 1, "a photo of a {c}, a type of pet."),
    "stl10": (10, 2, "a photo of the {c}."),
    "cifar100": (100, 18, "a photo of a small {c}."),
    "cifar10": (10, 18, "a black and white photo of the {c}."),
    "food101": (101, 1, "a photo of {c}, a type of food."),
    "fashion_mnist": (10, 2, "a photo of a {c}."),
    "emnist_letters": (26, 1, 'a photo of the digit character: "{c}".'),
    "kmnist": (10, 1, "a photo of the character {c}."),
    "rendered-sst2": (2, 1, "a {c} review of a movie."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip") / "base"))


@pytest.fixture(scope="module")
def vision(folder):
    return load_base_model(Pretrained(folder, "CLIPVisionModelWithProjection"))


def pixels(n=3):
    return {"pixel_values": torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def test_head_and_logits_are_the_golden():
    embeddings = torch.tensor(GOLDEN["template_embeddings"], dtype=torch.float64)
    images = torch.tensor(GOLDEN["image_embeddings"], dtype=torch.float64)
    head = zero_shot_head(embeddings)
    expected = {name: torch.tensor(v, dtype=torch.float64) for name, v in GOLDEN["expected"].items()}
    torch.testing.assert_close(head, expected["head"], atol=1e-9, rtol=0)
    scale = torch.tensor(GOLDEN["logit_scale_log"], dtype=torch.float64).exp()
    logits = zero_shot_logits(images, head, scale)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dataset", SETS)
def test_names_and_prompts_are_the_published_ones(dataset):
    classes, prompts, example = SETS[dataset]
    found = read_prompts(dataset)
    assert (len(found.classes), len(set(found.classes)), len(found.prompts)) == (classes, classes, prompts)
    assert example in found.prompts
    assert found.texts()[-1][0] == found.prompts[0].replace("{c}", found.classes[-1])


def test_spellings_that_numbers_depend_on():
    assert "cra" in read_prompts("cifar100").classes
    assert "american_bulldog" in read_prompts("oxford-iiit-pet").classes
    assert read_prompts("pcam").classes == ("lymph node", "lymph node containing metastatic tumor tissue")
    assert "".join(read_prompts("kmnist").classes) == "おきすつなはまやれを"
    assert read_prompts("fer2013").classes[-3:] == ("neutral", "sad", "surprised")
    order = ["satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view"]
    assert list(read_prompts("resisc45").prompts) == [
        f"{view} of {article}{{c}}." for article in ("", "a ", "the ") for view in order
    ]


def test_logits_are_clips_own_where_a_class_has_one_prompt(folder, vision):
    texts = [row[0] for row in read_prompts("mnist").texts()]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    whole = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(**pixels(), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        got = ZeroShotClassification("mnist")(vision, pixels())
    torch.testing.assert_close(got, expected.logits_per_image, atol=2e-3, rtol=1e-4)


def test_many_prompts_are_averaged_class_by_class(folder, vision):
    task = ZeroShotClassification("eurosat", clip=folder)
    task.check(vision)
    whole, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row, prompts in enumerate(read_prompts("eurosat").texts()):
        total = 0
        for prompt in prompts:
            with torch.no_grad():
                tokens = tokenizer(prompt, return_tensors="pt")
                pooled = whole.text_model(input_ids=tokens["input_ids"]).pooler_output
                embedding = whole.text_projection(pooled)[0]
            total = total + embedding / embedding.norm()
        mean = total / len(prompts)
        torch.testing.assert_close(task.head[row], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_a_vision_tower_without_projection_gives_the_same(folder, vision):
    plain = load_base_model(Pretrained(folder, "CLIPVisionModel"))
    got = ZeroShotClassification("eurosat")(plain, pixels())
    torch.testing.assert_close(got, ZeroShotClassification("eurosat")(vision, pixels()))


def test_logits_are_fp32_under_autocast(vision):
    task = ZeroShotClassification("eurosat")
    features = task.features(vision, pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = task.predict(features, {})
    torch.testing.assert_close(got, task.predict(features, {}))


def test_the_head_is_no_part_of_an_expert_and_gradients_reach_the_tower(folder):
    tower = load_base_model(Pretrained(folder, "CLIPVisionModelWithProjection"))
    task = ZeroShotClassification("svhn")
    assert not task.state_dict()
    task.load_head({}, "svhn")
    weight = tower.get_parameter("vision_model.encoder.layers.3.self_attn.v_proj.weight")
    weight.requires_grad_(True)
    task.loss(task(tower, pixels()), torch.tensor([1, 2, 3])).backward()
    assert float(weight.grad.abs().sum()) > 0
    assert list(task.parameters()) == []
    assert not task.state_dict()


def test_accuracy_counts_every_sample(vision):
    task = ZeroShotClassification("mnist")
    metrics = task.metrics()
    prediction = task(vision, pixels())
    metrics.update(prediction, prediction.argmax(1) * torch.tensor([1, 1, 0]) + torch.tensor([0, 0, 9]))
    third = float(prediction.argmax(1)[2] == 9)
    assert float(metrics.compute()["accuracy"]) == pytest.approx((2 + third) / 3)


def test_what_does_not_fit_is_refused(folder, vision, tmp_path):
    with pytest.raises(ConfigError, match=r"no zero-shot data set 'euroset'; did you mean 'eurosat'\?"):
        ZeroShotClassification("euroset")
    llama = load_base_model(str(write_llama(tmp_path / "llama")))
    with pytest.raises(ConfigError, match=r"LlamaModel is no vision tower of CLIP.*CLIPVisionModelWithProjection"):
        ZeroShotClassification("mnist").check(llama)
    with pytest.raises(ConfigError, match=r"CLIP '.*nowhere' cannot be loaded"):
        ZeroShotClassification("mnist", clip=str(tmp_path / "nowhere")).check(vision)
    other = str(write_clip(tmp_path / "wide", hidden=16))
    with pytest.raises(ConfigError, match=r"gives 16 features, CLIPVisionModelWithProjection 32"):
        ZeroShotClassification("mnist", clip=other).check(vision)
