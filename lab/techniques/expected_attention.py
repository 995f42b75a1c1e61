"""Expected Attention: what future queries will look at, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.rope import Rope
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class ExpectedAttention(Technique):
    """Score by the mean attention of Gaussian future queries, times the value's norm (arXiv 2510.00636)."""

    name: ClassVar[str] = "expected_attention"
    title: ClassVar[str] = "Expected Attention"
    paper: ClassVar[Paper] = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        "2510.00636", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "The tokens that will be asked for in future are unknown, but queries of one head resemble each other. Expected "
        "Attention describes them by a mean and a covariance, turns them to the coming positions, and computes which keys "
        "they would attend to. It does not need the question at the end, but fails when the topic drifts after the prompt."
    )
    does_not_save: ClassVar[str] = "It acts once, after the prompt: tokens generated afterwards are all kept."
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    future: int = param(512, "Coming positions over which the rotation is averaged.", min=1, max=8192, unit="tokens")
    sinks: int = param(4, "First tokens: left out of the statistics, and always kept.", min=0, max=1024, unit="tokens")
    epsilon: float = param(0.0, "Added to the attention before weighing by value size (0.02 for long prompts).", min=0, max=1)
    covariance: bool = param(True, "Use the spread of queries too, not only their mean.")

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return self.sinks, 0

    def observe(self, ctx: LayerContext) -> None:
        """Add this chunk's queries, turned back to position 0, to the running moments."""
        if ctx.phase != "prefill":
            return
        place = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=ctx.q.device)[None]
        q = ctx.rope.rotate(ctx.q.float(), -place[:, None])
        counted = (place >= self.sinks).float()[:, None, :, None].expand(q.shape[0], 1, -1, 1)
        seen = {"count": counted.sum(2, keepdim=True), "sum": (q * counted).sum(2, keepdim=True)}
        if self.covariance:
            seen["square"] = (q * counted).mT @ q
        for name, value in seen.items():
            have = ctx.state.get(f"query_{name}")
            ctx.state[f"query_{name}"] = value if have is None else have + value

    def forget(self, ctx: LayerContext) -> None:
        for name in ("count", "sum", "square"):
            ctx.state.pop(f"query_{name}", None)

    def score(self, ctx: LayerContext) -> torch.Tensor:
        state = ctx.state
        mean = state["query_sum"] / state["query_count"].clamp_min(1)  # [B,Hq,1,d]
        spread = None
        if self.covariance:
            spread = state["query_square"] / state["query_count"].clamp_min(1) - mean.mT @ mean
        z = self.logits(ctx.rope, mean, spread, ctx.store.all_keys().float(), ctx.newest + 1, ctx.scale)
        pos, valid = ctx.positions(), ctx.store.valid()
        hidden = pos < self.sinks if valid is None else (pos < self.sinks) | ~valid
        p = z.masked_fill(hidden.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0)  # [B,Hk,G,N]
        size = ctx.store.all_values().float().norm(dim=-1)
        return (p.mean(2) + self.epsilon) * size

    def logits(
        self, rope: Rope, mean: torch.Tensor, spread: torch.Tensor | None, keys: torch.Tensor, start, scale: float
    ) -> torch.Tensor:
        """ln E[exp(scale q.k)] of queries N(mean, spread) at the positions start .. start + future, [B,Hk,G,N].

        mean [B,Hq,1,d], spread [B,Hq,d,d] of queries before rotation, keys [B,Hk,N,d] after it. Exact for one position.
        """
        d = keys.shape[-1]
        if isinstance(start, torch.Tensor):  # padding: each sequence ends elsewhere
            turns = torch.stack([_mean_turn(rope, d, int(s), self.future, keys.device) for s in start.flatten()]).unsqueeze(1)
        else:
            turns = _mean_turn(rope, d, start, self.future, keys.device)
        shape = (keys.shape[1], -1)
        mean = (mean @ turns).unflatten(1, shape)  # [B,Hk,G,1,d]
        z = (mean @ keys.mT.unsqueeze(2)).squeeze(3) * scale
        if spread is not None:
            turned = (turns.mT @ spread @ turns).unflatten(1, shape)
            z = z + ((keys.unsqueeze(2) @ turned) * keys.unsqueeze(2)).sum(-1) * (scale**2 / 2)
        return z


def _mean_turn(rope: Rope, d: int, start: int, count: int, device: torch.device) -> torch.Tensor:
    """[d, d] matrix that turns row vectors by the mean rotation over the positions start .. start + count."""
    eye, total = torch.eye(d, device=device), torch.zeros(d, d, device=device)
    for at in range(0, count, 64):
        place = torch.arange(start + at, start + min(count, at + 64), device=device)
        total += rope.rotate(eye.expand(place.numel(), d, d), place[:, None]).sum(0)
    return total / count
