"""The lab's own attention kernels as functions of one head's q, k, v, to be held against exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import cpu_attention, decode, prefill
from kernels.backend import has_triton
from kernels.decode.tier import TierView

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _prefill(impl: str) -> Attention:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return prefill.attend(q[None, None], k[None, None], v[None, None], scale, impl=impl).out[0, 0]

    return attend


def _decode(impl: str) -> Attention:
    """Every row as a decode step of its own: row i is a lane that reads the first i + 1 entries of one shared tier."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        rows, n = q.shape[0], k.shape[0]
        length = torch.arange(n - rows + 1, n + 1, dtype=torch.int32, device=q.device)
        tier = TierView(16, k.contiguous(), v.contiguous(), torch.zeros_like(length), length, n)
        return decode.attend(q[:, None], [tier], scale, impl=impl).out[:, 0]

    return attend


def _processor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return cpu_attention.plain(q[None, None], k[None, None], v[None, None], scale, causal=True)[0][0, 0]


def kernels(device: torch.device) -> dict[str, Attention]:
    """{name: f(q [T, d], k, v, scale) -> [T, d]} of the kernels that run on this device, causal, one head.

    On CUDA the Triton kernels and, where it serves, the library's; elsewhere what the engine runs on processors.
    """
    if device.type == "cuda" and has_triton():
        return {"prefill, triton": _prefill("triton"), "decode, triton": _decode("triton"),
                "prefill, library": _prefill("library"), "prefill, torch": _prefill("torch")}
    return {"prefill, processor": _processor, "prefill, torch": _prefill("torch"), "decode, torch": _decode("torch")}


def ways(device: torch.device) -> dict[str, tuple[torch.dtype, Attention]]:
    """Every kernel of ``kernels`` in every precision, named "kernel | precision", for ``deviation.compare``."""
    return {f"{name} | {label}": (dtype, f) for name, f in kernels(device).items() for label, dtype in DTYPES.items()}
