"""Whether kernels for a use have been compiled on this machine before: Triton compiles at the first launch, which takes seconds.

A use is named by its caller (a stack and a model's shape). Its mark is an empty file beside Triton's own cache, named after the
kernels' sources, Triton and the card, so that clearing that cache or changing a kernel makes it a first use again.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from kernels.backend import has_triton


def is_first(use: str, device: torch.device) -> bool:
    """True where launches for this use will compile; never on a CPU."""
    mark = _mark(use, device)
    return mark is not None and not mark.exists()


def note(use: str, device: torch.device) -> None:
    """Remember that this use has been compiled for. A cache folder that cannot be written is no error."""
    mark = _mark(use, device)
    if mark is None:
        return
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        pass


def _mark(use: str, device: torch.device) -> Path | None:
    if device.type != "cuda" or not has_triton():
        return None
    text = f"{_sources()} {torch.cuda.get_device_capability(device)} {use}"
    return _folder() / f"attention-lab-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


@functools.cache
def _sources() -> str:
    import triton

    found = hashlib.sha256(triton.__version__.encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
