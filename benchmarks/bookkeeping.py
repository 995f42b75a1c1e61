"""What a policy's bookkeeping costs per decode step on CPU, beside dense in the same run.

    python benchmarks/bookkeeping.py [--prompt 1024] [--steps 24] [--json] [SPEC ...]

Dense and the policy take turns, step by step, in processor time of one thread, so that other work on the machine hits both
alike. The ratio is of the medians; above 1 the policy costs more than the smaller cache saves. The mean shows bursts. What
costs more than a quarter of a dense step is listed at the end, with what its steps do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.machine import write  # noqa: E402
from lab.engine.sample_text import prose  # noqa: E402
from lab.engine.session import Session  # noqa: E402

LIMIT = 1.25
POLICIES = (
    "streaming_llm", "streaming_llm(renumber=false)", "h2o", "tova", "snapkv", "vatp(budget=0.25)", "vatp(budget=0.25,wo=true)",
    "expected_attention", "keydiff", "knorm", "random_score", "arkv_score", "adakv+snapkv", "adakv+h2o",
    "global_top+snapkv", "h2o+cam", "h2o+d2o_merge",
    "h2o+d2o_merge(multiplicity=true)", "arkv", "int_codes", "int_codes(bits=4)", "int_codes(bits=2)", "kivi", "snapkv+kivi",
    "zerotuning", "head_pruning(heads=1)", "rotated", "fp8", "kvquant", "think",
    "dwb", "dwb(interval=1)", "quest", "quest(budget=1024)", "block_topk",
)


def why(session: Session) -> str:
    """What a stack's decode steps do that a dense step does not, by how the engine runs them."""
    policy, layer = session.cache.policy, session.cache.lab_layers[-1]
    doing = []
    if policy.encoder is not None or layer.coded_k:
        held = sum(sum(c.rows.lens) for c in layer.coded_k)
        widths = "/".join(str(c.bits) for c in layer.coded_k) or "no"
        doing.append(f"codes a row and reads {held} entries of {widths} bits a layer as numbers")
    if policy.scorer is not None and policy.scorer.evicts_in_decode:
        doing.append("scores every entry and drops one")
    if policy.reducer is not None:
        doing.append("merges what leaves")
    if policy.choosers:
        doing.append("chooses what to read and fetches it")
    if policy.tiered:
        doing.append("sets the bits of single entries")
    if layer.step is not None:
        return f"in place ({type(layer.step).__name__}): {', '.join(doing) or 'nothing more'}"
    return f"ordinary steps, because {policy.not_in_place or 'a layer is stored unevenly'}: {', '.join(doing) or 'nothing more'}"


def pair(model, ids: list[int], prompt: int, steps: int, spec: str) -> dict:
    """Processor time of dense and of `spec`, in ms per step."""
    sessions = [Session(model, s, new_tokens=steps) for s in ("dense", spec)]
    for session in sessions:
        session.prefill(ids[:prompt])
    spent: list[list[float]] = [[], []]
    for t in range(steps):
        for session, times in zip(sessions, spent):
            start = time.process_time()
            session.step(torch.tensor([ids[prompt + t]]))
            times.append((time.process_time() - start) * 1e3)
    dense, own = (sorted(times[2:]) for times in spent)
    return {
        "spec": spec, "dense_ms": statistics.median(dense), "ms": statistics.median(own),
        "ratio": statistics.median(own) / statistics.median(dense),
        "mean_ratio": statistics.mean(own) / statistics.mean(dense), "kept": sessions[1].cache.kept_fraction,
        "why": why(sessions[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/bookkeeping.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from lab import models

    loaded = models.load("default")
    ids = loaded.tokenizer(prose("measure")[: 20 * options.prompt], add_special_tokens=False)["input_ids"]
    rows = []
    print(f"{'policy':40s} {'kept':>5s} {'dense ms':>9s} {'ms':>7s} {'ratio':>6s} {'mean':>6s}")
    for spec in options.specs or POLICIES:
        rows.append(pair(loaded.model, ids, options.prompt, options.steps, spec))
        r = rows[-1]
        print(f"{spec:40s} {r['kept']:5.2f} {r['dense_ms']:9.1f} {r['ms']:7.1f} {r['ratio']:6.2f} {r['mean_ratio']:6.2f}",
              flush=True)
    over = [r for r in rows if r["ratio"] > LIMIT]
    print(f"\nabove {LIMIT} times dense: {len(over)} of {len(rows)}")
    for r in over:
        print(f"  {r['spec']:38s} {r['ratio']:5.2f}  {r['why']}")
    if options.json:
        print(write("bookkeeping", {"prompt": options.prompt, "steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main()
