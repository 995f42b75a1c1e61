"""QAdA: decide per query, from moments of the far keys, whether they are worth reading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Pick
from lab.engine.slots import Paper, Technique, param
from lab.engine.sparse import fetch


@dataclass(frozen=True)
class QAdA(Technique):
    """Read only sinks and a window where a Gaussian estimate says the rest holds little mass (arXiv 2502.09647)."""

    name: ClassVar[str] = "qada"
    title: ClassVar[str] = "Query-adaptive heads"
    paper: ClassVar[Paper] = Paper(
        "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification", "2502.09647", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "Most heads, for most tokens, look only nearby. Mean and covariance of the far keys tell how much attention a query "
        "would give them, without reading them; where that is below tau, only the first and the latest tokens are read. "
        "The moments cannot see a single far needle, so those can be missed."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "All keys and values stay stored, and the moments (head_dim squared per KV head) come on top. Padded batches and heads "
        "of uneven length read everything."
    )
    select_phases: ClassVar[tuple[str, ...]] = ("decode",)

    tau: float = param(0.2, "Far attention below this share is not worth reading; 0 reads everything.", min=0, max=1)
    sinks: int = param(16, "First tokens that are always read.", min=0, max=1024, unit="tokens")
    window: int = param(128, "Recent tokens that are always read.", min=1, max=65536, unit="tokens")

    def select(self, ctx: LayerContext) -> Pick | None:
        store = ctx.store
        entries = store.longest
        far = entries - self.sinks - self.window
        if self.tau == 0 or far <= 0 or store.valid() is not None:
            return None
        mean, second = self._moments(ctx, far)
        q = ctx.q[:, :, 0].unflatten(1, (ctx.kv_heads, ctx.groups)).float()
        near = torch.cat([torch.arange(self.sinks), torch.arange(entries - self.window, entries)]).to(q.device)
        near = near.expand(store.batch, store.heads, -1)
        own = (q @ fetch(store, "key", near).float().mT * ctx.scale).logsumexp(-1)
        share = torch.sigmoid(bulk(q, mean, second, far, ctx.scale) - own)  # [B, Hk, G]
        wants = (share >= self.tau).any(-1)
        probe = (mean.numel() + second.numel()) * 4
        if not bool(wants.any()):
            return Pick(near, probe=probe)
        keep = wants.unsqueeze(-1).expand(-1, -1, entries).clone().scatter_(2, near, True)
        return Pick(keep=keep, probe=probe)

    def _moments(self, ctx: LayerContext, far: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B,Hk,d] and covariance [B,Hk,d,d] of the far keys, from sums that each new far key joins once."""
        store, state = ctx.store, ctx.state
        known = state.get("qada/far", 0)
        if ctx.store.meta is not None or known > far:
            known = 0  # entries may have left or moved
        if known < far:
            slots = torch.arange(self.sinks + known, self.sinks + far, device=store.device)
            keys = fetch(store, "key", slots.expand(store.batch, store.heads, -1)).float()
            first, second = keys.sum(2), keys.mT @ keys
            if known:
                first, second = first + state["qada/sum"], second + state["qada/squares"]
            state["qada/sum"], state["qada/squares"], state["qada/far"] = first, second, far
        mean = state["qada/sum"] / far
        return mean, state["qada/squares"] / far - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        busy = self.tau > 0 and entries - self.sinks - self.window > 0
        return 4 * head_dim * (head_dim + 1) if busy else 0


def bulk(q: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, count: int, scale: float) -> torch.Tensor:
    """Log of the summed exponentials that `count` keys with these moments give q [B,Hk,G,d], were they Gaussian."""
    spread = ((q @ covariance) * q).sum(-1).clamp_min(0)
    return math.log(count) + scale * (q * mean.unsqueeze(2)).sum(-1) + 0.5 * scale**2 * spread
