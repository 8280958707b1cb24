"""PASCAL-Context's label files: the map of 459 categories, and the people with their body parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.dense.files import Size, check_size, read_mat
from nscmerge.errors import DataError

CATEGORIES = 459
# fmt: off
#: Categories on which surface normals count: those that NYU's 894 have too, except ``unknown``, and ``tvmonitor``.
#: Source: ``nyu_classes.json`` and ``context_classes.json`` of the family's ``data/db_info``.
NORMAL_CATEGORIES = frozenset((
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56,
    59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124,
    135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213,
    215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269,
    272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403,
    405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
))
# fmt: on

#: ``class_ind`` of a person.
PERSON = 15
#: Group of every part of a person: head, torso, upper arm, lower arm, upper leg, lower leg.
HUMAN_PARTS = {
    **dict.fromkeys(("head", "hair", "lear", "rear", "leye", "reye", "lebrow", "rebrow", "nose", "mouth"), 1),
    **dict.fromkeys(("torso", "neck"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("llarm", "rlarm", "lhand", "rhand"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("llleg", "rlleg", "lfoot", "rfoot"), 6),
}


def read_label_map(root: Path, name: str, size: Size | None) -> NDArray[np.int64]:
    """Return the map of categories (H, W), 0 to 459.

    Raises:
        DataError: It is not a 2-D map of such integers, or does not fit its image.
    """
    file = root / "pascal-context" / "trainval" / f"{name}.mat"
    labels = np.asarray(read_mat(file, "LabelMap"))
    if labels.ndim != 2 or labels.dtype.kind not in "biuf" or not (labels == labels.astype(np.int64)).all():
        raise DataError(f"{file}: LabelMap is {labels.dtype} of shape {labels.shape}; expected integers (H, W).")
    check_size(file, (labels.shape[0], labels.shape[1]), size)
    if labels.min() < 0 or labels.max() > CATEGORIES:
        raise DataError(f"{file}: LabelMap holds {labels.min()} to {labels.max()}; expected 0 to {CATEGORIES}.")
    return labels.astype(np.int64)


def _objects(file: Path) -> list[Any]:
    """Return the objects of a parts file: records with ``class_ind``, ``mask`` and ``parts``."""
    anno = read_mat(file, "anno")
    try:
        objects = anno["objects"][0, 0].ravel()
        fields = set(objects.dtype.names or ()) if objects.size else {"class_ind", "mask", "parts"}
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: anno is not a struct with a list 'objects'; expected PASCAL-Part's form.") from error
    if not {"class_ind", "mask", "parts"} <= fields:
        raise DataError(f"{file}: objects have the fields {sorted(fields)}; expected class_ind, mask and parts.")
    return list(objects)


def read_parts(root: Path, name: str, size: Size) -> NDArray[np.uint8]:
    """Return the part groups of all people (H, W): 0 to 6, where 0 is everything else.

    Raises:
        DataError: The file is not of PASCAL-Part's form, names an unknown part, or does not fit its image.
    """
    file = root / "human_parts" / f"{name}.mat"
    groups = np.zeros(size, np.uint8)
    for thing in _objects(file):
        if thing["class_ind"].item() != PERSON:
            continue
        for part in thing["parts"].ravel():  # nothing, where nobody annotated the person's parts
            part_name = str(part["part_name"].item())
            if part_name not in HUMAN_PARTS:
                raise DataError(f"{file}: a person has a part '{part_name}'; known: {', '.join(HUMAN_PARTS)}.")
            check_size(file, part["mask"].shape, size)
            groups[part["mask"].astype(bool)] = HUMAN_PARTS[part_name]
    return groups


def part_categories(root: Path, name: str) -> list[int]:
    """Return the category of every object of an image, -1 for one without any area."""
    return [
        int(thing["class_ind"].item()) if thing["mask"].any() else -1
        for thing in _objects(root / "human_parts" / f"{name}.mat")
    ]


def people_list(root: Path, file: Path, ids: Sequence[str]) -> dict[str, list[int]] | None:
    """Return the categories of every id as a JSON list file of the data set has them.

    Args:
        root: Folder of the data set.
        file: ``ImageSets/Parts/<list>.txt``.
        ids: What the list must cover.

    Returns:
        None where the file is missing or lacks one of the ids; then :func:`part_categories` says the same, slowly.

    Raises:
        DataError: The file is not JSON of that form.
    """
    try:
        categories = json.loads(file.read_text("utf-8"))
        if not isinstance(categories, dict) or not all(isinstance(c, list) for c in categories.values()):
            raise TypeError("not an object of lists")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{file} is not JSON of the form {{id: [category, ...]}} ({error}). "
            f"Delete it; what it says is found out from {root / 'human_parts'} again."
        ) from error
    return categories if set(ids) <= categories.keys() else None
