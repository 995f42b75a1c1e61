"""Codes with levels that are not evenly spaced, sign codes, and the random rotations that make one codebook fit all.

Packing follows `kernels.codes`; three bits are two bits in one stream and the high bit in another.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels import codes

CPU = torch.device("cpu")

# Lloyd-Max levels of a standard normal variable, positive half (Max 1960)
_NORMAL = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


@cache
def normal_levels(bits: int, device: torch.device = CPU) -> torch.Tensor:
    """The 2**bits Lloyd-Max levels of N(0, 1), ascending, float32; bits 1 to 4. On a device always the same tensor, so that
    nothing is copied to it while a graph is captured."""
    half = torch.tensor(_NORMAL[bits])
    return torch.cat([-half.flip(0), half]).to(device)


@cache
def normal_edges(bits: int, device: torch.device = CPU) -> torch.Tensor:
    """The middles between neighbouring `normal_levels`."""
    found = normal_levels(bits, device)
    return (found[1:] + found[:-1]) / 2


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """uint8 index of the level (ascending, [n]) nearest to each number of x."""
    edges = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x.contiguous(), edges.to(x.device)).to(torch.uint8)


def fit_levels(x: torch.Tensor, bits: int, rounds: int = 25) -> torch.Tensor:
    """One-dimensional k-means with 2**bits centres on the numbers x [n], ascending float32 (Lloyd's algorithm)."""
    count = 2**bits
    x = x.float().sort().values
    below = torch.nn.functional.pad(x.double().cumsum(0), (1, 0))
    places = ((torch.arange(count) + 0.5) / count * (x.numel() - 1)).long()
    levels = x[places.to(x.device)]
    for _ in range(rounds):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), x.numel())])
        sums = below[ends].diff()
        held = ends.diff()
        levels = torch.where(held > 0, (sums / held.clamp_min(1)).float(), levels).sort().values
    return levels


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., d] below 2**bits into bytes [..., d*bits/8]; bits 1, 2, 3, 4 or 8."""
    if bits == 3:
        return torch.cat([codes.pack(values & 3, 2), codes.pack(values >> 2, 1)], -1)
    return codes.pack(values, bits)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`."""
    if bits == 3:
        low = packed.shape[-1] * 2 // 3
        return codes.unpack(packed[..., :low], 2) | (codes.unpack(packed[..., low:], 1) << 2)
    return codes.unpack(packed, bits)


@cache
def rotation(d: int, seed: int) -> torch.Tensor:
    """Random orthogonal [d, d]: a Hadamard matrix with random signs, or QR of a Gaussian where d is not a power of two."""
    generator = torch.Generator().manual_seed(7919 * seed + d)
    if d & (d - 1):
        q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float().contiguous()
    h = torch.ones(1, 1)
    while h.shape[0] < d:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    signs = torch.randint(2, (d,), generator=generator).float() * 2 - 1
    return h * signs / d**0.5


@cache
def turn(d: int, seed: int, device: torch.device) -> torch.Tensor:
    """`rotation` on a device, always the same tensor: what is under one rotation is recognised by it (`kernels.decode`)."""
    return rotation(d, seed).to(device)


@cache
def projection(d: int, seed: int, device: torch.device = CPU) -> torch.Tensor:
    """Gaussian [d, d] whose signs measure a residual without bias (QJL, arXiv 2406.03482)."""
    return torch.randn(d, d, generator=torch.Generator().manual_seed(104_729 * seed + d)).to(device)
