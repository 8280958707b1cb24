"""Prompts and answers of text tasks: what is cut, what is learned, and that the splits are the task's own."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.base import IGNORED
from datamodules.prompted import PromptedDataModule
from datamodules.text import TextDataModule
from nscmerge.errors import ConfigError

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = "{text} topic :"


class Numbered(TextDataModule):
    def records(self):
        return [(f"{word} {word}", i % 2) for i, word in enumerate(WORDS)]


@pytest.fixture
def tokenizer(tmp_path):
    words = [*WORDS, "topic", ":", "even", "odd", "0.0", "1.0", "<end>", "<unk>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path)
    return str(tmp_path)


def data(tokenizer, **options):
    task = Numbered(train_size=10, val_size=4, test_size=6)
    module = PromptedDataModule(task, TEMPLATE, tokenizer, **{"answers": ["even", "odd"], **options})
    module.setup()
    return module, task


def text(module, ids):
    return module.dataset("train").tokenizer.decode([int(i) for i in ids])


def test_splits_are_those_of_the_task(tokenizer):
    module, task = data(tokenizer)
    for split, records in task.splits().items():
        samples = [module.dataset(split)[i] for i in range(len(records))]
        assert [text(module, s["input_ids"]) for s in samples] == [f"{words} topic :" for words, _ in records]
        assert [s["target"] for s in samples] == [[f" {['even', 'odd'][label]}"] for _, label in records]


def test_labels_are_the_answer_and_the_end(tokenizer):
    module, _ = data(tokenizer)
    for i in range(10):
        scored, taught = module.dataset("train")[i], module.supervised("train")[i]
        prompt = scored["input_ids"].tolist()
        assert taught["input_ids"].tolist()[: len(prompt)] == prompt
        kept = taught["target"] != IGNORED
        assert kept.tolist() == [False] * len(prompt) + [True, True]
        assert taught["target"][kept].tolist() == taught["input_ids"][kept].tolist()
        assert text(module, taught["target"][kept]) == f"{scored['target'][0].strip()} <end>"


def test_without_answers_the_label_is_a_number(tokenizer):
    module, _ = data(tokenizer, answers=None)
    assert {module.dataset("val")[i]["target"][0] for i in range(4)} <= {" 0.0", " 1.0"}


def test_a_long_text_is_cut_and_the_question_is_not(tokenizer):
    module, task = data(tokenizer, max_length=1)
    words = task.splits()["test"][0][0].split()
    assert text(module, module.dataset("test")[0]["input_ids"]) == f"{words[0]} topic :"


@pytest.mark.parametrize("template", ["topic :", "{text} {text}"])
def test_a_template_holds_the_text_once(tokenizer, template):
    with pytest.raises(ConfigError, match="exactly once"):
        PromptedDataModule(Numbered(), template, tokenizer)


def test_asked_too_early(tokenizer):
    with pytest.raises(ConfigError, match="call setup"):
        PromptedDataModule(Numbered(), TEMPLATE, tokenizer).dataset("val")
