"""DARE-TIES against whole vectors at once; where its masks come from."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nscmerge import Adapter, LowRank, merge
from nscmerge.errors import MethodError
from tests import ties_oracle as oracle
from tests.fakes.unequal import RANKS, adapters, agrees, masks, tensors

ROOT = Path(__file__).parents[2]
CASES = [(m, v) for m in ("dare_ties", "knots_dare_ties") for v in ("original", "papercode")]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
class TestDareEqualsTheOracle:
    def test_original(self, ranks, drop):
        experts = adapters(*ranks)
        keep = masks(experts, drop)
        dropped = oracle.dare([tensors(e) for e in experts], list(keep.values()), drop)
        agrees(merge(experts, "dare_ties", drop=drop, keep_masks=keep), oracle.ties(dropped, 0.2))

    def test_papercode(self, ranks, drop):
        experts = adapters(*ranks)
        keep = masks(experts, drop)
        expected = oracle.ties_papercode([tensors(e) for e in experts], 0.2, "sum", list(keep.values()), drop)
        agrees(merge(experts, "dare_ties", variant="papercode", drop=drop, keep_masks=keep), expected)


@pytest.mark.parametrize("variant", ["original", "papercode"])
class TestDraws:
    def test_they_depend_on_seed_task_and_layer_alone(self, variant):
        experts = adapters(2, 3, 1)
        update = merge(experts, "dare_ties", variant=variant, drop=0.5, agg="sum", density=1.0)
        kept = {
            (e.name, n): merge([e], "dare_ties", variant=variant, drop=0.5, density=1.0, agg="sum").delta(n)
            for e in experts
            for n in e.layers
        }
        for e in experts:  # each task alone has the mask that it has among others: half of the entries, doubled
            for n in e.layers:
                alone, delta = kept[e.name, n], e.layers[n].dense()
                torch.testing.assert_close(alone, torch.where(alone != 0, 2 * delta, 0.0))
        signs = torch.stack([kept[e.name, "blocks.2.q"] for e in experts])
        agree = (signs >= 0).all(0) | (signs <= 0).all(0)
        torch.testing.assert_close(update.delta("blocks.2.q")[agree], signs.sum(0)[agree])
        other = merge(experts, "dare_ties", variant=variant, drop=0.5, seed=1)
        assert not torch.equal(other.delta("blocks.2.q"), update.delta("blocks.2.q"))

    def test_the_share_kept_is_as_asked(self, variant):
        wide = Adapter({"l": LowRank(torch.ones(1, 300), torch.ones(300, 1))}, name="a")
        for drop in (0.9, 0.5, 0.1):
            kept = merge([wide], "dare_ties", variant=variant, drop=drop, density=1.0).delta("l")
            share = float((kept != 0).float().mean())
            assert abs(share - (1 - drop)) < 5 * (drop * (1 - drop) / 90_000) ** 0.5
            torch.testing.assert_close(kept[kept != 0], torch.full((int((kept != 0).sum()),), 1 / (1 - drop)))


def digests():
    """Return a hash of every method's and variant's merge."""
    merges = [merge(adapters(2, 3), m, variant=v, drop=0.5) for m, v in CASES]
    return [
        hashlib.sha256(b"".join(u.delta(n).numpy().tobytes() for n in [*u.layers, *u.dense])).hexdigest()
        for u in merges
    ]


def test_the_same_for_every_hash_seed():
    code = "from tests.nscmerge.test_dare_ties import digests; print(*digests())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("0", "1")
    ]
    assert runs[0] == runs[1] == digests()


def test_masks_that_do_not_fit():
    experts = adapters(2, 3)
    keep = masks(experts, 0.5)
    full = {e: dict(m) for e, m in keep.items()}

    def refused(changed, message):
        with pytest.raises(MethodError, match=message):
            merge(experts, "dare_ties", keep_masks=changed)

    refused({"a": full["a"]}, r"keep_masks has no task 'b' \(1 of 2 are missing\); give one for each of a, b")
    refused({**full, "aa": full["a"]}, "keep_masks has 'aa', which is no task of this merge; did you mean 'a'")
    refused({**full, "a": {}}, r"keep_masks\['a'\] has no layer or tensor 'blocks.10.o' \(5 of 5 are missing\)")
    refused({**full, "a": {**full["a"], "q": full["a"]["p.weight"]}}, r"\['a'\] has 'q', which is no layer or tensor")
    wrong = {**full["a"], "p.weight": torch.ones(4, 3, dtype=torch.bool)}
    refused({**full, "a": wrong}, r"\['p.weight'\] is \(4, 3\); expected a bool tensor \(3, 4\)")
    refused({**full, "a": {**full["a"], "p.weight": [True]}}, r"\['p.weight'\] is list; expected a bool tensor")
    refused({**full, "a": {**full["a"], "p.weight": torch.full((3, 4), 0.5)}}, "values other than 0 and 1")
    # Zeros of a layer that the task lacks need no mask; 0 and 1 will do for bool.
    fewer = {**full, "b": {n: m.to(torch.uint8) for n, m in full["b"].items() if n != "blocks.2.v"}}
    expected = merge(experts, "dare_ties", drop=0.5, keep_masks=full)
    agrees(merge(experts, "dare_ties", drop=0.5, keep_masks=fewer), {n: expected.delta(n) for n in full["a"]})


def test_given_masks_are_hashed_into_the_receipt(tmp_path):
    experts = adapters(2, 3)
    folder = merge(experts, "dare_ties", keep_masks=masks(experts, 0.5)).save(tmp_path / "out")
    given = json.loads((folder / "receipt.json").read_text())["options"]["keep_masks"]
    assert given["a"]["p.weight"]["tensor"] == [3, 4]
    assert len(given["b"]["blocks.2.q"]["sha256_as_fp32"]) == 64
