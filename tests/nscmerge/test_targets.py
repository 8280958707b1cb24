"""Target layers by parsed block index and exact projection name."""

import pytest
from torch import nn

from nscmerge.errors import TargetError
from nscmerge.targets import is_projection, place, select_targets


def model(blocks, names=("q_proj", "v_proj", "o_proj")):
    root = nn.Module()
    root.layers = nn.ModuleList()
    for _ in range(blocks):
        block = nn.Module()
        block.self_attn = nn.Module()
        for name in names:
            block.self_attn.add_module(name, nn.Linear(4, 4))
        root.layers.append(block)
    return root


def linears(module):
    return [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]


def test_place_is_split_at_the_first_number():
    assert place("model.layers.24.self_attn.v_proj") == ("model.layers", 24, "self_attn.v_proj")
    assert place("multi_modal_projector.linear_1") is None


def test_projection_names_match_whole_parts():
    assert is_projection("layers.1.attention.output.dense", "attention.output.dense")
    assert is_projection("layers.1.attention.output.dense", "dense")
    assert not is_projection("layers.1.output_dense", "dense")
    assert not is_projection("layers.1.self_attn.qv_proj", "v_proj")


@pytest.mark.parametrize(("total", "first"), [(32, 24), (12, 9), (6, 4), (1, 0)])
def test_last_quarter_is_rounded_up(total, first):
    net = model(total)
    targets = select_targets(net, linears(net))
    assert sorted(targets) == sorted(f"layers.{i}.self_attn.o_proj" for i in range(first, total))


def test_block_count_comes_from_the_model_not_from_the_adapters():
    net = model(12)
    adapted = [n for n in linears(net) if place(n).block < 10]
    assert {place(t).block for t in select_targets(net, adapted)} == {9}


def test_block_one_is_not_block_eleven():
    net = model(12)
    assert select_targets(net, linears(net), [1], ["v_proj"]) == ["layers.1.self_attn.v_proj"]


def test_value_projection_where_the_output_is_not_adapted():
    net = model(4)
    adapted = [n for n in linears(net) if not n.endswith("o_proj")]
    assert select_targets(net, adapted) == ["layers.3.self_attn.v_proj"]


def test_empty_selection_says_what_there_was():
    net = model(4)
    with pytest.raises(TargetError, match=r"blocks \[9\].*Adapted blocks: \[0, 1, 2, 3\].*self_attn.q_proj"):
        select_targets(net, linears(net), [9])
