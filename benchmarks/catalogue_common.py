"""What both sides of the catalogue share: scenes, prompts read once, quality measures, seeds, resuming, saving."""

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
from typing import Callable

import torch

from benchmarks.intervals import interval
from benchmarks.machine import write
from lab.engine.cache import LabCache
from lab.engine.layer import LabLayer
from lab.engine.pipeline import Call, run
from lab.engine.sample_text import prose
from lab.errors import LabError

RESULTS = Path(__file__).parent / "results"
Key = tuple[str, float | None]  # policy, share aimed at


@dataclass(frozen=True)
class Side:
    """One side of the catalogue.

    name: of its result file. policies: spec templates by name; one with "{" takes a budget, which
    solve(model, prompts, template, share, seed) sets so that a share is met, or answers None.
    measure(model, prompts, spec, dense_rows, seed) gives the figures of one seed; figures, those that get an interval.
    page(rows, path) writes the HTML page.
    """

    name: str
    policies: dict[str, str]
    solve: Callable[..., str | None]
    measure: Callable[..., dict]
    figures: tuple[str, ...]
    page: Callable[[list[dict], Path], None]


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
    cache, tokens = LabCache(model, prompt=len(ids)), torch.tensor([ids])
    for layer in cache.lab_layers:
        layer.tap = Keeper()
    hidden = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)[0]
    taps = [layer.tap for layer in cache.lab_layers]
    for layer in cache.lab_layers:
        layer.tap = None
    logits = model.get_output_embeddings()(hidden[:, -1:])[0, -1].float()
    return Read(tokens, [(t.q, t.k, t.v) for t in taps], [t.call for t in taps], hidden, logits), cache


@torch.inference_mode()
def compressed(model, prompt: Read, spec: str, seed: int, first: Callable[[LabCache], object] | None = None) -> LabCache:
    """The cache a policy leaves after this prompt; `first` sees it while it is empty."""
    cache = LabCache(model, spec, prompt=prompt.ids.shape[1], seed=seed)
    if first is not None:
        first(cache)
    for layer, (q, k, v), call in zip(cache.lab_layers, prompt.layers, prompt.calls):
        run(cache.policy, layer.update(k, v)[0], q, Call(call.scale, call.softcap, call.window, call.sink))
    if cache.policy.watchers or cache.policy.waits:
        cache.policy.forward_done(prompt.ids, prompt.hidden)
    return cache


def rows16(layer: LabLayer) -> int:
    """Bytes of a layer's keys and values, exact numbers counted as 16-bit whatever the cache's precision."""
    extra = 0
    parts = [layer.exact_k.rows.fields.get("x"), layer.exact_v.rows.fields.get("x")]
    sizes = [x.element_size() if x is not None else 2 for x in parts]
    live = (layer.exact_k.live_bytes, layer.exact_v.live_bytes)
    extra += sum(b - b * 2 // size for b, size in zip(live, sizes))
    for segment in (*layer.coded_k, *layer.coded_v):
        for field in segment.rows.fields.values():
            if field.dtype == torch.float32:  # channels kept exactly (ThinK)
                extra += sum(segment.rows.lens) * field[:1].numel() * 2
    return sum(s.live_bytes for s in (*layer.keys_side, *layer.values_side)) - extra


@torch.inference_mode()
def follow(model, cache: LabCache, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), V] after each of `ids`, fed one by one."""
    return torch.stack([step(model, cache, token) for token in ids])


@torch.inference_mode()
def step(model, cache: LabCache, token: int) -> torch.Tensor:
    """Log-probabilities [V] after one more token."""
    out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return out.logits[0, -1].float().log_softmax(-1)


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


def quality(model, prompts: dict, opened: Callable[[Read], tuple[LabCache, torch.Tensor]], dense_rows: torch.Tensor,
            noted: Callable[[LabCache, list[int]], torch.Tensor] | None = None) -> dict:
    """KL, perplexity, agreement and needles of the caches that `opened` gives: (cache, logits [V] after the prompt).

    noted(cache, ids) replaces `follow` on the text where a side wants to look at every step.
    """
    prompt, after = prompts["prose"]
    cache, _ = opened(prompt)
    rows = follow(model, cache, after[:-1]) if noted is None else noted(cache, after[:-1])
    kl = (dense_rows.exp() * (dense_rows - rows)).sum(-1).clamp_min(0)
    nll = -rows.gather(1, torch.tensor(after[1:])[:, None]).mean()
    agree = (rows.argmax(-1) == dense_rows.argmax(-1)).float().mean()
    found = {"kl": float(kl.mean()), "perplexity": math.exp(float(nll)), "agree": float(agree), "one": [], "many": []}
    for kind, _, reading, answer in prompts["needles"]:
        found[kind].append(hit(model, *opened(reading), answer))
    return found | {kind: statistics.mean(found[kind]) for kind in ("one", "many")}


def bisect(template: str, share: float, most: int, reads: Callable[[str], float]) -> str | None:
    """The template filled so that reads(spec) is nearest to `share`, or None where that is more than 15% off.

    {b} is a whole number up to `most` of which more reads more; {f} lies in 0..1, more reads less; {t} in 0..1 reads more.
    A whole number starts at 2, because 1 means everything.
    """
    whole, rising = "{b}" in template, "{f}" not in template
    low, high = (2.0, float(most)) if whole else (0.01, 1.0)
    best, gap, tried = None, 0.15, set()
    for _ in range(9):
        middle = (low + high) / 2
        value = str(round(middle)) if whole else f"{middle:.3f}"
        if value in tried:
            break
        tried.add(value)
        spec = template.format(b=value, f=value, t=value)
        try:
            got = reads(spec)
        except LabError:  # a budget below what is protected: more is needed
            got = 0.0 if rising else float(most)
        if got and abs(got / share - 1) < gap:
            best, gap = spec, abs(got / share - 1)
        if gap < 0.02:
            break
        low, high = (middle, high) if (got < share) == rising else (low, middle)
    return best


def arguments(doc: str) -> argparse.ArgumentParser:
    """The command line of both sides."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("stored", "read"), default="stored", help="equal bytes stored, or equal bytes read")
    parser.add_argument("--model", default="default")
    parser.add_argument("--shares", default="0.25,0.125,0.06")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--next", type=int, default=48)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--html", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on after the seeds in this side's result file")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each takes some of the policies")
    parser.add_argument("--limit", type=float, default=0, help="with --jobs: seconds after which the finished seeds are enough")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side-of", help=argparse.SUPPRESS)
    return parser


