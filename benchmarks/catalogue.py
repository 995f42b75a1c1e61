"""Every cache policy at the same stored bytes: prose, needles, and fidelity on the default model.

    python benchmarks/catalogue.py [--model default] [--shares 0.25,0.125,0.06] [--seeds 5] [--prompt 768] [--next 48]
                                   [--text FILE] [--only SUBSTRING,...] [--html] [--resume]

For each share of a dense 16-bit cache and each policy, the budget is set so that the bytes stored after the prompt (codes,
scales, positions, running sums) are that share; exact numbers count two bytes whatever the model's precision, as they would
on a GPU. Policies that cannot reach a share say so; those with a fixed size are listed at their own. One seed is one stretch
of prose and one set of needle prompts; every policy sees the same. Figures are means with a 95% t interval over seeds:

    KL          KL(dense || policy) of the next token on the text's own continuation, nats
    perplexity  of that continuation
    one, many   share of needles whose digits are all most likely, given the right ones before them: one needle at depths
                10, 50 and 90%; four needles with different names, one asked. The first digit is predicted by the prompt's
                own last row, before anything is compressed; the cache is tested by those after it

The prompt is read once per seed; each policy is then given the same queries, keys and values, layer by layer, which is what
it would see anyway, because every policy here attends to the exact prompt. Prints a table, writes results/catalogue.json,
and with --html an interactive page beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import write  # noqa: E402
from lab.engine.cache import LabCache  # noqa: E402
from lab.engine.pipeline import Call, run  # noqa: E402
from lab.engine.sample_text import prose  # noqa: E402
from lab.errors import LabError  # noqa: E402

# {b} is the budget that is solved for; policies without it have a size of their own
POLICIES = {
    "StreamingLLM": "streaming_llm(budget={b})",
    "Random": "random_score(budget={b},window=16)",
    "H2O": "h2o(budget={b})",
    "H2O, by age": "h2o(budget={b},norm=true)",
    "TOVA": "tova(budget={b})",
    "SnapKV": "snapkv(budget={b},window=16)",
    "VATP": "vatp(budget={b},first=4)",
    "Expected Attention": "expected_attention(budget={b})",
    "KeyDiff": "keydiff(budget={b},window=16)",
    "Key norm": "knorm(budget={b},window=16)",
    "KVzip": "kvzip(budget={b})",
    "KVzip, per layer": "kvzip(budget={b},scope=layer)",
    "ARKV score": "arkv_score(budget={b},window=16)",
    "SnapKV, pyramid": "snapkv(budget={b},window=16)+pyramidkv(window=16)",
    "SnapKV, AdaKV": "snapkv(budget={b},window=16)+adakv",
    "SnapKV, global": "snapkv(budget={b},window=16)+global_top",
    "SnapKV, D2O budgets": "snapkv(budget={b},window=16)+d2o_budget",
    "SnapKV, min. variance": "snapkv(budget={b},window=16)+min_variance",
    "SnapKV, risk parity": "snapkv(budget={b},window=16)+hrp",
    "H2O, CaM": "h2o(budget={b})+cam",
    "H2O, D2O merging": "h2o(budget={b},recent=0.25)+d2o_merge",
    "H2O, D2O counted": "h2o(budget={b},recent=0.25)+d2o_merge(multiplicity=true)",
    "Window, int4": "streaming_llm(budget={b},renumber=false)+int_codes(bits=4)",
    "Random, int4": "random_score(budget={b},window=16)+int_codes(bits=4)",
    "SnapKV, int8": "snapkv(budget={b},window=16)+int_codes(bits=8)",
    "SnapKV, int4": "snapkv(budget={b},window=16)+int_codes(bits=4)",
    "SnapKV, int2": "snapkv(budget={b},window=16)+int_codes(bits=2)",
    "SnapKV, rotated 4/3": "snapkv(budget={b},window=16)+rotated",
    "SnapKV, rotated 2": "snapkv(budget={b},window=16)+rotated(bits=2)",
    "SnapKV, KVQuant 3": "snapkv(budget={b},window=16)+kvquant",
    "SnapKV, KIVI 2": "snapkv(budget={b},window=16)+kivi(bits=2,residual=32)",
    "SnapKV, fp8": "snapkv(budget={b},window=16)+fp8",
    "SnapKV, ThinK": "snapkv(budget={b},window=16)+think(window=16)",
    "SnapKV, DWB 4": "snapkv(budget={b},window=16)+dwb",
    "SnapKV, ARKV": "arkv(window=16)+snapkv(budget={b},window=16)",
    "int8": "int_codes(bits=8)",
    "int4": "int_codes(bits=4)",
    "int2": "int_codes(bits=2)",
    "KIVI 4": "kivi(bits=4,residual=32)",
    "KIVI 2": "kivi(bits=2,residual=32)",
    "Rotated 4/3": "rotated",
    "Rotated inner 4/3": "rotated(mode=inner)",
    "Rotated integers 4": "rotated(mode=quarot)",
    "KVQuant 3": "kvquant",
    "fp8": "fp8",
    "ThinK": "think",
    "DWB 4": "dwb",
    "DWB 3": "dwb(target=3)",
}
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Read:
    """A prompt read once: per layer queries, keys and values, the call's settings, and the last hidden states."""

    ids: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    calls: list[Call]
    hidden: torch.Tensor
    logits: torch.Tensor


