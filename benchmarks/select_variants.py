"""Quest at 131k tokens, part by part and way by way: which slices, warps and overlaps `kernels/select/best.py` should state.

    python benchmarks/select_variants.py [--context 131072]

For every way: whether it names the same pages as the two-call way (and at how many places not: the sums of 128 products may be
rounded in another order, so two pages of all but equal scores can change places), microseconds of the selection alone and of the
whole step (selection, reading 1,024 tokens of the pages, merge), and the ratio to dense decode, 194 us on the card of the notes
(measured again here). About 20 s on an H100, most of it compilation.
"""

from __future__ import annotations

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_cases import dense_calls, tier
from benchmarks.gpu_timing import copies, time_us
from kernels import decode, select
from kernels.select import best
from kernels.select.best import Slices

HEADS, KV, DIM, COUNT = 32, 8, 128, 64


def main() -> None:
    """Print one line per way, the quickest steps last."""
    began = time.perf_counter()
    n = int(sys.argv[sys.argv.index("--context") + 1]) if "--context" in sys.argv else 131072
    bytes_ = n // 16 * KV * DIM * 4
    sets = []
    for _ in range(copies(bytes_)):
        t = tier(16, KV, n, DIM, DIM)
        sets.append((t, *select.page_summaries(t, 16)))
    q = torch.randn(1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    rows = q.view(KV, HEADS // KV, DIM)
    print(f"{torch.cuda.get_device_name()}; floor of the scores {bytes_ / 3.0e6:.1f} us, of the reading "
          f"{COUNT * 16 * KV * DIM * 4 / 3.0e6:.1f} us", flush=True)
    dense = min(time_us(calls, 5)[0] for calls in dense_calls(1, HEADS, KV, n, DIM, copies(n * KV * DIM * 4)).values())
    print(f"dense decode {dense:.1f} us", flush=True)

    def two(t, low, high):
        return select.best_pages(q, low, high, t.length, COUNT, way="scores")

    def cut(c):
        return lambda t, low, high: best.best_pages(rows, low, high, t.length, COUNT, 16, True, c)

    def read(pages, t, early):
        return decode.attend(q, [select.read_pages(t, pages)], DIM**-0.5, early=early)

    ways = {"two calls (present)": (two, False), "two calls, read early": (two, True)}
    for c in best.variants(KV, n // 16):
        ways[str(c).replace("Slices", "slices")] = (cut(c), c.overlap > 0)
    want = [two(*s) for s in sets]
    out = read(want[0], sets[0][0], False).out.float()
    results = []
    for name, (pick, early) in ways.items():
        try:
            wrong = sum(int((pick(*s) != w).sum()) for s, w in zip(sets, want))
            far = float((read(pick(*sets[0]), sets[0][0], early).out.float() - out).abs().max())
            alone = time_us([lambda s=s: pick(*s) for s in sets], 5)[0]
            whole, spread = time_us([lambda s=s: read(pick(*s), s[0], early) for s in sets], 7)
        except Exception as e:
            print(name, "FAILED", repr(e)[:200], flush=True)
            continue
        results.append((whole, name))
        print(f"{name:100s} differs at {wrong:4d} of {len(sets) * KV * COUNT}, out {far:.1e}  select {alone:6.1f}  "
              f"step {whole:6.1f} ±{spread:3.1f} us  {dense / whole:5.2f}x", flush=True)
    reading = time_us([lambda s=s, p=p: read(p, s[0], False) for s, p in zip(sets, want)], 5)[0]
    print(f"reading and merge alone {reading:.1f} us; {time.perf_counter() - began:.0f} s in all")
    for whole, name in sorted(results)[:3]:
        print(f"best: {whole:.1f} us {name}")


if __name__ == "__main__":
    main()
