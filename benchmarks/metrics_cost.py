"""What recording costs: the share of a run's decode time that is spent beside the model's own steps.

    python benchmarks/metrics_cost.py [--tokens 96] [--spec dense]

One variant is run through an experiment (events, beliefs, top alternatives, bytes, histories, captures); the time between its
first and last token is compared with the sum of its decode steps, which are timed alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lab  # noqa: F401  sets how OpenMP threads wait, before torch starts them

from benchmarks.machine import machine, write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--spec", default="dense")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    from lab.engine.events import Token
    from lab.measure.experiment import Experiment
    from lab.measure.request import RunRequest
    from lab.models import load

    loaded = load("default", device="cpu")
    shares = []
    for turn in range(args.rounds):
        request = RunRequest("The keeper wrote one line each evening. " * 40, (args.spec,), max_new_tokens=args.tokens)
        stamps, steps = [], []
        for event in Experiment(loaded, request).events():
            if isinstance(event, Token):
                stamps.append(time.perf_counter())
                steps.append(event.step_ms)
        if turn:
            whole = (stamps[-1] - stamps[0]) * 1e3
            shares.append(1 - sum(s for s in steps if s is not None) / whole)
    print(f"{args.spec}: recording takes {statistics.median(shares):.1%} of decode time ({min(shares):.1%} to {max(shares):.1%})")
    print(machine(), write("metrics_cost", {"spec": args.spec, "shares": shares}))


if __name__ == "__main__":
    main()
