"""What was measured about a model on this machine, kept beside the model cache so that it is measured once."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lab.models.places import cache_dir


class Record:
    """A small JSON file of measurements for one model version.

    A missing or damaged file reads as empty, and a cache that cannot be written is no reason to fail: the
    measurement is then simply repeated next time.
    """

    def __init__(self, key: str) -> None:
        self.path: Path = cache_dir() / "measured" / f"{key}.json"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        self._values: dict[str, Any] = content if isinstance(content, dict) else {}

    def get(self, name: str, *context: object) -> Any:
        """The value kept under ``name`` for this context (versions, mode), or None."""
        return self._values.get(self._full(name, context))

    def put(self, value: Any, name: str, *context: object) -> None:
        """Keep a JSON-able value; the file is replaced whole."""
        self._values[self._full(name, context)] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._values, file, indent=1)
            os.replace(scratch, self.path)
        except OSError:
            return

    @staticmethod
    def _full(name: str, context: tuple[object, ...]) -> str:
        return " | ".join([name, *map(str, context)])


def machine() -> str:
    """What packed weights and their speed depend on: torch's version and the processor's instruction set."""
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
