import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from datamodules.dense.files import Pixels, read_image
from datamodules.dense.taskonomy_maps import DOMAINS, curvature, log_depth, occlusion, read_target, resize, validity
from datamodules.taskonomy import TaskonomyDataModule
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError
from tests.fakes.dense_trees import save_png, taskonomy_file, taskonomy_tree

SIZE = (16, 16)
CHANNELS = {"de": 2, "dz": 2, "n": 3, "r": 3, "c": 2}


class AnyTaskonomy(TaskonomyDataModule):
    expected_counts = None
    expected_image_size = None


@pytest.fixture
def root(tmp_path):
    return taskonomy_tree(tmp_path / "taskonomy")


def module(root, task="n", cls=AnyTaskonomy, **options):
    data = cls(task, root, **{"size": SIZE, **options})
    data.setup()
    return data


@pytest.mark.parametrize("level", [True, False])
def test_both_trees_are_read_by_the_split_file_in_the_order_of_numbers(tmp_path, level):
    data = module(taskonomy_tree(tmp_path / "t", level=level))
    names = ["point_0_view_0", "point_2_view_1", "point_10_view_2"]
    assert data.dataset("train").ids == [f"{b}/{n}" for b in ("ash", "elm") for n in names]  # no woodbine
    assert data.dataset("val").ids == [f"fir/{n}" for n in names]  # no wiconisco
    assert data.dataset("test").ids == [f"ihlen/{n}" for n in names]  # not yew


def test_all_test_buildings_if_wanted(root):
    class All(AnyTaskonomy):
        test_buildings = None

    assert len(module(root, cls=All).dataset("test")) == 6


@pytest.mark.parametrize("task", DOMAINS)
def test_every_target_has_its_form(root, task):
    data = module(root, task, batch_size=2)
    sample = data.dataset("test")[1]
    assert sample["x"].dtype == sample["target"].dtype == torch.float32
    assert sample["x"].shape == (3, *SIZE)
    assert sample["target"].shape == (CHANNELS.get(task, 1), *SIZE)
    assert sample["x"].min() >= -1
    assert sample["x"].max() <= 1
    assert next(iter(data.train_dataloader()))["target"].shape == (2, CHANNELS.get(task, 1), *SIZE)
    if task not in ("eo", "c"):
        assert sample["target"].min() >= (0 if task in ("de", "dz") else -1)
        assert sample["target"].max() <= 1
    assert torch.equal(data.dataset("test").target(1), sample["target"])
    # Loader processes that are spawned get a copy.
    assert torch.equal(pickle.loads(pickle.dumps(data.dataset("test")))[1]["target"], sample["target"])


def stored(root, task, view=0):
    return np.asarray(Image.open(taskonomy_file(root, DOMAINS[task].name, "ihlen", view))).astype(np.float64)


def test_targets_by_an_independent_formula(root):
    found = {task: module(root, task).dataset("test").target(0).numpy() for task in DOMAINS}
    raw = {task: stored(root, task) for task in DOMAINS}

    def close(task, expected):
        np.testing.assert_allclose(found[task], expected, atol=2e-6, rtol=1e-6)

    for task in ("de", "dz"):
        np.testing.assert_allclose(found[task][0], np.log(1 + raw[task]) / np.log(65536), atol=1e-6)
        assert np.array_equal(found[task][1], raw["dz"] != 65535)
    close("eo", gaussian_filter(2 * raw["eo"] / 409.6 - 1, 4)[None])
    close("et", (2 * np.minimum(raw["et"], 5242.88) / 5242.88 - 1)[None])
    close("k2", (2 * np.minimum(raw["k2"], 327.68) / 327.68 - 1)[None])
    close("k3", (2 * raw["k3"] / 65536 - 1)[None])
    for task in ("n", "r"):
        close(task, np.moveaxis(2 * raw[task] / 255 - 1, 2, 0))
    for task in ("s2", "s25"):
        close(task, (2 * raw[task] / 255 - 1)[None])
    red, green, _ = np.moveaxis(raw["c"], 2, 0)
    close("c", np.stack([(red - 123.572) / 31.922, (green - 120.1) / 21.658]))


