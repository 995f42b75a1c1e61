"""Peak numbers of accelerators, from their makers' public sheets, and of this machine, measured once."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """flops: peak dense FLOP/s at the stated number format; bandwidth: memory bytes/s; memory: bytes; source: where from."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    format: str
    source: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte at which work and traffic take equally long: the roofline's corner."""
        return self.flops / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "intensity": self.intensity}


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
ACCELERATORS: tuple[Machine, ...] = (
    Machine("NVIDIA T4", 65e12, 320e9, 16e9, "float16", _NVIDIA + "tesla-t4/"),
    Machine("NVIDIA L4", 121e12, 300e9, 24e9, "bfloat16", _NVIDIA + "l4/"),
    Machine("NVIDIA A10", 125e12, 600e9, 24e9, "bfloat16", _NVIDIA + "products/a10-gpu/"),
    Machine("NVIDIA L40S", 362e12, 864e9, 48e9, "bfloat16", _NVIDIA + "l40s/"),
    Machine("GeForce RTX 4090", 165e12, 1008e9, 24e9, "bfloat16", "NVIDIA Ada GPU Architecture whitepaper, appendix A"),
    Machine("NVIDIA A100 80GB SXM", 312e12, 2039e9, 80e9, "bfloat16", _NVIDIA + "a100/"),
    Machine("NVIDIA H100 SXM", 989e12, 3350e9, 80e9, "bfloat16", _NVIDIA + "h100/"),
    Machine("NVIDIA H200 SXM", 989e12, 4800e9, 141e9, "bfloat16", _NVIDIA + "h200/"),
    Machine("NVIDIA B200", 2250e12, 8000e9, 180e9, "bfloat16", _NVIDIA + "dgx-b200/"),
    Machine("AMD Instinct MI300X", 1307e12, 5300e9, 192e9, "bfloat16",
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    Machine("Google TPU v5e", 197e12, 819e9, 16e9, "bfloat16", "https://cloud.google.com/tpu/docs/v5e"),
)


@cache
def this_machine(device: str = "cpu", seconds: float = 0.15) -> Machine:
    """This machine's float32 matrix product and memory read, measured once per process in about 2*`seconds`."""
    place = torch.device(device)
    side = 1024 if place.type == "cpu" else 4096
    kind = torch.float32 if place.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=place, dtype=kind) for _ in range(2))
    flops = 2 * side**3 / _time(lambda: a @ b, place, seconds)
    big = torch.ones((64 if place.type == "cpu" else 1024) << 18, device=place)  # beyond the last cache level
    bandwidth = big.numel() * 4 / _time(big.sum, place, seconds)
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        return Machine(f"this machine ({properties.name})", flops, bandwidth, properties.total_memory, "bfloat16", "measured")
    return Machine("this machine", flops, bandwidth, _memory(), "float32", "measured")


def machines() -> list[Machine]:
    """The table, this machine first."""
    return [this_machine("cuda" if torch.cuda.is_available() else "cpu"), *ACCELERATORS]


def _time(work, device: torch.device, seconds: float) -> float:
    """Seconds of one call: the fastest of as many as fit."""
    best, start = float("inf"), time.perf_counter()
    work()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    if best == float("inf"):
        before = time.perf_counter()
        work()
        best = time.perf_counter() - before
    return best


def _memory() -> float:
    """Bytes of main memory, 0 where the system does not tell."""
    import os

    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 0.0