class Keeper:
    """A tap that keeps one layer's queries, keys and values."""

    def add(self, ctx, handle) -> None:
        self.q, self.k, self.v = ctx.q, handle.k, handle.v
        self.call = Call(ctx.scale, ctx.softcap, ctx.window, ctx.sink)


@torch.inference_mode()
def read(model, ids: list[int]) -> tuple[Read, LabCache]:
    """Read a prompt densely; also gives the dense cache."""
    cache, tokens = LabCache(model, "", prompt=len(ids)), torch.tensor([ids])
    for layer in cache.lab_layers:
        layer.tap = Keeper()
    hidden = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)[0]
    taps = [layer.tap for layer in cache.lab_layers]
    for layer in cache.lab_layers:
        layer.tap = None
    logits = model.get_output_embeddings()(hidden[:, -1:])[0, -1].float()
    return Read(tokens, [(t.q, t.k, t.v) for t in taps], [t.call for t in taps], hidden, logits), cache


@torch.inference_mode()
def compressed(model, prompt: Read, spec: str, seed: int) -> LabCache:
    """The cache a policy leaves after this prompt."""
    cache = LabCache(model, spec, prompt=prompt.ids.shape[1], seed=seed)
    for layer, (q, k, v), call in zip(cache.lab_layers, prompt.layers, prompt.calls):
        run(cache.policy, layer.update(k, v)[0], q, Call(call.scale, call.softcap, call.window, call.sink))
    if cache.policy.watchers or cache.policy.waits:
        cache.policy.forward_done(prompt.ids, prompt.hidden)
    return cache


