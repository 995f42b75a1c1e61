"""Rotated codes: turn vectors at random so that one fixed codebook fits every channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kernels import encode, levels
from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.techniques.int_codes import TokenCodec


@dataclass(frozen=True)
class AffineRotated:
    """Integer codes of the rotated vector (QuaRot)."""

    bits: int
    group: int
    seed: int
    block: ClassVar[int] = 1

    @property
    def inner(self) -> TokenCodec:
        return TokenCodec(self.bits, self.group)

    def turn(self, d: int, device: torch.device) -> torch.Tensor:
        """The rotation [d,d] that stored vectors are under: the decode kernel turns the query and the output instead of them."""
        return levels.turn(d, self.seed, device)

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        return self.inner.encode(turned(x, self.seed), pos)

    def encode_into(self, x: torch.Tensor, rows: Fields, slots: torch.Tensor) -> None:
        """Code x [n,d] into flat rows slots int64 [n] of stored fields."""
        out = rows["codes"], rows["scale"], rows["zero"]
        encode.encode_sides([turned(x, self.seed)], self.bits, x.shape[-1] // out[1].shape[-1], [out], slots)

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        y = self.inner.decode(rows, blocks, pos)
        return y @ levels.turn(y.shape[-1], self.seed, y.device)

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor | None:
        return self.inner.logits(turned(q, self.seed).to(q.dtype), rows, blocks, whole)

    def mix(self, p: torch.Tensor, rows: Fields) -> torch.Tensor:
        y = self.inner.mix(p, rows)
        return y @ levels.turn(y.shape[-1], self.seed, y.device).to(y.dtype)


@dataclass(frozen=True)
class NormalRotated:
    """Norm and Lloyd-Max codes of the rotated unit vector; `signs` spends one of the bits on the residual's signs."""

    bits: int
    seed: int
    signs: bool = False
    block: ClassVar[int] = 1

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        d = x.shape[-1]
        if not self.signs:
            packed, norm = self._table(x)
            return {"codes": packed, "norm": norm}, {}
        norm = x.float().norm(dim=-1, keepdim=True).half()
        y = turned(x, self.seed) / norm.float().clamp_min(1e-12) * math.sqrt(d)
        width = self.bits - 1
        table = levels.normal_levels(width, y.device)
        picked = levels.nearest(y, table)
        rest = (y - table[picked.long()]) / math.sqrt(d)
        up = (rest @ levels.projection(d, self.seed, y.device).mT >= 0).to(torch.uint8)
        rows = {"codes": levels.pack(picked, width), "norm": norm}
        return rows | {"signs": levels.pack(up, 1), "rest": rest.norm(dim=-1, keepdim=True).half()}, {}

    def encode_into(self, x: torch.Tensor, rows: Fields, slots: torch.Tensor) -> None:
        """Code x [n,d] into flat rows slots int64 [n] of stored fields: one launch, but for signs."""
        if not self.signs:
            self._table(x, (rows["codes"], rows["norm"]), slots)
            return
        for name, found in self.encode(x, None)[0].items():
            rows[name].index_copy_(0, slots, found)

    def _table(
        self, x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None, slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = x.device
        return encode.table(
            x, levels.normal_levels(self.bits, device), self.bits, turn=levels.turn(x.shape[-1], self.seed, device), by_norm=True,
            out=out, slots=slots, edges=levels.normal_edges(self.bits, device),
        )

    def unit(self, rows: Fields) -> torch.Tensor:
        """The rotated unit vectors as stored, float32 [B,Hk,N,d]."""
        picked = levels.unpack(rows["codes"], self.bits - self.signs)
        d = picked.shape[-1]
        y = levels.normal_levels(self.bits - self.signs, picked.device)[picked.int()] / math.sqrt(d)
        if self.signs:
            up = levels.unpack(rows["signs"], 1).float() * 2 - 1
            step = math.sqrt(math.pi / 2) / d * rows["rest"].float()
            y = y + step * (up @ levels.projection(d, self.seed, y.device))
        return y

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        return self.decode_as(torch.float32, rows)

    def decode_as(self, dtype: torch.dtype, rows: Fields) -> torch.Tensor:
        """`decode` in one launch, but for signs."""
        if not self.signs:
            codes, norm = rows["codes"], rows["norm"]
            turn = levels.turn(codes.shape[-1] * 8 // self.bits, self.seed, codes.device)
            return encode.from_table(codes, norm, levels.normal_levels(self.bits, codes.device), self.bits, turn, dtype)
        y = self.unit(rows)
        return (rows["norm"].float() * (y @ levels.turn(y.shape[-1], self.seed, y.device))).to(dtype)

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor:
        """(Rq).y times the norm: keys are never turned back."""
        return (turned(q, self.seed) @ self.unit(rows).mT * rows["norm"].float().mT).to(q.dtype)

    def mix(self, p: torch.Tensor, rows: Fields) -> torch.Tensor:
        """Values add up in rotated space; one turn back per output."""
        y = (p.float() * rows["norm"].float().mT) @ self.unit(rows)
        return (y @ levels.turn(y.shape[-1], self.seed, y.device)).to(p.dtype)


@dataclass(frozen=True)
class Rotated(Technique):
    """A random rotation per head before coding (QuaRot arXiv 2404.00456, TurboQuant arXiv 2504.19874)."""

    name: ClassVar[str] = "rotated"
    title: ClassVar[str] = "Rotated codes"
    paper: ClassVar[Paper] = Paper("TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", "2504.19874", 2025)
    slots: ClassVar[tuple[str, ...]] = ("encode",)
    help: ClassVar[str] = (
        "Turning a vector at random spreads its outliers over all channels, and every channel then looks like the same bell "
        "curve, so one fixed table of levels is nearly optimal and nothing has to be calibrated. Mode lloyd uses that table, "
        "quarot plain integers, inner adds one sign bit per channel that makes dot products right on average. With small "
        "heads the bell curve is less exact, and at few bits the signs add more noise than they remove bias."
    )
    does_not_save: ClassVar[str] = (
        "Codes are decoded at every read, which costs time on a CPU; the prompt is attended exactly first."
    )

    bits: int = param(4, "Bits per number of a key.", choices=(2, 3, 4, 8), unit="bits")
    value_bits: int = param(0, "Bits per number of a value; 0: one less than keys in modes lloyd and inner, the same in quarot.",
                            choices=(0, 2, 3, 4, 8), unit="bits")
    mode: str = param("lloyd", "Levels: quarot = evenly spaced, lloyd = fixed table, inner = table and residual signs (keys).",
                      choices=("quarot", "lloyd", "inner"))
    group: int = param(64, "Channels that share one scale in mode quarot (capped at head_dim).", choices=(16, 32, 64, 128),
                       unit="channels")
    seed: int = param(0, "Which random rotation.", min=0, max=1_000_000)

    def validate(self) -> None:
        if self.mode == "quarot" and 3 in (self.bits, self.value_bits):
            raise LabError("rotated: mode quarot has no 3-bit codes", "It packs 2, 4 or 8 bits", "Use mode=lloyd for 3 bits")

    @property
    def label(self) -> str:
        return f"{self.mode} {self.bits}/{self._value_bits}-bit"

    @property
    def _value_bits(self) -> int:
        if self.value_bits:
            return self.value_bits
        return self.bits if self.mode == "quarot" or self.bits in (2, 8) else self.bits - 1

    @property
    def codes_in_place(self) -> str:
        return "rows"

    def codecs(self, ctx: LayerContext) -> tuple[AffineRotated | NormalRotated, AffineRotated | NormalRotated]:
        return self._codec(self.bits, self.mode == "inner"), self._codec(self._value_bits, False)

    def _codec(self, bits: int, signs: bool) -> AffineRotated | NormalRotated:
        if self.mode == "quarot" or bits == 8:  # eight bits need no table
            return AffineRotated(bits, self.group, self.seed)
        return NormalRotated(bits, self.seed, signs)

    def at(self, bits: int) -> "Rotated":
        """One width for keys and values."""
        return replace(super().at(bits), value_bits=bits)

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return 0, exact

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        bits = self.bits if side == "key" else self._value_bits
        if self.mode == "quarot" or bits == 8:
            return entries * TokenCodec.bytes_per_row(bits, self.group, head_dim)
        extra = 4 if side == "key" and self.mode == "inner" else 2
        return entries * (head_dim * bits // 8 + extra)


def turned(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x [..., d] in the rotated frame, float32; dot products are unchanged."""
    return x.float() @ levels.turn(x.shape[-1], seed, x.device).mT


__all__ = ["AffineRotated", "NormalRotated", "Rotated", "turned"]
