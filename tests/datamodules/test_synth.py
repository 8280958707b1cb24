"""The stand-in data modules: rendered once, read through the real loaders, honest in what they say of themselves."""

import pytest
import torch

from datamodules.scenes import GENERATOR_VERSION
from datamodules.synth import DATA, SynthNYUDDataModule, SynthPascalDataModule, SynthTaskonomyDataModule
from nscmerge.errors import DatasetNotFoundError

#: One file is missing on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*dropped as incomplete")
NYUD = ("semseg", "depth", "normal", "edge")
PASCAL = ("semseg", "parts", "saliency", "normal", "edge")
TASKONOMY = ("de", "dz", "eo", "et", "k2", "k3", "n", "c", "r", "s2", "s25")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSCMERGE_CACHE", str(folder))
        yield folder


def nyud(task):
    return SynthNYUDDataModule(task, size=(32, 48), train=4, held_out=4, image_size=(28, 40), workers=1)


def pascal(task):
    return SynthPascalDataModule(task, size=(48, 48), train=4, val=6, test=6, image_size=(40, 32), workers=1)


def taskonomy(task):
    return SynthTaskonomyDataModule(
        task, size=(32, 32), train=2, val=1, test=1, views=4, image_size=(32, 32), incomplete=True, workers=1
    )


CASES = [(make, task) for make, tasks in ((nyud, NYUD), (pascal, PASCAL), (taskonomy, TASKONOMY)) for task in tasks]
SHAPES = {"depth": (), "semseg": (), "parts": (), "saliency": (), "edge": (2,), "normal": (3,)}
SHAPES |= {
    "de": (2,),
    "dz": (2,),
    "n": (3,),
    "r": (3,),
    "c": (2,),
    **dict.fromkeys(("eo", "et", "k2", "k3", "s2", "s25"), (1,)),
}


@pytest.mark.parametrize(("make", "task"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_every_task_reads_what_was_rendered(cache, make, task):
    data = make(task)
    data.prepare_data()
    data.setup()
    height, width = data.size
    for split in ("train", "val", "test"):
        sample = data.dataset(split)[0]
        assert sample["x"].shape == (3, height, width)
        assert sample["x"].dtype == torch.float32
        assert sample["target"].shape == (*SHAPES[task], height, width)
        assert sample["target"].dtype == (torch.int64 if task in ("semseg", "parts", "saliency") else torch.float32)
        valid = sample["target"][sample["target"] != 255]
        assert torch.isfinite(sample["target"]).all()
        assert len(valid)


def test_counts_are_those_asked_for(cache):
    for make, task, expected in ((nyud, "depth", [4, 2, 2]), (pascal, "edge", [4, 6, 6]), (taskonomy, "n", [7, 4, 4])):
        data = make(task)
        data.prepare_data()
        data.setup()
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == expected


def test_equal_pools_have_equal_inputs(cache):
    one, other, parts = pascal("semseg"), pascal("normal"), pascal("parts")
    for data in (one, other, parts):
        data.prepare_data()
        data.setup()
    assert one.pool == other.pool != parts.pool
    assert torch.equal(one.unlabelled("val")[1]["x"], other.unlabelled("val")[1]["x"])
    assert nyud("depth").pool != one.pool
    assert SynthNYUDDataModule("depth", scene_seed=1).pool != SynthNYUDDataModule("depth").pool


def test_a_result_says_that_it_is_synthetic(cache):
    for make, task in ((nyud, "depth"), (pascal, "edge"), (taskonomy, "n")):
        data = make(task)
        data.prepare_data()
        data.setup()
        facts = data.describe()
        assert facts["data"] == DATA == "synthetic ray-cast scenes (project)"
        assert facts["data_set"].startswith("synth_")
        assert not any(real in str(facts) for real in ("NYUD-v2", "PASCAL-Context", "Taskonomy"))


def test_the_path_says_version_and_seed(cache):
    root = nyud("depth").root
    assert root.parent == cache / "synth" / f"v{GENERATOR_VERSION}"
    assert root.name == "synth_nyud-seed0-4-4-28x40"


def test_reading_before_rendering_says_what_to_do(cache):
    with pytest.raises(DatasetNotFoundError, match=r"synth_nyud: .* is not rendered yet\. Call prepare_data\(\)"):
        SynthNYUDDataModule("depth", train=5).setup()


def test_nothing_is_rendered_twice(cache):
    data = nyud("depth")
    data.prepare_data()
    before = {file: file.stat().st_mtime_ns for file in data.root.rglob("*")}
    nyud("edge").prepare_data()
    assert {file: file.stat().st_mtime_ns for file in data.root.rglob("*")} == before