def earlier(side: Side, options: argparse.Namespace) -> tuple[dict[Key, list[dict]], dict[Key, str | None]]:
    """(results, specs) of the saved run of this side; None as a spec where no budget reached the share.

    Raises LabError where it was made with other settings.
    """
    saved = json.loads((RESULTS / f"{side.name}.json").read_text())
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    other = [k for k in ("model", "prompt", "next", "text") if saved["settings"].get(k) != asked[k]]
    if other:
        raise LabError(f"The saved run has another {', '.join(other)}", fix="Run without --resume, or with its settings")
    specs: dict[Key, str | None] = {(name, share): None for name, share in saved.get("unreached", [])}
    specs |= {(r["policy"], r["target"]): r["spec"] for r in saved["rows"]}
    return {(r["policy"], r["target"]): r["values"] for r in saved["rows"]}, specs


def sweep(side: Side, options: argparse.Namespace) -> dict[Key, list[dict]]:
    """Measure every policy of a side on every seed, saving after each seed; gives the results by (policy, share).

    The n-th result of a policy is that of seed n; one that fails on a seed ends there. Resuming fills in what is missing,
    policies that were added since included.
    """
    from lab import models

    started, loaded = time.time(), models.load(options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = options.text.read_text() if options.text else prose("measure")
    shares = [float(s) for s in options.shares.split(",")]
    asked = [o.lower() for o in options.only.split(",")] if options.only else [""]
    wanted = {n: t for n, t in side.policies.items() if any(o in n.lower() for o in asked)}
    templates: dict[Key, str] = {("Dense", None): "dense"}
    templates |= {(n, share): t for n, t in wanted.items() for share in (shares if "{" in t else [None])}
    found, specs = earlier(side, options) if options.resume else ({}, {})
    for seed in range(options.seeds):
        todo = [k for k in templates if len(found.get(k, [])) == seed and specs.get(k, "") is not None]
        if not todo:
            continue
        scene = scenes(tokenizer, text, options, seed)
        prompt, dense = read(model, scene["prose"][0])
        needles = [(kind, d, read(model, ids)[0], answer) for kind, d, ids, answer in scene["needles"]]
        dense_rows = follow(model, dense, scene["prose"][1][:-1])
        prompts = {"prose": (prompt, scene["prose"][1]), "needles": needles}
        for key in todo:
            name, share = key
            try:
                if key not in specs:
                    specs[key] = side.solve(model, prompts, templates[key], share, seed) if share else templates[key]
                if specs[key] is not None:
                    result = side.measure(model, prompts, specs[key], dense_rows, seed)
                    found.setdefault(key, []).append(result)
            except LabError as problem:
                print(f"{name} at {share}: {problem}", file=sys.stderr)
            print(f"seed {seed}: {name} {share or ''} ({time.time() - started:.0f} s)", file=sys.stderr, flush=True)
        save(side, options, loaded.facts.to_dict(), found, specs, time.time() - started)
    return found


def save(side: Side, options: argparse.Namespace, model: dict, found: dict, specs: dict, seconds: float) -> None:
    """Write what is known so far: a long run that is stopped still leaves its seeds."""
    rows = []
    for (name, share), results in found.items():
        figures = {k: interval([r[k] for r in results]) for k in side.figures}
        rows.append({"policy": name, "target": share, "spec": specs[name, share], "seeds": len(results),
                     **{k: {"mean": m, "half": None if math.isnan(h) else h} for k, (m, h) in figures.items()},
                     "values": results})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("part", "side_of")}
    unreached = [key for key, spec in specs.items() if spec is None]
    path = write(side.name, {"model": model, "settings": settings, "seconds": seconds, "rows": rows,
                             "unreached": unreached})
    if options.html:
        side.page(rows, path.with_suffix(".html"))
