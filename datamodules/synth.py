"""Stand-ins for the dense data sets: ray-cast scenes in their layouts, rendered once into the user's cache.

For running loaders, training, merging and metrics from end to end without the real data. What they give is never
NYUD-v2, PASCAL-Context or Taskonomy, and their scores belong into no table with those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from datamodules.dense.files import Size
from datamodules.dense.module import DenseDataModule
from datamodules.dense.transforms import Normalization
from datamodules.nyud import NYUDDataModule
from datamodules.packages import cache_folder
from datamodules.pascal_context import PascalContextDataModule
from datamodules.scenes import GENERATOR_VERSION
from datamodules.scenes.nyud import NYUDTree
from datamodules.scenes.pascal import PascalTree
from datamodules.scenes.rendering import Tree, render
from datamodules.scenes.taskonomy import TaskonomyTree
from datamodules.taskonomy import TaskonomyDataModule
from nscmerge.errors import DatasetNotFoundError

#: What every result on these data must say of them.
DATA = "synthetic ray-cast scenes (project)"


def tree_folder(tree: Tree) -> Path:
    """Return where a tree is kept: generator version, data set, seed, counts and image size are in the path."""
    return cache_folder() / "synth" / f"v{GENERATOR_VERSION}" / tree.name


class Rendered(DenseDataModule):
    """Renders the tree that a data module reads.

    A subclass sets ``tree`` and ``workers`` and passes ``tree_folder(tree)`` on as ``root``.
    """

    expected_hashes: ClassVar[Mapping[str, str] | None] = None
    expected_counts: ClassVar[Mapping[str, int] | None] = None
    expected_image_size: ClassVar[Size | None] = None
    tree: Tree
    workers: int | None

    def prepare_data(self) -> None:
        """Render the tree into the cache unless it is there."""
        render(self.tree, self.root, self.workers)

    def setup(self, stage: str | None = None) -> None:
        """Read what was rendered.

        Raises:
            DatasetNotFoundError: Nothing was.
        """
        if not self.root.is_dir():
            raise DatasetNotFoundError(
                f"{self.data_name}: {self.root} is not rendered yet. Call prepare_data() first; a trainer does."
            )
        super().setup(stage)

    def describe(self) -> dict[str, Any]:
        """Return what a result should keep of its data; ``data`` says that they are synthetic.

        ``root`` is the tree's place within the cache folder, which differs from machine to machine.
        """
        place = f"synth/v{GENERATOR_VERSION}/{self.tree.name}"
        return {**super().describe(), "data": DATA, "data_set": self.data_name, "root": place}


class SynthNYUDDataModule(Rendered, NYUDDataModule):
    """Scenes in NYUD-v2's layout.

    Args:
        task: See :class:`NYUDDataModule`, as for all that follow up to ``verify``.
        size: Height and width that a model sees.
        split_seed: Divides the held-out frames into val and test.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random views of the training samples.
        normalization: Of the images.
        verify: Read every file during setup.
        train: Training frames.
        held_out: Frames of the held-out list, one half to validate and one to test.
        image_size: Height and width of a frame.
        scene_seed: Which scenes.
        workers: Rendering processes; None takes one per CPU.
    """

    data_name: ClassVar[str] = "synth_nyud"

    def __init__(
        self,
        task: Literal["semseg", "depth", "normal", "edge"],
        size: tuple[int, int] = (112, 144),
        split_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        normalization: Normalization = "imagenet",
        verify: bool = False,
        train: int = 256,
        held_out: int = 96,
        image_size: tuple[int, int] = (106, 140),
        scene_seed: int = 0,
        workers: int | None = None,
    ) -> None:
        self.tree = NYUDTree(train, held_out, (image_size[0], image_size[1]), scene_seed)
        self.workers = workers
        root = tree_folder(self.tree)
        NYUDDataModule.__init__(
            self, task, root, size, split_seed, batch_size, eval_batch_size, num_workers, seed, normalization, verify
        )


class SynthPascalDataModule(Rendered, PascalContextDataModule):
    """Scenes in PASCAL-Context's layout; 27 kinds of things, of which 8 are VOC classes.

    Args:
        task: See :class:`PascalContextDataModule`, as for all that follow up to ``verify``.
        size: Height and width that a model sees.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random views of the training samples.
        normalization: Of the images.
        verify: Read every file during setup.
        train: Training images.
        val: Validation images.
        test: Test images.
        image_size: Height and width of an image; None draws sizes of at most 128 a side, some upright.
        scene_seed: Which scenes.
        workers: Rendering processes; None takes one per CPU.
    """

    data_name: ClassVar[str] = "synth_pascal"

    def __init__(
        self,
        task: Literal["semseg", "parts", "saliency", "normal", "edge"],
        size: tuple[int, int] = (128, 128),
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        normalization: Normalization = "imagenet",
        verify: bool = False,
        train: int = 256,
        val: int = 48,
        test: int = 48,
        image_size: tuple[int, int] | None = None,
        scene_seed: int = 0,
        workers: int | None = None,
    ) -> None:
        fixed = (image_size[0], image_size[1]) if image_size else None
        self.tree = PascalTree(train, val, test, fixed, scene_seed)
        self.workers = workers
        root = tree_folder(self.tree)
        PascalContextDataModule.__init__(
            self, task, root, size, batch_size, eval_batch_size, num_workers, seed, normalization, verify
        )


class SynthTaskonomyDataModule(Rendered, TaskonomyDataModule):
    """Scenes in Taskonomy's layout; buildings are groups of rooms, key points in 3D are a normal-dispersion stand-in.

    Args:
        task: See :class:`TaskonomyDataModule`, as for all that follow up to ``verify``.
        size: Height and width to which images and labels are resized.
        batch_size: Samples per training step and process.
        eval_batch_size: Samples per batch of validation and test.
        num_workers: Loader processes.
        seed: Order and random flips of the training samples.
        flip_normals: Whether mirroring turns the x of normals.
        join: ``all`` keeps views that all eleven tasks have; ``task`` asks for this task's files alone.
        normalization: Of the images.
        verify: Read every file during setup.
        train: Training buildings.
        val: Validation buildings.
        test: Test buildings.
        views: Images per building, a multiple of two.
        image_size: Height and width of an image.
        scene_seed: Which scenes.
        incomplete: Leave one texture edge out, as the real download does.
        workers: Rendering processes; None takes one per CPU.
    """

    data_name: ClassVar[str] = "synth_taskonomy"
    test_buildings: ClassVar[Sequence[str] | None] = None
    skipped_buildings: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        task: Literal["de", "dz", "eo", "et", "k2", "k3", "n", "c", "r", "s2", "s25"],
        size: tuple[int, int] = (128, 128),
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        flip_normals: bool = True,
        join: Literal["all", "task"] = "all",
        normalization: Normalization = "half",
        verify: bool = False,
        train: int = 16,
        val: int = 3,
        test: int = 3,
        views: int = 16,
        image_size: tuple[int, int] = (128, 128),
        scene_seed: int = 0,
        incomplete: bool = False,
        workers: int | None = None,
    ) -> None:
        self.tree = TaskonomyTree(train, val, test, views, (image_size[0], image_size[1]), scene_seed, incomplete)
        self.workers = workers
        root = tree_folder(self.tree)
        TaskonomyDataModule.__init__(
            self,
            task,
            root,
            size,
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
            flip_normals,
            join,
            normalization,
            verify,
        )
