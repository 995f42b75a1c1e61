"""Machine instructions of the decode kernels, counted without a GPU: Triton compiles for sm_90 and `nvdisasm` reads the result.

    python benchmarks/instructions.py                       # every width, plain and with mass and entropy
    PYTHONPATH=/path/to/triton-3.6 python benchmarks/instructions.py   # with another Triton's compiler

A count is no time: what was measured stands in benchmarks/NOTES.md. It says what to measure next.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.decode import TierView, launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LENGTH, BATCH = 32768, 8


class Absent:
    """Stands for the driver of a card that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiling:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel, into: list):
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid):
        return lambda *args, **options: self.into.append((self.kernel.__name__, self.kernel.warmup(*args, grid=grid, **options)))


def tier(bits: int, lanes: int, dim: int, group: int) -> TierView:
    """A tier of LENGTH entries a lane, which nobody fills, since nothing runs."""
    slots = lanes * LENGTH
    start, length = torch.zeros(lanes, dtype=torch.int64), torch.full((lanes,), LENGTH, dtype=torch.int32)
    if bits == 16:
        k, v = (torch.empty(slots, dim, dtype=torch.bfloat16) for _ in range(2))
        return TierView(16, k, v, start, length, LENGTH)
    k, v = (torch.empty(slots, dim * bits // 8, dtype=torch.uint8) for _ in range(2))
    ks, kz, vs, vz = (torch.empty(slots, dim // group, dtype=torch.float16) for _ in range(4))
    return TierView(bits, k, v, start, length, LENGTH, k_scale=ks, k_zero=kz, v_scale=vs, v_zero=vz)


def tool(name: str, compiled, *options: str) -> str:
    """What one of NVIDIA's tools says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        return subprocess.run([TOOLS / name, *options, f.name], capture_output=True, text=True, check=True).stdout


def loop(text: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the longest loop) of a disassembly."""
    labels, found, longest = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    for end, instruction in enumerate(found):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        begin = labels.get(target[1], end) if target else end
        if end - begin > len(longest):
            longest = found[begin : end + 1]
    return found, longest


def kinds(body: list[str], most: int = 10) -> str:
    """The most frequent instructions of a loop."""
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", i).split()[0].split(".")[0] for i in body)
    return ", ".join(f"{name} {n}" for name, n in names.most_common(most))


def main() -> None:
    compiled: list = []
    driver.set_active(Absent())
    launch.home = lambda kernel: Compiling(kernel, compiled)
    launch.interpreting, launch.overlaps = lambda: False, lambda q: True
    print(f"Triton {triton.__version__}, sm_90; instructions of one warp")
    for heads, kv_heads, dim, group in ((32, 8, 128, 64), (9, 3, 64, 64)):
        for bits in (16, 8, 4, 2):
            for what, more in (("plain", False), ("mass and entropy", True)):
                compiled.clear()
                q = torch.empty(BATCH, heads, dim, dtype=torch.bfloat16)
                launch.run(q, [tier(bits, BATCH * kv_heads, dim, group)], 0.1, None, None, None, more, more)
                for name, kernel in compiled:
                    all_, body = loop(tool("nvdisasm", kernel, "-c"))
                    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", kernel, "-res-usage"))
                    frequent = kinds(body) if name == "split_kernel" else ""
                    print(f"{heads}/{kv_heads}/{dim} {bits:2} bits, {what:16} {name:13} all {len(all_):5} loop {len(body):4} "
                          f"registers {usage[1]:>3} stack {usage[2]}  {frequent}", flush=True)


if __name__ == "__main__":
    main()
