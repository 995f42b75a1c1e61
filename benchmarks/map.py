"""How fast attention is drawn: the overview of one head, then 512 x 512 views anywhere in the run.

    python benchmarks/map.py --context 8192 --json
    python benchmarks/map.py --context 8192 --layers 30 --json
    python benchmarks/map.py --context 32768 --device cuda --json

Synthetic queries and keys with the default model's geometry (9 query heads, 3 KV heads, 64 channels), a quarter of the
entries evicted; float16, as captures are. The last line is one JSON object: ``overview_s`` is the first drawing of the whole
run by one head (the larger of max and mean pooling), ``view_ms_median`` the median over windows, zooms, heads and poolings of
one layer after that. ``--layers N`` adds reductions over every head of N layers: for ``all_mean``, ``all_max`` and
``rollout``, ``overview_s_*`` is the first drawing and ``view_ms_median_*`` and ``view_ms_max_*`` any later window. On CUDA
single heads, and reductions that commute with pooling, go through ``kernels.view``; ``kernel`` says whether it served, and
``compile_s`` what its compilation took. Progress goes to standard error. Imports torch, numpy and, on CUDA, triton only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels.backend import has_triton  # noqa: E402
from lab.inspect import store  # noqa: E402
from lab.inspect.capture import NEVER, Capture  # noqa: E402
from lab.inspect.lens import Heads, Rollout  # noqa: E402
from lab.inspect.view import overview, view  # noqa: E402

START = time.perf_counter()


def synthetic(context: int, heads: int, kv_heads: int, dim: int, evicted: float, device: str, layer: int = 0) -> Capture:
    """A capture of random vectors; a share of the entries dies at random rows after its own."""
    g = torch.Generator().manual_seed(layer)
    q = torch.randn(heads, context, dim, generator=g)
    k = torch.randn(kv_heads, context, dim, generator=g)
    own = torch.arange(context).expand(kv_heads, context)
    life = (torch.rand(kv_heads, context, generator=g) * (context - own)).long() + own + 1
    death = torch.where(torch.rand(kv_heads, context, generator=g) < evicted, life, NEVER).int()
    bits = torch.where(death < NEVER, 0, 16).to(torch.uint8)
    return Capture(q.to(device, torch.float16), k.to(device, torch.float16), death=death, bits=bits, layer=layer)


def windows(context: int, count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Square windows of every zoom from 512 tokens to the whole run, at reproducible places on or under the diagonal."""
    rng = random.Random(0)
    out = []
    while len(out) < count:
        side = min(context, 512 * 2 ** (len(out) % 8))
        side = max(1, min(context, int(side * rng.uniform(0.75, 1.0)))) if len(out) % 2 else side
        r = rng.randint(0, context - side)
        c = rng.randint(0, max(0, min(r, context - side)))
        out.append(((r, r + side), (c, c + side)))
    return out


def clock(device: str, work: Callable, *args) -> float:
    """Seconds ``work(*args)`` took, with the GPU's queue emptied."""
    start = time.perf_counter()
    work(*args)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(f"{time.perf_counter() - START:6.1f} s  {text}", file=sys.stderr, flush=True)


def one_layer(capture: Capture, a: argparse.Namespace) -> dict[str, float]:
    """Views of single heads and of all heads of a layer."""
    result: dict[str, float] = {}
    last = (a.context - min(512, a.context), a.context)
    result["first_window_ms"] = round(1000 * clock(a.device, view, capture, 1, last, None, a.size, a.size), 1)
    both = [clock(a.device, overview, capture, 0, a.size, pool) for pool in ("max", "mean")]
    result["overview_s"] = round(max(both), 3)
    say(f"overview of one head {result['overview_s']} s")
    result["overview_mean_of_heads_s"] = round(clock(a.device, overview, capture, "mean", a.size), 3)
    result["overview_max_of_heads_s"] = round(clock(a.device, overview, capture, "max", a.size), 3)
    times: dict[str, list[float]] = {}
    for head in (0, "mean", "max"):
        name = "one_head" if head == 0 else f"{head}_of_heads"
        for pool in ("max", "mean"):
            for rows, cols in windows(a.context, a.views):
                ms = 1000 * clock(a.device, view, capture, head, rows, cols, a.size, a.size, pool)
                times.setdefault(name, []).append(ms)
        say(f"views of {name}: median {statistics.median(times[name]):.0f} ms")
    every = [ms for group in times.values() for ms in group]
    result["view_ms_median"], result["view_ms_max"] = round(statistics.median(every), 1), round(max(every), 1)
    for name, group in times.items():
        result[f"view_ms_median_{name}"] = round(statistics.median(group), 1)
        result[f"view_ms_max_{name}"] = round(max(group), 1)
    return result


def all_layers(captures: list[Capture], a: argparse.Namespace) -> dict[str, float]:
    """Views of reductions over every head of every layer."""
    result: dict[str, float] = {}
    lenses = {"all_mean": Heads(captures, "mean", "mean"), "all_max": Heads(captures, "max", "max"),
              "rollout": Rollout(captures)}
    for name in a.reductions.split(","):
        def draw(rows, cols, pool, lens=lenses[name]):
            return lens.view(rows, cols, a.size, a.size, pool)

        whole = (0, a.context)
        result[f"overview_s_{name}"] = round(clock(a.device, draw, whole, whole, "max"), 2)
        say(f"first drawing of {name} {result[f'overview_s_{name}']} s")
        times = [1000 * clock(a.device, draw, rows, cols, pool) for pool in ("max", "mean")
                 for rows, cols in windows(a.context, min(16, a.views))]
        result[f"view_ms_median_{name}"] = round(statistics.median(times), 1)
        result[f"view_ms_max_{name}"] = round(max(times), 1)
        say(f"views of {name}: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")
    return result


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--context", type=int, default=8192)
    p.add_argument("--size", type=int, default=512, help="cells per side of a view")
    p.add_argument("--views", type=int, default=32, help="windows measured for each head and pooling")
    p.add_argument("--layers", type=int, default=1, help="layers combined by the reductions over all heads (1: none)")
    p.add_argument("--reductions", default="all_mean,all_max,rollout", help="which of them")
    p.add_argument("--heads", type=int, default=9)
    p.add_argument("--kv-heads", type=int, default=3)
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--evicted", type=float, default=0.25)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true", help="print only the JSON line")
    a = p.parse_args()
    shape = (a.heads, a.kv_heads, a.dim, a.evicted, a.device)
    captures = [synthetic(a.context, *shape, layer=n) for n in range(a.layers)]
    result = {"context": a.context, "layers": a.layers, "kernel": a.device != "cpu" and has_triton(), "device": a.device,
              "threads": torch.get_num_threads(), "size": a.size}
    say(f"{a.layers} layers of {a.context:,} tokens")
    if a.device != "cpu":
        small = synthetic(256, *shape)
        result["compile_s"] = round(sum(clock(a.device, view, small, head, None, None, 64, 64) for head in (0, "mean")), 2)
        say(f"compiled in {result['compile_s']} s")
    result |= one_layer(captures[0], a)
    if a.layers > 1:
        result |= all_layers(captures, a)
    result["stored_mib"] = round(store.stored_bytes() / 2**20, 1)
    if not a.json:
        for key, value in result.items():
            print(f"{key:30} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
