"""The twenty image sets: the published table, labels of every kind, splits, images."""

import io

import pytest
import torch
from datasets import ClassLabel, Dataset, disable_progress_bars
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import random_split
from transformers import CLIPImageProcessorPil

from datamodules.clip import CLIP_TASKS, CLIPDataModule
from datamodules.sources import open_source
from datamodules.twins.clip import write_clip
from datamodules.twins.models import write_clip as write_model
from datamodules.twins.pictures import draw, png
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError

#: Key, hub id, configuration and number of classes, as the protocol lists them.
TABLE = """
sun397 tanganke/sun397 - 397
stanford-cars tanganke/stanford_cars - 196
resisc45 tanganke/resisc45 - 45
eurosat tanganke/eurosat - 10
svhn ufldl-stanford/svhn cropped_digits 10
gtsrb tanganke/gtsrb - 43
mnist ylecun/mnist - 10
dtd tanganke/dtd - 47
oxford_flowers102 dpdl-benchmark/oxford_flowers102 - 102
pcam 1aurent/PatchCamelyon - 2
fer2013 clip-benchmark/wds_fer2013 - 7
oxford-iiit-pet timm/oxford-iiit-pet - 37
stl10 tanganke/stl10 - 10
cifar100 tanganke/cifar100 - 100
cifar10 tanganke/cifar10 - 10
food101 ethz/food101 - 101
fashion_mnist zalando-datasets/fashion_mnist - 10
emnist_letters tanganke/emnist_letters - 26
kmnist tanganke/kmnist - 10
rendered-sst2 nateraw/rendered-sst2 - 2
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        yield str(write_model(root / "base")), write_clip(root / "data", rows=10)["mnist"].parent


def opened(folders, task, source=None, **options):
    module = CLIPDataModule(task, folders[0], str(source or folders[1] / task), **options)
    module.setup()
    return module


def test_the_table():
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert [row[0] for row in rows] == list(CLIP_TASKS)
    for key, hub, config, classes in rows:
        task = CLIP_TASKS[key]
        assert (task.place.id, task.place.config or "-", task.classes) == (hub, config, int(classes))
        assert task.scored[0] == ("validation" if key == "food101" else "test")


@pytest.mark.parametrize("task", CLIP_TASKS)
def test_samples_of_every_set(folders, task):
    module = opened(folders, task)
    classes = CLIP_TASKS[task].classes
    used = {0, classes // 3, 2 * classes // 3, classes - 1}
    for split, size in (("train", 18), ("val", 2), ("test", 10)):
        dataset = module.dataset(split)
        assert len(dataset) == size
        for i in range(size):
            sample = dataset[i]
            assert sample["pixel_values"].shape == (3, 32, 32)
            assert sample["pixel_values"].dtype == torch.float32
            assert sample["target"].dtype == torch.int64
            assert sample["target"].ndim == 0
            assert int(sample["target"]) in used
    assert module.unlabelled("val")[0].keys() == {"pixel_values"}
    batch = next(iter(module.test_dataloader()))
    assert batch["target"].shape == (10,)
    assert module.describe()["data"].startswith("stand-in")


def test_colour_is_class_whatever_the_order_of_numbered_folders(folders, tmp_path):
    for split in ("train", "test"):
        for label in (0, 2, 10, 11):  # in the order of text: 0, 10, 11, 2
            (tmp_path / split / str(label)).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (32, 32), (10 * label, 0, 0)).save(tmp_path / split / str(label) / f"{i}.png")
    module = opened(folders, "emnist_letters", tmp_path)
    transform = module._transform
    for split in ("train", "val", "test"):
        for sample in (module.dataset(split)[i] for i in range(len(module.dataset(split)))):
            red = sample["pixel_values"][0, 0, 0] * transform.std[0] + transform.mean[0]
            assert round(float(red) * 255) == 10 * int(sample["target"])


def test_named_folders_are_counted_in_the_order_of_their_names(folders, tmp_path):
    for split in ("train", "test"):
        for name in ("negative", "positive"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                draw("red" if name == "positive" else "blue").save(tmp_path / split / name / f"{i}.png")
    assert opened(folders, "rendered-sst2", tmp_path).dataset("test").labels.tolist() == [0] * 6 + [1] * 6
    with pytest.raises(DataError, match=r"names 2 classes \(negative, positive, \.\.\.\); expected 7"):
        opened(folders, "fer2013", tmp_path).dataset("test")


def table(path, labels, split, label="label", names=None):
    pictures = [{"bytes": png(draw("red")), "path": None} for _ in labels]
    data = Dataset.from_dict({"image": pictures, label: labels}).cast_column("image", ImageColumn())
    if names:
        data = data.cast_column(label, ClassLabel(names=names))
    data.to_parquet(str(path / f"{split}.parquet"))


def test_validation_is_the_end_of_a_random_split_of_train(folders, tmp_path):
    labels = [i % 10 for i in range(57)]
    table(tmp_path, labels, "train")
    table(tmp_path, labels[:10], "test")
    rest, val = random_split(range(57), [52, 5], generator=torch.Generator().manual_seed(0))
    module = opened(folders, "cifar10", tmp_path)
    assert module.dataset("train").labels.tolist() == [labels[i] for i in rest]
    assert module.dataset("val").labels.tolist() == [labels[i] for i in val]
    assert len(opened(folders, "cifar10", tmp_path, val_max=3).dataset("val")) == 3
    assert len(opened(folders, "cifar10", tmp_path, val_fraction=0.5).dataset("val")) == 28


def test_a_published_validation_split_is_taken_and_train_left_whole(folders, tmp_path):
    for split, rows in (("train", 30), ("valid", 7), ("test", 11)):
        table(tmp_path, [bool(i % 2) for i in range(rows)], split)
    module = opened(folders, "pcam", tmp_path)
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [30, 7, 11]


def test_what_food101_publishes_as_validation_is_its_test_split(folders, tmp_path):
    table(tmp_path, list(range(30)), "train")
    table(tmp_path, list(range(9)), "validation")
    module = opened(folders, "food101", tmp_path)
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [27, 3, 9]


@pytest.mark.parametrize("labels", [[0, 7], [0, -1], ["0", "cat"], [0, None]])
def test_labels_that_are_no_class_are_named(folders, tmp_path, labels):
    table(tmp_path, labels, "test")
    with pytest.raises(DataError, match=r"fer2013: .*row 1: its label is .*; expected 0 to 6"):
        opened(folders, "fer2013", tmp_path).dataset("test")


def test_images_are_those_of_the_processor(folders):
    module = opened(folders, "svhn")
    row = module.dataset("test").table[3]["image"]
    expected = CLIPImageProcessorPil.from_pretrained(folders[0])(
        images=Image.open(io.BytesIO(row["bytes"])), return_tensors="pt"
    )["pixel_values"][0].float()
    torch.testing.assert_close(module.dataset("test")[3]["pixel_values"], expected, rtol=0, atol=2e-6)


def test_bad_input_is_named(folders, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no image data set 'imagenet'"):
        CLIPDataModule("imagenet")
    with pytest.raises(ConfigError, match=r"val_fraction is 1\.5"):
        CLIPDataModule("svhn", val_fraction=1.5)
    with pytest.raises(ConfigError, match="call setup"):
        CLIPDataModule("svhn", folders[0], str(folders[1] / "svhn")).dataset("test")
    with pytest.raises(DatasetNotFoundError, match="no folder"):
        opened((str(tmp_path / "no"), folders[1]), "svhn")
    with pytest.raises(DatasetNotFoundError, match="is not there"):
        opened(folders, "svhn", tmp_path / "nowhere")
    for digit in "01":
        (tmp_path / "test" / digit).mkdir(parents=True)
        (tmp_path / "test" / digit / "a.png").write_bytes(png(draw("red"))[:50])
    with pytest.raises(DataError, match=r"mnist: .*row 0: .*a\.png cannot be decoded"):
        opened(folders, "mnist", tmp_path).dataset("test")[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetNotFoundError, match=r"(?s)svhn cannot be had from the hub.*columns image"):
        open_source(CLIPDataModule("svhn").spec)
