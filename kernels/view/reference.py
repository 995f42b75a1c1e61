"""The attention view in plain torch, a block of cell rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pooled(q, k, lse, scale, rows, cols, row_step, col_step, kind, softcap, window, key_bias, death, dtype=torch.float64):
    """See `kernels.view.pooled`."""
    (r0, r1), (c0, c1) = rows, cols
    j = torch.arange(c0, c1, device=q.device)
    out = []
    for a in range(r0, r1, row_step):
        i = torch.arange(a, min(a + row_step, r1), device=q.device)[:, None]
        s = q[a : min(a + row_step, r1)].to(dtype) @ k[c0:c1].to(dtype).mT * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if key_bias is not None:
            s = s + key_bias[c0:c1].to(dtype)
        see = (j <= i) & (i - j < (window or 2**30))
        if death is not None:
            see = see & (i < death[c0:c1])
        p = torch.where(see, torch.exp(s - lse[a : min(a + row_step, r1), None].to(dtype).clamp_min(-1e30)), 0.0)
        line = F.pad(p.amax(0) if kind == "max" else p.sum(0), (0, -(c1 - c0) % col_step)).view(-1, col_step)
        out.append(line.amax(1) if kind == "max" else line.sum(1))
    return torch.stack(out)
