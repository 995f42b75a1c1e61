"""Times tile configurations of the prefill kernels, so that kernels/prefill/launch.py can state the best.

    python benchmarks/prefill_variants.py [--warm I N]
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_timing import time_us
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


def main() -> None:
    """Print milliseconds and TFLOP/s of visible work."""
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
