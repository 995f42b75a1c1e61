"""Exact attention of query rows over plain keys and values, returning (out, lse): the torch path on any device."""

from __future__ import annotations

from typing import Sequence

import torch

from kernels.merge import merge

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with as many query heads as key heads.

    q [B,H,R,d], k [B,H,N,d], v [B,H,N,dv]; mask None or boolean/additive, broadcastable to [B,H,R,N].
    causal aligns the first query with the first key. Returns out [B,H,R,dv] and natural-log lse [B,H,R] (float32);
    a row that sees no key gives zeros and -inf.
    """
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.dtype != torch.float16 and q.dtype != torch.float64:
        if mask is None or (mask.dtype == q.dtype and mask.dim() == 4 and not causal):
            return _flash_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return materialised(q, k, v, scale, causal=causal, mask=mask)


def materialised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool = False,
    mask: torch.Tensor | None = None, rows: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `plain`, in blocks of `rows` queries, so that no more than [B,H,rows,N] logits live at once."""
    n = k.shape[-2]
    outs, lses = [], []
    for start in range(0, q.shape[-2], rows):
        block = q[..., start : start + rows, :]
        s = (block @ k.mT).float() * scale
        if causal:
            i = torch.arange(start, start + block.shape[-2], device=q.device)[:, None]
            s = s.masked_fill(torch.arange(n, device=q.device)[None] > i, -torch.inf)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., start : start + rows, :]
            s = s.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else s + part
        out, lse = normalise(s, v)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def normalise(s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of float32 logits s [...,R,N] applied to v [...,N,d]; rows of -inf give zeros and lse -inf."""
    p, lse = softmax(s)
    return p.to(v.dtype) @ v, lse


def softmax(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, lse) of float32 logits [..., N]; a row of -inf gives zero weights, never NaN."""
    lse = torch.logsumexp(s, -1)
    safe = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    return torch.exp(s - safe.unsqueeze(-1)), lse


def grouped_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal prefill with grouped query heads. q [B,Hq,T,d], k,v [B,Hk,T,d] -> out [B,Hq,T,d], lse [B,Hq,T].

    One call per query head of a group on strided views: keys are never repeated in memory.
    """
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return plain(q, k, v, scale, causal=True)
    qg = q.unflatten(1, (k.shape[1], groups))
    parts = [plain(qg[:, :, g], k, v, scale, causal=True) for g in range(groups)]
    out = torch.stack([p[0] for p in parts], 2).flatten(1, 2)
    return out, torch.stack([p[1] for p in parts], 2).flatten(1, 2)


def band(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, sinks: int, window: int, start: int = 0,
    block: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of row i to keys j < sinks or i - j < window (A-shape, MInference arXiv 2407.02490).

    q [B,Hq,T,d] are the rows start..start+T of the sequence, k,v [B,Hk,N,d] hold keys 0..N-1 with N >= start+T.
    Work per row is sinks + window + block, not N.
    """
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    outs, lses = [], []
    for r0 in range(0, q.shape[2], block):
        rows = q[:, :, r0 : r0 + block]
        first, last = start + r0, start + r0 + rows.shape[2]
        near = max(0, first - window + 1)
        sink_end = min(sinks, near)
        keys = torch.cat([k[:, :, :sink_end], k[:, :, near:last]], 2) if sink_end else k[:, :, near:last]
        vals = torch.cat([v[:, :, :sink_end], v[:, :, near:last]], 2) if sink_end else v[:, :, near:last]
        j = torch.cat([torch.arange(sink_end), torch.arange(near, last)]).to(q.device)
        i = torch.arange(first, last, device=q.device)[:, None]
        visible = (j <= i) & ((j < sinks) | (i - j < window))
        packed = rows.unflatten(1, (kv_heads, groups)).flatten(2, 3)
        out, lse = materialised(packed, keys, vals, scale, mask=visible.repeat(groups, 1), rows=packed.shape[2])
        outs.append(out.unflatten(2, (groups, -1)).flatten(1, 2))
        lses.append(lse.unflatten(2, (groups, -1)).flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def column_mass(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, *, start: int, softcap: float | None = None,
    window: int | None = None, bands: Sequence[tuple[int, int]] = (),
    biases: Sequence[tuple[int, torch.Tensor]] = (), rows: int = 256,
) -> torch.Tensor:
    """Attention each key received, summed over query rows and the heads of its group: [B,Hk,N] float32.

    q [B,Hq,T,d] rows start.., k [B,Hk,N,d], lse [B,Hq,T]; bands (sinks, window) and biases (column, [Hq]) are those
    under which lse was formed. Recomputed blockwise from the row lse: O(rows*N) memory.
    """
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    mass = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    j = torch.arange(k.shape[2], device=k.device)
    for r0 in range(0, q.shape[2], rows):
        block = q[:, :, r0 : r0 + rows]
        last = start + r0 + block.shape[2]
        packed = block.unflatten(1, (kv_heads, groups)).flatten(2, 3)
        s = (packed @ k[:, :, :last].mT).float() * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        i = torch.arange(start + r0, last, device=k.device)[:, None]
        hidden = j[:last] > i
        if window:
            hidden |= i - j[:last] >= window
        for sinks, width in bands:
            hidden |= (j[:last] >= sinks) & (i - j[:last] >= width)
        for column, bias in biases:
            if column < last:
                s[..., column] += bias.to(s.device).view(kv_heads, groups).repeat_interleave(block.shape[2], 1)
        row_lse = lse[:, :, r0 : r0 + rows].unflatten(1, (kv_heads, groups)).flatten(2, 3).unsqueeze(-1)
        p = torch.exp(s - row_lse).masked_fill_(hidden.repeat(groups, 1), 0)
        mass[:, :, :last] += p.sum(2)
    return mass


__all__ = ["plain", "materialised", "normalise", "softmax", "grouped_causal", "band", "column_mass", "merge"]
