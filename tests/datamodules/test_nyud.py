import json
import pickle

import numpy as np
import pytest
import torch

from datamodules.dense.lists import list_hash
from datamodules.nyud import NYUDDataModule, write_halves
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError, OutputExistsError
from tests.fakes.dense_trees import nyud_tree, save_png, write_list

SIZE = (24, 32)


class AnyNYUD(NYUDDataModule):
    expected_hashes = None
    expected_counts = None
    expected_image_size = None


@pytest.fixture
def root(tmp_path):
    return nyud_tree(tmp_path / "NYUDv2")


def module(root, task="semseg", **options):
    data = AnyNYUD(task, root, size=SIZE, **options)
    data.setup()
    return data


def raw(root, folder, name):
    from PIL import Image

    return np.asarray(Image.open(root / folder / f"{name}.png")).astype(np.float32)


def middle(tensor):
    """Return the 21 x 28 pixels that are not padding: 1 row above, 2 below, 2 columns left and right."""
    return tensor[..., 1:22, 2:30]


def test_splits_follow_the_rule(root):
    data = module(root, split_seed=7)
    held_out = [f"{i:04d}" for i in range(5, 11)]
    order = np.random.default_rng(7).permutation(held_out).tolist()
    assert data.dataset("train").ids == ["0001", "0002", "0003", "0004"]
    assert data.dataset("val").ids == order[:3]
    assert data.dataset("test").ids == order[3:]
    # The order of the file does not matter.
    write_list(root / "gt_sets" / "val.txt", held_out[::-1])
    assert module(root, split_seed=7).dataset("val").ids == order[:3]
    assert module(root, split_seed=8).pool != data.pool
    assert module(root, "depth", split_seed=7).pool == data.pool


def test_the_image_is_normalised_and_padded(root):
    data = module(root).dataset("test")
    x = data[0]["x"]
    assert x.dtype == torch.float32
    assert x.shape == (3, *SIZE)
    pixels = torch.from_numpy(raw(root, "images", data.ids[0])).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(middle(x), (pixels - mean[:, None, None]) / std[:, None, None])
    assert (x[:, 0] == 0).all()
    assert (x[:, :, -2:] == 0).all()


def test_every_map_is_decoded_as_specified(root):
    name = module(root).dataset("test").ids[0]
    targets = {task: module(root, task).dataset("test").target(0) for task in NYUDDataModule.tasks}

    assert targets["semseg"].dtype == torch.int64
    labels = raw(root, "segmentation", name)
    assert middle(targets["semseg"]).tolist() == np.where(labels == 0, 255, labels - 1).astype(int).tolist()

    assert targets["depth"].dtype == torch.float32
    metres = np.load(root / "depth" / f"{name}.npy")
    assert (metres == 0).any()
    assert np.array_equal(middle(targets["depth"]).numpy(), np.where(metres == 0, np.float32(255), metres))

    assert targets["normal"].dtype == torch.float32
    normals = 2 * raw(root, "normals", name) / 255 - 1
    np.testing.assert_allclose(middle(targets["normal"]).permute(1, 2, 0).numpy(), normals, atol=1e-6)

    assert targets["edge"].dtype == torch.float32
    assert targets["edge"].shape == (2, *SIZE)
    assert np.array_equal(middle(targets["edge"])[0].numpy(), raw(root, "edge", name) / 255)
    assert set(middle(targets["edge"])[1].unique().tolist()) == {0, 1}

    for target in targets.values():
        border = target.clone()
        middle(border).fill_(255)
        assert (border == 255).all()


