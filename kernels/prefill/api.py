"""The public prefill operator: many rows at once, structural masks, statistics without the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import choose
from kernels.prefill import reference
from kernels.prefill.options import normalise

WIDEST = 256  # channels of a head


@dataclass
class Prefilled:
    """Result of `attend`. out [B,Hq,R,d] in q's dtype; lse [B,Hq,R] float32, natural (for sigmoid and relu the logarithm
    of the row's weight sum); entropy [B,Hq,R] float32 nats or None; mass [B,Hk,N] float32 or None: the weight each key
    received, summed over rows and the query heads of its group."""

    out: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    mass: torch.Tensor | None = None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, start: int | None = None, window=None, sinks=0,
    rows: torch.Tensor | None = None, blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
    block_size: tuple[int, int] = (128, 64), softcap: float | None = None, sink: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None, weight: str = "softmax", want_entropy: bool = False, want_mass: bool = False,
    impl: str = "auto",
) -> Prefilled:
    """Causal attention of q [B,Hq,T,d], the rows at positions start..start+T, to k, v [B,Hk,N,d] at positions 0..N.

    start      position of the first row; default N - T.
    window     int or int [Hq]: row i sees keys i-window+1..i (A-shape, per-head spans); None sees everything before it.
    sinks      int or int [Hq]: the first keys, seen by every row whatever its window.
    rows       int32 [R] ascending absolute positions: compute only these rows; the output has R rows.
    blocks     (index int32 [B,Hq,RB,M], count int32 [B,Hq,RB]): row block r reads only its first `count` key blocks, cut by
               causality and window. Mass is not available with it. See `kernels.prefill.blocks`.
    block_size  (rows, keys) of those blocks, powers of two from 16; rows count from the call's first, keys from position 0.
    softcap    logits become softcap*tanh(logit/softcap).       sink  float [Hq]: a logit in the normaliser, no value.
    key_bias   float [Hq,N] or [B,Hq,N] added to every row's logits.
    weight     "softmax" | "sigmoid" | "relu": the latter two are not normalised.
    impl       "auto" | "torch" | "triton" | "library" (cuDNN, plain causal softmax only; "auto" picks it there).

    A row that sees nothing gives zeros and lse -inf. Raises ValueError for shapes and requests that do not fit.
    """
    o = normalise(q, k, start=start, window=window, sinks=sinks, rows=rows, blocks=blocks, softcap=softcap, sink=sink,
                  key_bias=key_bias, weight=weight, block_size=block_size)
    if want_mass and (blocks is not None or rows is not None):
        raise ValueError("column mass needs every row and no block list; call column_mass with all rows' lse instead.")
    if want_entropy and weight != "softmax":
        raise ValueError("entropy is defined for softmax weights only.")
    if impl in ("auto", "library") and o.plain and not want_entropy and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from kernels.prefill.library import causal

        found = causal(q, k, v, scale)
        if found is not None:
            mass = column_mass(q, k, found[1], scale) if want_mass else None
            return Prefilled(*found, None, mass)
    if _choose("auto" if impl == "library" else impl, q, k, v) == "torch":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse, entropy, mass = reference.attend(q, k, v, scale, o, dtype=dtype)
        return Prefilled(out.to(q.dtype), lse.float(), entropy.float() if want_entropy else None,
                         mass.float() if want_mass else None)
    from kernels.prefill.launch import forward, mass_of

    out, lse, entropy = forward(q, k, v, scale, o, want_entropy)
    return Prefilled(out, lse, entropy, mass_of(q, k, lse, scale, o) if want_mass else None)


def _choose(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """`choose`, and torch for heads that no tile holds: over 256 channels, or values of another width than keys."""
    fits = q.shape[-1] <= WIDEST and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if impl == "triton" and not fits:
        raise ValueError(
            f"the Triton path takes queries, keys and values of one width up to {WIDEST}, not "
            f"{q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}. Use impl='auto' or impl='torch'."
        )
    return choose(impl, q) if fits else "torch"


def column_mass(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, *, start: int | None = None, window=None, sinks=0,
    softcap: float | None = None, key_bias: torch.Tensor | None = None, weight: str = "softmax", impl: str = "auto",
) -> torch.Tensor:
    """Weight every key received, [B,Hk,N] float32, from q [B,Hq,T,d], k [B,Hk,N,d] and the rows' lse [B,Hq,T].

    The lse may come from any exact attention over the same visible keys (a library's, or the merge of parts, or one
    that includes a sink logit). Options as in `attend`.
    """
    o = normalise(q, k, start=start, window=window, sinks=sinks, rows=None, blocks=None, softcap=softcap, sink=None,
                  key_bias=key_bias, weight=weight)
    if _choose(impl, q, k, k) == "triton":
        from kernels.prefill.launch import mass_of

        return mass_of(q, k, lse, scale, o)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    mass = torch.zeros(k.shape[0], q.shape[1], k.shape[2], device=q.device)
    pos = o.positions(q)
    kx = k.float().repeat_interleave(group, 1)
    for r in range(0, q.shape[2], 256):
        s = q[:, :, r : r + 256].float() @ kx.mT * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if o.key_bias is not None:
            s = s + o.key_bias.float()[:, :, None]
        if weight == "softmax":
            p = torch.exp(s - lse[:, :, r : r + 256].float().clamp_min(-1e30)[..., None])
        else:
            p = torch.sigmoid(s) if weight == "sigmoid" else torch.relu(s)
        mass += p.masked_fill(~reference.visible(o, pos[r : r + 256], k.shape[2]), 0.0).sum(2)
    return mass.unflatten(1, (kv_heads, group)).sum(2)
