"""Milliseconds per token of whole decode steps on one GPU, beside what a user would pick instead, in one run.

    python benchmarks/e2e_gpu.py [--prompt 512] [--tokens 48] [--context 32768] [--no-compile] [--no-large] [--budget 150]
                                 [--out DIR]

Part 1, SmolLM2-135M's geometry with random bfloat16 weights, batch 1: transformers `generate` with its default cache, one
captured forward with transformers' StaticCache, and the lab's sessions: modules as loaded, sibling products and norms fused,
the short step (`lab.engine.lean`), and stacks of techniques. Part 2, Llama-3-8B's shape with random weights at a long
context: dense against an int4 cache, tokens per second and peak memory beside the prediction. Part 3, last because its
compilation may take long: `generate` with the static cache, which transformers compiles (mode reduce-overhead). Results are
written after every part; a part that would start beyond the budget is skipped and says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.machine import machine, write

STACKS = ("snapkv(budget=0.25)", "pyramidkv(budget=0.25)", "head_pruning(fraction=0.2)", "a_shape+delta", "h2o", "streaming_llm",
          "int_codes(bits=4)", "kivi(bits=2)", "zerotuning")
LARGE_STACKS = ("int_codes(bits=4)", "kivi(bits=4)")
COMPILE_SECONDS = 150
START = time.perf_counter()


class Stamps(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Report:
    """Rows printed as they come and written after every part."""

    def __init__(self, budget: float, out: str | None) -> None:
        self.budget, self.out = budget, out
        self.found: dict = {"rows": [], "large": [], "skipped": []}

    def seconds(self) -> float:
        return time.perf_counter() - START

    def say(self, text: str) -> None:
        print(f"[{self.seconds():6.1f}s] {text}", flush=True)

    def row(self, engine: str, ms: float, **more) -> None:
        self.found["rows"].append({"engine": engine, "ms_per_token": round(ms, 4), **more})
        self.say(f"{engine:<52} {ms:8.3f} ms/token   " + "  ".join(f"{k}={v}" for k, v in more.items()))

    def write(self) -> None:
        payload = {**self.found, "seconds": round(self.seconds(), 1)}
        write("e2e_gpu", payload)
        if self.out:
            Path(self.out).mkdir(parents=True, exist_ok=True)
            (Path(self.out) / "e2e_gpu.json").write_text(json.dumps({"machine": machine(), **payload}, indent=1) + "\n")

    def attempt(self, name: str, work) -> None:
        """One measurement: a failure, or a budget used up, is noted and the rest goes on."""
        if self.seconds() > self.budget:
            self.found["skipped"].append({"what": name, "why": f"{self.budget:.0f} s used up"})
            self.say(f"{name}: skipped, {self.budget:.0f} s used up")
            return
        try:
            work()
        except Exception as error:
            self.found["skipped"].append({"what": name, "why": f"{type(error).__name__}: {str(error)[:300]}"})
            self.say(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")
        self.write()


def random_model(**shape) -> LlamaForCausalLM:
    """A Llama of random bfloat16 weights, made on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def small() -> LlamaForCausalLM:
    return random_model(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )


def large(context: int) -> LlamaForCausalLM:
    return random_model(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=max(131072, context), tie_word_embeddings=False,
    )


def by_generate(model, ids, tokens, rounds: int = 2, **options) -> float:
    """Median ms between tokens of `generate`, the last of `rounds` calls."""
    for _ in range(rounds):
        stamps = Stamps()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=stamps,
                       **options)
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


def steps(session, logits: torch.Tensor, tokens: int, most_seconds: float = 4.0) -> tuple[float, torch.Tensor]:
    """Median ms of decode steps after the first four, and the last logits."""
    times, begun = [], time.perf_counter()
    for n in range(tokens):
        logits = session.step(logits.argmax(-1))
        times.append(session.last_ms)
        if n >= 8 and time.perf_counter() - begun > most_seconds:
            break
    return statistics.median(times[4:]), logits


def how(session) -> dict:
    """How a session's steps ran, for the report."""
    graph = session._graph
    lean = getattr(graph, "lean", None)
    found = {"path": session.path or "?"}
    if session.path == "CUDA graph":
        found["step"] = "short" if lean is not None else f"modules ({session.own})"
    if lean is not None and lean.errors:
        found["largest_part_error"] = round(max(lean.errors.values()), 5)
    return found


def part_small(report: Report, args) -> None:
    from lab.engine.attach import attach
    from lab.engine.session import Session
    from lab.models.fuse import fuse

    model = small()
    ids = torch.randint(2, 49000, (1, args.prompt), device="cuda")
    prompt = ids[0].tolist()
    report.say(f"SmolLM2-135M geometry, prompt {args.prompt}")
    report.attempt("generate", lambda: report.row("transformers generate", by_generate(model, ids, args.tokens)))
    report.attempt("static", lambda: report.row("transformers StaticCache, captured", captured_static(model, ids, args.tokens)))
    attach(model)
    kept: dict[str, torch.Tensor] = {}

    def ours(name: str, spec: str, shorten: bool) -> None:
        session = Session(model, spec, new_tokens=args.tokens + 8)
        session.shorten = shorten
        logits = session.prefill(prompt)
        ms, _ = steps(session, logits, args.tokens)
        more = how(session)
        if spec == "dense":
            kept[name] = comparable(session)
        report.row(f"lab {name}", ms, **more)

    def comparable(session) -> torch.Tensor:
        """Logits of one fixed token after the prompt, from a fresh session of the same kind."""
        twin = Session(model, "dense", new_tokens=8)
        twin.shorten = session.shorten
        twin.prefill(prompt)
        return twin.step(torch.tensor([7], device="cuda"))

    report.attempt("as loaded", lambda: ours("dense, modules as loaded", "dense", False))
    report.say(f"fused (products saved, norms): {fuse(model)}")
    report.attempt("fused", lambda: ours("dense, products and norms fused", "dense", False))
    report.attempt("short", lambda: ours("dense, short step", "dense", True))
    if len(kept) == 3:
        loaded, fused, short = kept.values()
        off = lambda x: float((x - loaded).norm() / loaded.norm())  # noqa: E731
        report.found["logits_against_modules_as_loaded"] = {"fused": off(fused), "short": off(short)}
        report.say(f"logits against the modules as loaded: fused {off(fused):.4f}, short {off(short):.4f} (relative)")
    for spec in STACKS:
        report.attempt(spec, lambda spec=spec: ours(spec, spec, True))


