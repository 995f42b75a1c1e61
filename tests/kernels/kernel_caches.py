"""Random tiered caches for tests: any width, code, raggedness, and poison wherever nothing should be read."""

from __future__ import annotations

import torch

from kernels import codes
from kernels.backend import has_triton
from kernels.decode import TierView

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BEST = "triton" if has_triton() else "torch"  # what is held against the float64 references
LLOYD_4 = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326]
LLOYD_2 = [0.4528, 1.5104]


def lanes_of(lengths: list[int], spare: int = 0) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """start, length (int32), total slots and capacity for ragged lanes laid out with `spare` unused slots after each."""
    length = torch.tensor(lengths, dtype=torch.int32)
    start = torch.cumsum(length + spare, 0).to(torch.int32) - length - spare
    return start, length, int(length.sum()) + spare * len(lengths), max(lengths)


def make_tier(
    bits: int, lengths: list[int], dim: int, *, dtype=torch.float16, channels: int | None = None, kind: str = "token",
    spare: int = 0, device: str = "cpu", generator: torch.Generator | None = None, capacity: int | None = None,
) -> TierView:
    """kind: "token" | "block" (KIVI, contiguous groups of 32) | "gather" (KIVI, shuffled) | "levels" | "fp8"."""
    start, length, slots, cap = lanes_of(lengths, spare)
    slots = max(slots, 1)
    k = torch.randn(slots, dim, generator=generator) * (0.5 + torch.rand(dim, generator=generator))
    v = torch.randn(slots, dim, generator=generator)
    common = dict(start=start.to(device), length=length.to(device), capacity=capacity or cap)
    if bits == 16:
        dead = torch.ones(slots, dtype=torch.bool)
        for s, n in zip(start.tolist(), length.tolist()):
            dead[s : s + n] = False
        k, v = k.to(dtype), v.to(dtype)
        k[dead], v[dead] = torch.nan, torch.nan
        return TierView(16, k.to(device), v.to(device), **common)
    group = channels or dim
    if kind == "levels":
        table = torch.tensor(LLOYD_4 if bits == 4 else LLOYD_2)
        levels = torch.cat([-table.flip(0), table]).half()
        parts = []
        for x in (k, v):
            norm = (x.norm(dim=-1, keepdim=True) / dim**0.5).half()
            code = (x[..., None] / norm.float()[..., None] - levels.float()).abs().argmin(-1).to(torch.uint8)
            parts.append((codes.pack(code, bits).to(device), norm.to(device)))
        return TierView(bits, parts[0][0], parts[1][0], k_scale=parts[0][1], v_scale=parts[1][1], code="levels",
                        levels=levels.to(device), **common)
    if kind == "fp8":
        parts = []
        for x in (k, v):
            s = (x.abs().amax(-1, keepdim=True) / 448).half()
            parts.append(((x / s.float()).to(torch.float8_e4m3fn).view(torch.uint8).to(device), s.to(device)))
        return TierView(8, parts[0][0], parts[1][0], k_scale=parts[0][1], v_scale=parts[1][1], code="fp8", **common)
    vc, vs, vz = (t.to(device) for t in codes.encode_tokens(v, bits, group))
    extra = {}
    if kind == "token":
        kc, ks, kz = (t.to(device) for t in codes.encode_tokens(k, bits, group))
    else:
        k_group = torch.zeros(slots, dtype=torch.int32)
        row = 0
        for s, n in zip(start.tolist(), length.tolist()):
            for b in range(0, n, 32):
                k_group[s + b : s + min(n, b + 32)] = row
                row += 1
        if kind == "gather":
            k_group = k_group[torch.randperm(slots, generator=generator)]
        rows = max(row, 1)
        low = torch.full((rows, dim), torch.inf).index_reduce_(0, k_group.long(), k, "amin")
        high = torch.full((rows, dim), -torch.inf).index_reduce_(0, k_group.long(), k, "amax")
        low, high = torch.nan_to_num(low, posinf=0.0), torch.nan_to_num(high, neginf=0.0)
        ks, kz = codes.affine_range(low, high, bits)
        kc = codes.pack(codes.quantise(k, ks[k_group.long()], kz[k_group.long()], bits), bits)
        kc, ks, kz = kc.to(device), ks.to(device), kz.to(device)
        extra = dict(k_group=k_group.to(device), k_block=32 if kind == "block" else 0)
    return TierView(bits, kc, vc, k_scale=ks, k_zero=kz, v_scale=vs, v_zero=vz, **extra, **common)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; NaN never passes a comparison with it."""
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30))
