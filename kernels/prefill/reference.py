"""Prefill attention in plain torch, row block by row block: the meaning of the operator in any float dtype."""

from __future__ import annotations

import torch

from kernels.prefill.options import Options


def visible(o: Options, pos: torch.Tensor, n_keys: int) -> torch.Tensor:
    """Boolean [Hq, rows, N]: which keys each head's rows at absolute positions pos may see (block lists apart)."""
    i, j = pos[:, None], torch.arange(n_keys, device=pos.device)[None]
    window, sinks = o.window[:, None, None], o.sinks[:, None, None]
    return (j <= i) & ((j < sinks) | (i - j < window))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, o: Options, *, dtype: torch.dtype = torch.float64,
    rows_at_once: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,Hq,T,d], lse [B,Hq,T], entropy [B,Hq,T], mass [B,Hk,N], all in dtype. See `kernels.prefill.attend`."""
    batch, heads, _, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    group = heads // kv_heads
    kx, vx = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    pos = o.positions(q)
    picked = q if o.rows is None else q[:, :, (o.rows - o.start).long()]
    outs, lses, entropies = [], [], []
    mass = torch.zeros(batch, heads, n, dtype=dtype, device=q.device)
    for r in range(0, len(pos), rows_at_once):
        s = picked[:, :, r : r + rows_at_once].to(dtype) @ kx.mT * scale
        if o.softcap:
            s = o.softcap * torch.tanh(s / o.softcap)
        if o.key_bias is not None:
            s = s + o.key_bias.to(dtype)[:, :, None]
        see = visible(o, pos[r : r + rows_at_once], n)
        if o.blocks is not None:
            see = see & o.listed(pos[r : r + rows_at_once] - pos[0], n)
        s = s.masked_fill(~see, -torch.inf)
        if o.weight == "softmax":
            full = s if o.sink is None else torch.cat([s, o.sink.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
            lse = torch.logsumexp(full, -1)
            p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        else:
            p = torch.sigmoid(s) if o.weight == "sigmoid" else torch.relu(torch.where(see, s, 0.0))
            lse = torch.log(p.sum(-1))
        outs.append(p @ vx)
        lses.append(lse)
        entropies.append(-torch.special.xlogy(p, p).sum(-1))
        mass += p.sum(2)
    out, lse, entropy = torch.cat(outs, 2), torch.cat(lses, 2), torch.cat(entropies, 2)
    return out, lse, entropy, mass.unflatten(1, (kv_heads, group)).sum(2)
