"""Which implementation an operator uses: Triton on CUDA, torch elsewhere, and how a caller may insist."""

from __future__ import annotations

import functools
import os

import torch


@functools.cache
def has_triton() -> bool:
    """True when Triton can be imported (its kernels then run on CUDA, or anywhere under TRITON_INTERPRET=1)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0", "off", "false")


def overlaps(x: torch.Tensor) -> bool:
    """True where a kernel may be launched before its predecessor ends (programmatic dependent launch, NVIDIA's Hopper on)."""
    return x.is_cuda and not interpreting() and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


@functools.cache
def _several() -> bool:
    return torch.cuda.device_count() > 1 and not interpreting()


class _Home:
    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            where = next(a.device for a in args if isinstance(a, torch.Tensor))
            with torch.cuda.device(where):
                return self.kernel[grid](*args, **options)

        return launch


def home(kernel):
    """A Triton kernel that is launched, as kernel[grid](...), on the card where its first tensor lies: Triton itself
    launches on torch's current device, which is another one where a model is spread over several cards."""
    return _Home(kernel) if _several() else kernel


def choose(impl: str, *tensors: torch.Tensor) -> str:
    """Resolve impl "auto" | "torch" | "triton" for these tensors to "torch" or "triton".

    Raises ValueError when "triton" is asked for where it cannot run.
    """
    if impl == "torch":
        return "torch"
    runs = has_triton() and (all(t.is_cuda for t in tensors) or interpreting())
    if impl == "triton" and not runs:
        raise ValueError(
            "the Triton path was asked for but cannot run here; it needs triton and CUDA tensors "
            "(or TRITON_INTERPRET=1 set before triton is imported). Use impl='auto' or impl='torch'."
        )
    if impl not in ("auto", "triton"):
        raise ValueError(f"unknown impl {impl!r}; expected 'auto', 'torch' or 'triton'.")
    return "triton" if runs and (impl == "triton" or all(t.is_cuda for t in tensors)) else "torch"
