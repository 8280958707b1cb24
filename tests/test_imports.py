"""The architecture as a test: imports point one way, and the package comes up fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What each package may import of the others.
ALLOWED = {
    "nscmerge": set(),
    "datamodules": {"nscmerge.errors", "nscmerge.base_model"},
    "tasks": {"nscmerge"},
}


def imports(file):
    """Yield (module, name) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for module, _ in imports(file):
            owner = module.partition(".")[0]
            if owner in ALLOWED and owner != package:
                allowed = any(module == a or module.startswith(f"{a}.") for a in ALLOWED[package])
                assert allowed, f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("module", ["factors", "geometry", "methods", "adapters", "merging"])
def test_the_algebra_needs_no_trainer(module):
    code = f"import sys, nscmerge.{module}; print(any(m in sys.modules for m in ('lightning', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_comes_up_without_torch():
    code = "import sys, nscmerge, nscmerge.cli; nscmerge.cli.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_public_names_are_there():
    import nscmerge

    for name in nscmerge.__all__:
        assert getattr(nscmerge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nscmerge.nothing


def test_no_file_grows_too_long():
    files = [f for p in (*ALLOWED, "benchmarks", "tests") for f in (ROOT / p).rglob("*.py")]
    assert [f.name for f in files if len(f.read_text().splitlines()) > 300] == []
