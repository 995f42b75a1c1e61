"""Coding on the GPU at hand: the kernels of `kernels.encode` and rectified prefill beside the same in torch, one line each.

    python benchmarks/encode_gpu.py [--out DIR]

Every operator is first compared with its torch path on the same card. Times are medians over CUDA-graph replays that rotate over
more data than L2 holds; `floor_us` is bytes read and written over 3.0 TB/s. Writes encode_gpu.json with the machine in it.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks.gpu_timing import copies, machine, time_us
from kernels import encode, levels, prefill
from kernels.prefill import rectify

LANES, ROWS, DIM = 8, 32768, 128  # one layer of a Llama-3-8B prompt of 32k
BYTES_PER_US = 3.0e6


def coders() -> dict[str, tuple]:
    """Name -> (bits, function of x [LANES, ROWS, DIM] and impl)."""
    turn, table = levels.rotation(DIM, 0).cuda(), {b: levels.normal_levels(b).cuda() for b in (3, 4)}
    found = {}
    for bits in (8, 4, 2):
        found[f"per token, {bits} bits"] = bits, lambda x, impl, bits=bits: encode.tokens(x, bits, 64, impl=impl)
        found[f"per channel, {bits} bits"] = bits, lambda x, impl, bits=bits: encode.channels(
            x.unflatten(1, (-1, 32)), bits, impl=impl)
    for bits in table:
        found[f"rotated by table, {bits} bits"] = bits, lambda x, impl, bits=bits: encode.table(
            x, table[bits], bits, turn=turn, by_norm=True, impl=impl)
    return found


def coding() -> list[dict]:
    count = copies(2 * LANES * ROWS * DIM)
    inputs = [torch.randn(LANES, ROWS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    rows = []
    for name, (bits, code) in coders().items():
        got, want = code(inputs[0], "triton"), code(inputs[0], "torch")
        same = min(float((a == b).double().mean()) for a, b in zip(got, want))
        times = {impl: time_us([lambda x=x: code(x, impl) for x in inputs])[0] for impl in ("triton", "torch")}
        floor = LANES * ROWS * DIM * (2 + bits / 8) / BYTES_PER_US
        rows.append({"op": name, "equal": same, "ours_us": times["triton"], "torch_us": times["torch"], "floor_us": floor})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def rectified() -> list[dict]:
    """Rectified prefill (blocks of 128) against the best dense prefill here, its error against torch on a short prompt."""
    make = lambda n: [torch.randn(1, h, n, DIM, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8)]  # noqa: E731
    scale, rows = DIM**-0.5, []
    q, k, v = make(1024)
    got, want = (prefill.rectified(q, k, v, scale, share=0.3, impl=impl).float() for impl in ("triton", "torch"))
    error = float((got - want).norm() / want.norm())
    for n in (8192, ROWS):
        q, k, v = make(n)
        dense = time_us([lambda: prefill.attend(q, k, v, scale)] * 2, repeats=5)[0]
        for share in (0.1, 0.3):
            critical = rectify.plan(q, k, v, scale, block=128, share=share).critical
            read = float(critical.double().sum() / critical.double().fill_(1).tril().sum())
            ours = time_us([lambda: prefill.rectified(q, k, v, scale, share=share)] * 2, repeats=5)[0]
            rows.append({"op": "rectified prefill", "context": n, "share": share, "blocks_read": read, "ours_us": ours,
                         "dense_us": dense, "error": error})
            print({k_: round(x, 4) if isinstance(x, float) else x for k_, x in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    folder = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else os.path.join(os.path.dirname(__file__), "results")
    os.makedirs(folder, exist_ok=True)
    card = machine()
    print(card, flush=True)
    with open(os.path.join(folder, "encode_gpu.json"), "w") as f:
        json.dump({"machine": card, "coding": coding(), "prefill": rectified()}, f, indent=1)


if __name__ == "__main__":
    main()
