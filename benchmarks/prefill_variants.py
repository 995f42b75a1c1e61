"""Times tile configurations of the prefill kernels, so that kernels/prefill/launch.py can state the best.

    python benchmarks/prefill_variants.py [--warm I N]
    python benchmarks/prefill_variants.py --delta [--long]

--delta: A-shape 2k with Delta every 64 rows at 32k (with --long also the default ways at 131k), way by way and tile by tile:
the largest difference from the three passes (they round the A-shape to bfloat16 before they correct it, so about one bfloat16
step is to be expected), milliseconds, and the ratio to cuDNN's dense prefill. About 20 s on an H100, half of it compilation;
--long adds 5.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_timing import time_us
from kernels.prefill.api import attend
from kernels.prefill.compose import a_shape, delta
from kernels.prefill.joined import choice as joined_choice
from kernels.prefill.joined import run as joined_run
from kernels.prefill.joined import variants as joined_variants
from kernels.prefill.launch import forward, mass_of
from kernels.prefill.library import causal
from kernels.prefill.options import normalise


def options(q, k, **kw):
    return normalise(q, k, **{**dict(start=None, window=None, sinks=0, rows=None, blocks=None, softcap=None, sink=None,
                                    key_bias=None, weight="softmax"), **kw})


def variants():
    """(what, head_dim, config)."""
    for c in [(128, 128, 8, 3, 1), (128, 128, 8, 3, 2)]:
        yield "forward", 128, c
    for c in [(128, 64, 8, 3, 1), (128, 64, 8, 4, 1), (128, 64, 8, 2, 1)]:
        yield "sigmoid", 128, c
    for c in [(128, 128, 8, 2, 1), (128, 128, 8, 2, 2), (128, 64, 8, 3, 2), (128, 64, 8, 3, 3), (128, 128, 8, 3, 2),
              (64, 64, 4, 3, 3)]:
        yield "a_shape", 128, c
    for c in [(64, 64, 4, 3, 3), (64, 64, 4, 4, 4), (128, 64, 8, 3, 3), (128, 128, 8, 2, 2), (64, 128, 8, 2, 2),
              (128, 128, 8, 3, 3)]:
        yield "rows", 128, c
    for c in [(128, 128, 4, 2, 1), (128, 128, 4, 3, 1), (64, 128, 8, 4, 1), (256, 128, 8, 2, 1), (128, 64, 4, 2, 1),
              (64, 256, 8, 3, 1)]:
        yield "mass", 128, c
    for c in [(128, 128, 8, 3, 1), (128, 128, 8, 2, 1)]:
        yield "forward", 64, c
    for c in [(128, 64, 4, 3, 1), (128, 128, 4, 2, 1), (64, 128, 4, 2, 1)]:
        yield "mass", 64, c


def delta_ways() -> None:
    """Print one line per way of A-shape with Delta."""
    heads, kv, dim, gamma, sinks, window = 32, 8, 128, 64, 64, 2048
    given = dict(gamma=gamma, sinks=sinks, window=window)
    worker = sys.argv[sys.argv.index("--worker") + 1 :] if "--worker" in sys.argv else None
    if worker is None:  # compile side by side
        helpers = [subprocess.Popen([sys.executable, __file__, "--delta", "--worker", str(i), "6"]) for i in range(6)]
        if any([h.wait() for h in helpers]):
            print("a compiling helper failed; its variants are compiled, or fail, below")
    for n in (4096,) if worker else (32768, 131072) if "--long" in sys.argv else (32768,):
        q = torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        repeats = 5 if n == 32768 else 3
        dense = 0.0 if worker else time_us([lambda: causal(q, k, v, dim**-0.5)], repeats)[0]
        if not worker:
            print(f"{torch.cuda.get_device_name()}, {n} tokens: cuDNN dense {dense / 1e3:.2f} ms", flush=True)
        tail = n % gamma + max(128, gamma)
        body = n - tail
        exact = torch.cat([torch.arange(0, body, gamma), torch.arange(body, n)]).to("cuda", torch.int32)

        def joined(c):
            return lambda: joined_run(q, k, v, dim**-0.5, exact, body, start=0, c=c, **given)

        def part(which, c):
            return lambda: joined_run(q, k, v, dim**-0.5, exact, body, start=0, c=c, only=which, **given)

        if worker:
            todo = [lambda: delta(q, k, v, dim**-0.5, way="passes", **given)] + [joined(c) for c in joined_variants(dim, gamma)]
            for call in todo[int(worker[0]) :: int(worker[1])]:
                with contextlib.suppress(Exception):  # said again, and printed, where it is timed
                    call()
            return
        calls = {"three passes (before)": lambda: delta(q, k, v, dim**-0.5, way="passes", **given),
                 "  of which A-shape": lambda: a_shape(q, k, v, dim**-0.5, sinks=sinks, window=window).out,
                 "  of which chosen rows": lambda: attend(q, k, v, dim**-0.5, rows=exact).out}
        default = joined_choice(dim, gamma, False)
        for c in joined_variants(dim, gamma) if n == 32768 else [default]:
            calls[str(c).replace("Joined", "joined")] = joined(c)
        alone = dict.fromkeys(replace(c, overlap=False, grouped=True) for c in joined_variants(dim, gamma))
        for c in alone if n == 32768 else [default]:
            calls[f"  rest alone {c.rest} waves {c.waves}"] = part("rest", c)
            calls[f"  A-shape and joining alone {c.shape}"] = part("shape", c)
        want = calls["three passes (before)"]()
        results = []
        for name, call in calls.items():
            try:
                got = call()
                far = float((got.float() - want.float()).abs().max()) if name[:1] != " " else 0.0
                del got
                us, spread = time_us([call], repeats)
            except Exception as e:
                print(name, "FAILED", repr(e)[:200], flush=True)
                continue
            off = f"differs by {far:.1e}  " if name[:1] != " " else ""
            print(f"{name:96s} {off}{us / 1e3:6.3f} ms ±{spread / 1e3:.3f}  {dense / us:5.2f}x", flush=True)
            if name[:1] != " ":
                results.append((us, name))
        for us, name in sorted(results)[:3]:
            print(f"best: {us / 1e3:.3f} ms {dense / us:.2f}x {name}")
        del q, k, v, want
        torch.cuda.empty_cache()


def main() -> None:
    """Print milliseconds and TFLOP/s of visible work."""
    if "--delta" in sys.argv:
        return delta_ways()
    warm = sys.argv[1:2] == ["--warm"]
    todo = list(variants())
    if warm:
        todo = todo[int(sys.argv[2]) :: int(sys.argv[3])]
    n = 256 if warm else 32768
    for dim in (128, 64):
        heads, kv = (32, 8) if dim == 128 else (9, 3)
        q = torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        if not warm:
            us, _ = time_us([lambda: causal(q, k, v, dim**-0.5)], 5)
            print(f"cudnn d{dim}: {us / 1e3:.2f} ms, {2 * n * n * dim * heads / us / 1e6:.0f} TFLOP/s", flush=True)
        plain = options(q, k)
        lse = forward(q, k, v, dim**-0.5, plain, False)[1]
        if not warm:
            ref = causal(q, k, v, dim**-0.5)
            print("cudnn lse agrees:", float((ref[1] - lse).abs().max()), flush=True)
        for what, d, config in todo:
            if d != dim:
                continue
            o, work = plain, n / 2
            if what == "sigmoid":
                o = options(q, k, weight="sigmoid")
            if what == "a_shape":
                o, work = options(q, k, window=2048, sinks=64), 2112
            if what == "rows":
                picked = torch.arange(0, n, 64 if not warm else 1, device="cuda", dtype=torch.int32)
                o, work = options(q, k, rows=picked), n / 128
            try:
                if what == "mass":
                    calls = [lambda: mass_of(q, k, lse, dim**-0.5, o, config)]
                else:
                    calls = [lambda: forward(q, k, v, dim**-0.5, o, False, config)]
                if warm:
                    calls[0]()
                    continue
                us, spread = time_us(calls, 5)
            except Exception as e:
                print(what, dim, config, "FAILED", repr(e)[:160], flush=True)
                continue
            flops = (2 if what == "mass" else 4) * n * work * dim * heads
            tile = f"rows {config[0]:3d} keys {config[1]:3d} w{config[2]} st{config[3]}/{config[4]}"
            print(f"{what:8s} d{dim} {tile} {us / 1e3:7.2f} ms"
                  f" ±{spread / 1e3:.2f} {flops / us / 1e6:5.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
