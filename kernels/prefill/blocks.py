"""Block-sparse prefill: rows read whole blocks of keys, chosen for each block of rows and each query head."""

from __future__ import annotations

import torch

from kernels.prefill.api import Prefilled, attend

SIZES = (16, 32, 64, 128)  # sides of a block that the kernel's tiles can have


def lists(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index int32 [B,Hq,RB,NB], count int32 [B,Hq,RB]) of keep bool [B,Hq,RB,NB]: the kept blocks first, ascending."""
    blocks = keep.shape[-1]
    place = torch.where(keep, keep.cumsum(-1) - 1, blocks)
    index = torch.zeros(*keep.shape[:-1], blocks + 1, dtype=torch.int32, device=keep.device)
    index.scatter_(-1, place, torch.arange(blocks, dtype=torch.int32, device=keep.device).expand(keep.shape))
    return index[..., :blocks].contiguous(), keep.sum(-1, dtype=torch.int32)


def block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, keep: torch.Tensor, size: int, *, start: int | None = None,
    impl: str = "auto", **options,
) -> Prefilled:
    """Causal attention of q [B,Hq,T,d] at positions start..start+T to the blocks of k, v [B,Hk,N,d] in keep bool [B,Hq,RB,NB].

    Blocks of `size` tokens (16, 32, 64 or 128) count from position 0 for rows and keys alike, so a call that starts inside a
    block has RB = ceil((start % size + T) / size) blocks of rows; NB = ceil(N / size). Blocks behind the diagonal are not read
    whatever keep says. options as in `attend`; the same for a row that sees nothing. ValueError for other sizes and shapes.
    """
    rows = q.shape[2]
    start = k.shape[2] - rows if start is None else start
    lead = start % size
    want = (*q.shape[:2], -(-(lead + rows) // size), -(-k.shape[2] // size))
    if size not in SIZES or keep.shape != want:
        raise ValueError(f"blocks of {size} tokens kept as {tuple(keep.shape)}; expected a size in {SIZES} and {want}.")
    row = torch.arange(want[2], device=q.device)[:, None] + start // size
    keep = keep & (torch.arange(want[3], device=q.device) <= row)
    tile, keys = _tile(q, size)
    keep = keep.repeat_interleave(size // keys, -1).repeat_interleave(size // tile, 2)[:, :, : -(-(lead + rows) // tile)]
    if lead:
        q = torch.nn.functional.pad(q, (0, 0, lead, 0))
    found = attend(q, k, v, scale, start=start - lead, blocks=lists(keep), block_size=(tile, keys), impl=impl, **options)
    if not lead:
        return found
    return Prefilled(*(None if x is None else x[:, :, lead:] for x in (found.out, found.lse, found.entropy)))


def _tile(q: torch.Tensor, size: int) -> tuple[int, int]:
    """Rows and keys of a tile; longer blocks are read in several. Wide float32 heads fill shared memory soonest."""
    wide = q.dtype == torch.float32 and q.shape[-1] > 128
    return (min(size, 32), min(size, 32)) if wide else (size, min(size, 64))
