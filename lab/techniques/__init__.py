"""Techniques: one file each. The registry is this folder; a new file with a Technique in it is a new toggle."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from lab.engine.slots import Technique


@cache
def registry() -> dict[str, type[Technique]]:
    """Every technique by name, in alphabetical order of name."""
    found: dict[str, type[Technique]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if (isinstance(value, type) and issubclass(value, Technique) and value.__module__ == module.__name__
                    and hasattr(value, "name")):
                found[value.name] = value
    return dict(sorted(found.items()))
