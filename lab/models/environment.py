"""Checks of the Python environment that must pass before transformers is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from lab.errors import LabError

_ROOT = Path(__file__).resolve().parents[2]


def check_environment(root: Path = _ROOT) -> None:
    """Refuse environments in which PyPI's ``kernels`` package and this project's ``kernels`` folder collide.

    Both have the same import name. Where Python finds the installed one first, the lab's operators are out of reach;
    where it finds ours first, transformers takes ours for the installed one if that has a version it accepts, and
    its import fails. Neither transformers nor ``kernels`` is imported to find out.

    Args:
        root: the project's folder, the one that holds ``kernels/``.

    Raises:
        LabError: one sentence with the remedy.
    """
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or []]
    ours = (root / "kernels").resolve()
    installed = _installed_version()
    if ours not in places:
        if spec is None:
            raise LabError(f"Python does not find the project's kernels folder; start from {root}, or put that folder "
                           "on PYTHONPATH")
        raise LabError(f"Another package named kernels ({_where(spec)}) hides this project's kernels folder; run "
                       f"`pip uninstall kernels`, or start from {root} in an environment without it")
    if installed is not None and _accepted_by_transformers(installed):
        raise LabError(f"The installed package kernels {installed} collides with this project's kernels folder and "
                       "would make transformers fail; run `pip uninstall kernels`, or use an environment without it")


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _accepted_by_transformers(version: str) -> bool:
    """Whether transformers would import from an installed ``kernels`` of this version.

    The range is read from the source of transformers as text; where it cannot be read, the answer is yes.
    """
    from packaging.version import InvalidVersion, Version

    spec = importlib.util.find_spec("transformers")
    try:
        assert spec is not None and spec.origin is not None
        source = (Path(spec.origin).parent / "utils" / "import_utils.py").read_text(encoding="utf-8")
        lowest, highest = (re.search(rf'^KERNELS_{bound}_VERSION\s*=\s*"([^"]+)"', source, re.MULTILINE)
                           for bound in ("MIN", "MAX"))
        return (lowest is None or Version(version) >= Version(lowest[1])) and \
            (highest is None or Version(version) < Version(highest[1]))
    except (AssertionError, OSError, InvalidVersion):
        return True


def _where(spec: importlib.machinery.ModuleSpec) -> str:
    return spec.origin or ", ".join(spec.submodule_search_locations or ["unknown place"])
