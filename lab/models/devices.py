"""Device, dtype and memory: what was asked for, what is sensible, and what fits."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.errors import LabError

WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Where a model goes and in what form.

    Attributes:
        device: its device; with a device map, the one that holds the first layers decides later.
        device_map: what accelerate is given, or None.
        dtype: of parameters as loaded, activations and cache.
        weights: "auto" or a mode of packed linear layers, for float32 models on the CPU; None elsewhere.
    """

    device: torch.device
    device_map: Any
    dtype: torch.dtype
    weights: str | None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def plan(device: str, dtype: str, weights: str, device_map: Any) -> Plan:
    """Turn what the user asked for into a Plan.

    ``all`` spreads the model over every GPU through accelerate. On the CPU ``auto`` means float32 activations over packed
    weights. On CUDA it means bfloat16, or float16 where the card has no bfloat16.

    Raises:
        LabError: a device that is not there, an unknown name, or a combination that makes no sense.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise LabError(f"There is no dtype {dtype}", f"One of auto, {', '.join(_DTYPES)} was expected")
    if weights not in WEIGHTS:
        raise LabError(f"There are no {weights} weights", f"One of {', '.join(WEIGHTS)} was expected")
    if device == "all":
        if not torch.cuda.is_available():
            raise LabError("The model was to be spread over all GPUs, but torch sees none",
                           fix="Use cpu, or install the CUDA build of torch and the driver")
        device_map = device_map if device_map is not None else "auto"
    if device_map is not None and torch.cuda.is_available():
        if importlib.util.find_spec("accelerate") is None:
            raise LabError("Spreading a model over several devices needs the accelerate package",
                           fix="Run `pip install accelerate`, or name one device")
        where = torch.device("cuda", 0)
    else:
        device_map = None
        where = _device(device)
    if where.type == "cpu":
        return _plan_cpu(where, dtype, weights)
    if weights in ("int8", "int4"):
        raise LabError(f"{weights} weights are held through the CPU's packed products and are not available on {where}",
                       "On a GPU the weights are float32, bfloat16 or float16", "Leave weights at auto and set dtype")
    named = dtype if dtype != "auto" else weights if weights != "auto" else \
        "bfloat16" if torch.cuda.get_device_capability(where)[0] >= 8 else "float16"
    if weights not in ("auto", named):
        raise LabError(f"On {where} weights and activations share one dtype, but weights={weights} and dtype={dtype}",
                       fix="Set only dtype")
    return Plan(where, device_map, _DTYPES[named], None)


def _plan_cpu(where: torch.device, dtype: str, weights: str) -> Plan:
    if dtype == "float16":
        raise LabError("float16 is slow and imprecise on a CPU", "float32 or bfloat16 was expected",
                       "Leave dtype at auto; weights=int8 saves more")
    if dtype == "bfloat16":
        if weights not in ("auto", "bfloat16"):
            raise LabError(f"{weights} weights are packed for float32 activations, but dtype=bfloat16 was set",
                           fix="Leave dtype at auto")
        return Plan(where, None, torch.bfloat16, None)
    return Plan(where, None, torch.float32, weights)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LabError(f"There is no device {name}", "auto, cpu, cuda, cuda:N or all was expected") from error
    if device.type not in ("cpu", "cuda"):
        raise LabError(f"The device {name} is not supported", "auto, cpu, cuda or cuda:N was expected")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LabError(f"The device {name} was asked for, but torch sees no CUDA GPU",
                           fix="Use cpu, or install the CUDA build of torch and the driver")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise LabError(f"There is no {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def check_memory(folder: Path, chosen: Plan) -> None:
    """Refuse a model whose weights alone do not fit, before the system starts to swap or kill.

    Raises:
        LabError: with the sizes.
    """
    if chosen.device_map is not None:
        return
    need = sum(_elements(file) for file in folder.glob("*.safetensors")) * chosen.dtype.itemsize
    if chosen.device.type == "cuda":
        free, where = torch.cuda.mem_get_info(chosen.device)[0], str(chosen.device)
    else:
        found = available_bytes()
        if found is None:
            return
        free, where = found, "this machine's memory"
    if need > free:
        raise LabError(f"The model needs {need / _GIB:.1f} GiB for its weights in {chosen.dtype_name}, but {where} has "
                       f"{free / _GIB:.1f} GiB free", fix="Choose a smaller model, or a smaller dtype")


def available_bytes() -> int | None:
    """Memory that programs can still get without swapping, cgroup limits included; None where it is not known."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    try:
        base = Path("/sys/fs/cgroup")
        limit = int((base / "memory.max").read_text())
        free = min(free, limit - int((base / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit
    return free


def _elements(path: Path) -> int:
    """Weights in a safetensors file, from its header."""
    try:
        with path.open("rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 1 << 27)))
    except (OSError, ValueError, struct.error) as error:
        raise LabError(f"{path.name} is damaged: it has no readable safetensors header",
                       fix="Fetch the model again") from error
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for length in entry["shape"]:
                count *= length
            total += count
    return total
