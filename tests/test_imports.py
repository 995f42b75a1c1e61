"""Imports run one way, and the engine side imports where neither browser nor database exist (DESIGN section 4)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)
FACES = {"gradio", "duckdb", "plotly", "pandas", "storage", "lab.ui", "lab.cli"}
ENGINE_SIDE = ["lab/engine", "lab/techniques", "lab/measure", "lab/inspect", "lab/models"]


def files(*rooms: str) -> list[Path]:
    return sorted(p for room in rooms for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, also inside functions; relative imports made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def breaches(paths: list[Path], forbidden=None, allowed=None) -> list[str]:
    out = []
    for path in paths:
        for name in sorted(imports(path)):
            bad = within(name, forbidden) if forbidden else not (name.split(".")[0] in STDLIB or within(name, allowed))
            if bad:
                out.append(f"{path.relative_to(ROOT)} imports {name}")
    return out


def test_kernels_know_tensors_only():
    assert files("kernels") and breaches(files("kernels"), allowed={"torch", "triton", "numpy", "kernels"}) == []


def test_storage_knows_the_database_only():
    assert breaches(files("storage"), forbidden={"torch", "lab", "kernels", "transformers", "gradio", "plotly"}) == []


@pytest.mark.parametrize("room", ENGINE_SIDE)
def test_the_engine_side_knows_no_face_and_no_database(room):
    assert breaches(files(room), forbidden=FACES) == []


def test_the_engine_does_not_know_who_uses_it():
    """Techniques are loaded late, by `Stack.parse` alone; nothing in the engine names one at import."""
    assert breaches(files("lab/engine"), forbidden={"lab.measure", "lab.inspect", "lab.models"}) == []
    for path in files("lab/engine"):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {getattr(n, "module", None) or n.names[0].name for n in top}
        assert not any(within(name, {"lab.techniques"}) for name in names), path.name


def test_techniques_know_the_engine_and_kernels_only():
    assert breaches(
        files("lab/techniques"), allowed={"torch", "numpy", "kernels", "lab.engine", "lab.errors", "lab.techniques", "lab"}
    ) == []


def test_only_what_starts_the_browser_app_knows_it():
    starters = {ROOT / "app.py", ROOT / "lab/cli.py", ROOT / "lab/__main__.py"}
    others = [
        p for p in [*files("kernels", "storage", "lab"), *ROOT.glob("*.py")]
        if p not in starters and ROOT / "lab/ui" not in p.parents and ROOT / "lab/cli" not in p.parents
    ]
    assert breaches(others, forbidden={"lab.ui"}) == []


def test_kernels_defines_no_version():
    """transformers probes for PyPI's `kernels` by import name and version; ours must not look like it."""
    init = ROOT / "kernels/__init__.py"
    assert not init.exists() or "__version__" not in init.read_text()


BLOCKED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import {modules}
for name in {names!r}:
    assert name not in sys.modules, name
from lab.techniques import registry
assert registry()
"""


def test_the_engine_side_imports_without_gradio_duckdb_plotly_pandas():
    """In a fresh interpreter where importing them fails, every module of the engine side loads."""
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files(*ENGINE_SIDE)
    )
    modules = [m for m in modules if not m.startswith("lab.models")]
    code = BLOCKED.format(names=["gradio", "duckdb", "plotly", "pandas"], modules=", ".join(modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_kernels_import_without_triton_and_transformers():
    """As on macOS and Windows, where the torch paths must do."""
    names = ["triton", "transformers", "gradio", "duckdb"]
    code = BLOCKED.format(names=names, modules="kernels.codes, kernels.merge, kernels.cpu_attention").split("for name")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
