"""ThinK: prune key channels instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError


@dataclass(frozen=True, eq=False)
class ChannelSubset:
    """Only some channels of a key, chosen per KV head: index int64 [Hk, d'], ascending, of `width` channels."""

    index: torch.Tensor
    width: int
    block: ClassVar[int] = 1

    @property
    def bits(self) -> int:
        """Mean bits per channel, pruned ones counted as 0."""
        return round(16 * self.index.shape[-1] / self.width)

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        return {"x": x.gather(-1, self._like(x))}, {}

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        x = rows["x"]
        return x.new_zeros(*x.shape[:-1], self.width).scatter(-1, self._like(x), x)

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor:
        """The same channels of the query are left out."""
        return q.gather(-1, self._like(q)) @ rows["x"].to(q.dtype).mT

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        return self.index[None, :, None].expand(x.shape[0], -1, x.shape[2], -1)


@dataclass(frozen=True)
class ThinK(Technique):
    """Drop the key channels that matter least to the last queries (arXiv 2407.21018)."""

    name: ClassVar[str] = "think"
    title: ClassVar[str] = "ThinK"
    paper: ClassVar[Paper] = Paper("ThinK: Thinner Key Cache by Query-Driven Pruning", "2407.21018", 2024)
    slots: ClassVar[tuple[str, ...]] = ("observe", "encode")
    help: ClassVar[str] = (
        "Not every channel of a key matters to the dot product. ThinK looks at the last prompt rows, drops the channels "
        "where queries and keys are small, and leaves the same channels out of every later query. Tokens all stay; keys get "
        "thinner. Recent tokens keep every channel."
    )
    does_not_save: ClassVar[str] = "Values stay at full size, so at the default 40% the cache shrinks by a fifth."

    prune: float = param(0.4, "Share of key channels to drop.", min=0, max=0.95)
    window: int = param(32, "Last prompt rows that decide, and recent tokens whose keys stay whole.", min=1, max=1024,
                        unit="tokens")
    pairs: bool = param(False, "Drop rotary pairs of channels together, which keeps rotation meaningful.")

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def label(self) -> str:
        return f"ThinK {self.prune:.0%}"

    def at(self, bits: int) -> Technique:
        raise LabError("ThinK drops channels and cannot hold entries at fewer bits", fix="Use integer codes or KIVI with it")

    def observe(self, ctx: LayerContext) -> None:
        """Choose the channels at the end of the prompt, while the last queries are at hand."""
        if ctx.phase == "prefill" and self._dropped(ctx.q.shape[-1]):
            ctx.state["think_scores"] = self.scores(ctx)

    def forget(self, ctx: LayerContext) -> None:
        ctx.state.pop("think_scores", None)

    def scores(self, ctx: LayerContext) -> torch.Tensor:
        """Importance of each channel, float32 [B, Hk, d]: mean square of the last queries times mean square of the keys."""
        q = ctx.store.queries[:, :, -self.window :].float()
        keys = ctx.store.all_keys().float()
        valid = ctx.store.valid()
        square = keys.square() if valid is None else keys.square() * valid.unsqueeze(-1)
        score = ctx.per_kv_head(q.square().mean(2)) * square.mean(2)
        if self.pairs:
            half = score.shape[-1] // 2
            score = (score[..., :half] + score[..., half:]).repeat(1, 1, 2)
        return score

    def codecs(self, ctx: LayerContext) -> tuple[ChannelSubset, ChannelSubset]:
        if "think" not in ctx.state:  # later tokens lose the same channels
            ctx.state["think"] = self._subset(ctx)
        return ctx.state["think"], ctx.state["think"]

    def _subset(self, ctx: LayerContext) -> ChannelSubset:
        d = ctx.q.shape[-1]
        stay = d - self._dropped(d)
        if stay == d:
            return ChannelSubset(torch.arange(d, device=ctx.q.device).expand(ctx.kv_heads, -1), d)
        score = ctx.state["think_scores"].mean(0)  # one set for all sequences of a batch
        if self.pairs:
            best = score[:, : d // 2].topk(stay // 2, dim=-1).indices
            index = torch.cat([best, best + d // 2], -1)
        else:
            index = score.topk(stay, dim=-1).indices
        return ChannelSubset(index.sort(-1).values, d)

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return 0, max(0, exact - self.window) if side == "key" and self.prune else 0

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        coded = self.due(side, entries)[1]
        return (entries * head_dim - coded * self._dropped(head_dim)) * element

    def _dropped(self, head_dim: int) -> int:
        count = int(self.prune * head_dim)
        return count - count % 2 if self.pairs else count


