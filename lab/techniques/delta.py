"""Delta correction: measure what sparse prefill lost on some rows, and repeat it on their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class Delta(Technique):
    """Add the dense-minus-sparse difference of every gamma-th row to the rows after it (arXiv 2505.11254)."""

    name: ClassVar[str] = "delta"
    title: ClassVar[str] = "Delta correction"
    paper: ClassVar[Paper] = Paper(
        "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction", "2505.11254", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("combine",)
    help: ClassVar[str] = (
        "Sparse prefill shifts each layer's output. Delta computes every gamma-th row densely, sees by how much that row "
        "moved, and adds the same shift to the rows up to the next one. The last rows are dense. It costs about 1/gamma "
        "of a dense prefill and helps when outputs drift slowly."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "It corrects another technique's sparse prefill and saves nothing by itself."

    gamma: int = param(64, "Distance between dense rows.", min=1, max=4096, unit="rows")
    recompute: bool = param(False, "Ablation: replace only the dense rows themselves, without repeating the shift.")

    def combine(self, ctx: LayerContext, out: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rows = torch.arange(ctx.q.shape[2], device=out.device)
        place = rows + ctx.first
        tail = ctx.prompt % self.gamma + max(128, self.gamma)
        is_tail = place >= ctx.prompt - tail
        anchors = rows[(place % self.gamma == 0) & ~is_tail]
        chosen = torch.cat([anchors, rows[is_tail]])
        fixed = out.clone()
        if chosen.numel():
            dense = exact(chosen).to(out.dtype)
            shift = dense[:, :, : anchors.numel()] - out[:, :, anchors]
            if not self.recompute:
                self._repeat(ctx, fixed, place, is_tail, shift)
            fixed[:, :, chosen] = dense
        elif not self.recompute:
            self._repeat(ctx, fixed, place, is_tail, out[:, :, :0])
        if bool(is_tail[-1]):
            ctx.state.pop("delta", None)
        return fixed

    def _repeat(
        self, ctx: LayerContext, fixed: torch.Tensor, place: torch.Tensor, is_tail: torch.Tensor, shift: torch.Tensor
    ) -> None:
        """Add each anchor's shift to its rows; rows before the first anchor of this chunk use the previous chunk's."""
        carried = ctx.state.get("delta")
        shifts = shift if carried is None else torch.cat([carried, shift], 2)
        if shifts.shape[2] == 0:
            return
        group = place // self.gamma - int(place[0]) // self.gamma
        if int(place[0]) % self.gamma == 0 and carried is not None:
            group = group + 1
        body = ~is_tail
        fixed[:, :, body] += shifts[:, :, group[body].clamp_max(shifts.shape[2] - 1)]
        if shift.shape[2]:
            ctx.state["delta"] = shift[:, :, -1:].clone()
