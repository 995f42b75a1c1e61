"""Milliseconds per decode step of every technique of the first issue, and of others that read or store less, on one GPU, beside
dense in the same run.

    python benchmarks/e2e_techniques.py [--prompt 1024] [--tokens 150] [--check 6] [SPEC ...]

SmolLM2-135M's geometry with random weights in bfloat16, batch 1, modules fused as the lab loads them. One line per stack: the
median and the mean step (the mean holds what runs between replays, such as coding a block of keys), the ratio to dense, how the
steps ran, and how far `--check` captured steps are from the same steps taken one by one (logits, relative norm; share of the
cache's history that agrees).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.machine import machine, write

LIMIT = 1.5
STACKS = (
    "streaming_llm", "streaming_llm(renumber=false)", "h2o", "tova", "snapkv", "pyramidkv", "int_codes(bits=8)",
    "int_codes(bits=4)", "int_codes(bits=2)", "kivi(bits=4)", "kivi(bits=2)", "snapkv+kivi", "h2o+int_codes(bits=4)",
    "zerotuning", "a_shape+delta", "head_pruning(fraction=0.2)", "quest(budget=0.2)", "block_topk(budget=0.2)",
    "rotated(bits=4)", "rotated(bits=4,mode=quarot)", "fp8", "h2o+rotated(bits=4)", "h2o+kivi(bits=2)",
)


def session_of(model, spec: str, ids: list[int], room: int, eager: bool = False):
    """A session whose prompt is read, and the logits of its last row."""
    from lab.engine.session import Session

    session = Session(model, spec, new_tokens=room, record=True)
    logits = session.prefill(ids)
    if eager:
        session.path = "step by step: asked for"
    return session, logits


def timed(model, spec: str, ids: list[int], tokens: int) -> dict:
    """Median and mean ms of a step after the first few, and how it ran. Step by step only a dozen are taken."""
    session, logits = session_of(model, spec, ids, tokens + 8)
    times = []
    for n in range(tokens):
        logits = session.step(logits.argmax(-1))
        times.append(session.last_ms)
        if n == 11 and session.path != "CUDA graph":
            break
    how = session.path or "?"
    if how == "CUDA graph":
        how += ", short" if session.own is None else f", modules ({session.own})"
    return {"spec": spec, "ms": statistics.median(times[4:]), "mean_ms": statistics.mean(times[4:]), "path": how,
            "kept": session.cache.kept_fraction, "kv_bytes": session.cache.kv_bytes}


def compared(model, spec: str, ids: list[int], count: int) -> dict:
    """Captured steps beside ordinary ones over the same tokens."""
    ours, _ = session_of(model, spec, ids, count + 8)
    theirs, _ = session_of(model, spec, ids, count + 8, eager=True)
    off = 0.0
    for token in ids[:count]:
        one = torch.tensor([token], device="cuda")
        a, b = ours.step(one), theirs.step(one)
        off = max(off, float((a - b).norm() / b.norm()))
    lives = []
    for session in (ours, theirs):
        layers = session.cache.lab_layers
        lives.append(torch.cat([x.long().cpu().flatten() for layer in layers for x in layer.history.upto(layer.seen)]))
    agree = float((lives[0] == lives[1]).float().mean())
    return {"off": off, "agree": agree, "bytes_equal": ours.cache.kv_bytes == theirs.cache.kv_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--check", type=int, default=6, help="steps to compare with ordinary ones; 0 for none")
    parser.add_argument("--one-stream", action="store_true", help="capture what steps change in line with the model")
    args = parser.parse_args()
    from benchmarks.e2e_gpu import small
    from lab.engine import session as engine

    engine.GraphedDecode = functools.partial(engine.GraphedDecode, beside=not args.one_stream)
    from lab.engine.attach import attach
    from lab.models.fuse import fuse

    model = small()
    attach(model)
    print("fused (products saved, norms):", fuse(model))
    torch.manual_seed(0)
    ids = torch.randint(2, 49000, (args.prompt,)).tolist()
    timed(model, "dense", ids, 8)  # compiles
    rows: list[dict] = []

    def keep(row: dict) -> Path:
        """Add a row to the results at once: a run that is cut off leaves what it has measured."""
        rows.append(row)
        settings = {"prompt": args.prompt, "one_stream": args.one_stream, "tokens": args.tokens, "limit": LIMIT}
        return write("e2e_techniques", settings | {"rows": rows})

    keep(timed(model, "dense", ids, args.tokens))
    dense = rows[0]["ms"]
    print(f"{'stack':32s} {'ms':>7s} {'mean':>7s} {'ratio':>6s} {'off':>8s} {'agree':>6s}  how")
    print(f"{'dense':32s} {dense:7.3f} {rows[0]['mean_ms']:7.3f} {1:6.2f} {'':8s} {'':6s}  {rows[0]['path']}", flush=True)
    for spec in args.specs or STACKS:
        try:
            row = timed(model, spec, ids, args.tokens)
            row["ratio"] = row["ms"] / dense
            row |= compared(model, spec, ids, args.check) if args.check and row["path"].startswith("CUDA") else {}
        except Exception as error:  # one stack's failure must not cost the others their line
            print(f"{spec:32s} failed: {type(error).__name__}: {str(error)[:160]}", flush=True)
            keep({"spec": spec, "error": f"{type(error).__name__}: {error}"})
            continue
        keep(row)
        off, agree = (f"{row['off']:8.1e}", f"{row['agree']:6.3f}") if "off" in row else ("", "")
        numbers = f"{row['ms']:7.3f} {row['mean_ms']:7.3f} {row['ratio']:6.2f} {off:>8s} {agree:>6s}"
        print(f"{spec:32s} {numbers}  {row['path']}", flush=True)
    where = keep(timed(model, "dense", ids, args.tokens) | {"spec": "dense, again"})
    print(f"{'dense, again':32s} {rows[-1]['ms']:7.3f}")
    over = [r["spec"] for r in rows if r.get("ratio", 0) > LIMIT or "error" in r]
    print(f"above {LIMIT} times dense:", ", ".join(over) if over else "none")
    print(machine())
    print("written to", where)


if __name__ == "__main__":
    main()
