"""KVQuant: keys before rotation, levels that fit the data, a few outliers kept apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels import encode
from kernels import levels as grid
from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.rope import Rope
from lab.engine.slots import Paper, Technique, param

LOW, HIGH = 0.005, 0.995  # percentiles that bound a channel
SAMPLES = 100_000  # numbers the levels are fitted to


@dataclass(frozen=True, eq=False)
class LevelCodec:
    """b-bit codes of normalised numbers; the `outliers` largest of a vector are stored exactly beside them.

    Keys: low and high [Hk,1,d] per channel, calibrated, and turned back to position 0 by `rope`. Values: the range of
    each token (low and high are None).
    """

    bits: int
    outliers: int
    levels: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    rope: Rope | None = None
    block: ClassVar[int] = 1

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        x = x.float() if self.rope is None else self.rope.turn_to(x.float(), -pos)
        rows: Fields = {}
        if self.low is not None:
            low, high = self.low, self.high
            far = (2 * (x - low) / (high - low) - 1).abs()
        else:
            far = (x - x.median(-1, keepdim=True).values).abs()
        if self.outliers:
            index = far.topk(self.outliers, dim=-1).indices
            rows["place"], rows["value"] = index.to(torch.int16), x.gather(-1, index).half()
        if self.low is None:
            inner = x
            if self.outliers:  # outliers do not stretch the range of the others
                inside = torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False)
                any_left = inside.any(-1, keepdim=True)
                low = torch.where(any_left, x.masked_fill(~inside, torch.inf).amin(-1, keepdim=True), 0.0)
                high = torch.where(any_left, x.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True), 1.0)
            else:
                low, high = inner.amin(-1, keepdim=True), inner.amax(-1, keepdim=True)
            rows["range"] = torch.cat([low, high], -1).half()
            low, high = rows["range"].float().split(1, -1)
        rows["codes"], _ = encode.table(x, self.levels, self.bits, low=low, high=high)
        return rows, {}

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        unit = self.levels.to(rows["codes"].device)[grid.unpack(rows["codes"], self.bits).int()]
        low, high = (self.low, self.high) if self.low is not None else rows["range"].float().split(1, -1)
        x = low + (unit + 1) / 2 * (high - low).clamp_min(1e-6)
        if self.outliers:
            x = x.scatter(-1, rows["place"].long(), rows["value"].float())
        return x if self.rope is None else self.rope.turn_to(x, pos)


@dataclass(frozen=True)
class KVQuant(Technique):
    """Pre-rotation keys with calibrated non-uniform levels and sparse outliers (arXiv 2401.18079, simplified)."""

    name: ClassVar[str] = "kvquant"
    title: ClassVar[str] = "KVQuant"
    paper: ClassVar[Paper] = Paper(
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", "2401.18079", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("encode", "calibrate")
    help: ClassVar[str] = (
        "Position encoding mixes the channels of a key, so KVQuant codes keys as they were before it and turns them again "
        "when they are read. The levels are learnt once from sample text, dense where numbers are dense, and the largest "
        "numbers of each vector are stored exactly beside the codes. The lab leaves out the paper's weighting by "
        "sensitivity; text unlike the sample is coded less well."
    )
    does_not_save: ClassVar[str] = (
        "Outliers cost 4 bytes each, at least one per vector where any are kept, and every read decodes and turns the keys."
    )
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    calibration_sequences: ClassVar[int] = 16

    bits: int = param(3, "Bits per number.", choices=(2, 3, 4, 8), unit="bits")
    outliers: float = param(0.01, "Share of each vector's numbers stored exactly (rounded up to whole numbers).", min=0, max=1)
    sinks: int = param(1, "First tokens that stay exact.", min=0, max=64, unit="tokens")

    @property
    def label(self) -> str:
        return f"KVQuant {self.bits}-bit"

    @property
    def keeps_order(self) -> bool:
        return self.sinks == 0

    def fit(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Channel ranges of keys and levels of every width for keys and values, from sample vectors [Hk,M,d]."""
        bounds = torch.quantile(keys, torch.tensor([LOW, HIGH], device=keys.device), dim=1, keepdim=True)
        low, high = bounds[0], torch.maximum(bounds[1], bounds[0] + 1e-4)
        spans = values.aminmax(dim=-1, keepdim=True)
        found = {"low": low, "high": high}
        for side, unit in (
            ("key", (2 * (keys - low) / (high - low) - 1).clamp(-1, 1)),
            ("value", 2 * (values - spans.min) / (spans.max - spans.min).clamp_min(1e-6) - 1),
        ):
            flat = unit.flatten()
            flat = flat[torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel())).long()]
            for bits in (2, 3, 4, 8):
                found[f"{side}_levels_{bits}"] = grid.fit_levels(flat, bits)
        return found

    def codecs(self, ctx: LayerContext) -> tuple[LevelCodec, LevelCodec]:
        key = ("kvquant", ctx.layer, self.bits, self.outliers)
        if key not in ctx.shared:
            know, count = ctx.calibrated, self._count(ctx.q.shape[-1])
            ctx.shared[key] = (
                LevelCodec(self.bits, count, know[f"key_levels_{self.bits}"], know["low"], know["high"], ctx.rope),
                LevelCodec(self.bits, count, know[f"value_levels_{self.bits}"]),
            )
        return ctx.shared[key]

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return self.sinks, max(0, exact - self.sinks)

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        exact = min(self.sinks, entries)
        row = head_dim * self.bits // 8 + 4 * self._count(head_dim) + (4 if side == "value" else 0)
        return exact * head_dim * element + (entries - exact) * row

    def _count(self, head_dim: int) -> int:
        return math.ceil(self.outliers * head_dim)
