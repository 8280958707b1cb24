"""Trees on disk: names, modes, ranges, lists, structs; rendered once, whole or not at all, the same by any pool."""

import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from datamodules.scenes.labels import context_categories
from datamodules.scenes.nyud import NYUDTree
from datamodules.scenes.nyud import write_frame as write_nyud
from datamodules.scenes.pascal import NUMBER, PascalTree, annotation
from datamodules.scenes.rendering import render
from datamodules.scenes.taskonomy import TaskonomyTree
from datamodules.scenes.views import draw_frame
from nscmerge.errors import ConfigError

DOMAINS_16 = ("depth_euclidean", "depth_zbuffer", "edge_occlusion", "edge_texture", "keypoints2d", "keypoints3d")
DOMAINS_RGB = ("rgb", "normal", "principal_curvature", "reshading")
DOMAINS_GREY = ("segment_unsup2d", "segment_unsup25d")


def contents(root):
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def pixels(path):
    with Image.open(path) as image:
        return image.mode, np.array(image)


def test_the_nyud_tree(tmp_path):
    root = render(NYUDTree(3, 2, (32, 40)), tmp_path / "tree", workers=1)
    assert (root / "gt_sets/train.txt").read_text() == "0001\n0002\n0003\n"
    assert (root / "gt_sets/val.txt").read_text() == "0004\n0005\n"
    assert len(contents(root)) == 5 * 5 + 2
    for unit in range(5):
        name = f"{unit + 1:04d}"
        modes = {
            folder: pixels(root / folder / f"{name}.png") for folder in ("images", "segmentation", "normals", "edge")
        }
        assert {folder: mode for folder, (mode, _) in modes.items()} == {
            "images": "RGB",
            "segmentation": "L",
            "normals": "RGB",
            "edge": "L",
        }
        assert all(values.shape[:2] == (32, 40) for _, values in modes.values())
        assert modes["segmentation"][1].min() >= 1
        assert modes["segmentation"][1].max() <= 40
        assert set(np.unique(modes["edge"][1])) == {0, 255}
        normal = modes["normals"][1] / 127.5 - 1
        np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=0.01)
        assert (normal[..., 2] > -0.7).all()
        depth = np.load(root / "depth" / f"{name}.npy")
        assert depth.dtype == np.float32
        assert (depth == 0).tolist() == draw_frame((1, unit), 0, (32, 40)).hole.tolist()
        assert depth.max() < 12


def test_nyud_has_no_more_ids():
    with pytest.raises(ConfigError, match=r"1400 \+ 50 images.*1449"):
        NYUDTree(1400, 50)


def test_real_sized_frames_can_be_written(tmp_path):
    write_nyud(tmp_path, "0001", draw_frame((1, 0), 0, (425, 560)))
    assert pixels(tmp_path / "images/0001.png")[1].shape == (425, 560, 3)


def test_the_pascal_tree(tmp_path):
    root = render(PascalTree(4, 2, 2, (40, 32)), tmp_path / "tree", workers=1)
    lists = {
        s: (root / f"ImageSets/Context/{s}.txt").read_text().split() for s in ("train", "val", "val_new", "test_new")
    }
    assert lists["val"] == lists["val_new"] + lists["test_new"]
    assert [len(v) for v in lists.values()] == [4, 4, 2, 2]
    for unit, name in enumerate(lists["train"] + lists["val"]):
        frame = draw_frame((NUMBER, unit), 0, (40, 32))
        with Image.open(root / f"JPEGImages/{name}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 40))
        folder = "VOC12" if unit % 2 == 0 else "pascal-context"
        mode, classes = pixels(root / f"semseg/{folder}/{name}.png")
        assert mode == "L"
        assert set(np.unique(classes)) <= {*range(21), 255}
        assert (unit % 2 == 1) <= (255 not in classes)
        labels = loadmat(root / f"pascal-context/trainval/{name}.mat")["LabelMap"]
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, context_categories(frame))
        mode, saliency = pixels(root / f"sal_distill/{name}.png")
        assert mode == "L"
        assert set(np.unique(saliency)) <= {0, 255}
        assert pixels(root / f"normals_distill/{name}.png")[0] == "RGB"
    assert any(255 in pixels(file)[1] for file in (root / "semseg/VOC12").iterdir())


