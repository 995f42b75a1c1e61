"""Times launch configurations of the decode split kernel, so that kernels/decode/config.py can state the best.

    python benchmarks/decode_variants.py            all groups on one GPU
    python benchmarks/decode_variants.py --warm I N  compile every N-th variant only (run N of these at once first)
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_cases import dense_calls, tier, tier_bytes
from benchmarks.gpu_timing import copies, machine, time_us
from kernels.decode.config import Split
from kernels.decode.launch import run

LLAMA8, LLAMA1, SMOL8 = (8, 32, 8, 128, 32768), (1, 32, 8, 128, 131072), (8, 9, 3, 64, 32768)


def variants():
    """(name, shape, bits, channels per group, kind, Split)."""
    for tile, stages, regs, chunk, ahead in [
        (32, 3, 168, 1376, False), (32, 3, 168, 2048, False), (32, 3, 168, 2752, False), (32, 4, 168, 1376, False),
        (32, 4, 168, 2048, False), (32, 2, 168, 1376, False), (32, 3, 168, 1376, True), (32, 4, 168, 1376, True),
        (32, 3, 128, 1376, False), (32, 3, 128, 1056, False), (64, 2, None, 2048, False), (64, 3, None, 2048, False),
        (32, 3, 168, 704, False), (32, 4, 168, 704, True),
    ]:
        yield "int4 g64 llama B8", LLAMA8, 4, 64, "token", Split(tile, 1, stages, regs, chunk, ahead)
    for stages, chunk, ahead in [(3, 1376, True), (4, 1376, True), (3, 1376, False), (3, 2048, True), (4, 2048, True)]:
        yield "int4 g128 llama B8", LLAMA8, 4, 128, "token", Split(32, 1, stages, 168, chunk, ahead)
    for stages, chunk in [(3, 672), (3, 1344), (4, 672), (3, 1024), (3, 896)]:
        yield "int4 g64 llama B1 131k", LLAMA1, 4, 64, "token", Split(32, 1, stages, 168, chunk)
    for chunk in (2048, 1376):
        yield "int4 g32 llama B8", LLAMA8, 4, 32, "token", Split(32, 1, 3, None, chunk)
    for regs, chunk, stages in [(168, 1376, 3), (None, 2048, 3), (168, 1376, 4), (168, 2048, 5)]:
        yield "int4 kivi llama B8", LLAMA8, 4, 64, "block", Split(32, 1, stages, regs, chunk)
    for tile, stages, regs, chunk in [(32, 3, 168, 1504), (32, 3, 168, 2048), (32, 2, 168, 1376), (32, 2, 168, 2048),
                                      (32, 3, 168, 4096), (16, 4, 168, 2048), (64, 2, None, 4096)]:
        yield "int8 g64 llama B8", LLAMA8, 8, 64, "token", Split(tile, 1, stages, regs, chunk)
    for stages, regs, chunk in [(3, 168, 1376), (4, 168, 1376), (3, 168, 2048), (4, 168, 2048), (4, 128, 1056)]:
        yield "int2 g64 llama B8", LLAMA8, 2, 64, "token", Split(32, 1, stages, regs, chunk)
    yield "int2 g128 llama B8", LLAMA8, 2, 128, "token", Split(32, 1, 4, 128, 1056, True)
    yield "int8 g128 llama B8", LLAMA8, 8, 128, "token", Split(32, 1, 3, 168, 2048, True)
    yield "fp8 llama B8", LLAMA8, 8, 128, "fp8", Split(32, 1, 3, 168, 2048, True)
    for tile, stages, regs, chunk, ahead in [
        (64, 3, 168, 512, True), (64, 3, 168, 512, False), (64, 4, 168, 512, True), (32, 4, 128, 384, True),
        (32, 4, 128, 512, True), (64, 3, 168, 704, True), (64, 3, None, 704, True), (32, 4, 128, 768, True),
    ]:
        yield "int4 g64 smol B8", SMOL8, 4, 64, "token", Split(tile, 1, stages, regs, chunk, ahead)
    for tile, warps, stages, chunk in [(128, 4, 3, 16384), (64, 4, 3, 16384), (64, 4, 4, 16384), (64, 2, 4, 8192),
                                       (32, 1, 3, 4096)]:
        yield "bf16 llama B8", LLAMA8, 16, 128, "token", Split(tile, warps, stages, None, chunk)
    for tile, warps, stages, chunk in [(64, 4, 3, 704), (64, 4, 3, 1024), (64, 4, 3, 2048), (64, 4, 5, 2048),
                                       (128, 4, 3, 2048),
                                       (64, 4, 2, 512), (64, 4, 2, 1024), (32, 2, 4, 512)]:
        yield "bf16 llama B1", (1, 32, 8, 128, 32768), 16, 128, "token", Split(tile, warps, stages, None, chunk)
    for tile, warps, stages, chunk in [(64, 2, 3, 1024), (64, 2, 3, 2048), (128, 4, 3, 2048)]:
        yield "bf16 smol B8", SMOL8, 16, 64, "token", Split(tile, warps, stages, None, chunk)


def main() -> None:
    """Print one line per variant, best of each group marked."""
    warm = sys.argv[1:2] == ["--warm"]
    todo = list(variants())
    if warm:
        todo = todo[int(sys.argv[2]) :: int(sys.argv[3])]
    else:
        print(machine(), flush=True)
    made, results = {}, []
    for name, (batch, heads, kv, dim, n), bits, channels, kind, split in todo:
        key = (batch, heads, kv, dim, 256 if warm else n, bits, channels, kind)
        if key not in made:
            made.clear()
            torch.cuda.empty_cache()
            one = tier(bits, batch * kv, key[4], dim, channels, kind=kind)
            count = 2 if warm else copies(tier_bytes(one))
            made[key] = [one] + [tier(bits, batch * kv, key[4], dim, channels, kind=kind) for _ in range(count - 1)]
        tiers = made[key]
        q = torch.randn(batch, heads, dim, device="cuda", dtype=torch.bfloat16)
        try:
            calls = [lambda t=t: run(q, [t], dim**-0.5, None, None, None, False, False, [split]) for t in tiers]
            if warm:
                calls[0]()
                continue
            us, spread = time_us(calls, 9)
        except Exception as e:
            print(name, split, "FAILED", repr(e)[:200], flush=True)
            continue
        floor = tier_bytes(tiers[0]) / 3.0e6
        results.append((name, us))
        print(f"{name:24s} tile {split.tile:3d} w{split.warps} st{split.stages} reg {split.registers or 0:3d} chunk"
              f" {split.chunk:5d} ahead {int(split.ahead)}  {us:7.1f} us ±{spread:4.1f}  floor {floor:6.1f}"
              f"  {floor / us:5.2f} of 3.0 TB/s", flush=True)
    if warm:
        return
    made.clear()
    for name, (b, h, kv, d, n) in (("llama B8", LLAMA8), ("llama B1 131k", LLAMA1), ("smol B8", SMOL8),
                                   ("llama B1", (1, 32, 8, 128, 32768))):
        size = 4 * b * kv * n * d
        for kind, calls in dense_calls(b, h, kv, n, d, copies(size)).items():
            print(f"baseline {name} {kind}: {time_us(calls, 9)[0]:.1f} us (floor {size / 3.0e6:.1f})", flush=True)
        torch.cuda.empty_cache()
    for group in dict.fromkeys(r[0] for r in results):
        print(group, "best", round(min(r[1] for r in results if r[0] == group), 1))


if __name__ == "__main__":
    main()