def part_large(report: Report, args) -> None:
    from lab.engine.attach import attach
    from lab.engine.session import Session
    from lab.measure.cost import predict
    from lab.models.fuse import fuse

    begun = time.perf_counter()
    model = large(args.context)
    attach(model)
    fuse(model)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    parameters = sum(p.numel() for p in model.parameters())
    report.say(f"Llama-3-8B shape: {parameters / 1e9:.2f} billion random weights, {weights / 2**30:.2f} GiB, "
               f"made in {time.perf_counter() - begun:.1f} s")
    facts = {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "parameters": parameters}
    prompt = torch.randint(2, 128000, (args.context,), generator=torch.Generator().manual_seed(1)).tolist()
    report.found["large_how"] = (
        f"a prompt of {args.context} random tokens read by the lab's own prefill, 2048 at a time; "
        "peak memory is that of the decode steps"
    )

    def measure(spec: str) -> None:
        session = Session(model, spec, new_tokens=args.large_tokens + 8, chunk=2048)
        logits = session.prefill(prompt)
        report.say(f"{spec}: prompt read in {session.last_ms / 1e3:.2f} s")
        ttft = session.last_ms
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ms, _ = steps(session, logits, args.large_tokens, 6.0)
        cache, peak = session.cache, torch.cuda.max_memory_allocated()
        expected = predict(facts, spec, args.context, cache.lab_layers[0].seen, element=2)
        found = {
            "spec": spec, "context": args.context, "ms_per_token": round(ms, 3), "tokens_per_s": round(1e3 / ms, 1),
            "prefill_ms": round(ttft), "kv_bytes": cache.kv_bytes, "slack_bytes": cache.slack_bytes,
            "predicted_kv_bytes": expected.kv_bytes,
            "peak_bytes": peak, "peak_over_weights": peak - weights, **how(session),
        }
        report.found["large"].append(found)
        report.say(f"8B {spec:<20} {ms:8.3f} ms/token = {1e3 / ms:6.1f} tok/s   cache {cache.kv_bytes / 2**30:.3f} GiB "
                   f"(predicted {expected.kv_bytes / 2**30:.3f}), peak over weights {(peak - weights) / 2**30:.3f} GiB   "
                   f"{how(session)}")
        if spec == "dense":
            session._leave_graph("measured again")
            session._graph, session.path, session.shorten = None, None, False
            again, _ = steps(session, logits, 12, 4.0)
            found["ms_per_token_modules"] = round(again, 3)
            report.say(f"8B dense, modules instead of the short step: {again:.3f} ms/token")

    for spec in ("dense", *LARGE_STACKS):
        report.attempt(f"8B {spec}", lambda spec=spec: measure(spec))
        gc.collect()
        torch.cuda.empty_cache()
    rows = {r["spec"]: r for r in report.found["large"]}
    for spec in LARGE_STACKS:
        if "dense" in rows and spec in rows:
            a, b = rows["dense"], rows[spec]
            saved = {"measured": a["peak_bytes"] - b["peak_bytes"],
                     "predicted": a["predicted_kv_bytes"] - b["predicted_kv_bytes"],
                     "speedup": round(a["ms_per_token"] / b["ms_per_token"], 3)}
            b["against_dense"] = saved
            report.say(f"8B {spec} against dense: {saved['speedup']} times the tokens per second; peak memory falls by "
                       f"{saved['measured'] / 2**30:.3f} GiB, predicted {saved['predicted'] / 2**30:.3f}")


def part_compiled(report: Report, args) -> None:
    """`generate` with the static cache, which transformers compiles; given up after a minute of compiling."""

    def too_long(*_) -> None:
        raise TimeoutError(f"still compiling after {args.compile_seconds} s")

    model = small()
    ids = torch.randint(2, 49000, (1, args.prompt), device="cuda")
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(args.compile_seconds)
    begun = time.perf_counter()
    try:
        by_generate(model, ids, 8, rounds=1, cache_implementation="static")
        report.say(f"first static-cache generate (compilation) took {time.perf_counter() - begun:.1f} s")
        ms = by_generate(model, ids, args.tokens, cache_implementation="static")
        report.row("transformers generate, static cache + compile", ms, compile_s=round(time.perf_counter() - begun, 1))
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--large-tokens", type=int, default=24)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-large", action="store_true")
    parser.add_argument("--compile-seconds", type=int, default=COMPILE_SECONDS)
    parser.add_argument("--budget", type=float, default=150.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    report = Report(args.budget, args.out)
    report.say(str(machine()))
    report.found["prompt"] = args.prompt
    report.attempt("part 1", lambda: part_small(report, args))
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_large:
        report.attempt("part 2", lambda: part_large(report, args))
        gc.collect()
        torch.cuda.empty_cache()
    if not args.no_compile:
        report.attempt("static cache + compile", lambda: part_compiled(report, args))
    report.write()
    report.say("done")


if __name__ == "__main__":
    main()
