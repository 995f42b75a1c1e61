"""What packed linear weights alone bring on the CPU: transformers' own `generate` and attention on every model.

    python benchmarks/weights_cpu.py [--model default] [--context 256] [--rounds 7] [--tokens 12] [--modes float32,int8]

Every round gives each model the same prompt and number of new tokens in turn, in an order that rotates. A figure is the median
over rounds; a ratio is taken between times of the same round. KL is to the unpacked float32 model, in nats per token.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import machine, spread, write
from lab.engine.attach import detach
from lab.models import load
from lab.models.quality import sample_ids
from lab.models.sources import locate
from lab.models.stores import MODES


class Stamps(BaseStreamer):
    """Notes when `generate` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """(milliseconds to the first token, median milliseconds of the following ones) of one `generate`."""
    stamps = Stamps()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, min_new_tokens=tokens + 1,
                   do_sample=False, streamer=stamps, pad_token_id=0)
    prompt, *rest = stamps.times
    steps = [(after - before) * 1e3 for before, after in zip(rest, rest[1:], strict=False)]
    return (rest[0] - prompt) * 1e3, spread(steps)["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--output", default="weights_cpu")
    args = parser.parse_args()

    models: dict[str, PreTrainedModel] = {
        "generate": AutoModelForCausalLM.from_pretrained(locate(args.model).folder, dtype=torch.float32).eval()}
    facts: dict[str, Any] = {}
    for mode in args.modes.split(","):
        loaded = load(args.model, device="cpu", weights=mode)
        models[mode], facts[mode] = detach(loaded.model), loaded.facts
    ids = sample_ids(loaded.tokenizer, loaded.facts.vocab)
    ids = ids.repeat(1, -(-args.context // ids.shape[1]))[:, :args.context]

    prompt: dict[str, list[float]] = {name: [] for name in models}
    step: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(args.rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            first, each = timed(models[name], ids, args.tokens)
            if turn:  # the first round warms up
                prompt[name].append(first)
                step[name].append(each)

    rows = []
    print(f"{args.model}, context {args.context}, {args.rounds} rounds of {args.tokens} tokens")
    print(f"{'weights':<10} {'ms/token':>9} {'tok/s':>7} {'ratio':>6} {'[quartiles]':>14} {'prompt ms':>10} {'KL':>9}")
    for name in names:
        taken = spread(step[name])
        ratio = spread([base / ours for base, ours in zip(step["generate"], step[name], strict=True)])
        kl = facts[name].weights_kl if name in facts else None
        print(f"{name:<10} {taken['median']:9.2f} {1e3 / taken['median']:7.1f} {ratio['median']:5.2f}x "
              f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}] {spread(prompt[name])['median']:10.0f} "
              f"{'' if kl is None else format(kl, '9.5f'):>9}")
        rows.append({"weights": name, "ms_per_token": taken, "ratio_to_generate": ratio,
                     "prompt_ms": spread(prompt[name]), "kl": kl})
    print(machine())
    print("written to", write(args.output, {"model": args.model, "context": args.context, "rows": rows}))


if __name__ == "__main__":
    main()