def test_a_hole_is_one_and_flat_curvature_is_not_zero():
    assert log_depth(np.array([0, 65535], np.float32)).tolist() == [0, 1]
    flat = curvature(np.full((3, 1, 1), 127, np.float32)).flatten()
    assert flat.tolist() == pytest.approx([(127 - 123.572) / 31.922, (127 - 120.1) / 21.658])
    constant = occlusion(np.full((1, 9, 9), 409.6, np.float32))
    np.testing.assert_allclose(constant, 1, atol=1e-6)


def test_metres_survive_the_file_and_the_scale(tmp_path):
    metres = np.random.default_rng(0).uniform(0.1, 127, (8, 8))
    save_png(tmp_path / "a.png", np.round(512 * metres).astype(np.uint16))
    image = read_image(tmp_path / "a.png", Pixels.GREY16)
    target = log_depth(resize(image, (8, 8)).astype(np.float64))
    back = (np.exp(target[0] * math.log(65536)) - 1) / 512
    assert np.abs(back - metres).max() <= 0.5 / 512 + 1e-9
    assert (tmp_path / "a.png").read_bytes()[24] == 16  # the bit depth in the header


def test_resizing_is_bilinear_in_sixteen_bits_and_a_hole_spoils_what_it_goes_into(tmp_path):
    depth = np.full((8, 8), 1000, np.uint16)
    depth[:, 1::2] = 60000
    depth[0, 0] = 65535
    save_png(tmp_path / "a.png", depth)
    image = read_image(tmp_path / "a.png", Pixels.GREY16)
    half = resize(image, (4, 4))
    oracle = np.asarray(Image.fromarray(depth.astype(np.float32)).resize((4, 4), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(half[0], oracle, rtol=1e-6)
    assert half.max() > 256
    valid = validity(image, (4, 4))[0]
    assert valid[0, 0] == 0
    assert valid[2:, 2:].all()
    assert np.array_equal(validity(image, (8, 8))[0], depth != 65535)


def test_everything_is_resized_to_the_wanted_size(root):
    data = module(root, "de", size=(8, 12))
    sample = data.dataset("test")[0]
    assert sample["x"].shape == (3, 8, 12)
    assert sample["target"].shape == (2, 8, 12)
    rgb = Image.open(taskonomy_file(root, "rgb", "ihlen", 0)).resize((12, 8), Image.Resampling.BILINEAR)
    expected = 2 * torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255 - 1
    torch.testing.assert_close(sample["x"], expected)


@pytest.mark.parametrize(("task", "flip_normals", "sign"), [("n", True, -1), ("n", False, 1), ("r", True, 1)])
def test_training_mirrors_both_and_turns_x_of_normals_only(root, task, flip_normals, sign):
    train = module(root, task, flip_normals=flip_normals).dataset("train")
    plain, target = train.inputs(0)["x"], train.target(0)
    mirrored = 0
    for _ in range(30):
        sample = train[0]
        if torch.equal(sample["x"], plain):
            assert torch.equal(sample["target"], target)
        else:
            mirrored += 1
            assert torch.equal(sample["x"], plain.flip(-1))
            assert torch.equal(sample["target"][0], sign * target[0].flip(-1))
            assert torch.equal(sample["target"][1:], target[1:].flip(-1))
    assert 5 < mirrored < 25


def test_an_incomplete_view_is_dropped_from_all_tasks_and_reported(root):
    taskonomy_file(root, "edge_texture", "elm", 1).unlink()
    taskonomy_file(root, "rgb", "elm", 2).unlink()
    taskonomy_file(root, "normal", "elm", 2).unlink()
    with pytest.warns(UserWarning, match=r"2 views of 'train' are dropped.*rgb 1, edge_texture 1, normal 1"):
        data = module(root, "k2")
    assert data.dataset("train").ids[3:] == ["elm/point_0_view_0"]
    assert data.describe()["dropped"] == {"train": {"rgb": 1, "edge_texture": 1, "normal": 1, "views": 2}}
    # What is paired belongs together, although the names before it are gone.
    assert len({module(root, task).pool for task in ("k2", "n", "de")}) == 1


def test_the_join_may_be_of_one_task(root):
    for building in ("ash", "elm", "fir", "ihlen"):
        for view in range(3):
            taskonomy_file(root, "edge_texture", building, view).unlink()
    with pytest.raises(DataError, match=r"no view of 'train' is complete"), pytest.warns(UserWarning, match="dropped"):
        module(root, "n")
    assert len(module(root, "n", join="task").dataset("train")) == 6
    assert module(root, "n", join="task").pool != module(root, "de", join="task").pool
    with pytest.raises(ConfigError, match=r"join is 'none'"):
        module(root, join="none")


def test_another_count_than_the_papers_is_a_warning(root):
    class Counted(AnyTaskonomy):
        expected_counts = {"train": 6, "val": 35774}  # noqa: RUF012

    with pytest.warns(UserWarning, match=r"'val' has 3 views, the paper's 35774") as found:
        module(root, cls=Counted)
    assert not any("'train'" in str(w.message) for w in found)


def test_misplaced_and_missing_files_are_named(root):
    file = taskonomy_file(root, "depth_zbuffer", "ash", 0)
    file.rename(taskonomy_file(root, "depth_euclidean", "ash", 0).parent / file.name)
    with pytest.raises(DataError, match=r"depth_euclidean/.*domain_depth_zbuffer\.png is not named .*depth_euclidean"):
        module(root)
    for name in list((root / "rgb" / "taskonomy" / "fir").iterdir()):
        name.unlink()
    (root / "rgb" / "taskonomy" / "fir").rmdir()
    (taskonomy_file(root, "depth_euclidean", "ash", 0).parent / file.name).unlink()
    missing = r"building 'fir' is missing from the domain 'rgb'"
    with pytest.raises(DatasetNotFoundError, match=missing), pytest.warns(UserWarning, match="dropped"):
        module(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,train,val\nash,1,0\n", r"has the columns \['id', 'train', 'val'\]"),
        ("id,train,val,test\nash,1,0,1\n", r"line 2 .* is ash,1,0,1; expected .* exactly one"),
        ("id,train,val,test\nash,1,0,0\nash,0,1,0\n", r"line 3 .* expected a building, once"),
        ("id,train,val,test\nash,1,0,0\nfir,0,1,0\n", r"no test building 'ihlen'; it has none"),
        ("id,train,val,test\nihlen,0,0,1\nfir,0,1,0\n", r"no building for 'train'"),
    ],
)
def test_broken_split_files_are_named(root, text, message):
    (root / "splits_taskonomy" / "train_val_test_tiny.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        module(root)


def test_a_missing_split_file_is_said_where_to_find(root):
    (root / "splits_taskonomy" / "train_val_test_tiny.csv").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"train_val_test_tiny\.csv is missing.*splits_taskonomy\.zip"):
        module(root)


def test_wrong_files_are_named(root):
    file = taskonomy_file(root, "keypoints2d", "ash", 0)
    save_png(file, np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match=r"keypoints2d\.png .* mode L, expected 16-bit grey"):
        module(root, "k2")
    save_png(file, np.zeros((8, 16), np.uint16))
    with pytest.raises(DataError, match=r"keypoints2d\.png is 8 x 16 .* expected 16 x 16 as its image"):
        module(root, "k2")
    with pytest.raises(DataError, match=r"rgb\.png is 16 x 16 .* expected 512 x 512 as the data set's images"):
        TaskonomyDataModule("n", root).setup()
    broken = taskonomy_file(root, "normal", "elm", 2)
    broken.write_bytes(broken.read_bytes()[:150])
    data = module(root, "n")
    with pytest.raises(DataError, match=r"point_10_view_2_domain_normal\.png cannot be read"):
        data.dataset("train")[5]
    with pytest.raises(DataError, match=r"point_10_view_2_domain_normal\.png cannot be read"):
        module(root, "n", verify=True)


def test_what_is_recorded_is_json(root):
    record = module(root, "s25").describe()
    assert json.loads(json.dumps(record)) == record
    assert record["buildings"] == {"train": ["ash", "elm"], "val": ["fir"], "test": ["ihlen"]}
    assert record["counts"] == {"train": 6, "val": 3, "test": 3}
    assert record["normalization"] == "half"


def test_depth_reads_the_holes_of_the_zbuffer(root):
    read = []

    def file(name):
        read.append(name)
        return taskonomy_file(root, name, "ihlen", 0)

    read_target(DOMAINS["de"], file, SIZE, SIZE)
    assert read == ["depth_euclidean", "depth_zbuffer"]
    read.clear()
    read_target(DOMAINS["dz"], file, SIZE, SIZE)
    assert read == ["depth_zbuffer"]
