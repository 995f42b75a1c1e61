"""Eight-bit floating point codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.slots import Paper, Technique
from lab.errors import LabError

LARGEST = 448.0  # of float8 e4m3


@dataclass(frozen=True)
class FloatCodec:
    """float8 e4m3 with one bfloat16 scale per token and head."""

    bits: ClassVar[int] = 8
    block: ClassVar[int] = 1

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        scale = brain_above(x.float().abs().amax(-1, keepdim=True) / LARGEST)
        step = scale.float()
        scaled = x.float() / torch.where(step == 0, torch.ones_like(step), step)
        return {"codes": scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}, {}

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        return rows["codes"].view(torch.float8_e4m3fn).float() * rows["scale"].float()

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor:
        return q @ rows["codes"].view(torch.float8_e4m3fn).to(q.dtype).mT * rows["scale"].to(q.dtype).mT

    def mix(self, p: torch.Tensor, rows: Fields) -> torch.Tensor:
        return (p * rows["scale"].to(p.dtype).mT) @ rows["codes"].view(torch.float8_e4m3fn).to(p.dtype)


@dataclass(frozen=True)
class Fp8(Technique):
    """float8 e4m3 per token (the quantiser of ARKV, arXiv 2603.08727)."""

    name: ClassVar[str] = "fp8"
    title: ClassVar[str] = "8-bit floats"
    paper: ClassVar[Paper] = Paper("FP8 Formats for Deep Learning", "2209.05433", 2022)
    slots: ClassVar[tuple[str, ...]] = ("encode",)
    help: ClassVar[str] = (
        "Stores numbers as tiny floating-point values: four bits of exponent and three of mantissa. Small numbers keep their "
        "relative precision next to large outliers, which whole numbers do not offer. Graphics cards read this format directly."
    )
    does_not_save: ClassVar[str] = (
        "There is only one width; with three bits of mantissa, whole numbers of 8 bits are often more exact."
    )

    @property
    def label(self) -> str:
        return "fp8"

    @property
    def codes_in_place(self) -> str:
        return "rows"

    def codecs(self, ctx: LayerContext) -> tuple[FloatCodec, FloatCodec]:
        return FloatCodec(), FloatCodec()

    def at(self, bits: int) -> "Fp8":
        if bits != 8:
            raise LabError(f"8-bit floats cannot hold entries at {bits} bits", "They have 8 bits", "Use integer codes with it")
        return self

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return 0, exact

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        return entries * (head_dim + 2)


def brain_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 number not below x >= 0; one that already is stays, so that coding twice changes nothing.

    bfloat16 rather than half precision: tiny vectors would get scales too coarse to hit the largest code.
    """
    near = x.bfloat16()
    up = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, up, near)
