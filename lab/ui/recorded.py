"""The recorded run that ships with the lab, so that every tab is full before any model is loaded."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .opened import OpenRun

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "recorded"


def load(folder: Path = FOLDER) -> OpenRun | None:
    """The recorded run, or None when the folder holds none. It was made by the engine, never by hand."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    arrays = {}
    if (folder / "arrays.npz").is_file():
        with np.load(folder / "arrays.npz", allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
    return OpenRun(record, arrays, recorded=True)
