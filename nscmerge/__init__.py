"""nscmerge: merge LoRA adapters of one base model into one, without labels.

The public names below are imported on first use, so that ``import nscmerge`` and ``nscmerge --help`` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LowRank": "nscmerge.factors",
    "Adapter": "nscmerge.adapters",
    "load_adapter": "nscmerge.adapters",
    "save_adapter": "nscmerge.adapters",
    "Update": "nscmerge.update",
    "merge": "nscmerge.merging",
    "METHODS": "nscmerge.methods",
    "MergeModule": "nscmerge.module",
    "Pretrained": "nscmerge.pretrained",
    "NSCMergeError": "nscmerge.errors",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from nscmerge.adapters import Adapter as Adapter
    from nscmerge.adapters import load_adapter as load_adapter
    from nscmerge.adapters import save_adapter as save_adapter
    from nscmerge.errors import NSCMergeError as NSCMergeError
    from nscmerge.factors import LowRank as LowRank
    from nscmerge.merging import merge as merge
    from nscmerge.methods import METHODS as METHODS
    from nscmerge.module import MergeModule as MergeModule
    from nscmerge.pretrained import Pretrained as Pretrained
    from nscmerge.update import Update as Update


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nscmerge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
