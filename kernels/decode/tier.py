"""One width of the cache as the kernels see it: flat tensors and, for every lane, where it starts and how long it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class TierView:
    """Entries of one width for all lanes (lane = sequence*Hk + KV head).

    Lane l owns slots start[l] .. start[l] + length[l]. All lengths live on the device; `capacity` is the longest a
    lane can become and sizes the grid, so a captured CUDA graph stays valid while lanes grow and shrink.

    bits 16: k, v [slots, d] in the cache's dtype (float16, bfloat16 or float32).
    bits 8, 4, 2: k, v uint8 [slots, d*bits/8], packed as in `kernels.codes`, under one of three codes:
      "affine"  x = code*scale + zero. v_scale, v_zero float16 [slots, d/g]. Keys either likewise, or per channel
                (KIVI, arXiv 2402.02750): k_scale, k_zero float16 [groups, d] with k_group int32 [slots] naming each
                slot's row. `k_block` > 0 promises that entries k_block*i .. k_block*(i+1) of a lane share a row,
                which is what makes the per-channel path fast; demotion and compaction may break it, then leave 0.
      "levels"  x = levels[code]*scale, levels float16 [2**bits] ascending (TurboQuant, arXiv 2504.19874).
      "fp8"     x = float8_e4m3(code)*scale, bits 8.
    rotation  float32 [d, d] orthogonal or None: k and v hold R x; the query is rotated and the output rotated back.
    pages     int32 [lanes, n] or None: read only these pages of `page` entries of each lane (-1 skipped, each page at
              most once); see kernels.select.
    bias      float32 [slots] or [G, slots] added to the logits of the group's G query heads, or None.
    """

    bits: int
    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    capacity: int
    k_scale: torch.Tensor | None = None
    k_zero: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    v_zero: torch.Tensor | None = None
    k_group: torch.Tensor | None = None
    k_block: int = 0
    code: str = "affine"
    levels: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    page: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4, 2):
            raise ValueError(f"a tier holds 16, 8, 4 or 2 bits per number, not {self.bits}.")
        if self.code not in ("affine", "levels", "fp8"):
            raise ValueError(f"unknown code {self.code!r}; expected 'affine', 'levels' or 'fp8'.")
        if not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise ValueError("a tier's k and v must be contiguous [slots, width] tensors.")
        if self.bits < 16 and (self.k_scale is None or self.v_scale is None):
            raise ValueError(f"a {self.bits}-bit tier needs k_scale and v_scale.")
        if self.bits < 16 and self.code == "affine" and (self.k_zero is None or self.v_zero is None):
            raise ValueError(f"an affine {self.bits}-bit tier needs k_zero and v_zero.")
        if self.code == "levels" and self.levels is None:
            raise ValueError("a tier of levels needs the table `levels`, one entry per code.")

    @property
    def dim(self) -> int:
        """Channels per vector."""
        return self.k.shape[-1] if self.bits == 16 else self.k.shape[-1] * 8 // self.bits

    @property
    def slots(self) -> int:
        """Slots allocated over all lanes."""
        return self.k.shape[0]

    @property
    def lanes(self) -> int:
        """Sequences times KV heads."""
        return self.start.shape[0]
