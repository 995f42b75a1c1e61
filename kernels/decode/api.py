"""The public decode operator: one new token per sequence against every tier of the cache at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.backend import choose
from kernels.decode import reference
from kernels.decode.tier import TierView
from kernels.merge import merge


@dataclass
class Decoded:
    """Result of `attend`. out [B,Hq,d] in q's dtype; lse [B,Hq] float32, natural logarithm (-inf where nothing was
    read); entropy [B,Hq] float32 in nats or None; mass: per tier [slots], the weight each key received summed
    over its group's query heads (slots outside every lane are left as they were), float32, or bfloat16 where the weights were
    kept as bytes; or an empty list."""

    out: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    mass: list[torch.Tensor] = field(default_factory=list)


def attend(
    q: torch.Tensor, tiers: list[TierView], scale: float, *, softcap: float | None = None,
    sink: torch.Tensor | None = None, threshold: torch.Tensor | None = None, want_mass: bool = False,
    want_entropy: bool = False, impl: str = "auto", early: bool = False,
    weights_as: str | None = None, gate: torch.Tensor | None = None,
) -> Decoded:
    """Softmax attention of q [B,Hq,d] to all entries of `tiers` (same lanes, any widths), in one exact softmax.

    softcap      logits become softcap*tanh(logit/softcap).
    sink         [Hq] float: a logit that takes part in the normaliser and has no value (gpt-oss).
    threshold    [Hq] or [B,Hq] float: keys whose logit (bias included) does not exceed it are not read (Top-theta,
                 arXiv 2502.08363).
    impl         "auto" | "torch" | "triton".
    weights_as   how local weights are kept for the mass: "bytes" (the default for bfloat16: off by at most 1/510 of the largest
                 weight among 32 or 64 neighbours, about bfloat16's own error) or "halves" (the default for others; slower).
    gate         float32 [Hq] that multiplies the outputs of the heads, or None.
    early        launch before the kernel that writes q has ended, and wait for it inside (a chain of small launches).

    On CUDA nothing synchronises and every length is read on the device, so calls can be captured in a CUDA graph; the
    graph stays valid while `length`, `start` and the contents change, up to `capacity`. Raises ValueError for shapes
    that do not fit together.
    """
    if not tiers:
        raise ValueError("attend needs at least one tier.")
    batch, heads, dim = q.shape
    lanes = tiers[0].lanes
    if (batch * heads) % lanes:
        raise ValueError(f"{batch}x{heads} query heads cannot be shared among {lanes} lanes; expected lanes = B*Hk.")
    for t in tiers:
        if t.lanes != lanes or t.dim != dim:
            raise ValueError(f"a tier has {t.lanes} lanes of {t.dim} channels; the query needs {lanes} of {dim}.")
    if choose(impl, q) == "torch":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse, entropy, mass = reference.attend(
            q, tiers, scale, softcap=softcap, sink=sink, threshold=threshold, want_mass=want_mass, dtype=dtype
        )
        if gate is not None:
            out = out * gate[:, None]
        return Decoded(out.to(q.dtype), lse.float(), entropy.float() if want_entropy else None,
                       [m.float() for m in mass])
    if want_mass and any(t.pages is not None for t in tiers):
        raise ValueError("mass of page-selected reading needs impl='torch'; read it from a tier without `pages`.")
    from kernels.decode.launch import run

    spaces: dict[int, list[TierView]] = {}
    for t in tiers:
        spaces.setdefault(id(t.rotation), []).append(t)
    if len(spaces) == 1 and tiers[0].rotation is None:
        return run(
            q, tiers, scale, softcap, sink, threshold, want_mass, want_entropy, early=early, weights_as=weights_as, gate=gate)
    if want_mass or want_entropy:
        raise ValueError("mass and entropy of rotated tiers need impl='torch'; read them from an unrotated tier.")
    outs, lses = [], []
    for i, group in enumerate(spaces.values()):
        turn = group[0].rotation
        rotated = q if turn is None else (q.float() @ turn.mT).to(q.dtype)
        part = run(rotated, group, scale, softcap, sink if i == 0 else None, threshold, False, False)
        outs.append(part.out if turn is None else (part.out.float() @ turn).to(q.dtype))
        lses.append(part.lse)
    out, lse = merge(outs, lses)
    return Decoded(out if gate is None else (out * gate[:, None]).to(out.dtype), lse)
