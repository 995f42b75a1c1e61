"""Decode speed on the CPU against transformers' own `generate` with its default cache, interleaved in one run.

    python benchmarks/decode_cpu.py [--contexts 256,2048] [--rounds 9] [--tokens 12] [--specs "h2o,kivi(bits=4)"]

Each round gives every engine the same `tokens` decode steps in turn, in an order that rotates; a figure is the median over rounds
of the per-token time, and a ratio is the median over rounds of baseline time over ours in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lab  # noqa: F401  sets how OpenMP threads wait, before torch starts them; the baseline runs under the same setting
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import machine, spread, write


class Stamps(BaseStreamer):
    """Notes when `generate` hands over each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Baseline:
    """transformers' `generate`, default attention and default cache, float32."""

    name = "transformers generate"

    def __init__(self, folder: str, ids: list[int]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids = torch.tensor([ids])
        self.cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(self.ids[:, :-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.kept = self.ids.shape[1] - 1

    def steps(self, count: int) -> list[float]:
        """Milliseconds of `count` decode steps; the cache is put back afterwards."""
        stamps = Stamps()
        self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, max_new_tokens=count + 1,
            min_new_tokens=count + 1, do_sample=False, streamer=stamps, pad_token_id=0,
        )
        extra = self.cache.get_seq_length() - self.kept
        if extra > 0:
            self.cache.crop(-extra)
        times = stamps.times[1:]  # the first stamp is the prompt itself
        return [(b - a) * 1e3 for a, b in zip(times, times[1:])]


class Ours:
    """The lab's session on the same tokens; the cache is copied for every round."""

    def __init__(self, loaded, name: str, spec: str, ids: list[int]) -> None:
        from lab.engine.session import Session

        self.name, self.session = name, Session(loaded.model, spec, new_tokens=64)
        self.logits = self.session.prefill(ids)

    def steps(self, count: int) -> list[float]:
        twin, logits, times = self.session.fork(), self.logits, []
        for _ in range(count):
            logits = twin.step(logits.argmax(-1))
            times.append(twin.last_ms)
        return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", default="256,2048")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--weights", default="float32,bfloat16,int8,int4")
    parser.add_argument("--specs", default="", help="also these stacks, separated by ';', on the last weights mode named")
    parser.add_argument("--output", default="decode_cpu")
    args = parser.parse_args()

    from lab.models import load
    from lab.models.default import locate

    where = str(locate().folder)
    text = " ".join(__import__("pydoc_data.topics", fromlist=["topics"]).topics.values())
    rows = []
    for context in map(int, args.contexts.split(",")):
        engines, loaded = [], None
        for weights in args.weights.split(","):
            loaded = load("default", device="cpu", weights=weights)
            ids = loaded.tokenizer(text[: context * 12])["input_ids"][:context]
            engines.append(Ours(loaded, f"lab dense, {weights}", "dense", ids))
        for spec in filter(None, args.specs.split(";")):
            engines.append(Ours(loaded, f"lab {spec}, {weights}", spec, ids))
        engines.insert(0, Baseline(where, ids))
        times = {e.name: [] for e in engines}
        for turn in range(args.rounds + 1):
            shifted = engines[turn % len(engines) :] + engines[: turn % len(engines)]
            for engine in shifted:
                taken = statistics.median(engine.steps(args.tokens))
                if turn:  # the first round warms up
                    times[engine.name].append(taken)
        base = times[Baseline.name]
        print(f"\ncontext {context}, {args.rounds} rounds of {args.tokens} tokens")
        for name, values in times.items():
            ratio = [b / v for b, v in zip(base, values)]
            got, times_faster = spread(values), spread(ratio)
            print(f"  {name:<34} {got['median']:7.2f} ms/token [{got['q1']:.2f}, {got['q3']:.2f}]   "
                  f"{times_faster['median']:.2f}x [{times_faster['q1']:.2f}, {times_faster['q3']:.2f}]")
            rows.append({"context": context, "engine": name, "ms": got, "ratio_to_generate": times_faster})
    print(machine())
    print("written to", write(args.output, {"rows": rows}))


if __name__ == "__main__":
    main()
