"""Decode attention in plain torch: the meaning of the operator, in any float dtype, and the path on CPU."""

from __future__ import annotations

import torch

from kernels import codes
from kernels.decode.tier import TierView


def dequantise(tier: TierView, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some slots as numbers, [n, d] each, un-rotated."""
    turn = (lambda x: x) if tier.rotation is None else (lambda x: x @ tier.rotation.to(dtype))
    if tier.bits == 16:
        return turn(tier.k[rows].to(dtype)), turn(tier.v[rows].to(dtype))
    out = []
    for packed, scale, zero, group in (
        (tier.k, tier.k_scale, tier.k_zero, tier.k_group), (tier.v, tier.v_scale, tier.v_zero, None)
    ):
        c = codes.unpack(packed[rows], tier.bits)
        if tier.code == "levels":
            x = tier.levels.to(dtype)[c.long()]
        elif tier.code == "fp8":
            x = c.contiguous().view(torch.float8_e4m3fn).to(torch.float32).to(dtype)
        else:
            x = c.to(dtype)
        if group is not None:
            of = group[rows].long()
            x = x * scale[of].to(dtype) + zero[of].to(dtype)
        else:
            x = x.unflatten(-1, (scale.shape[-1], -1)) * scale[rows].to(dtype).unsqueeze(-1)
            if tier.code == "affine":
                x = x + zero[rows].to(dtype).unsqueeze(-1)
            x = x.flatten(-2)
        out.append(turn(x))
    return out[0], out[1]


def _slots(tier: TierView, lane: int, start: int, length: int) -> torch.Tensor:
    """The slots of one lane that are read, int64."""
    i = torch.arange(length, device=tier.k.device)
    if tier.pages is not None:
        chosen = tier.pages[lane].long()
        i = (chosen[chosen >= 0][:, None] * tier.page + torch.arange(tier.page, device=i.device)).flatten()
        i = i[i < length]
    return start + i


def attend(
    q: torch.Tensor, tiers: list[TierView], scale: float, *, softcap: float | None = None,
    sink: torch.Tensor | None = None, threshold: torch.Tensor | None = None, want_mass: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Arguments and results as `kernels.decode.attend`, computed lane by lane in `dtype`.

    Returns out [B,Hq,d], lse [B,Hq], entropy [B,Hq] (all in dtype), mass per tier [slots] (empty list if not wanted).
    """
    batch, heads, dim = q.shape
    lanes = tiers[0].lanes
    group = batch * heads // lanes
    rows = q.reshape(lanes, group, dim).to(dtype)
    out, lse, entropy = torch.zeros_like(rows), rows.new_empty(lanes, group), rows.new_zeros(lanes, group)
    masses = [torch.zeros(t.slots, dtype=dtype, device=q.device) for t in tiers] if want_mass else []
    sinks = None if sink is None else sink.to(dtype).expand(batch, heads).reshape(lanes, group)
    bounds = None if threshold is None else threshold.to(dtype).expand(batch, heads).reshape(lanes, group)
    spans = [list(zip(t.start.tolist(), t.length.tolist())) for t in tiers]
    for lane in range(lanes):
        places = [_slots(t, lane, *s[lane]) for t, s in zip(tiers, spans)]
        pairs = [dequantise(t, place, dtype) for t, place in zip(tiers, places)]
        k, v = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
        s = rows[lane] @ k.mT * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if any(t.bias is not None for t in tiers):
            biases = [(t.bias if t.bias is not None else torch.zeros(t.slots, device=q.device))[..., place]
                      for t, place in zip(tiers, places)]
            s = s + torch.cat([b.expand(group, -1) for b in biases], -1).to(dtype)
        if bounds is not None:
            s = s.masked_fill(s <= bounds[lane][:, None], -torch.inf)
        full = s if sinks is None else torch.cat([s, sinks[lane][:, None]], -1)
        z = torch.logsumexp(full, -1) if full.shape[-1] else torch.full_like(lse[lane], -torch.inf)
        p = torch.exp(s - torch.where(z == -torch.inf, torch.zeros_like(z), z)[:, None])
        out[lane], lse[lane] = p @ v, z
        entropy[lane] = -torch.special.xlogy(p, p).sum(-1)
        if want_mass:
            for mass, place, part in zip(masses, places, p.sum(0).split([len(pl) for pl in places])):
                mass[place] = part
    shape = (batch, heads)
    return out.view(batch, heads, dim), lse.view(shape), entropy.view(shape), masses
