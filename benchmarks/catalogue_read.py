"""Every way to read less at the same bytes read: generated tokens first, prompts second.

    python benchmarks/catalogue.py --side read [--shares 0.25,0.125,0.06] [--seeds 5] [--prompt 768] [--next 48] [--html]
                                   [--only SUBSTRING,...] [--resume]

Generated tokens. Bytes read are what the ledger counts in a decode step, over what a dense 16-bit cache would read: keys and
values read to attend, and whatever is read in order to choose them (page bounds, means, every key). Budgets are set so that
both together are the share, and the figure shown is the mean over all steps. Every policy is given the exact prompt, as on the
stored side. What cannot get that low because choosing alone costs more is left out at that share. "choice free" counts the
entries attended only: an oracle reads every key to choose, and shows what a perfect choice would be worth. Policies without
a budget are listed at their own size; company that stores less (StreamingLLM, SnapKV, codes) reads less for that reason.

Prompts. The model reads the prompt under the policy and everything after it exactly. The share is of (query head, key) pairs a
dense causal prompt attends to, counted as the policy asks for them, densely corrected rows included; "choose" is the work of
choosing in the same unit, from the method's definition. Writes results/catalogue_read.json and results/catalogue_prefill.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

from benchmarks import catalogue_page, catalogue_prefill
from benchmarks.catalogue_common import Key, Read, Side, bisect, compressed, interval, quality, rows16, step
from benchmarks.catalogue_jobs import swept
from lab.engine.cache import LabCache

FLOAT32_TABLES = ("qada",)  # whose statistics are float32 on any machine; other tables follow the cache's precision
FREE = "choice free"
BLOCKS = "block_topk(budget={b},local=16"
# {b} tokens, {t} a fraction of which more reads more, {f} one of which more reads less
POLICIES = {
    "StreamingLLM": "streaming_llm(budget={b})",
    "Random eviction": "random_score(budget={b},window=16)",
    "H2O": "h2o(budget={b})",
    "SnapKV": "snapkv(budget={b},window=16)",
    "Window without sinks": "swat(window={b})",
    "Sinks and window": "block_topk(budget=1.0001,page=1,local={b},mode=local)",
    "Random pages": BLOCKS + ",mode=random)",
    "Block top-k": BLOCKS + ")",
    "Block top-k, page 8": BLOCKS + ",page=8)",
    "Block top-k, page 32": BLOCKS + ",page=32)",
    f"Token top-k, {FREE}": BLOCKS + ",page=1,mode=oracle)",
    "Quest": "quest(budget={b})",
    "Quest, all layers": "quest(budget={b},dense_layers=0)",
    "Quest, all layers, page 32": "quest(budget={b},dense_layers=0,page=32)",
    "Block top-k, int4": BLOCKS + ")+int_codes(bits=4)",
    "Quest, all layers, int4": "quest(budget={b},dense_layers=0)+int_codes(bits=4)",
    "Rectified": "rectified(share={t},block=16,decode=true)",
    "Pooled blocks, not rectified": "rectified(share={t},block=16,decode=true,rectify=false)",
    "DuoAttention": "duo_attention(fraction={f},sinks=4,window=16)",
    "MoA 0.25": "moa(density=0.25,first=4)",
    "MoA 0.5": "moa(density=0.5,first=4)",
    "QAdA": "qada(sinks=4,window=64)",
    "All-or-Here": "aha",
    "Flux": "flux",
    "Attention reuse 2": "attention_reuse(every=2,exact_first=0)",
    "Attention reuse 4": "attention_reuse(every=4,exact_first=0)",
    "Top-theta 32": "top_theta(k=32,first_k=32)",
    "Top-theta 32, no VMC": "top_theta(k=32,first_k=32,vmc=false)",
    "Top-theta 32, no SDC, no VMC": "top_theta(k=32,first_k=32,sdc=none,vmc=false)",
    "Top-theta 32, SDC threshold": "top_theta(k=32,first_k=32,sdc=threshold)",
    "Top-theta 32, SDC learnt": "top_theta(k=32,first_k=32,sdc=learnt)",
    "int4": "int_codes(bits=4)",
    "KIVI 2": "kivi(bits=2,residual=32)",
}
FIGURES = ("share", "attend", "choose", "stored", "kl", "perplexity", "agree", "one", "many")


def read16(cache: LabCache) -> tuple[float, float]:
    """(read to attend, read to choose) by the newest step, over the bytes a dense 16-bit cache reads in it."""
    wide = any(t.name in FLOAT32_TABLES for t in cache.policy.members)
    attend = choose = dense = 0.0
    for layer in cache.lab_layers:
        held = sum(layer.counts)
        attend += layer.last_read * rows16(layer) / held if held else 0.0
        choose += layer.last_probe * (1 if wide else 2 / layer.dtype.itemsize)
        dense += layer.seen * layer.batch * layer.heads * layer.widths * 2
    return attend / dense, choose / dense


def stored16(cache: LabCache) -> float:
    """Bytes of keys and values held, over those of a dense 16-bit cache; tables are not counted."""
    dense = sum(layer.seen * layer.batch * layer.heads * layer.widths * 2 for layer in cache.lab_layers)
    return sum(rows16(layer) for layer in cache.lab_layers) / dense


def solve(model, prompts: dict, template: str, share: float, seed: int) -> str | None:
    """The spec whose bytes read, over the first steps after the prompt, are `share` of dense; None where there is none."""
    prompt, after = prompts["prose"]
    free = "mode=oracle" in template

    def reads(spec: str) -> float:
        cache = compressed(model, prompt, spec, seed)
        shares = []
        for token in after[:2]:
            step(model, cache, token)
            attend, choose = read16(cache)
            shares.append(attend if free else attend + choose)
        return shares[-1]  # the first step may still find the prompt as it was

    return bisect(template, share, prompt.ids.shape[1], reads)


def measure(model, prompts: dict, spec: str, dense_rows: torch.Tensor, seed: int) -> dict:
    """One policy on one seed: what its decode steps read, and what that did."""
    shares: list[tuple[float, float]] = []
    ends: list[float] = []

    def noted(cache: LabCache, ids: list[int]) -> torch.Tensor:
        rows = []
        for token in ids:
            rows.append(step(model, cache, token))
            shares.append(read16(cache))
        ends.append(stored16(cache))
        return torch.stack(rows)

    def opened(reading: Read) -> tuple[LabCache, torch.Tensor]:
        return compressed(model, reading, spec, seed), reading.logits

    found = quality(model, prompts, opened, dense_rows, noted)
    attend, choose = (statistics.mean(x) for x in zip(*shares))
    return {"share": attend + choose, "attend": attend, "choose": choose, "stored": ends[0], **found}


READ = Side("catalogue_read", POLICIES, solve, measure, FIGURES, partial(
    catalogue_page.page, title="Generated tokens at equal bytes read", axis="bytes read per step, % of a dense 16-bit cache"))


def report(options: argparse.Namespace) -> None:
    """Measure and print both tables."""
    show(swept(READ, options))
    print()
    catalogue_prefill.report(options)


def show(found: dict[Key, list[dict]]) -> None:
    """The table of generated tokens, as README prints it."""
    print("| policy | target | read | of it to choose | stored | KL, nats | perplexity | same top token | one needle | of four |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (name, share), results in sorted(found.items(), key=lambda x: (-(x[0][1] or 2), interval([r["kl"] for r in x[1]])[0])):
        cells = [interval([r[k] for r in results]) for k in ("kl", "perplexity", "agree", "one", "many")]
        read, choose, stored = (statistics.mean(r[k] for r in results) for k in ("share", "choose", "stored"))
        texts = [f"{m:.{d}f} ± {h:.{d}f}" for (m, h), d in zip(cells, (3, 1, 2, 2, 2))]
        print(f"| {name} | {f'{share:.1%}' if share else '-'} | {read:.1%} | {choose:.1%} | {stored:.1%} | {' | '.join(texts)} |")