def test_sizes_vary_and_some_stand_upright():
    sizes = [draw_frame((NUMBER, unit), 0, None).size for unit in range(8)]
    assert len(set(sizes)) > 4
    assert any(h > w for h, w in sizes)
    assert any(w > h for h, w in sizes)


def test_the_annotation_reads_as_the_real_ones_do(tmp_path):
    root = render(PascalTree(6, 1, 1), tmp_path / "tree", workers=1)
    groups, seen = {}, 0
    for split in ("train", "val", "val_new", "test_new"):
        groups |= json.loads((root / f"ImageSets/Parts/{split}.txt").read_text())
    for unit, name in enumerate(sorted(groups)):
        frame = draw_frame((NUMBER, unit), 0, None)
        anno = loadmat(root / f"human_parts/{name}.mat")["anno"]
        # Indices as in the loaders of ASTMT and its children.
        assert anno[0][0][0].item() == name
        objects = anno[0][0][1]
        assert groups[name] == [one[1].item() for one in objects.ravel()]
        voc = np.array([s.labels.voc for s in frame.scene.solids])[frame.solid]
        covered = np.zeros(frame.size, bool)
        for number in range(objects.size):
            kind, index, mask, parts = objects[0][number]
            assert set(voc[mask == 1]) == {index[0][0]}
            covered |= mask == 1
            if index.item() != 15:
                assert parts.shape == (0, 0)
                continue
            seen += 1
            assert kind.item() == "person"
            joined = np.zeros(frame.size, int)
            for position in range(len(parts[0])):
                part, where = parts[0][position][0][0], parts[0][position][1]
                expected = np.array([s.part == part for s in frame.scene.solids])[frame.solid] & (mask == 1)
                np.testing.assert_array_equal(where.astype(bool), expected)
                joined += where
            np.testing.assert_array_equal(joined, mask)
        np.testing.assert_array_equal(covered, voc > 0)
    assert seen > 1


def test_an_image_without_objects_has_an_empty_list(tmp_path):
    frame = next(
        f
        for f in (draw_frame((9, n), 0, (16, 20), people=0) for n in range(40))
        if not f.table([s.labels.voc for s in f.scene.solids]).any()
    )
    assert annotation("empty", frame)["objects"][0, 0].shape == (0, 0)


def test_the_taskonomy_tree(tmp_path):
    root = render(TaskonomyTree(1, 1, 1, views=2, size=(48, 48), incomplete=True), tmp_path / "tree", workers=1)
    csv = (root / "splits_taskonomy/train_val_test_tiny.csv").read_text()
    assert csv == "id,train,val,test\nsynth000,1,0,0\nsynth001,0,1,0\nsynth002,0,0,1\n"
    assert len(contents(root)) == 3 * 2 * 12 - 1 + 1
    assert not (root / "edge_texture/taskonomy/synth000/point_0_view_0_domain_edge_texture.png").exists()

    def read(domain):
        return pixels(root / domain / "taskonomy/synth001" / f"point_0_view_1_domain_{domain}.png")

    maps = {domain: read(domain) for domain in (*DOMAINS_16, *DOMAINS_RGB, *DOMAINS_GREY)}
    assert all(maps[d][0] == "I;16" and maps[d][1].shape == (48, 48) for d in DOMAINS_16)
    assert all(maps[d][0] == "RGB" and maps[d][1].shape == (48, 48, 3) for d in DOMAINS_RGB)
    assert all(maps[d][0] == "L" for d in DOMAINS_GREY)
    z, euclidean = (maps[d][1].astype(int) for d in ("depth_zbuffer", "depth_euclidean"))
    known = z < 65535
    assert (euclidean[known] >= z[known]).all()
    assert z[known].max() < 12 * 512
    normal = maps["normal"][1][known] / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=0.01)
    assert (maps["principal_curvature"][1][..., 2] == 0).all()
    reshading = maps["reshading"][1]
    assert (reshading == reshading[..., :1]).all()


