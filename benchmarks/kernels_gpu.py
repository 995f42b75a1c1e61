"""The table of the Triton kernels against what a user would pick instead, on the GPU at hand.

    python benchmarks/kernels_gpu.py [--scaling] [--quick] [--flex] [--out DIR]

Prints one line per operator and writes kernels_gpu.json (and kernels_gpu_scaling.json) with the machine in it. Times are
medians over CUDA-graph replays that rotate over more data than L2 holds. `floor_us` is the larger of bytes over the rate at
which this card reads (the fastest dense 16-bit decode of this run, a library's or ours: about 3.0 TB/s on an H100, 4.4 on an
H200; `read_tb_s` of the machine) and floating-point operations over 798 TFLOP/s (a large bf16 product on an H100; an H200 has
the same multiprocessors). --quick: only the rows that the issue's table asks for, and no 131k prefill; its file is
kernels_gpu_quick.json. --flex: compiled flex attention too, for decode and prefill at 32k (it takes a minute to compile, and
has never been the best).
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_cases import dense_calls, tier, tier_bytes
from benchmarks.gpu_timing import copies, machine, time_us
from kernels import decode, prefill, select

FLOPS_PER_US = 7.98e8
LLAMA, SMOL = (32, 8, 128), (9, 3, 64)


class Table:
    """Rows in the order they were measured."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.baselines: dict[tuple, tuple[str, float]] = {}
        size, (ours, _) = decode_time(lambda: [tier(16, 64, 32768, 128, 128)], 8, LLAMA)
        self.bytes_per_us = size / min(ours, self.dense(8, LLAMA, 32768)[1])  # what this card reads at

    def dense(self, batch: int, shape: tuple[int, int, int], n: int) -> tuple[str, float]:
        """Name and time of the best bf16 decode baseline."""
        key = (batch, shape, n)
        if key not in self.baselines:
            heads, kv, dim = shape
            calls = dense_calls(batch, heads, kv, n, dim, copies(4 * batch * kv * n * dim))
            times = {}
            for name, each in calls.items():
                try:
                    times[name] = time_us(each)[0]
                except RuntimeError as e:
                    print("baseline", name, "declined:", str(e)[:80])
            best = min(times, key=times.get)
            self.baselines[key] = (best, times[best])
            calls.clear()
            torch.cuda.empty_cache()
        return self.baselines[key]

    def add(self, op: str, bits: int, batch: int, shape: tuple[int, int, int], n: int, ours: tuple[float, float],
            baseline: tuple[str, float], size: float = 0.0, operations: float = 0.0) -> dict:
        """Record and print one measurement; size (bytes) and operations give its floor."""
        floor = max(size / self.bytes_per_us, operations / FLOPS_PER_US)
        heads, kv, dim = shape
        row = {"op": op, "bits": bits, "batch": batch, "heads": heads, "kv_heads": kv, "head_dim": dim, "context": n,
               "ours_us": round(ours[0], 1), "baseline": baseline[0], "baseline_us": round(baseline[1], 1),
               "floor_us": round(floor, 1)}
        self.rows.append(row)
        print(f"{op:34s} b{bits:<2d} B{batch:<2d} {heads}/{kv}/{dim} {n:7d} ours {ours[0]:9.1f} ±{ours[1]:4.1f} {baseline[0]:12s}"
              f" {baseline[1]:9.1f}  ratio {baseline[1] / ours[0]:5.2f}  floor {floor:8.1f}", flush=True)
        return row


def decode_time(tiers_of, batch: int, shape: tuple[int, int, int], **options) -> tuple[int, tuple[float, float]]:
    """(bytes read, (median, spread)) of decode.attend over rotating tier lists made by tiers_of()."""
    heads, _, dim = shape
    first = tiers_of()
    size = sum(tier_bytes(t) for t in first)
    sets = [first] + [tiers_of() for _ in range(copies(size) - 1)]
    q = torch.randn(batch, heads, dim, device="cuda", dtype=torch.bfloat16)
    us = time_us([lambda s=s: decode.attend(q, s, dim**-0.5, **options) for s in sets])
    del sets, first
    torch.cuda.empty_cache()
    return size, us


