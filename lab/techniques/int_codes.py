"""Per-token integer codes: the plain baseline of cache quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kernels import codes, encode
from lab.engine.context import LayerContext
from lab.engine.ragged import Fields
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class TokenCodec:
    """b-bit affine codes, each token and KV head by itself, in groups of `group` channels."""

    bits: int
    group: int
    block: ClassVar[int] = 1

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        packed, scale, zero = encode.tokens(x, self.bits, min(self.group, x.shape[-1]))
        return {"codes": packed, "scale": scale, "zero": zero}, {}

    def encode_few(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """`encode` of float32 rows [..., d] on a CPU: the row of a decode step."""
        packed, scale, zero = codes.encode_few(x, self.bits, min(self.group, x.shape[-1]))
        return {"codes": packed, "scale": scale, "zero": zero}

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        return codes.decode_tokens(rows["codes"], rows["scale"], rows["zero"], self.bits)

    def logits(self, q: torch.Tensor, rows: Fields, blocks: Fields, whole: bool) -> torch.Tensor:
        return codes.token_logits(q, rows["codes"], rows["scale"], rows["zero"], self.bits)

    def mix(self, p: torch.Tensor, rows: Fields) -> torch.Tensor:
        return codes.token_mix(p, rows["codes"], rows["scale"], rows["zero"], self.bits)

    @staticmethod
    def bytes_per_row(bits: int, group: int, head_dim: int) -> int:
        return head_dim * bits // 8 + 4 * (head_dim // min(group, head_dim))


@dataclass(frozen=True)
class IntCodes(Technique):
    """Uniform integer codes per token for keys and values (the classical baseline)."""

    name: ClassVar[str] = "int_codes"
    title: ClassVar[str] = "Integer codes"
    paper: ClassVar[Paper] = Paper("Per-token asymmetric integer quantisation (baseline)", "baseline", 2019)
    slots: ClassVar[tuple[str, ...]] = ("encode",)
    help: ClassVar[str] = (
        "Stores every key and value as whole numbers of 8, 4 or 2 bits, with one scale and offset per token and head. "
        "Eight bits are nearly free of loss. At four and two bits the outlier channels of keys spoil the rest."
    )
    does_not_save: ClassVar[str] = "Reading needs a conversion, which costs time on a CPU; the prompt is attended exactly first."

    bits: int = param(8, "Bits per number.", choices=(8, 4, 2), unit="bits")
    group: int = param(64, "Channels that share one scale (capped at head_dim).", choices=(16, 32, 64, 128), unit="channels")
    sinks: int = param(0, "First tokens that stay exact, because sinks have extreme keys.", min=0, max=64, unit="tokens")

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    @property
    def codes_in_place(self) -> str:
        return "" if self.sinks else "rows"

    @property
    def keeps_order(self) -> bool:
        return self.sinks == 0

    def codecs(self, ctx: LayerContext) -> tuple[TokenCodec, TokenCodec]:
        codec = TokenCodec(self.bits, self.group)
        return codec, codec

    def due(self, side: str, exact: int) -> tuple[int, int]:
        return self.sinks, max(0, exact - self.sinks)

    def coded_bytes(self, side: str, entries: int, head_dim: int, element: int) -> int:
        exact = min(self.sinks, entries)
        return exact * head_dim * element + (entries - exact) * TokenCodec.bytes_per_row(self.bits, self.group, head_dim)
