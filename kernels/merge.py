"""Exact merging of partial attention results over disjoint key sets (invariant I5 of the conventions sheet)."""

from __future__ import annotations

import torch


def merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention outputs over disjoint sets of keys.

    outs: tensors [..., d]; lses: tensors [...], natural-log sum of exponentials of each part (-inf for an empty part).
    Returns (out [..., d], lse [...]). Rows in which every part is empty give zeros and -inf.
    """
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses).float()
    top = stacked.amax(0)
    safe = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp(stacked - safe)
    total = weights.sum(0)
    out = sum(o.float() * w.unsqueeze(-1) for o, w in zip(outs, weights))
    out = out / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out.to(outs[0].dtype), torch.log(total) + safe


def scale_columns(
    out: torch.Tensor, lse: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `bias` to the logits of a few columns of an attention that has already been computed.

    out [..., T, d], lse [..., T]: the finished attention; logits [..., T, C]: the logits those columns had
    (-inf where a row may not see a column); values [..., C, d]; bias broadcastable to [..., T, C].
    Adding b to a column multiplies its weight by e^b before normalising, so the correction is exact and costs
    O(T*C*d) instead of a second pass over every key.
    """
    weight = torch.exp(logits.float() - lse.float().unsqueeze(-1))
    extra = weight * torch.expm1(bias)
    total = 1 + extra.sum(-1)
    fixed = (out.float() + extra @ values.float()) / total.unsqueeze(-1)
    return fixed.to(out.dtype), lse + torch.log(total)


def sink_logit(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a learned logit without a value join the softmax (gpt-oss `s_aux`): weights then sum to less than one.

    out [B,H,T,d], lse [B,H,T], sink [H]. Returns the rescaled output and the new lse.
    """
    total = torch.logaddexp(lse.float(), sink.float().view(1, -1, 1).expand_as(lse))
    return (out.float() * torch.exp(lse.float() - total).unsqueeze(-1)).to(out.dtype), total
