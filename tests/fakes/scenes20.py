"""The twenty tasks of the stand-in, cut small: a few rendered scenes, a tiny random base, random experts with heads."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from datamodules.joint import JointDataModule
from nscmerge.adapters import Adapter, save_adapter
from nscmerge.base_model import load_base_model
from nscmerge.factors import LowRank
from tests.fakes.vit import DEPTH, WIDTH, write_tiny_vit

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTS = {
    "SynthNYUDDataModule": {"train": 2, "held_out": 8},
    "SynthPascalDataModule": {"train": 6, "val": 8, "test": 8},
    "SynthTaskonomyDataModule": {"train": 1, "val": 1, "test": 1, "views": 4},
}


def _made(entry: dict[str, Any], **options: Any) -> Any:
    module, name = entry["class_path"].rsplit(".", 1)
    return getattr(import_module(module), name)(**(entry.get("init_args", {}) | options))


def scene_data(share: bool) -> JointDataModule:
    """Return the data of ``configs/data/synth20.yaml``, few of them."""
    options = yaml.safe_load((CONFIGS / "data" / "synth20.yaml").read_text())["init_args"]
    tasks = {name: _made(e, **COUNTS[e["class_path"].rsplit(".", 1)[1]]) for name, e in options["tasks"].items()}
    sizes = {"batch_size": 2, "val_samples": 2, "test_batch_size": 2, "share_batches": share}
    return JointDataModule(**(options | sizes | {"tasks": tasks}))


def scene_tasks() -> dict[str, nn.Module]:
    """Return the tasks of the stand-in's benchmark for the tiny base; random heads; few thresholds for ods-F."""
    entries = yaml.safe_load((CONFIGS / "experiments" / "synth20_benchmark.yaml").read_text())
    torch.manual_seed(1)
    found = {}
    for name, entry in entries["model"]["init_args"]["tasks"].items():
        few = {"thresholds": 19, "workers": 0} if name.endswith("_edge") else {}
        found[name] = _made(entry, width=WIDTH, depth=DEPTH, **few)
    return found


def write_scene_experts(folder: Path) -> tuple[str, dict[str, Path]]:
    """Write the tiny base and one random expert with a head per task; return the base's name and the experts."""
    base = f"timm:{write_tiny_vit(folder / 'base')}"
    model = load_base_model(base)
    layers = {n: m for n, m in model.named_modules() if n.endswith(("attn.qkv.q", "attn.qkv.v", "attn.proj"))}
    experts = {}
    for seed, (name, task) in enumerate(scene_tasks().items()):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            layer: LowRank(
                torch.randn(2, m.in_features, generator=generator),
                0.1 * torch.randn(m.out_features, 2, generator=generator),
            )
            for layer, m in layers.items()
        }
        experts[name] = folder / name
        save_adapter(Adapter(factors, base, head=task.state_dict(), name=name), experts[name])
    return base, experts