def decode_rows(table: Table, quick: bool = False) -> None:
    """Every width, code and raggedness against the best bf16 decode."""
    cases = [
        ("decode", 16, 1, LLAMA, 32768, 128, "token"), ("decode", 16, 8, LLAMA, 32768, 128, "token"),
        ("decode", 16, 1, LLAMA, 131072, 128, "token"), ("decode", 16, 8, SMOL, 32768, 64, "token"),
        ("decode g128", 8, 8, LLAMA, 32768, 128, "token"), ("decode g64", 8, 8, LLAMA, 32768, 64, "token"),
        ("decode fp8", 8, 8, LLAMA, 32768, 128, "fp8"), ("decode g64", 8, 1, LLAMA, 32768, 64, "token"),
        ("decode g64", 4, 8, LLAMA, 32768, 64, "token"), ("decode g128", 4, 8, LLAMA, 32768, 128, "token"),
        ("decode g32", 4, 8, LLAMA, 32768, 32, "token"), ("decode kivi", 4, 8, LLAMA, 32768, 64, "block"),
        ("decode g64", 4, 1, LLAMA, 32768, 64, "token"), ("decode g64", 4, 1, LLAMA, 131072, 64, "token"),
        ("decode g64", 2, 8, LLAMA, 32768, 64, "token"), ("decode kivi", 2, 8, LLAMA, 32768, 64, "block"),
        ("decode g64", 4, 8, SMOL, 32768, 64, "token"), ("decode g64", 4, 1, SMOL, 32768, 64, "token"),
    ]
    if quick:
        cases = [c for c in cases
                 if c[0] in ("decode", "decode g64") and (c[2] == 8 or c[4] == 131072) and (c[1], c[4]) != (16, 131072)]
    for op, bits, batch, shape, n, group, kind in cases:
        size, us = decode_time(lambda: [tier(bits, batch * shape[1], n, shape[2], group, kind=kind)], batch, shape)
        table.add(op, bits, batch, shape, n, us, table.dense(batch, shape, n), size)
    lanes, n = 64, 32768
    parts = {16: n // 16, 8: n // 8, 4: n // 4, 2: n // 2}  # and n/16 evicted: 4 bits on average
    size, us = decode_time(lambda: [tier(b, lanes, m, 128, 64) for b, m in parts.items()], 8, LLAMA)
    pure = next(r for r in table.rows if r["op"] == "decode g64" and r["bits"] == 4 and r["batch"] == 8)["ours_us"]
    table.add("decode mixed 16/8/4/2 (4 bits)", 4, 8, LLAMA, n, us, ("ours int4", pure), size)
    generator = torch.Generator().manual_seed(1)
    kept = (torch.rand(lanes, generator=generator) * 0.4 + 0.05).mul(n).int()
    size, us = decode_time(lambda: [tier(16, lanes, n, 128, 128, lengths=kept)], 8, LLAMA)
    share = float(kept.float().mean()) / n
    table.add(f"decode ragged {share:.0%} kept", 16, 8, LLAMA, n, us, table.dense(8, LLAMA, n), size)
    even = torch.full((lanes,), int(kept.float().mean()))
    size, budget = decode_time(lambda: [tier(16, lanes, n, 128, 128, lengths=even)], 8, LLAMA)
    table.add("decode ragged vs even budget", 16, 8, LLAMA, n, us, ("ours even", budget[0]), size)
    ways = (("bytes", "decode with mass and entropy"), ("halves", "decode with mass (halves), entropy"))
    for bits in (16, 8, 4, 2):
        _, own = decode_time(lambda: [tier(bits, lanes, n, 128, 64)], 8, LLAMA)  # again, beside what it is compared with
        for way, named in ways if bits in (16, 4) else ways[:1]:
            size, us = decode_time(
                lambda: [tier(bits, lanes, n, 128, 64)], 8, LLAMA, want_mass=True, want_entropy=True, weights_as=way
            )
            table.add(named, bits, 8, LLAMA, n, us, ("ours without", own[0]), size)


def quest_row(table: Table) -> None:
    """Page scores, selection and reading 1k tokens at 131k, against dense decode."""
    n, (heads, kv, dim) = 131072, LLAMA
    count = copies(n // 16 * kv * dim * 4)
    sets = []
    for _ in range(count):
        t = tier(16, kv, n, dim, dim)
        sets.append((t, *select.page_summaries(t, 16)))
    q = torch.randn(1, heads, dim, device="cuda", dtype=torch.bfloat16)

    def step(t, low, high):
        return select.attend_best(q, t, low, high, 64, dim**-0.5)

    us = time_us([lambda s=s: step(*s) for s in sets])
    size = n // 16 * kv * dim * 4 + 1024 * kv * dim * 4
    table.add("quest: score, select, read 1k", 16, 1, LLAMA, n, us, table.dense(1, LLAMA, n), size)
    t, low, high = sets[0]
    pages = select.best_pages(q, low, high, t.length, 64)
    parts = [time_us([lambda s=s: select.page_scores(q, s[1], s[2], s[0].length) for s in sets])[0],
             time_us([lambda s=s: select.best_pages(q, s[1], s[2], s[0].length, 64) for s in sets])[0],
             time_us([lambda s=s: decode.attend(q, [select.read_pages(s[0], pages)], dim**-0.5) for s in sets])[0]]
    print("  scores alone, scores and selection, reading:", [round(p, 1) for p in parts], flush=True)


def prefill_rows(table: Table, long: bool = True) -> None:
    """Prefill with statistics, sigmoid, A-shape with Delta, against the best dense prefill without."""
    heads, kv, dim = LLAMA
    scale = dim**-0.5
    for n in (32768, 131072) if long else (32768,):
        q = torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        repeats = 7 if n == 32768 else 3

        def once(f):
            return time_us([f], repeats)

        def library(backend):
            def go():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return go

        flash = ("flash", once(library(SDPBackend.FLASH_ATTENTION))[0])
        cudnn = ("cudnn", once(library(SDPBackend.CUDNN_ATTENTION))[0])
        best = min(flash, cudnn, key=lambda x: x[1])
        work = 2 * n * n * dim * heads
        if n == 32768:
            table.add("prefill (our Triton forward)", 16, 1, LLAMA, n,
                      once(lambda: prefill.attend(q, k, v, scale, impl="triton")), best, operations=work)
            table.add("prefill with mass and row lse", 16, 1, LLAMA, n,
                      once(lambda: prefill.attend(q, k, v, scale, want_mass=True)), best,
                      operations=work * 1.5)
            table.add("prefill with entropy, lse, mass", 16, 1, LLAMA, n,
                      once(lambda: prefill.attend(q, k, v, scale, want_mass=True, want_entropy=True)), best,
                      operations=work * 1.5)
            table.add("prefill sigmoid", 16, 1, LLAMA, n,
                      once(lambda: prefill.attend(q, k, v, scale, weight="sigmoid")), flash,
                      operations=work)
        sparse = 4 * n * (2048 + 64) * dim * heads
        table.add("prefill a-shape 2k", 16, 1, LLAMA, n,
                  once(lambda: prefill.a_shape(q, k, v, scale, sinks=64, window=2048)), best,
                  operations=sparse)
        table.add("prefill a-shape 2k + delta 64", 16, 1, LLAMA, n,
                  once(lambda: prefill.delta(q, k, v, scale, gamma=64, sinks=64, window=2048)), best,
                  operations=sparse + work / 64)
        del q, k, v
        torch.cuda.empty_cache()


def flex_rows(table: Table) -> None:
    """Compiled flex attention beside our kernels' own rows: decode at 32k, batch 1 and 8, and causal prefill at 32k."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention, dynamic=False)
    heads, kv, dim, n = *LLAMA, 32768
    own = {(r["op"], r["batch"]): r for r in table.rows if r["bits"] == 16 and r["context"] == n and r["heads"] == heads}
    for batch, queries, named in ((1, 1, "decode"), (8, 1, "decode"), (1, n, "prefill (our Triton forward)")):
        q = torch.randn(batch, heads, queries, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, kv, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda") if queries > 1 else None
        call = lambda: run(q, k, v, block_mask=mask, enable_gqa=True, scale=dim**-0.5)  # noqa: E731
        for _ in range(3):
            call()
        kind = dict(operations=2 * n * n * dim * heads) if queries > 1 else dict(size=4 * batch * kv * n * dim)
        table.add(f"{named}, against compiled flex", 16, batch, LLAMA, n, (own[named, batch]["ours_us"], 0.0),
                  ("flex", time_us([call] * 2, 5)[0]), **kind)


def scaling(table: Table) -> list[dict]:
    """Decode time against context (batch 1) and against batch (8k tokens), by width, with the best baseline."""
    out = []
    points = [(1, 1 << e) for e in range(10, 21, 2)] + [(b, 8192) for b in (1, 4, 16, 64)]
    for batch, n in points:
        row = {"batch": batch, "context": n, "heads": 32, "kv_heads": 8, "head_dim": 128}
        row["baseline"], row["baseline_us"] = table.dense(batch, LLAMA, n)
        for bits in (16, 8, 4, 2):
            size, (us, _) = decode_time(lambda: [tier(bits, batch * 8, n, 128, 64)], batch, LLAMA)
            row[f"ours_{bits}_us"], row[f"floor_{bits}_us"] = round(us, 1), round(size / table.bytes_per_us, 1)
        row["baseline_us"] = round(row["baseline_us"], 1)
        out.append(row)
        print(row, flush=True)
    return out


def main() -> None:
    """Measure, print, write."""
    folder = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else os.path.join(os.path.dirname(__file__), "results")
    os.makedirs(folder, exist_ok=True)
    quick = "--quick" in sys.argv
    table = Table()
    card = {**machine(), "read_tb_s": round(table.bytes_per_us / 1e6, 2)}
    print(card, flush=True)

    def write(name: str, rows: list[dict]) -> None:
        with open(os.path.join(folder, name + ".json"), "w") as f:
            json.dump({"machine": card, "rows": rows}, f, indent=1)

    def scale(table: Table) -> None:
        write("kernels_gpu_scaling", scaling(table))

    parts = [lambda t: decode_rows(t, quick), quest_row, lambda t: prefill_rows(t, long=not quick)]
    for part in parts + [scale] * ("--scaling" in sys.argv) + [flex_rows] * ("--flex" in sys.argv):
        try:
            part(table)
        except Exception as error:  # a baseline that does not compile must not cost the rows measured before it
            print("stopped early:", type(error).__name__, str(error)[:200], flush=True)
        write("kernels_gpu_quick" if quick else "kernels_gpu", table.rows)


if __name__ == "__main__":
    main()
