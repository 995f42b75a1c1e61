"""Inputs for GPU benchmarks: random tiers made on the device, and the baselines a user would pick instead."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import codes
from kernels.decode import TierView


def tier(bits: int, lanes: int, n: int, dim: int, group: int, *, kind: str = "token",
         lengths: torch.Tensor | None = None, dtype=torch.bfloat16) -> TierView:
    """A tier of `lanes` lanes with `n` entries each (or `lengths`, laid out back to back)."""
    device = "cuda"
    length = torch.full((lanes,), n, dtype=torch.int32, device=device) if lengths is None else lengths.int().to(device)
    start = (torch.cumsum(length, 0) - length).int()
    slots = int(length.sum())
    common = dict(start=start, length=length, capacity=int(length.max()))
    if bits == 16:
        return TierView(16, torch.randn(slots, dim, device=device, dtype=dtype),
                        torch.randn(slots, dim, device=device, dtype=dtype), **common)

    def side(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        done = [codes.encode_tokens(part, bits, group) for part in x.split(1 << 18)]
        return tuple(torch.cat(d).contiguous() for d in zip(*done))

    if kind == "fp8":
        codes8 = [torch.randn(slots, dim, device=device).to(torch.float8_e4m3fn).view(torch.uint8) for _ in range(2)]
        ones = [torch.ones(slots, 1, device=device, dtype=torch.float16) for _ in range(2)]
        return TierView(8, *codes8, k_scale=ones[0], v_scale=ones[1], code="fp8", **common)
    vc, vs, vz = side(torch.randn(slots, dim, device=device))
    if kind == "token":
        kc, ks, kz = side(torch.randn(slots, dim, device=device))
        return TierView(bits, kc, vc, k_scale=ks, k_zero=kz, v_scale=vs, v_zero=vz, **common)
    blocks = -(-slots // 32)
    kc = torch.randint(0, 256, (slots, dim * bits // 8), dtype=torch.uint8, device=device)
    ks = (torch.rand(blocks, dim, device=device) * 0.2 + 0.2).half()
    kz = -ks * (2 ** (bits - 1) - 0.5)
    k_group = (torch.arange(slots, device=device) // 32).int()
    return TierView(bits, kc, vc, k_scale=ks, k_zero=kz, v_scale=vs, v_zero=vz, k_group=k_group, k_block=32, **common)


def tier_bytes(t: TierView) -> int:
    """Bytes one decode step must read from a tier."""
    used = int(t.length.sum())
    parts = [t.k, t.v, t.v_scale, t.v_zero] + ([] if t.k_group is not None else [t.k_scale, t.k_zero])
    total = sum(used * x.shape[-1] * x.element_size() for x in parts if x is not None)
    if t.k_group is not None:
        total += 2 * used // 32 * t.k_scale.shape[-1] * 2
    return total


def dense_calls(batch: int, heads: int, kv_heads: int, n: int, dim: int, count: int) -> dict[str, list]:
    """Decode baselines over `count` independent caches: {"flash": calls, "cudnn": calls}."""
    sets = [
        (torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16),
         torch.randn(batch, kv_heads, n, dim, device="cuda", dtype=torch.bfloat16),
         torch.randn(batch, kv_heads, n, dim, device="cuda", dtype=torch.bfloat16))
        for _ in range(count)
    ]

    def call(backend, q, k, v):
        def go():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return go

    return {
        name: [call(backend, *s) for s in sets]
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
    }