def test_training_edges_are_not_evaluated(root):
    target = module(root, "edge").dataset("train")[0]["target"]
    assert (target[1] == 255).all()
    assert set(target[0].unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize("task", NYUDDataModule.tasks)
def test_training_views_have_the_form_of_the_others(root, task):
    data = module(root, task)
    train, test = data.dataset("train"), data.dataset("test")
    seen = [train[0] for _ in range(3)]
    for sample in seen:
        assert sample["x"].shape == test[0]["x"].shape
        assert sample["target"].shape == test[0]["target"].shape
        assert sample["target"].dtype == test[0]["target"].dtype
    assert not torch.equal(seen[0]["x"], seen[1]["x"])
    # Read apart, they are the plain view, always.
    assert torch.equal(train.inputs(0)["x"], train.inputs(0)["x"])
    assert torch.equal(module(root, task).dataset("train")[0]["x"], seen[0]["x"])
    assert not torch.equal(module(root, task, seed=1).dataset("train")[0]["x"], seen[0]["x"])


def test_training_views_stay_in_range(root):
    train = {task: module(root, task).dataset("train") for task in ("semseg", "normal", "depth")}
    for _ in range(5):
        classes, normals, depth = (data[1]["target"] for data in train.values())
        assert set(classes.unique().tolist()) <= {0, 1, 16, 39, 255}
        counted = normals[normals != 255]
        assert counted.abs().max() <= 1
        metres = depth[depth != 255]
        assert metres.min() >= 0.5 / 2
        assert metres.max() <= 9.5 * 2


def test_frames_of_full_size_become_the_papers(tmp_path):
    class Sized(AnyNYUD):
        expected_image_size = NYUDDataModule.expected_image_size

    root = nyud_tree(tmp_path / "full", train=1, held_out=2, size=(425, 560))
    data = Sized("normal", root)
    data.setup()
    for sample in (data.dataset("train")[0], data.dataset("test")[0]):
        assert sample["x"].shape == sample["target"].shape == (3, 448, 576)
    ignored = (data.dataset("test").target(0) == 255).all(0)
    assert not ignored[11:436, 8:568].any()
    assert ignored.sum() == 448 * 576 - 425 * 560


def test_batches_and_unlabelled_batches(root):
    data = module(root, "depth", batch_size=2, eval_batch_size=2)
    pickle.dumps(data.dataset("train"))  # loader processes that are spawned get a copy
    assert next(iter(data.train_dataloader()))["target"].shape == (2, *SIZE)
    assert [len(batch["x"]) for batch in data.test_dataloader()] == [2, 1]
    assert set(data.unlabelled("val")[0]) == {"x"}


def test_what_is_recorded_is_json(root):
    record = module(root, "edge", split_seed=3).describe()
    assert json.loads(json.dumps(record)) == record
    assert record["data"] == "NYUD-v2"
    assert record["split_seed"] == 3
    assert record["counts"] == {"train": 4, "val": 3, "test": 3}
    assert record["lists"]["train"] == list_hash(["0001", "0002", "0003", "0004"])
    assert record["augmentation"]["scale"] == [0.5, 2.0]


def test_the_published_data_are_recognised(root):
    with pytest.raises(DatasetNotFoundError, match=r"train\.txt holds 4 ids, the published list 795"):
        NYUDDataModule("semseg", root).setup()
    write_list(root / "gt_sets" / "train.txt", [f"{i:04d}" for i in range(795)])
    write_list(root / "gt_sets" / "val.txt", [f"{i:04d}" for i in range(795, 1449)])
    with pytest.raises(DatasetNotFoundError, match=r"val\.txt have SHA-256 .* starts with 36252ced686579ae"):
        NYUDDataModule("semseg", root).setup()


def test_images_of_another_size_are_named(root):
    class Sized(AnyNYUD):
        expected_image_size = (425, 560)

    with pytest.raises(DataError, match=r"0001\.png is 21 x 28 .* expected 425 x 560 as the data set's images"):
        Sized("semseg", root).setup()
    with pytest.raises(DataError, match=r"is 21 x 28 .*larger than the 16 x 32 that evaluation pads to.*size"):
        AnyNYUD("semseg", root, size=(16, 32)).setup()


def test_other_distributions_are_named(root):
    for file in (root / "images").iterdir():
        file.rename(file.with_suffix(".jpg"))
    with pytest.raises(DatasetNotFoundError, match=r"MTI-Net.*NYUDv2\.tar\.gz"):
        module(root)
    for file in (root / "segmentation").iterdir():
        file.rename(file.with_suffix(".mat"))
    with pytest.raises(DatasetNotFoundError, match=r"ASTMT.*41 classes"):
        module(root)


def test_missing_files_and_ids_are_named_before_anything_is_read(root):
    (root / "normals" / "0006.png").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 of 6 ids of gt_sets/val\.txt.*lacks normals/0006\.png"):
        module(root)
    write_list(root / "gt_sets" / "train.txt", ["0001", "9999"])
    with pytest.raises(DatasetNotFoundError, match=r"1 of 2 ids of gt_sets/train\.txt.*images/9999\.png"):
        module(root)
    write_list(root / "gt_sets" / "train.txt", ["0001", "0005"])
    with pytest.raises(DataError, match=r"'0005' is in both gt_sets/train\.txt and gt_sets/val\.txt"):
        module(root)
    with pytest.raises(DatasetNotFoundError, match=r"there is no folder .*nowhere.*root"):
        module(root / "nowhere")


def test_labels_out_of_range_are_named(root):
    bad = np.full((21, 28), 41, np.uint8)
    save_png(root / "segmentation" / "0001.png", bad)
    with pytest.raises(DataError, match=r"segmentation/0001\.png holds the label 41; expected 0 .* to 40"):
        module(root)
    save_png(root / "edge" / "0001.png", bad)
    with pytest.raises(DataError, match=r"edge/0001\.png holds the value 41"):
        module(root, "edge")
    for value in (np.nan, -1.0, 2500.0):
        np.save(root / "depth" / "0001.npy", np.full((21, 28), value, np.float32))
        with pytest.raises(DataError, match=r"depth/0001\.npy holds depths from .* expected finite metres"):
            module(root, "depth")
    np.save(root / "depth" / "0001.npy", np.ones((28, 21), np.float32))
    with pytest.raises(DataError, match=r"depth/0001\.npy is 28 x 21 .* expected 21 x 28 as its image"):
        module(root, "depth")


def test_a_file_broken_deep_inside_is_found_when_asked_for(root):
    file = root / "images" / "0003.png"
    file.write_bytes(file.read_bytes()[:200])
    data = module(root)
    with pytest.raises(DataError, match=r"0003\.png cannot be read"):
        data.dataset("train")[2]
    with pytest.raises(DataError, match=r"0003\.png cannot be read"):
        module(root, verify=True)


def test_options_out_of_range_are_named(root):
    with pytest.raises(ConfigError, match=r"NYUD-v2 has no task 'normals'; did you mean 'normal'\?.*Known: semseg"):
        module(root, "normals")
    with pytest.raises(ConfigError, match=r"no task 'parts'"):
        module(root, "parts")
    with pytest.raises(ConfigError, match=r"seed is -1"):
        module(root, seed=-1)
    with pytest.raises(ConfigError, match=r"split_seed is -1"):
        module(root, split_seed=-1)
    with pytest.raises(ConfigError, match=r"size is \(0, 3\)"):
        AnyNYUD("semseg", root, size=(0, 3))
    with pytest.raises(ConfigError, match=r"not read yet; call setup"):
        AnyNYUD("semseg", root).dataset("val")


def test_the_halves_can_be_written_and_are_never_overwritten(root, tmp_path):
    write_halves(root, tmp_path / "out", split_seed=7)
    data = module(root, split_seed=7)
    assert (tmp_path / "out" / "val_nsc.txt").read_text().split() == data.dataset("val").ids
    assert (tmp_path / "out" / "test_nsc.txt").read_text().split() == data.dataset("test").ids
    assert (tmp_path / "out" / "nsc_split_seed.txt").read_text() == "7\n"
    with pytest.raises(OutputExistsError, match=r"val_nsc\.txt is there already"):
        write_halves(root, tmp_path / "out")
