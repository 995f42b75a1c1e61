"""A-shape prefill: prompt rows read the first tokens and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lab.engine.context import LayerContext
from lab.engine.slots import Band, Paper, Technique, param


@dataclass(frozen=True)
class AShape(Technique):
    """Sparse prefill over sinks and a window (the A-shape pattern of MInference, arXiv 2407.02490)."""

    name: ClassVar[str] = "a_shape"
    title: ClassVar[str] = "A-shape prefill"
    paper: ClassVar[Paper] = Paper(
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", "2407.02490", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "While the prompt is read, each token looks only at the first few tokens and at a window before it, so the work "
        "grows with the window instead of with the whole prompt. Generated tokens still read everything."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "Every key and value stays stored at full size."

    sinks: int = param(4, "First tokens every row may read.", min=0, max=65536, unit="tokens")
    window: int = param(256, "Recent tokens every row may read.", min=1, max=1_000_000, unit="tokens")

    @property
    def label(self) -> str:
        return f"A-shape {self.window}"

    def select(self, ctx: LayerContext) -> Band:
        return Band(self.sinks, self.window)

    def planned_band(self) -> Band:
        """What prompt rows will read, known before they are."""
        return Band(self.sinks, self.window)