def bytes16(cache: LabCache) -> int:
    """Stored bytes with exact numbers counted as 16-bit."""
    extra = 0
    for layer in cache.lab_layers:
        parts = [layer.exact_k.rows.fields.get("x"), layer.exact_v.rows.fields.get("x")]
        sizes = [x.element_size() if x is not None else 2 for x in parts]
        live = (layer.exact_k.live_bytes, layer.exact_v.live_bytes)
        extra += sum(b - b * 2 // size for b, size in zip(live, sizes))
        for segment in (*layer.coded_k, *layer.coded_v):
            for name, field in segment.rows.fields.items():
                if field.dtype == torch.float32:  # channels kept exactly (ThinK)
                    extra += sum(segment.rows.lens) * field[:1].numel() * 2
    return cache.kv_bytes - extra


@torch.inference_mode()
def follow(model, cache: LabCache, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), V] after each of `ids`, fed one by one."""
    rows = []
    for token in ids:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1].float().log_softmax(-1))
    return torch.stack(rows)


def solve(model, prompt: Read, template: str, share: float, seed: int) -> str | None:
    """The spec whose stored bytes after the prompt are `share` of dense, or None where it cannot get that small."""
    n = prompt.ids.shape[1]
    dense = 4 * sum(k.shape[1] * k.shape[2] * k.shape[3] for _, k, _ in prompt.layers)
    budget = max(8, round(share * n))
    for _ in range(6):
        spec = template.format(b=budget)
        try:
            got = bytes16(compressed(model, prompt, spec, seed)) / dense
        except LabError:
            return None
        better = max(2, min(n - 1, round(budget * share / got)))
        if abs(got / share - 1) < 0.02 or better == budget:
            return spec if abs(got / share - 1) < 0.15 else None
        budget = better
    return spec


def needle(tokenizer, draw: random.Random, text: str, tokens: int, depth: float, count: int) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids): facts hidden in prose, one of them asked for at the end."""
    names = draw.sample(["Paris", "London", "Cairo", "Tokyo", "Lima", "Oslo", "Delhi", "Rome"], count)
    facts = [f" The secret number of {name} is {draw.randrange(10000, 99999)}." for name in names]
    ask = f"\n\nQuestion: What is the secret number of {names[0]}?\nAnswer: The secret number of {names[0]} is"
    encode = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]  # noqa: E731
    answer = encode(facts[0].split(" is")[1].rstrip("."))
    body = encode(text)
    start = draw.randrange(0, len(body) - tokens)
    body = body[start : start + tokens - len(encode(ask)) - sum(len(encode(f)) for f in facts)]
    places = sorted(
        [(depth, facts[0])] + [(draw.random(), fact) for fact in facts[1:]], reverse=True)
    for where, fact in places:
        at = int(where * len(body))
        body = body[:at] + encode(fact) + body[at:]
    return body + encode(ask), answer


def scenes(tokenizer, text: str, options, seed: int) -> dict:
    """What one seed tests: a stretch of prose with its continuation, and needle prompts."""
    draw = random.Random(seed)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = draw.randrange(0, len(ids) - options.prompt - options.next)
    part = ids[start : start + options.prompt + options.next]
    plans = [("one", d, 1) for d in (0.1, 0.5, 0.9)] + [("many", d, 4) for d in (0.1, 0.5, 0.9)]
    return {
        "prose": (part[: options.prompt], part[options.prompt :]),
        "needles": [(kind, d, *needle(tokenizer, draw, text, options.prompt, d, n)) for kind, d, n in plans],
    }


@torch.inference_mode()
def hit(model, cache: LabCache, first: torch.Tensor, answer: list[int]) -> float:
    """1 when every answer token is the most likely one; `first` [V] are the logits after the prompt."""
    logits = first
    for place, token in enumerate(answer):
        if int(logits.argmax()) != token:
            return 0.0
        if place + 1 < len(answer):
            logits = follow(model, cache, [token])[0]
    return 1.0


