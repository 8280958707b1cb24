import pytest
import torch

from nscmerge.errors import AdapterError, ConfigError
from tasks.classification import TextClassification
from tasks.regression import TextRegression
from tasks.text import mean_pool
from tests.fakes.text_tasks import WIDTH, tiny_bert


def batch(rows, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_mean_pool_skips_padding():
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    torch.testing.assert_close(mean_pool(hidden, mask), hidden[:, :2].mean(1))
    assert torch.equal(mean_pool(hidden, torch.zeros_like(mask)), torch.zeros(1, 3))


@pytest.mark.parametrize("task", [TextClassification(3, WIDTH), TextRegression(WIDTH)])
def test_padding_does_not_change_a_prediction(task):
    model, short = tiny_bert(), batch(2, 6)
    padded = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in short.items()}
    torch.testing.assert_close(task(model, padded), task(model, short), atol=1e-6, rtol=1e-5)


def test_regression_speaks_the_unit_of_its_targets():
    task, targets = TextRegression(WIDTH), torch.tensor([100.0, 140.0, 180.0])
    task.fit_head(targets)
    assert (float(task.mean), float(task.std)) == (140.0, 40.0)
    model, inputs = tiny_bert(), batch(3, 5)
    prediction = task(model, inputs)
    torch.testing.assert_close(prediction, task.scores(task.features(model, inputs))[:, 0] * 40 + 140)
    expected = ((prediction - targets) / 40).square().mean()
    torch.testing.assert_close(task.loss(prediction, targets), expected)
    assert task.primary == "pearson"
    assert task.higher_is_better
    with pytest.raises(ConfigError, match="without any spread"):
        task.fit_head(torch.ones(4))


def test_a_task_is_built_again_from_its_config():
    task = TextClassification(num_classes=4, hidden_size=WIDTH)
    assert task.config() == {
        "class_path": "tasks.classification.TextClassification",
        "init_args": {"num_classes": 4, "hidden_size": WIDTH},
    }
    other = TextClassification(**task.config()["init_args"])
    other.load_head({k: v.half() for k, v in task.state_dict().items()}, "bbc")
    torch.testing.assert_close(other.linear.weight, task.linear.weight.half().float())


def test_a_foreign_head_is_refused_by_name():
    head = TextClassification(5, WIDTH).state_dict()
    with pytest.raises(AdapterError, match=r"head of 'bbc' has .*\(5, 32\).*TextClassification expects .*\(3, 32\)"):
        TextClassification(3, WIDTH).load_head(head, "bbc")
