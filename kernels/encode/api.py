"""Public cache writing: every function changes tensors in place, on the device, without synchronising on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels import codes
from kernels.backend import choose, home, interpreting
from kernels.decode.reference import dequantise
from kernels.decode.tier import TierView


def encode_tokens(
    x: torch.Tensor, bits: int, group: int, *, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None, impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token affine codes of x [n,d]: (bytes [.,d*bits/8], scale, zero float16 [.,d/group]), as `kernels.codes`.

    With `out` and slots int [n], row i goes to slot slots[i] of the given tensors (-1: nowhere).
    """
    n, dim = x.shape
    if dim % group or (dim * bits) % 8:
        raise ValueError(f"{dim} channels do not split into groups of {group} and whole bytes of {bits}-bit codes.")
    if out is None:
        out = (torch.empty(n, dim * bits // 8, dtype=torch.uint8, device=x.device),
               *(torch.empty(n, dim // group, dtype=torch.float16, device=x.device) for _ in range(2)))
        slots = torch.arange(n, device=x.device)
    if choose(impl, x) == "torch":
        live = slots >= 0
        for target, value in zip(out, codes.encode_tokens(x[live], bits, group)):
            target[slots[live].long()] = value
        return out
    import triton

    from kernels.encode.triton_encode import encode_kernel

    if n:
        width = dim * bits // 8
        home(encode_kernel)[(triton.cdiv(n, 16),)](
            x.contiguous(), slots, *out, n, D=dim, BITS=bits, GROUP=group, GP=triton.next_power_of_2(group), W=width,
            WP=triton.next_power_of_2(width), BR=16, num_warps=4,
            **({} if interpreting() else {"enable_fp_fusion": False}),  # the CPU's codes, bit for bit
        )
    return out


def encode_sides(
    xs: Sequence[torch.Tensor], bits: int, group: int, outs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    slots: torch.Tensor, *, stride: int = 0, source: torch.Tensor | None = None, impl: str = "auto",
) -> None:
    """Per-token affine codes of one row per lane, of one or two tensors (keys and values) in one launch.

    xs [.,d] contiguous; row r, or source[r] where int64 [n] is given, is coded into slot slots[r] + r*stride (int64 [n]) of its
    (bytes, scale, zero), as `encode_tokens`. Nothing synchronises.
    """
    n, dim = slots.shape[0], xs[0].shape[-1]
    if dim % group or (dim * bits) % 8:
        raise ValueError(f"{dim} channels do not split into groups of {group} and whole bytes of {bits}-bit codes.")
    if choose(impl, slots, *xs) == "torch":
        place = slots + torch.arange(n, device=slots.device) * stride if stride else slots
        for x, out in zip(xs, outs):
            picked = x if source is None else x.index_select(0, source)
            for target, value in zip(out, codes.encode_tokens(picked, bits, group)):
                target.index_copy_(0, place, value)
        return
    import triton

    from kernels.encode.triton_encode import encode_sides_kernel

    width = dim * bits // 8
    home(encode_sides_kernel)[(triton.cdiv(n, 4), len(xs))](
        xs[0], xs[-1], slots if source is None else source, slots, *outs[0], *outs[-1], n, stride, D=dim, BITS=bits, GROUP=group,
        GP=triton.next_power_of_2(group), W=width, WP=triton.next_power_of_2(width), BR=4, GATHER=source is not None, num_warps=2,
        **({} if interpreting() else {"enable_fp_fusion": False}),
    )


def append(tier: TierView, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, impl: str = "auto") -> None:
    """Write keys and values [n,d] into slots int64 [n] of a tier: copied at 16 bits, else encoded per token.

    Slots below 0 are skipped. Lengths are the caller's to raise. ValueError for per-channel or table codes, which need
    whole blocks: use `kernels.codes`.
    """
    if tier.bits == 16:
        if choose(impl, k) == "torch":
            live = slots >= 0
            at = slots[live].long()
            tier.k[at], tier.v[at] = k[live].to(tier.k.dtype), v[live].to(tier.v.dtype)
            return
        import triton

        from kernels.encode.triton_encode import scatter_kernel

        for target, x in ((tier.k, k), (tier.v, v)):
            if len(slots):
                home(scatter_kernel)[(len(slots),)](
                    x.contiguous(), slots, target, D=tier.dim, DP=triton.next_power_of_2(tier.dim), num_warps=1,
                )
        return
    if tier.code != "affine" or tier.k_group is not None:
        raise ValueError("append encodes per token and affine; per-channel and table codes are written block by block.")
    dim = tier.dim
    encode_tokens(k, tier.bits, dim // tier.k_scale.shape[-1], out=(tier.k, tier.k_scale, tier.k_zero), slots=slots, impl=impl)
    encode_tokens(v, tier.bits, dim // tier.v_scale.shape[-1], out=(tier.v, tier.v_scale, tier.v_zero), slots=slots, impl=impl)


def demote(
    source: TierView, source_slots: torch.Tensor, target: TierView, target_slots: torch.Tensor, impl: str = "auto"
) -> None:
    """Copy entries from one tier into a narrower one: decoded from source_slots int64 [n], encoded into target_slots.

    Entries whose target is below 0 are skipped. Positions, lengths and the source's compaction are the caller's
    (see `compact`).
    """
    k, v = dequantise(source, source_slots.clamp_min(0).long(), torch.float32)
    append(target, k, v, target_slots, impl)


def compact(tier: TierView, keep: torch.Tensor, extra: Sequence[torch.Tensor] = (), impl: str = "auto") -> torch.Tensor:
    """Drop entries in place: keep bool [slots]; survivors of each lane move to its front in order.

    `extra` are per-slot tensors that move along (positions, scores). tier.length is updated in place and returned; a
    per-channel tier loses the promise of `k_block`. Slots past the new length keep stale contents.
    """
    tensors = [tier.k, tier.v, *extra]
    if tier.bits < 16:
        per_token = [tier.v_scale, tier.v_zero] + ([tier.k_scale, tier.k_zero] if tier.k_group is None else [tier.k_group])
        tensors += [t for t in per_token if t is not None]
    tier.k_block = 0
    if choose(impl, tier.k) == "torch":
        for lane, (s, n) in enumerate(zip(tier.start.tolist(), tier.length.tolist())):
            chosen = keep[s : s + n].nonzero().flatten() + s
            for t in tensors:
                t[s : s + len(chosen)] = t[chosen]
            tier.length[lane] = len(chosen)
        return tier.length
    import triton

    from kernels.encode.triton_encode import compact_kernel, count_kernel

    flags = keep.to(torch.uint8)
    for t in tensors:
        rows = t.view(t.shape[0], -1)
        size = rows.shape[1] * rows.element_size()
        word = next(w for w in (4, 2, 1) if size % w == 0)
        rows = rows.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[word])
        width = size // word
        block = min(32, triton.next_power_of_2(width))
        home(compact_kernel)[(tier.lanes, triton.cdiv(width, block))](
            rows, flags, tier.start, tier.length, W=width, BW=block, BN=128, num_warps=4
        )
    kept = torch.empty_like(tier.length)
    home(count_kernel)[(tier.lanes,)](flags, tier.start, tier.length, kept, BN=1024, num_warps=4)
    tier.length.copy_(kept)
    return tier.length
