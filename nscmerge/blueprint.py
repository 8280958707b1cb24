"""What a checkpoint's tensors alone do not say: which weights are stored transposed, and which are shared.

transformers builds the model that ``config.json`` names, without any weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nscmerge.errors import AdapterError


@dataclass(frozen=True)
class Blueprint:
    """Traits of an architecture.

    Args:
        transposed: Modules that hold their weight as (d_in, d_out): transformers' ``Conv1D``, as in GPT-2.
        tied: Groups of tensor names that are one and the same parameter, such as an embedding and the output head.
    """

    transposed: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()


def read_blueprint(folder: Path) -> Blueprint:
    """Return the traits of the model in a checkpoint folder.

    A folder without ``config.json``, or with an architecture that transformers does not have, has none of them: both
    are peculiar to transformers.

    Raises:
        AdapterError: ``config.json`` is damaged, or transformers cannot build the model that it names.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        names = [str(name) for name in content.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"{path} is damaged ({type(error).__name__}: {error}). Copy it again.") from error
    if not names and "model_type" not in content:
        return Blueprint()
    # Imported here: seconds that nothing else in a merge needs.
    import transformers
    from transformers.pytorch_utils import Conv1D

    architecture = getattr(transformers, names[0] if names else "AutoModel", None)
    if architecture is None:
        return Blueprint()
    try:
        # False: code that comes with a checkpoint is never run.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture = architecture if names else transformers.AutoModel.from_config
        with torch.device("meta"):
            model = architecture(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise AdapterError(
            f"{path}: transformers cannot build the model it names ({type(error).__name__}: {error}). Copy it again, "
            "or install the version that the model needs."
        ) from error
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    return Blueprint(
        tuple(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        tuple(tuple(group) for group in shared.values() if len(group) > 1),
    )
