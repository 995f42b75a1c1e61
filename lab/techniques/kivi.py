"""KIVI: keys per channel, values per token, recent tokens exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels import codes, encode
from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.techniques.int_codes import TokenCodec


@dataclass(frozen=True)
class ChannelCodec:
    """b-bit affine codes with one scale and offset per channel over blocks of `block` consecutive rows."""

    bits: int
    block: int

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        blocks = x.unflatten(2, (-1, self.block))
        packed, scale, zero = encode.channels(blocks, self.bits)
        return {"codes": packed.flatten(2, 3)}, {"scale": scale, "zero": zero}

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        return codes.unpack(rows["codes"], self.bits).float() * blocks["scale"].float() + blocks["zero"].float()

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor | None:
        """Fold the scales into q, one scaled q per block, so that codes are only converted, never rescaled."""
        if not whole:
            return None
        factors = blocks["scale"].to(q.dtype)
        if self.bits < 8:
            factors = factors * codes.units(q, self.bits)
        parts = codes.masked(rows["codes"], self.bits)
        joined = parts[0] if self.bits == 8 else torch.cat(parts, -1)
        scaled = q.unsqueeze(2) * factors.unsqueeze(3)  # [B,Hk,blocks,R,d]
        raw = scaled @ joined.to(q.dtype).unflatten(2, (-1, self.block)).mT
        raw += (q @ blocks["zero"].to(q.dtype).mT).mT.unsqueeze(-1)
        return raw.transpose(2, 3).flatten(3)


@dataclass(frozen=True)
class Kivi(Technique):
    """Keys in per-channel codes by blocks, values in per-token codes, a residual of exact tokens (arXiv 2402.02750)."""

    name: ClassVar[str] = "kivi"
    title: ClassVar[str] = "KIVI"
    paper: ClassVar[Paper] = Paper("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "2402.02750", 2024)
    slots: ClassVar[tuple[str, ...]] = ("encode",)
    help: ClassVar[str] = (
        "Keys have a few channels that are always large; values do not. So keys share a scale down each channel and values "
        "along each token, which makes two bits usable. The most recent tokens stay exact until a block is full."
    )
    does_not_save: ClassVar[str] = "A residual of recent tokens stays exact, so short prompts save nothing."

    bits: int = param(2, "Bits per number.", choices=(2, 4, 8), unit="bits")
    group: int = param(32, "Consecutive tokens that share a key scale, and channels that share a value scale.",
                       choices=(16, 32, 64, 128), unit="")
    residual: int = param(128, "Recent tokens kept exact; a multiple of the group.", min=16, max=4096, unit="tokens")

    def validate(self) -> None:
        if self.residual % self.group:
            raise LabError(
                f"kivi: residual={self.residual} is not a multiple of group={self.group}",
                "Keys leave the residual in whole groups", f"Use residual={max(1, self.residual // self.group) * self.group}",
            )

    @property
    def label(self) -> str:
        return f"KIVI {self.bits}-bit"

    @property
    def code_block(self) -> int:
        return self.group

    @property
    def codes_in_place(self) -> str:
        return "blocks"

    def codecs(self, ctx: LayerContext) -> tuple[ChannelCodec, TokenCodec]:
        return ChannelCodec(self.bits, self.group), TokenCodec(self.bits, self.group)

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return 0, exact - exact % self.residual if side == "key" else max(0, exact - self.residual)

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        coded = self.due(side, entries)[1]
        exact = (entries - coded) * head_dim * element
        if side == "key":
            ids = 4 * coded  # which block's scales a row uses
            return exact + coded * head_dim * self.bits // 8 + coded // self.group * head_dim * 4 + ids
        return exact + coded * TokenCodec.bytes_per_row(self.bits, self.group, head_dim)
