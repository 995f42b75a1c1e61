"""ACT: take attention from later sinks and give it to ordinary tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.cpu_attention import softmax
from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Paper, Technique, param
from lab.techniques.zerotuning import picked

LEAST_ROWS = 32  # columns fewer rows have seen say nothing about being a sink


@dataclass(frozen=True)
class ACT(Technique):
    """Scale the weights of sinks beyond the first one by beta and share what is freed (arXiv 2406.15765)."""

    name: ClassVar[str] = "act"
    title: ClassVar[str] = "ACT"
    paper: ClassVar[Paper] = Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration", "2406.15765", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("weigh", "calibrate")
    help: ClassVar[str] = (
        "Besides the first token, some later tokens attract attention from nearly every row without meaning much. ACT finds "
        "them by the mean attention a column gets, turns their weights down to beta, and shares the freed attention among "
        "the other tokens in proportion. The first sink stays as it is. Calibration tries one head after the other on questions "
        "with known answers; on the default model it kept 43 of 270, which made 40 unseen answers a little likelier (0.05 nat) "
        "and none more of them right."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = "Every weight has to be computed, and the running column sums take memory."

    alpha: float = param(0.1, "A column is a sink when its mean attention is above this.", min=0.001, max=1)
    beta: float = param(0.4, "Factor on the weights of sinks.", min=0, max=1)
    heads: str = param("all", "Query heads it acts on: all, numbers joined by ; such as 0;3;5, or learnt: those whose "
                       "calibration raised the score of right answers.")
    causal: bool = param(True, "Judge each prompt row by the rows up to it; off takes the means of the whole prompt, as in the "
                         "paper, so that later tokens change earlier rows.")
    calibration: str = param("auto", "Calibration file for heads=learnt; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.heads == "learnt"

    def validate(self) -> None:
        if not self.learns:
            picked(self.name, "heads", self.heads)

    def weighs(self, ctx: LayerContext) -> bool:
        if self.beta == 1 or not acts(ctx.layer, ctx.layers):
            return False
        chosen = self.chosen(ctx)
        return chosen is None or bool(chosen.any())

    def chosen(self, ctx: LayerContext) -> torch.Tensor | None:
        """bool [Hq] of this layer's heads that it acts on; None for all."""
        if self.learns:
            return ctx.learnt(self)["heads"][ctx.layer] > 0
        listed = picked(self.name, "heads", self.heads)
        if listed is None:
            return None
        chosen = torch.zeros(ctx.heads, dtype=torch.bool)
        chosen[[h for h in listed if h < ctx.heads]] = True
        return chosen

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        p, lse = softmax(s)
        sinks = self.sinks(ctx, p, place)
        chosen = self.chosen(ctx)
        if chosen is not None:
            sinks = sinks & chosen.view(1, ctx.kv_heads, ctx.groups, 1, 1).to(s.device)
        return Weighed(calibrated(p, sinks, self.beta), lse)

    def sinks(self, ctx: LayerContext, p: torch.Tensor, place: Place) -> torch.Tensor:
        """bool [B, Hk, G, R or 1, n]: the columns of weights p that are turned down, where their head is."""
        whole = not self.causal and ctx.phase == "prefill"
        c = self._whole_means(ctx, place) if whole else self._column_means(ctx, p, place)
        found = c > self.alpha
        return found & (found.cumsum(-1) > 1)  # the first one found stays

    def _whole_means(self, ctx: LayerContext, place: Place) -> torch.Tensor:
        """Mean attention each column gets from all rows of the prompt so far, [B, Hk, G, 1, n]."""
        if place.row == 0:
            ctx.shared["act/means"] = self._read_all(ctx)
        means = ctx.shared["act/means"]
        slots = torch.arange(means.shape[-1], device=means.device) if place.slots is None else place.slots[:, :, None]
        return means.gather(3, slots.expand(*means.shape[:3], -1)).unsqueeze(3)

    def _read_all(self, ctx: LayerContext) -> torch.Tensor:
        """The means [B, Hk, G, N] of every stored column, a block of rows at a time; leaves the sums for later rows."""
        pos, valid = ctx.positions(), ctx.store.valid()
        pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=pos.device)[None]
        keys = ctx.store.all_keys()
        total = torch.zeros(pos.shape[0], ctx.kv_heads, ctx.groups, pos.shape[2], device=pos.device)
        for r0 in range(0, ctx.q.shape[2], 64):
            q = ctx.q[:, :, r0 : r0 + 64].unflatten(1, (ctx.kv_heads, ctx.groups))
            i, j = pos_q[:, None, None, r0 : r0 + 64, None], pos[:, :, None, None]
            s = (q @ keys.unsqueeze(2).mT).float() * ctx.scale
            s = ctx.softcap * torch.tanh(s / ctx.softcap) if ctx.softcap else s
            hidden = j > i if not ctx.window else (j > i) | (i - j >= ctx.window)
            hidden = hidden if valid is None else hidden | ~valid[:, :, None, None]
            total += softmax(s.masked_fill(hidden, -torch.inf))[0].sum(3)
        before = ctx.state.get("act/sums")
        at = pos[:, :, None].expand(total.shape).clamp_min(0)
        size = int(max(pos.max(), pos_q.max())) + 1
        if before is not None:
            total = total + torch.nn.functional.pad(before, (0, max(0, size - before.shape[-1]))).gather(3, at)
        grown = total.new_zeros(*total.shape[:3], size)
        ctx.state["act/sums"] = grown.scatter(3, at, total)
        rows = pos_q.amax(-1)[:, None, None, None] - pos[:, :, None] + 1
        return (total / rows.clamp_min(1)).masked_fill(rows < LEAST_ROWS, 0)

    def _column_means(self, ctx: LayerContext, p: torch.Tensor, place: Place) -> torch.Tensor:
        """Mean attention each column has had from the rows up to each row (causal prefix, I6), [B, Hk, G, R, n]."""
        size = ctx.row + 1 if ctx.pos_q is None else int(place.pos_q.max()) + 1
        size = max(size, int(place.pos.max()) + 1)
        before = ctx.state.get("act/sums")
        grown = p.new_zeros(*p.shape[:3], size)
        if before is not None:
            grown[..., : before.shape[-1]] = before[..., :size]
        at = place.pos[:, :, None].expand(*p.shape[:3], -1).clamp_min(0)
        prefix = grown.gather(3, at).unsqueeze(3) + p.cumsum(3)
        ctx.state["act/sums"] = grown.scatter(3, at, prefix[:, :, :, -1])
        rows = place.pos_q[:, None, None, :, None] - place.pos[:, :, None, None, :] + 1
        return (prefix / rows.clamp_min(1)).masked_fill(rows < LEAST_ROWS, 0)

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 4 * entries * groups if self.beta < 1 and acts(layer, layers) else 0


def acts(layer: int, layers: int) -> bool:
    """Layers 2 to L-2; of very small models all but the first."""
    return 2 <= layer <= layers - 2 if layers > 5 else layer > 0


def calibrated(p: torch.Tensor, sinks: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights p [..., n] with those of `sinks` times beta and the rest enlarged in proportion; rows still sum to one.

    A row all of whose weight lies on sinks stays as it is.
    """
    at = (p * sinks).sum(-1, keepdim=True)
    others = p.sum(-1, keepdim=True) - at
    possible = others > 1e-12
    gain = 1 + (1 - beta) * at / others.clamp_min(1e-12)
    return torch.where(possible, torch.where(sinks, beta * p, gain * p), p)
