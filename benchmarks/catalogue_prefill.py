"""Sparse prompts at the same share of (query head, key) pairs read; the second table of `catalogue.py --side read`."""

from __future__ import annotations

import argparse
import re
import statistics
from functools import partial
from typing import Any, Callable

import torch

from benchmarks import catalogue_page
from benchmarks.catalogue_common import Key, Read, Side, bisect, compressed, interval, quality
from benchmarks.catalogue_jobs import swept
from lab.engine.cache import LabCache
from lab.engine.context import LayerContext
from lab.engine.slots import Band

SHARES = "0.5,0.25"  # prompts are short here, and whole blocks and densely corrected rows are large parts of them
# {b} tokens, {t} a fraction of which more reads more
POLICIES = {
    "Window without sinks": "a_shape(sinks=0,window={b})",
    "A-shape": "a_shape(window={b})",
    "A-shape, Delta 16": "a_shape(window={b})+delta(gamma=16)",
    "A-shape, dense rows only": "a_shape(window={b})+delta(gamma=16,recompute=true)",
    "Vertical-slash": "vertical_slash(vertical={b},slash={b},window=32)",
    "Vertical-slash, Delta 16": "vertical_slash(vertical={b},slash={b},window=32)+delta(gamma=16)",
    "XAttention": "xattention(tau={t},block=16,stride=4)",
    "XAttention, Delta 16": "xattention(tau={t},block=16,stride=4)+delta(gamma=16)",
    "Rectified": "rectified(share={t},block=16)",
    "Pooled blocks, not rectified": "rectified(share={t},block=16,rectify=false)",
    "Groups (SF-Attn)": "sf_attn(group={b},shifted=0)",
    "Shifted groups (SF-Attn)": "sf_attn(group={b})",
}
FIGURES = ("share", "attend", "choose", "kl", "perplexity", "agree", "one", "many")


class Stand:
    """Stands for a technique in a policy and counts the pairs its prompt rows read; anything else is the technique's."""

    def __init__(self, technique: Any, pairs: list[int]) -> None:
        self.technique, self.pairs = technique, pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.technique, name)


class Counted(Stand):
    """A `select` technique."""

    def select(self, ctx: LayerContext) -> Any:
        answer = self.technique.select(ctx)
        if ctx.phase == "prefill":
            self.pairs[0] += asked(answer, ctx)
        return answer


