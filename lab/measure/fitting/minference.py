"""The pattern of each head: of all patterns that read equally much, the one whose output is closest to full attention."""

from __future__ import annotations

import torch

from lab.engine.sparse import attend
from lab.engine.reads import Rows
from lab.measure.fitting.common import forward, samples, sizes
from lab.techniques.minference import PATTERNS, SHARES, keeps


@torch.no_grad()
def fit(technique, model, tokenizer, progress, *, sequences: int = 3, length: int = 768) -> dict[str, torch.Tensor]:
    """For each share S of 125, 250, 500 thousandths: {"pattern_S": int64 [L, Hq], "error_S": [patterns, L, Hq] mean squared
    output error relative to the output}."""
    layers, heads = sizes(model)[:2]
    ids = samples(model, tokenizer, sequences, length)
    errors = {share: torch.zeros(len(PATTERNS), layers, heads) for share in SHARES}
    for n, row in enumerate(ids):
        def probe(ctx, out):
            if ctx.window or ctx.store.base:
                return out
            for share, table in errors.items():
                for i, (_, keep) in enumerate(keeps(ctx, share, list(PATTERNS), technique.window).items()):
                    table[i, ctx.layer] += error(ctx, keep, out).cpu() / len(ids)
            progress((n + (ctx.layer + 1) / layers) / len(ids), "Each head's output under each pattern")
            return out

        forward(model, row, probe=probe)
    found = {}
    for share, table in errors.items():
        found[f"pattern_{round(1000 * share)}"], found[f"error_{round(1000 * share)}"] = table.argmin(0), table
    return found


def error(ctx, keep, out: torch.Tensor) -> torch.Tensor:
    """float32 [Hq]: |sparse - full|^2 over |full|^2 for rows that read what `keep` says."""
    before = ctx.store.last_read, ctx.store.last_probe
    sparse = attend(ctx, [], [Rows(keep)], [], None, False, False).out
    ctx.store.last_read, ctx.store.last_probe = before
    return (sparse - out).float().pow(2).sum((0, 2, 3)) / out.float().pow(2).sum((0, 2, 3)).clamp_min(1e-12)
