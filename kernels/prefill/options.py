"""What a prefill call may ask for, checked once and brought to one shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EVERYTHING = 2**30  # a window no sequence outgrows


@dataclass
class Options:
    """Normalised options of `kernels.prefill.attend`: per-head tensors instead of numbers."""

    start: int
    window: torch.Tensor
    sinks: torch.Tensor
    rows: torch.Tensor | None
    blocks: tuple[torch.Tensor, torch.Tensor] | None
    softcap: float | None
    sink: torch.Tensor | None
    key_bias: torch.Tensor | None
    weight: str
    banded: bool  # some head sees less than everything before it
    plain: bool  # causal softmax over everything, nothing else: libraries do that too
    block_size: tuple[int, int] = (128, 64)  # rows and keys of one block of the lists

    def positions(self, q: torch.Tensor) -> torch.Tensor:
        """Absolute positions of the output rows, int [rows]."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.start, self.start + q.shape[2], device=q.device)

    def listed(self, row: torch.Tensor, n_keys: int) -> torch.Tensor:
        """Boolean [B, Hq, rows, N] from the block lists; row int [rows] counts within the call."""
        index, count = self.blocks
        rows, keys = self.block_size
        keep = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        n_blocks = -(-n_keys // keys)
        table = torch.zeros(*count.shape, n_blocks + 1, dtype=torch.bool, device=index.device)
        table.scatter_(-1, torch.where(keep, index.long(), n_blocks), True)
        spread = table[..., :n_blocks].repeat_interleave(keys, -1)[..., :n_keys]
        return spread[:, :, (row // rows).long()]


def normalise(
    q: torch.Tensor, k: torch.Tensor, *, start: int | None, window, sinks, rows, blocks, softcap, sink, key_bias, weight: str,
    block_size: tuple[int, int] = (128, 64),
) -> Options:
    """Check shapes and fill defaults; ValueError says what does not fit."""
    batch, heads, count, _ = q.shape
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[1]} KV heads; expected a multiple.")
    if weight not in ("softmax", "sigmoid", "relu"):
        raise ValueError(f"unknown weight {weight!r}; expected 'softmax', 'sigmoid' or 'relu'.")
    if blocks is not None:
        found, want = tuple(blocks[1].shape), (batch, heads, -(-count // block_size[0]))
        if rows is not None or found != want or blocks[0].shape[:3] != blocks[1].shape:
            raise ValueError(f"block lists for {found} do not fit; expected counts {want}, lists alike, and no chosen rows.")
    if start is None:
        start = k.shape[2] - count
    if start < 0:
        raise ValueError(f"{count} rows cannot be the last of {k.shape[2]} keys; give `start` or more keys.")
    plain = window is None and rows is None and blocks is None and softcap is None and sink is None and key_bias is None
    plain = plain and weight == "softmax" and start == 0 and count == k.shape[2] and not torch.is_tensor(sinks)

    def per_head(x, default: int) -> torch.Tensor:
        x = default if x is None else x
        if torch.is_tensor(x):
            if x.shape != (heads,):
                raise ValueError(f"a per-head window or sink count has shape {tuple(x.shape)}; expected ({heads},).")
            return x.to(device=q.device, dtype=torch.int32)
        return torch.full((heads,), min(int(x), EVERYTHING), dtype=torch.int32, device=q.device)

    if key_bias is not None and key_bias.shape[-2:] != (heads, k.shape[2]):
        raise ValueError(f"key_bias has shape {tuple(key_bias.shape)}; expected [B,] {heads}, {k.shape[2]}.")
    if key_bias is not None:
        key_bias = key_bias.expand(batch, heads, k.shape[2]).contiguous()
    return Options(start, per_head(window, EVERYTHING), per_head(sinks, 0), rows, blocks, softcap, sink, key_bias, weight,
                   window is not None, plain, block_size)