class Corrected(Stand):
    """A `combine` technique, whose dense rows come on top."""

    def combine(self, ctx: LayerContext, out: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def dense(rows: torch.Tensor) -> torch.Tensor:
            if ctx.phase == "prefill":
                self.pairs[0] += int((rows + ctx.first + 1).sum()) * ctx.heads
            return exact(rows)

        return self.technique.combine(ctx, out, dense)


def asked(answer: Any, ctx: LayerContext) -> int:
    """(query head, key) pairs that the rows of this call read under a select's answer, over all query heads."""
    rows, n = ctx.q.shape[2], ctx.store.longest
    i = torch.arange(ctx.first, ctx.first + rows)
    if answer is None:
        return int((i + 1).sum()) * ctx.heads
    if isinstance(answer, Band):
        kept = (i + 1).clamp(max=answer.window) + (i + 1 - answer.window).clamp(0, answer.sinks)
        return int(kept.sum()) * ctx.heads
    total = 0
    for r0 in range(0, rows, 64):
        r1 = min(r0 + 64, rows)
        keep = answer.keep(r0, r1) & (torch.arange(n) <= i[r0:r1, None])
        total += int(keep.expand(1, ctx.kv_heads, ctx.groups, r1 - r0, n).sum())
    return total


def choosing(spec: str, n: int) -> float:
    """Dot products computed in order to choose, over those of a dense causal prompt of n tokens."""
    numbers = {k: int(v) for k, v in re.findall(r"(window|stride|block)=(\d+)", spec)}
    dense = n * (n + 1) / 2
    if spec.startswith("vertical_slash"):
        return numbers["window"] * n / dense
    if spec.startswith("xattention"):
        return n * n / numbers["stride"] / dense
    if spec.startswith("rectified"):
        return 3 * (n / numbers["block"]) ** 2 / dense  # means, and two deviations
    return 0.0


def counted(cache: LabCache) -> list[int]:
    """Let a cache count the pairs its prompt reads; the number is in the list from then on."""
    pairs, policy = [0], cache.policy
    policy.selects = [Counted(t, pairs) for t in policy.selects]
    if policy.combine is not None:
        policy.combine = Corrected(policy.combine, pairs)
    return pairs


def share_of(cache: LabCache, pairs: list[int], heads: int, n: int) -> float:
    """Pairs that were read over those of a dense causal prompt of n tokens with `heads` query heads."""
    return pairs[0] / (n * (n + 1) // 2 * heads * len(cache.lab_layers)) if cache.policy.selects else 1.0


@torch.inference_mode()
def sparse(model, ids: torch.Tensor, spec: str, seed: int) -> tuple[LabCache, torch.Tensor, float]:
    """(cache, logits [V] after the prompt, share of the dense pairs that were read) of a prompt read under `spec`."""
    n = ids.shape[1]
    cache = LabCache(model, spec, prompt=n, seed=seed)
    pairs = counted(cache)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[0, -1].float(), share_of(cache, pairs, model.config.num_attention_heads, n)


def solve(model, prompts: dict, template: str, share: float, seed: int) -> str | None:
    """The spec that reads `share` of the pairs, or None where there is none.

    Shares are counted on the dense prompt's own queries and keys, layer by layer, which saves the model's other work; the
    figure that is reported is counted while the sparse prompt is read.
    """
    reading = prompts["prose"][0]

    def reads(spec: str) -> float:
        watched: list[list[int]] = []
        cache = compressed(model, reading, spec, seed, lambda c: watched.append(counted(c)))
        return share_of(cache, watched[0], reading.layers[0][0].shape[1], reading.ids.shape[1])

    return bisect(template, share, reading.ids.shape[1], reads)


def measure(model, prompts: dict, spec: str, dense_rows: torch.Tensor, seed: int) -> dict:
    """One policy on one seed."""
    shares: list[float] = []

    def opened(reading: Read) -> tuple[LabCache, torch.Tensor]:
        cache, logits, share = sparse(model, reading.ids, spec, seed)
        shares.append(share)
        return cache, logits

    found = quality(model, prompts, opened, dense_rows)
    choose = choosing(spec, prompts["prose"][0].ids.shape[1])
    return {"share": statistics.mean(shares), "attend": statistics.mean(shares), "choose": choose, **found}


PREFILL = Side("catalogue_prefill", POLICIES, solve, measure, FIGURES, partial(
    catalogue_page.page, title="Sparse prompts at equal pairs read", axis="(query head, key) pairs read, % of a dense prompt"))


def report(options: argparse.Namespace) -> None:
    """Measure and print the table."""
    show(swept(PREFILL, argparse.Namespace(**{**vars(options), "shares": SHARES})))


def show(found: dict[Key, list[dict]]) -> None:
    """The table of prompts, as README prints it."""
    print("| policy | target | pairs read | work of choosing | KL, nats | perplexity | same top token | one needle | of four |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, share), results in sorted(found.items(), key=lambda x: (-(x[0][1] or 2), interval([r["kl"] for r in x[1]])[0])):
        cells = [interval([r[k] for r in results]) for k in ("kl", "perplexity", "agree", "one", "many")]
        read, choose = (statistics.mean(r[k] for r in results) for k in ("share", "choose"))
        texts = [f"{m:.{d}f} ± {h:.{d}f}" for (m, h), d in zip(cells, (3, 1, 2, 2, 2))]
        print(f"| {name} | {f'{share:.1%}' if share else '-'} | {read:.1%} | {choose:.1%} | {' | '.join(texts)} |")