def measure(model, prompts: dict, spec: str, dense_rows: torch.Tensor, seed: int) -> dict:
    """One policy on one seed."""
    prompt, after = prompts["prose"]
    cache = compressed(model, prompt, spec, seed)
    total = 4 * sum(k.shape[1] * k.shape[2] * k.shape[3] for _, k, _ in prompt.layers)
    stored = bytes16(cache) / total
    rows = follow(model, cache, after[:-1])
    kl = (dense_rows.exp() * (dense_rows - rows)).sum(-1).clamp_min(0)
    nll = -rows.gather(1, torch.tensor(after[1:])[:, None]).mean()
    agree = (rows.argmax(-1) == dense_rows.argmax(-1)).float().mean()
    found = {"share": stored, "kl": float(kl.mean()), "perplexity": math.exp(float(nll)), "agree": float(agree), "one": [], "many": []}
    for kind, _, reading, answer in prompts["needles"]:
        found[kind].append(hit(model, compressed(model, reading, spec, seed), reading.logits, answer))
    return found | {kind: statistics.mean(found[kind]) for kind in ("one", "many")}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% t interval."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = T95[n - 2] if n - 2 < len(T95) else 2.0
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--shares", default="0.25,0.125,0.06")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--next", type=int, default=48)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--html", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on after the seeds in results/catalogue.json")
    options = parser.parse_args()
    from lab import models

    started, loaded = time.time(), models.load(options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = options.text.read_text() if options.text else prose("measure")
    shares = [float(s) for s in options.shares.split(",")]
    wanted = {n: s for n, s in POLICIES.items() if not options.only or any(o.lower() in n.lower() for o in options.only.split(","))}
    found: dict[tuple[str, float | None], list[dict]] = {}
    specs: dict[tuple[str, float | None], str] = {}
    if options.resume:
        earlier = json.loads((Path(__file__).parent / "results" / "catalogue.json").read_text())
        same = all(earlier["settings"][k] == str(v) if isinstance(v, Path) else earlier["settings"][k] == v
                   for k, v in vars(options).items() if k in ("model", "shares", "prompt", "next", "text"))
        if not same:
            parser.error("the saved run has other settings; run without --resume")
        for row in earlier["rows"]:
            key = (row["policy"], row["target"])
            found[key], specs[key] = row["values"], row["spec"]
    for seed in range(len(found.get(("Dense", None), [])), options.seeds):
        scene = scenes(tokenizer, text, options, seed)
        prompt, dense = read(model, scene["prose"][0])
        needles = [(kind, d, *read(model, ids), answer) for kind, d, ids, answer in scene["needles"]]
        with torch.inference_mode():
            dense_rows = follow(model, dense, scene["prose"][1][:-1])
        prompts = {"prose": (prompt, scene["prose"][1]), "needles": [(k, d, r, a) for k, d, r, _, a in needles]}
        found.setdefault(("Dense", None), []).append(measure(model, prompts, "dense", dense_rows, seed))
        specs["Dense", None] = "dense"
        for name, template in wanted.items():
            for share in shares if "{b}" in template else [None]:
                key = (name, share)
                if seed == 0:
                    spec = solve(model, prompt, template, share, seed) if share else template
                    if spec is None:
                        continue
                    specs[key] = spec
                if key in specs:
                    try:
                        found.setdefault(key, []).append(measure(model, prompts, specs[key], dense_rows, seed))
                    except LabError as problem:
                        print(f"{name} at {share}: {problem}", file=sys.stderr)
            print(f"seed {seed}: {name} ({time.time() - started:.0f} s)", file=sys.stderr, flush=True)
        save(options, loaded, found, specs, time.time() - started)
    show(found)


def save(options, loaded, found: dict, specs: dict, seconds: float) -> None:
    """Write what is known so far: a long run that is stopped still leaves its seeds."""
    rows = []
    for (name, share), results in found.items():
        figures = {k: interval([r[k] for r in results]) for k in ("share", "kl", "perplexity", "agree", "one", "many")}
        rows.append({"policy": name, "target": share, "spec": specs[name, share], "seeds": len(results),
                     **{k: {"mean": m, "half": None if math.isnan(h) else h} for k, (m, h) in figures.items()}, "values": results})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    path = write("catalogue", {"model": loaded.facts.to_dict(), "settings": settings, "seconds": seconds, "rows": rows})
    if options.html:
        from benchmarks.catalogue_page import page

        page(rows, path.with_suffix(".html"))


def show(found: dict) -> None:
    """The table, as README prints it."""
    text = lambda pair, digits: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"  # noqa: E731
    print("| policy | target | stored | KL, nats | perplexity | same top token | one needle | of four |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, share), results in sorted(found.items(), key=lambda x: (-(x[0][1] or 2), interval([r["kl"] for r in x[1]])[0])):
        cells = [interval([r[k] for r in results]) for k in ("kl", "perplexity", "agree", "one", "many")]
        stored = statistics.mean(r["share"] for r in results)
        print(f"| {name} | {f'{share:.1%}' if share else '-'} | {stored:.1%} | {text(cells[0], 3)} | {text(cells[1], 1)} | "
              f"{text(cells[2], 2)} | {text(cells[3], 2)} | {text(cells[4], 2)} |")


if __name__ == "__main__":
    main()
