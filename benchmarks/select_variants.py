"""Quest at 131k tokens, part by part and way by way: which slices, warps and overlaps `kernels/select/best.py` should state.

    python benchmarks/select_variants.py [--context 131072]

For every way: the largest difference of its output from the first way's (sums of 128 products may be rounded in another order, so
two pages of all but equal scores can change places; "pages differ" counts that), microseconds of the whole step (selection,
reading 1,024 tokens of the pages, merge), the ratio to dense decode measured beside it, and of the selection alone where it is a
call of its own. "joined" is `select.attend_best`. About 20 s on an H100, most of it compilation.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_cases import dense_calls, tier
from benchmarks.gpu_timing import copies, time_us
from kernels import decode, select
from kernels.select import best

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
        return lambda t, low, high: best.best_pages(rows, low, high, t.length, COUNT, 16, 1, c)

    def read(pages, t, early):
        return decode.attend(q, [select.read_pages(t, pages)], DIM**-0.5, early=early)

    def steps(pick, early):
        return lambda t, low, high: read(pick(t, low, high), t, early)

    def joined(c, share=64):
        return lambda t, low, high: best.attend(q, t, low, high, COUNT, DIM**-0.5, 16, 1, c, share)

    cuts = best.variants(KV, n // 16)
    ways = {"scores, pages, read (before)": (two, steps(two, False))}  # name: (selection alone or None, whole step)
    for c in cuts:
        ways["joined " + str(c)] = (None, joined(c))
    for share in (16, 32, 128):
        ways[f"joined, {share} entries a program, {cuts[0]}"] = (None, joined(cuts[0], share))
    for last_warps in (2, 8):
        c = replace(cuts[0], last_warps=last_warps)
        ways["joined " + str(c)] = (None, joined(c))
    for c in cuts[:2]:
        ways["best_pages, read " + str(c)] = (cut(c), steps(cut(c), c.overlap > 0))
    want = [two(*s) for s in sets]
    out = [read(w, s[0], False).out.float() for w, s in zip(want, sets)]
    results = []
    for name, (pick, whole) in ways.items():
        try:
            far = max(float((whole(*s).out.float() - o).abs().max()) for s, o in zip(sets, out))
            alone = ""
            if pick is not None:
                wrong = sum(int((pick(*s) != w).sum()) for s, w in zip(sets, want))
                us = time_us([lambda s=s: pick(*s) for s in sets], 5)[0]
                alone = f"pages differ at {wrong} of {len(sets) * KV * COUNT}, selection {us:.1f}"
            us, spread = time_us([lambda s=s: whole(*s) for s in sets], 7)
        except Exception as e:
            print(name, "FAILED", repr(e)[:200], flush=True)
            continue
        results.append((us, name))
        print(f"{name:108s} out differs by {far:.1e}  step {us:6.1f} ±{spread:3.1f} us  {dense / us:5.2f}x  {alone}", flush=True)
    reading = time_us([lambda s=s, p=p: read(p, s[0], False) for s, p in zip(sets, want)], 5)[0]
    print(f"reading and merge alone {reading:.1f} us; {time.perf_counter() - began:.0f} s in all")
    for us, name in sorted(results)[:3]:
        print(f"best: {us:.1f} us {name}")


if __name__ == "__main__":
    main()
