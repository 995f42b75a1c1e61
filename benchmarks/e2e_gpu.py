"""Milliseconds per token of whole decode steps on one GPU, beside what a user would pick instead, in one run.

    python benchmarks/e2e_gpu.py [--prompt 512] [--tokens 48] [--no-compile]

SmolLM2-135M's geometry with random weights in bfloat16, batch 1. Baselines: transformers `generate` with its default cache, the
same with its static cache (and compile, unless switched off), and one captured forward with transformers' StaticCache. Ours:
a session's steps, dense and under each stack named below, with how they ran (captured or step by step).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import machine, write

STACKS = ("dense", "snapkv(budget=0.25)", "pyramidkv(budget=0.25)", "head_pruning(fraction=0.2)", "a_shape+delta", "h2o", "streaming_llm",
          "int_codes(bits=4)", "kivi(bits=2)", "zerotuning")


class Stamps(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def geometry() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def by_generate(model, ids, tokens, **options) -> float:
    """Median ms between tokens of `generate`, after one warm-up call."""
    for _ in range(2):
        stamps = Stamps()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=stamps, **options)
    gaps = [(b - a) * 1e3 for a, b in zip(stamps.times[2:], stamps.times[3:])]
    return statistics.median(gaps)


def captured_static(model, ids, tokens) -> float:
    """One decode forward with transformers' StaticCache, captured in a graph and replayed."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens + 8)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, -1:].clone()
        place = torch.tensor([[ids.shape[1]]], device="cuda")
        run = lambda: model(token, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # noqa: E731
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return timed(graph.replay, tokens)


def timed(step, count: int) -> float:
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def ours(model, spec, ids, tokens) -> tuple[float, str]:
    from lab.engine.session import Session

    session = Session(model, spec, new_tokens=tokens + 8)
    logits = session.prefill(ids[0].tolist())
    times = []
    for _ in range(tokens):
        logits = session.step(logits.argmax(-1))
        times.append(session.last_ms)
    return statistics.median(times[4:]), session.path or "?"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    from lab.engine.attach import attach
    from lab.models.fuse import fuse

    model = geometry()
    ids = torch.randint(2, 49000, (1, args.prompt), device="cuda")
    rows = []

    def note(name: str, ms: float, path: str = "") -> None:
        rows.append({"engine": name, "ms_per_token": ms, "path": path, "prompt": args.prompt})
        print(f"{name:<46} {ms:8.3f} ms/token   {path}", flush=True)

    note("transformers generate", by_generate(model, ids, args.tokens))
    try:
        note("transformers StaticCache, captured", captured_static(model, ids, args.tokens))
    except Exception as error:
        print("StaticCache capture failed:", str(error)[:200])
    if not args.no_compile:
        try:
            note("transformers generate, static cache + compile", by_generate(model, ids, args.tokens, cache_implementation="static"))
        except Exception as error:
            print("static cache + compile failed:", str(error)[:200])
    attach(model)
    note("lab dense, modules as loaded", *ours(model, "dense", ids, args.tokens))
    print("fused (products saved, norms):", fuse(model))
    for spec in STACKS:
        try:
            note(f"lab {spec}", *ours(model, spec, ids, args.tokens))
        except Exception as error:
            print(spec, "failed:", type(error).__name__, str(error)[:300])
    print(machine())
    print("written to", write("e2e_gpu", {"rows": rows}))


if __name__ == "__main__":
    main()
