"""PyPI's kernels package against our folder of that name, in real interpreters with made-up site folders."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = "from lab.models.environment import check_environment; check_environment(); print('fine')"


def check(first: list[Path]) -> tuple[str, str]:
    """Run the check with ``first`` at the head of sys.path; stdout and the last line of stderr."""
    paths = os.pathsep.join(map(str, [*first, ROOT]))
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd="/",
                          env={**os.environ, "PYTHONPATH": paths}, timeout=600)
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


def site(folder: Path, version: str) -> Path:
    """A site folder that holds an installed ``kernels`` of ``version``."""
    package = folder / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


def bound(which: str) -> str:
    """The lowest (MIN) version that the installed transformers accepts, or the first it no longer does (MAX)."""
    place = importlib.util.find_spec("transformers")
    source = (Path(place.origin).parent / "utils" / "import_utils.py").read_text()
    return re.search(rf'KERNELS_{which}_VERSION = "(.+)"', source)[1]


def test_this_environment_is_fine() -> None:
    assert check([]) == ("fine", "")


def test_an_installed_kernels_in_front_hides_ours(tmp_path: Path) -> None:
    out, error = check([site(tmp_path, "0.12.0")])
    assert out == "" and "hides this project's kernels folder" in error and "pip uninstall kernels" in error


def test_a_version_that_transformers_accepts_collides_even_behind_ours(tmp_path: Path) -> None:
    out, error = check([ROOT, site(tmp_path, bound("MIN"))])
    assert out == "" and f"kernels {bound('MIN')} collides" in error and "pip uninstall kernels" in error


@pytest.mark.parametrize("version", ["0.12.0", bound("MAX")])
def test_a_version_that_transformers_ignores_is_harmless_behind_ours(tmp_path: Path, version: str) -> None:
    assert check([ROOT, site(tmp_path, version)]) == ("fine", "")


def test_a_colliding_version_really_breaks_transformers(tmp_path: Path) -> None:
    """The reason for the check: without it the user would meet this traceback."""
    paths = os.pathsep.join(map(str, [ROOT, site(tmp_path, bound("MIN"))]))
    done = subprocess.run([sys.executable, "-c", "import transformers.modeling_utils"], capture_output=True,
                          text=True, cwd="/", env={**os.environ, "PYTHONPATH": paths}, timeout=600)
    assert done.returncode != 0 and "kernels" in done.stderr


def test_naming_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, lab.models.environment; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)


@pytest.mark.parametrize("verb", [
    ["techniques", "--json"], ["run", "--prompt", "hi", "--no-save"], ["predict", "--prompt", "9"], ["serve"],
])
def test_every_verb_says_so_before_anything_breaks(tmp_path: Path, verb: list[str]) -> None:
    other = site(tmp_path, "0.12.0")
    code = f"import sys; sys.path.insert(0, {str(other)!r}); from lab.cli import main; sys.exit(main({verb!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 2 and "pip uninstall kernels" in done.stderr and "Traceback" not in done.stderr
