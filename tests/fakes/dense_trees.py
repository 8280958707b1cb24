"""Tiny trees in the published layouts of the dense data sets: random content, right names, types and ranges."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

#: Domain, number of channels (0: grey), bits.
TASKONOMY_DOMAINS = {
    "rgb": (3, 8),
    "depth_euclidean": (0, 16),
    "depth_zbuffer": (0, 16),
    "edge_occlusion": (0, 16),
    "edge_texture": (0, 16),
    "keypoints2d": (0, 16),
    "keypoints3d": (0, 16),
    "normal": (3, 8),
    "principal_curvature": (3, 8),
    "reshading": (3, 8),
    "segment_unsup2d": (0, 8),
    "segment_unsup25d": (0, 8),
}


def save_png(file: Path, array) -> None:
    """Write a uint8 (H, W) or (H, W, 3), or a uint16 (H, W) array as PNG or JPEG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def blocks(rng, size, values):
    """Return a (H, W) map of 4 x 4 blocks with random values."""
    coarse = rng.choice(values, [-(-side // 4) for side in size])
    return np.kron(coarse, np.ones((4, 4), int))[: size[0], : size[1]]


def nyud_tree(root: Path, train=4, held_out=6, size=(21, 28)) -> Path:
    """Write a NYUD-v2 tree: ids 0001 and on, the first ``train`` of them to train."""
    rng = np.random.default_rng(1)
    ids = [f"{i:04d}" for i in range(1, train + held_out + 1)]
    for folder in ("depth", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for i in ids:
        save_png(root / "images" / f"{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
        save_png(root / "segmentation" / f"{i}.png", blocks(rng, size, [0, 1, 2, 17, 40]).astype(np.uint8))
        save_png(root / "normals" / f"{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
        save_png(root / "edge" / f"{i}.png", (255 * (rng.random(size) < 0.1)).astype(np.uint8))
        depth = rng.uniform(0.5, 9.5, size).astype(np.float32)
        depth[rng.random(size) < 0.1] = 0
        np.save(root / "depth" / f"{i}.npy", depth)
    write_list(root / "gt_sets" / "train.txt", ids[:train])
    write_list(root / "gt_sets" / "val.txt", ids[train:])
    return root


def write_list(file: Path, ids) -> None:
    """Write ids, one a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{i}\n" for i in ids))


def save_parts(file: Path, objects) -> None:
    """Write PASCAL-Part's nested ``anno``.

    Args:
        file: Where to.
        objects: (category, mask, [(part name, part mask), ...]) each.
    """
    records = np.empty((1, len(objects)), [(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for n, (category, mask, parts) in enumerate(objects):
        packed = np.empty((1, len(parts)), [("part_name", object), ("mask", object)])
        for p, (name, part) in enumerate(parts):
            packed[0, p] = (name, part.astype(np.uint8))
        records[0, n] = (f"class{category}", category, mask.astype(np.uint8), packed if parts else np.zeros((0, 0)))
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = (file.stem, records)
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {"anno": anno})


def pascal_tree(root: Path, train=5, val=4, test=3, parts_lists=False) -> Path:
    """Write a PASCAL-Context tree of varying sizes; a person with a head and an arm in every image of even number.

    Odd images have their semantic map under ``semseg/pascal-context``, even ones under ``semseg/VOC12``.
    """
    rng = np.random.default_rng(2)
    ids = [f"2008_{i:06d}" for i in range(train + val + test)]
    for n, i in enumerate(ids):
        size = [(20, 30), (30, 20), (24, 24)][n % 3]
        save_png(root / "JPEGImages" / f"{i}.jpg", rng.integers(0, 256, (*size, 3), np.uint8))
        semseg = blocks(rng, size, [0, 5, 15, 20, 255]).astype(np.uint8)
        save_png(root / "semseg" / ("pascal-context" if n % 2 else "VOC12") / f"{i}.png", semseg)
        save_png(root / "normals_distill" / f"{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
        save_png(root / "sal_distill" / f"{i}.png", rng.choice([0, 127, 128, 255], size).astype(np.uint8))
        (root / "pascal-context" / "trainval").mkdir(parents=True, exist_ok=True)
        # 9 (bag), 284 (person) have normals, 2 (aeroplane) and 431 (unknown) have none.
        labels = blocks(rng, size, [2, 9, 284, 431]).astype(np.uint16)
        savemat(root / "pascal-context" / "trainval" / f"{i}.mat", {"LabelMap": labels})
        head, arm = np.zeros(size, bool), np.zeros(size, bool)
        head[2:6, 3:8], arm[5:12, 4:6] = True, True
        people = [(15, head | arm, [("hair", head), ("llarm", arm)])] if n % 2 == 0 else []
        save_parts(root / "human_parts" / f"{i}.mat", [(7, ~head, []), *people])
    lists = {"train": ids[:train], "val_new": ids[train : train + val], "test_new": ids[train + val :]}
    for name, chosen in lists.items():
        write_list(root / "ImageSets" / "Context" / f"{name}.txt", chosen)
    write_list(root / "ImageSets" / "Context" / "val.txt", ids[train:])
    return root


def taskonomy_tree(root: Path, level=True, views=3, size=(16, 16)) -> Path:
    """Write a Taskonomy tree: buildings ``ash``, ``elm`` to train, ``fir`` to validate, ``ihlen``, ``yew`` to test.

    Args:
        root: Where to.
        level: Whether domains have the folder ``taskonomy``.
        views: Views per building; the points are 0, 2, 10, ... so that names do not sort as numbers do.
        size: (H, W).
    """
    rng = np.random.default_rng(3)
    rows = [("ash", 1, 0, 0), ("elm", 1, 0, 0), ("woodbine", 1, 0, 0), ("fir", 0, 1, 0), ("wiconisco", 0, 1, 0)]
    rows += [("ihlen", 0, 0, 1), ("yew", 0, 0, 1)]
    (root / "splits_taskonomy").mkdir(parents=True)
    with (root / "splits_taskonomy" / "train_val_test_tiny.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "train", "val", "test"), *rows])
    for building in ("ash", "elm", "fir", "ihlen", "yew"):
        for view in range(views):
            for domain, (channels, bits) in TASKONOMY_DOMAINS.items():
                shape = (*size, channels) if channels else size
                array = rng.integers(0, 2**bits, shape).astype(f"uint{bits}")
                save_png(taskonomy_file(root, domain, building, view, level), array)
    return root


def taskonomy_file(root: Path, domain: str, building: str, view: int, level=True) -> Path:
    """Return the file of the n-th view of a building."""
    folder = root / domain / "taskonomy" if level else root / domain
    return folder / building / f"point_{(0, 2, 10, 11, 100)[view]}_view_{view}_domain_{domain}.png"
