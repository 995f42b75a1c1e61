"""A tap on a layer: the queries and keys that passed, kept for the attention map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lab.engine.context import LayerContext
    from lab.engine.handle import Handle


class Tap:
    """Collects q [Hq, T, d] and k [Hk, T, d] of the first sequence as float16 on the CPU, as long as rows flow."""

    def __init__(self) -> None:
        self._q: list[torch.Tensor] = []
        self._k: list[torch.Tensor] = []
        self.scale, self.softcap, self.window = 1.0, None, None

    def add(self, ctx: "LayerContext", handle: "Handle") -> None:
        """Note the rows of one call. Keys may exceed half precision in outlier channels; they are clamped."""
        self.note(ctx.q, handle.k, ctx.scale, ctx.softcap, ctx.window)

    def note(self, q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None, window: int | None) -> None:
        """As `add`, from q [B,Hq,T,d] and k [B,Hk,T,d] themselves."""
        self.scale, self.softcap, self.window = scale, softcap, window
        self._q.append(_half(q[0]))
        self._k.append(_half(k[0]))

    @property
    def q(self) -> torch.Tensor:
        return torch.cat(self._q, 1)

    @property
    def k(self) -> torch.Tensor:
        return torch.cat(self._k, 1)

    @property
    def meta(self) -> tuple[float, float, float]:
        """(scale, soft cap or 0, window or 0), as run records keep them."""
        return float(self.scale), float(self.softcap or 0), float(self.window or 0)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clamp(-65504, 65504).to("cpu", torch.float16, copy=True)
