"""Fusing tasks: rows stay whose they were, padding is masked, labels are refused."""

import pytest
import torch

from nscmerge.batching import by_length, fuse
from nscmerge.errors import ConfigError


def text(n, length, value=1):
    return {"input_ids": torch.full((n, length), value), "attention_mask": torch.ones(n, length, dtype=torch.long)}


def test_text_of_different_lengths_is_one_group():
    (group,) = fuse({"a": text(2, 3, value=7), "b": text(1, 5, value=8)})
    assert group.rows == {"a": slice(0, 2), "b": slice(2, 3)}
    assert group.inputs["input_ids"].tolist() == [[7, 7, 7, 0, 0], [7, 7, 7, 0, 0], [8] * 5]
    assert group.mask.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5]


def test_images_of_different_sizes_are_groups_of_their_own():
    batch = {
        "a": {"x": torch.ones(2, 3, 8, 8)},
        "b": {"x": torch.ones(1, 3, 4, 4)},
        "c": {"x": torch.zeros(2, 3, 8, 8)},
    }
    first, second = fuse(batch)
    assert list(first.rows) == ["a", "c"]
    assert list(second.rows) == ["b"]
    assert first.inputs["x"].shape == (4, 3, 8, 8)
    assert first.mask is None


@pytest.mark.parametrize("name", ["target", "labels"])
def test_labels_are_refused(name):
    with pytest.raises(ConfigError, match="'a': the batch holds labels"):
        fuse({"a": {**text(1, 2), name: torch.ones(1)}})


def test_says_what_is_wrong_with_an_input():
    with pytest.raises(ConfigError, match="task 'a': input 'x' is list"):
        fuse({"a": {"x": [1, 2]}})
    with pytest.raises(ConfigError, match=r"task 'a': inputs differ in batch size: \{'x': 2, 'y': 3\}"):
        fuse({"a": {"x": torch.ones(2, 1), "y": torch.ones(3, 1)}})
    with pytest.raises(ConfigError, match="task 'a': the batch is list"):
        fuse({"a": [torch.ones(2)]})


def test_a_part_of_a_group_has_no_padding_but_its_own():
    left = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    ragged = torch.tensor([[1, 2, 0], [3, 0, 0]])
    right = {"input_ids": ragged, "attention_mask": (ragged > 0).long()}
    images = torch.arange(3.0).reshape(3, 1, 1)
    (group,) = fuse({"a": left | {"image": images[:1]}, "b": right | {"image": images[1:]}})
    assert group.part(group.rows["a"])["input_ids"].tolist() == [[5, 6]]
    assert group.part(group.rows["b"])["input_ids"].tolist() == [[1, 2], [3, 0]]
    assert group.part(slice(2, 3))["attention_mask"].tolist() == [[1]]
    assert torch.equal(group.part(group.rows["b"])["image"], images[1:])
    empty = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.zeros(1, 2)}
    assert fuse({"a": empty})[0].part(slice(0, 1))["input_ids"].shape == (1, 2)  # nothing to choose by
    assert fuse({"a": {"x": images}})[0].part(slice(1, 3))["x"].shape == (2, 1, 1)


def test_parts_by_length_hold_every_row_once_and_no_common_padding():
    ids = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 0], [9, 1, 0, 0], [0, 0, 0, 2]])
    (group,) = fuse({"a": {"input_ids": ids, "attention_mask": (ids > 0).long()}})
    parts = by_length(group, 2)
    assert [rows.tolist() for rows, _ in parts] == [[1, 4, 3], [2, 0]]
    assert [inputs["input_ids"].tolist() for _, inputs in parts] == [
        [[5, 0, 0, 0], [0, 0, 0, 2], [9, 1, 0, 0]],  # one is padded left, the others right
        [[6, 7, 8, 0], [1, 2, 3, 4]],
    ]
    assert [rows.tolist() for rows, _ in by_length(group, 9)] == [[1], [4], [3], [2], [0]]
    ((rows, whole),) = by_length(group, 1)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert whole is group.inputs
    (images,) = fuse({"a": {"x": torch.ones(3, 1, 2, 2)}})
    assert len(by_length(images, 3)) == 1  # nothing to choose by
