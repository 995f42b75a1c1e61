"""The decode step's operators in plain torch: what the Triton kernels are checked against, and the path on a CPU."""

from __future__ import annotations

import torch


def normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [B,K] / sqrt(mean(x^2) + eps) * weight, in x's dtype; x itself without a weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def product(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, weight: torch.Tensor, bias: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(norm of x) @ weight.T + bias, [B,N] in `dtype`."""
    y = normed(x.to(dtype), norm, eps) @ weight.to(dtype).T
    return y if bias is None else y + bias.to(dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B,H,d] by cos, sin [d]: channel c is paired with c + d/2."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
