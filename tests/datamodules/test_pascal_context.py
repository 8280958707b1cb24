import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from datamodules.dense.context import HUMAN_PARTS, NORMAL_CATEGORIES
from datamodules.pascal_context import PascalContextDataModule
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError
from tests.fakes.dense_trees import pascal_tree, save_parts, save_png, write_list

SIZE = (32, 32)
TRAIN, VAL, TEST = ([f"2008_{i:06d}" for i in numbers] for numbers in (range(5), range(5, 9), range(9, 12)))


class AnyPascal(PascalContextDataModule):
    expected_hashes = None
    expected_counts = None


@pytest.fixture
def root(tmp_path):
    return pascal_tree(tmp_path / "PASCALContext")


def module(root, task="semseg", **options):
    data = AnyPascal(task, root, size=SIZE, **options)
    data.setup()
    return data


def inside(tensor, height, width):
    """Return what is not padding."""
    top, left = (32 - height) // 2, (32 - width) // 2
    return tensor[..., top : top + height, left : left + width]


def test_splits_are_the_lists(root):
    data = module(root)
    assert [data.dataset(split).ids for split in ("train", "val", "test")] == [TRAIN, VAL, TEST]


def test_every_map_is_decoded_as_specified(root):
    first = TEST[0]  # number 9: a picture of 20 x 30, without people, its semantic map under pascal-context
    targets = {task: module(root, task).dataset("test").target(0) for task in ("semseg", "saliency", "normal", "edge")}
    labels = loadmat(root / "pascal-context" / "trainval" / f"{first}.mat")["LabelMap"]
    assert labels.shape == (20, 30)

    semseg = np.asarray(Image.open(root / "semseg" / "pascal-context" / f"{first}.png"))
    assert targets["semseg"].dtype == torch.int64
    assert np.array_equal(inside(targets["semseg"], 20, 30).numpy(), semseg)

    grey = np.asarray(Image.open(root / "sal_distill" / f"{first}.png"))
    assert targets["saliency"].dtype == torch.int64
    assert np.array_equal(inside(targets["saliency"], 20, 30).numpy(), grey / 255 > 0.5)

    pixels = np.asarray(Image.open(root / "normals_distill" / f"{first}.png")).astype(np.float32)
    expected = np.where(np.isin(labels, (9, 284))[..., None], 2 * pixels / 255 - 1, 255)
    np.testing.assert_allclose(inside(targets["normal"], 20, 30).permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert (expected == 255).any()

    assert targets["edge"].shape == (2, *SIZE)
    for channel in inside(targets["edge"], 20, 30):
        assert set(channel.unique().tolist()) == {0, 1}
    for target in targets.values():
        border = target.clone()
        inside(border, 20, 30).fill_(255)
        assert (border == 255).all()


def test_semantic_maps_of_voc_come_first(root):
    name = TEST[0]
    save_png(root / "semseg" / "VOC12" / f"{name}.png", np.full((20, 30), 15, np.uint8))
    assert (inside(module(root).dataset("test").target(0), 20, 30) == 15).all()


def test_palette_images_are_read_by_index(root):
    file = root / "semseg" / "pascal-context" / f"{TEST[0]}.png"
    image = Image.fromarray(np.full((20, 30), 7, np.uint8), "L").convert("P")
    image.putpalette([255 - i // 3 for i in range(768)])
    image.save(file)
    assert (inside(module(root).dataset("test").target(0), 20, 30) == 7).all()


def test_parts_sees_people_only_and_knows_their_parts(root):
    data = module(root, "parts")
    assert [data.dataset(split).ids for split in ("train", "val", "test")] == [TRAIN[::2], VAL[1::2], TEST[1::2]]
    target = data.dataset("train").target(0)
    parts = inside(target, 20, 30)
    expected = torch.zeros(20, 30, dtype=torch.int64)
    expected[2:6, 3:8], expected[5:12, 4:6] = 1, 4  # hair is head, the later lower arm lies over it
    assert torch.equal(parts, expected)
    assert data.describe()["dropped"] == {
        "train": {"without people": 2},
        "val": {"without people": 2},
        "test": {"without people": 2},
    }


def test_pools(root):
    semseg, edge, parts = (module(root, task) for task in ("semseg", "edge", "parts"))
    assert semseg.pool == edge.pool != parts.pool


def test_the_list_of_people_is_believed_where_it_is_complete(root):
    folder = root / "ImageSets" / "Parts"
    folder.mkdir()
    (folder / "train.txt").write_text(json.dumps({i: [15] if i == TRAIN[2] else [7, -1] for i in TRAIN}))
    assert module(root, "parts").dataset("train").ids == [TRAIN[2]]
    (folder / "train.txt").write_text(json.dumps({i: [7] for i in TRAIN[1:]}))  # made for another list
    assert module(root, "parts").dataset("train").ids == TRAIN[::2]
    (folder / "val.txt").write_text(json.dumps({i: [15] for i in VAL + TEST}))  # the official list covers both
    assert module(root, "parts").dataset("val").ids == VAL
    (folder / "train.txt").write_text("{")
    with pytest.raises(DataError, match=r"Parts/train\.txt is not JSON.*Delete it"):
        module(root, "parts")


def test_people_without_area_or_parts(root):
    size, empty, full = (20, 30), np.zeros((20, 30), bool), np.ones((20, 30), bool)
    save_parts(root / "human_parts" / f"{TRAIN[0]}.mat", [(15, empty, [])])
    assert module(root, "parts").dataset("train").ids == TRAIN[2::2]
    save_parts(root / "human_parts" / f"{TRAIN[0]}.mat", [(15, full, [])])
    data = module(root, "parts").dataset("train")
    assert data.ids == TRAIN[::2]
    assert (inside(data.target(0), *size) == 255).all()  # nobody annotated them
    save_parts(root / "human_parts" / f"{TRAIN[0]}.mat", [])
    assert module(root, "parts").dataset("train").ids == TRAIN[2::2]
    for name in TRAIN:
        save_parts(root / "human_parts" / f"{name}.mat", [])
    with pytest.raises(DataError, match=r"none of the 5 images of 'train' shows a person"):
        module(root, "parts")


def test_the_groups_and_categories_are_the_familys():
    assert len(NORMAL_CATEGORIES) == 170
    assert {9, 284, 427} < NORMAL_CATEGORIES  # bag, person, tvmonitor
    assert not {1, 2, 360, 431} & NORMAL_CATEGORIES  # accordion, aeroplane, sky, unknown
    assert len(HUMAN_PARTS) == 24
    assert sorted(HUMAN_PARTS.values()) == [1] * 10 + [2] * 2 + [3] * 2 + [4] * 4 + [5] * 2 + [6] * 4


@pytest.mark.parametrize("task", PascalContextDataModule.tasks)
def test_training_views_have_the_form_of_the_others(root, task):
    data = module(root, task, batch_size=3)
    train, test = data.dataset("train"), data.dataset("test")
    for _ in range(3):
        sample = train[1]
        assert sample["x"].shape == (3, *SIZE)
        assert sample["target"].shape == test[0]["target"].shape
        assert sample["target"].dtype == test[0]["target"].dtype
    assert next(iter(data.train_dataloader()))["x"].shape == (3, 3, *SIZE)
    pickle.dumps(train)  # loader processes that are spawned get a copy
    assert json.loads(json.dumps(data.describe())) == data.describe()


def test_the_published_data_are_recognised(root):
    with pytest.raises(DatasetNotFoundError, match=r"train\.txt holds 5 ids, the published list 4998"):
        PascalContextDataModule("edge", root).setup()

    class Hashes(AnyPascal):
        expected_hashes = PascalContextDataModule.expected_hashes

    with pytest.raises(DatasetNotFoundError, match=r"train\.txt have SHA-256 .* starts with b5a02b12bee56b77"):
        Hashes("edge", root).setup()


def test_lists_that_the_archive_lacks_are_said_where_to_find(root):
    (root / "ImageSets" / "Context" / "val_new.txt").unlink()

    class Named(PascalContextDataModule):
        expected_counts = {"val_new": 2607}  # noqa: RUF012
        expected_hashes = {"val_new": "1ec527835c902925"}  # noqa: RUF012

    with pytest.raises(DatasetNotFoundError, match=r"val_new\.txt is missing.*2607 ids.*1ec527835c902925.*SEISM"):
        Named("edge", root).setup()


def test_every_id_must_have_every_file_whatever_the_task(root):
    (root / "sal_distill" / f"{VAL[0]}.png").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 of 4 ids of .*val_new\.txt.*sal_distill/2008_000005\.png"):
        module(root, "edge")
    write_list(root / "ImageSets" / "Context" / "val_new.txt", ["2007_000001"])
    with pytest.raises(DatasetNotFoundError, match=r"1 of 1 ids of .*val_new\.txt.*JPEGImages/2007_000001\.jpg"):
        module(root)
    semantic = next(
        folder for folder in ("VOC12", "pascal-context") if (root / "semseg" / folder / f"{TRAIN[0]}.png").is_file()
    )
    (root / "semseg" / semantic / f"{TRAIN[0]}.png").unlink()
    write_list(root / "ImageSets" / "Context" / "val_new.txt", VAL[1:])
    with pytest.raises(DatasetNotFoundError, match=r"semseg/VOC12/2008_000000\.png or semseg/pascal-context/"):
        module(root)


def test_labels_out_of_range_or_shape_are_named(root):
    name = TRAIN[0]
    save_png(root / "semseg" / "VOC12" / f"{name}.png", np.full((20, 30), 21, np.uint8))
    with pytest.raises(DataError, match=r"2008_000000\.png holds the label 21; expected 0 to 20, or 255"):
        module(root)
    save_png(root / "sal_distill" / f"{name}.png", np.zeros((30, 20), np.uint8))
    with pytest.raises(DataError, match=r"sal_distill/2008_000000\.png is 30 x 20 .* expected 20 x 30 as its image"):
        module(root, "saliency")
    file = root / "pascal-context" / "trainval" / f"{name}.mat"
    savemat(file, {"LabelMap": np.full((20, 30), 460, np.uint16)})
    with pytest.raises(DataError, match=r"LabelMap holds 460 to 460; expected 0 to 459"):
        module(root, "edge")
    savemat(file, {"LabelMap": np.full((20, 30), 1.5)})
    with pytest.raises(DataError, match=r"LabelMap is float64 .*expected integers"):
        module(root, "edge")
    savemat(file, {"Other": np.zeros((20, 30))})
    with pytest.raises(DataError, match=r"has no variable 'LabelMap'"):
        module(root, "normal")
    save_png(root / "normals_distill" / f"{name}.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(DataError, match=r"normals_distill/2008_000000\.png .* mode L, expected 8-bit RGB"):
        module(root, "normal")


def test_broken_part_files_are_named(root):
    file, mask = root / "human_parts" / f"{TRAIN[0]}.mat", np.ones((20, 30), bool)
    save_parts(file, [(15, mask, [("wing", mask)])])
    with pytest.raises(DataError, match=r"a person has a part 'wing'; known: head"):
        module(root, "parts")
    save_parts(file, [(15, mask, [("head", mask[:10])])])
    with pytest.raises(DataError, match=r"2008_000000\.mat is 10 x 30 .* expected 20 x 30"):
        module(root, "parts")
    savemat(file, {"anno": np.zeros((2, 2))})
    with pytest.raises(DataError, match=r"anno is not a struct"):
        module(root, "parts")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"2008_000000\.mat cannot be read"):
        module(root, "parts")


def test_a_task_of_another_data_set(root):
    with pytest.raises(ConfigError, match=r"PASCAL-Context has no task 'depth'.*Known: semseg, parts"):
        module(root, "depth")