def test_odd_numbers_of_views_are_refused():
    with pytest.raises(ConfigError, match=r"3 views per building.*multiple of 2"):
        TaskonomyTree(views=3)


class Together:
    """Several trees as one, so that one pool renders all; found by the workers under this module's name."""

    name = "together"

    def __init__(self, *trees):
        self.trees = trees
        self.pieces = [(tree, unit) for tree in trees for unit in range(tree.units)]
        self.units = len(self.pieces)

    def write(self, root, unit):
        tree, own = self.pieces[unit]
        tree.write(root / tree.name, own)

    def finish(self, root):
        for tree in self.trees:
            tree.finish(root / tree.name)


def test_the_bytes_do_not_depend_on_the_pool(tmp_path):
    trees = Together(NYUDTree(3, 1, (24, 32)), PascalTree(2, 1, 1, (24, 32)), TaskonomyTree(1, 1, 1, 2, (24, 24)))
    assert trees.units == 11
    alone, pooled = (render(trees, tmp_path / str(n), workers=n) for n in (1, 2))
    assert contents(alone) == contents(pooled)
    assert len(contents(alone)) == (4 * 5 + 2) + (4 * 6 + 8) + (6 * 12 + 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_names_tell_trees_apart():
    trees = [
        NYUDTree(),
        NYUDTree(seed=1),
        NYUDTree(train=10),
        NYUDTree(size=(20, 30)),
        PascalTree(),
        PascalTree(size=(20, 30)),
        TaskonomyTree(),
        TaskonomyTree(incomplete=True),
        TaskonomyTree(views=8),
    ]
    assert len({tree.name for tree in trees}) == len(trees)
    assert all(tree.name.startswith("synth_") for tree in trees)


class Counted:
    """Writes its piece's number; fails at one piece; can be overtaken by another process."""

    name, units = "counted", 3

    def __init__(self, fails_at=None, rival=None):
        self.fails_at, self.rival, self.written = fails_at, rival, []

    def write(self, root, unit):
        if unit == self.fails_at:
            raise RuntimeError("no space left")
        self.written.append(unit)
        (root / f"{unit}.txt").write_text(str(unit))

    def finish(self, root):
        (root / "list.txt").write_text("012")
        if self.rival is not None:
            render(Counted(), self.rival, workers=1)
            (self.rival / "first.txt").write_text("here first")


def test_a_tree_that_is_there_is_not_rendered_again(tmp_path):
    first, second = Counted(), Counted()
    assert render(first, tmp_path / "tree", workers=1) == render(second, tmp_path / "tree", workers=1)
    assert first.written == [0, 1, 2]
    assert second.written == []


def test_a_failed_render_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="no space left"):
        render(Counted(fails_at=1), tmp_path / "deep" / "tree", workers=1)
    assert list((tmp_path / "deep").iterdir()) == []
    assert (render(Counted(), tmp_path / "deep" / "tree", workers=1) / "list.txt").is_file()


class Broken(NYUDTree):
    def write(self, root, unit):
        if unit == 5:
            raise ValueError("piece 5 is broken")
        super().write(root, unit)


def test_a_failure_in_a_pool_leaves_nothing_either(tmp_path):
    with pytest.raises(ValueError, match="piece 5 is broken"):
        render(Broken(10, 2, (24, 32)), tmp_path / "tree", workers=2)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_whoever_is_first_wins(tmp_path):
    late = Counted(rival=tmp_path / "tree")
    assert (render(late, tmp_path / "tree", workers=1) / "first.txt").is_file()
    assert late.written == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NYUDTree(test=0), r"synth_nyud: held_out is 0; every split"),
        (lambda: PascalTree(val=-1), r"synth_pascal: val is -1; every split"),
        (lambda: PascalTree(size=(8, 40)), r"synth_pascal: image_size is \(8, 40\).*at least 16"),
        (lambda: TaskonomyTree(seed=-2), r"synth_taskonomy: scene_seed is -2"),
    ],
)
def test_what_cannot_be_made_is_refused_before_rendering(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
