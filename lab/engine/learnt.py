"""What a technique learnt about one model beforehand: saved, found again, and refused where it does not belong.

A calibration file is safetensors; its metadata name the technique and its version, the model and its revision. Files are
looked for in LAB_CALIBRATION (a folder), then among those shipped in assets/calibration.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lab.engine.slots import Technique
from lab.errors import LabError

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "calibration"
ANY = "*"  # a shipped file serves every revision of its model (hub weights and their packed copies)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Frozen parameters of one technique for one model.

    Attributes: technique, version: what learnt it. model, revision: from whom ("*" fits every revision). settings: the
    parameters it was learnt under. note: how it was measured. tensors: the result, by name.
    """

    technique: str
    version: int
    model: str
    revision: str
    tensors: dict[str, torch.Tensor]
    settings: dict = field(default_factory=dict)
    note: str = ""

    def save(self, path: Path | str) -> Path:
        """Write the file whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"technique": self.technique, "version": self.version, "model": self.model, "revision": self.revision,
                 "settings": self.settings, "note": self.note}
        part = path.with_suffix(".part")
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
        save_file(tensors, part, {"lab": json.dumps(about, sort_keys=True)})
        part.chmod(0o644)
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "Calibration":
        """Raises LabError where the file is missing or is no calibration."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["lab"])
                return cls(tensors={k: file.get_tensor(k) for k in file.keys()}, **about)
        except FileNotFoundError:
            raise LabError(
                f"There is no calibration file {path}", fix="python -m lab calibrate TECHNIQUE --out FILE makes one"
            ) from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise LabError(f"{path} is not a calibration file", "It was written by python -m lab calibrate") from None

    def check(self, technique: Technique, model: str, revision: str) -> None:
        """Raise LabError unless this belongs to the technique and the model."""
        again = f"python -m lab calibrate {technique.name} learns it anew"
        if self.technique != technique.name:
            raise LabError(f"This calibration belongs to {self.technique}, not to {technique.name}", fix=again)
        if self.version != technique.version:
            raise LabError(
                f"This calibration of {technique.title} was made by version {self.version}; the lab has version "
                f"{technique.version}", fix=again,
            )
        if self.model != model:
            raise LabError(f"This calibration of {technique.title} was learnt from {self.model}, not from {model}", fix=again)
        if self.revision not in (ANY, revision):
            raise LabError(
                f"This calibration of {technique.title} was learnt from revision {self.revision} of {model}; "
                f"revision {revision or 'unknown'} is loaded", fix=again,
            )


def identity(model: torch.nn.Module) -> tuple[str, str]:
    """(id, revision) of a model: what the lab's loader noted, else what transformers knows."""
    facts = getattr(model, "lab_facts", None)
    if facts is not None:
        return facts.id, facts.revision
    config = model.config
    return getattr(config, "_name_or_path", "") or type(model).__name__, getattr(config, "_commit_hash", None) or ""


def file_name(technique: str, model: str) -> str:
    """"duo_attention--HuggingFaceTB-SmolLM2-135M-Instruct.safetensors"."""
    return f"{technique}--{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}.safetensors"


def find(technique: Technique, model: torch.nn.Module) -> Calibration:
    """The calibration of a technique for a model: its `calibration` parameter's file, or the one found by name.

    Raises LabError where there is none or it does not match.
    """
    ident, revision = identity(model)
    chosen = getattr(technique, "calibration", "auto")
    if chosen != "auto":
        found = _load(chosen, _stamp(Path(chosen)))
        found.check(technique, ident, revision)
        return found
    name = file_name(technique.name, ident)
    own = os.environ.get("LAB_CALIBRATION")
    for folder in ([Path(own)] if own else []) + [SHIPPED]:
        if (folder / name).is_file():
            found = _load(str(folder / name), _stamp(folder / name))
            found.check(technique, ident, revision)
            return found
    raise LabError(
        f"{technique.title} has not been calibrated for {ident}",
        "It needs values learnt from this model once",
        f"Run python -m lab calibrate {technique.name} --model {ident} --out {name}, and give that file as calibration",
    )


@lru_cache(maxsize=32)
def _load(path: str, stamp: int) -> Calibration:
    return Calibration.load(path)


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
