"""Integer codes for keys and values: affine quantisation and packing of 8, 4 and 2 bits into bytes.

Layout: a b-bit code vector of d channels takes d*b/8 bytes. Byte j of 4-bit codes holds channel j in its low half and
channel j + d/2 in its high half; byte j of 2-bit codes holds channels j, j + d/4, j + d/2, j + 3d/4 from the low bits
up. Unpacking is then a shift and a mask per contiguous slice, never an interleave.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

WIDTHS = (8, 4, 2)
FEW = 4096  # numbers up to which a CPU codes them by numpy


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., d] with values below 2**bits into bytes [..., d*bits/8]."""
    if bits == 8:
        return codes
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: bytes [..., d*bits/8] to uint8 codes [..., d]."""
    return packed if bits == 8 else torch.cat(streams(packed, bits), dim=-1)


def streams(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The contiguous channel slices held in `packed`, each uint8 [..., d*bits/8], in channel order."""
    if bits == 8:
        return [packed]
    mask = (1 << bits) - 1
    count = 8 // bits
    return [(packed >> (bits * i)) & mask if i < count - 1 else packed >> (bits * i) for i in range(count)]


def masked(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """As `streams`, but slice i comes as codes * 2**(bits*i): one operation a slice instead of two. See `units`."""
    return [packed] if bits == 8 else [packed & (((1 << bits) - 1) << (bits * i)) for i in range(8 // bits)]


@functools.cache
def _units(width: int, bits: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.full((width * bits // 8,), 0.5 ** (bits * i), dtype=dtype, device=device) for i in range(8 // bits)])


def units(x: torch.Tensor, bits: int) -> torch.Tensor:
    """What each channel of `masked` codes has to be multiplied by, [d] in x's dtype for x [..., d]: powers of two, exact."""
    return _units(x.shape[-1], bits, x.dtype, x.device)


def affine_range(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 (scale, zero) whose grid covers [low, high], rounded outwards so that |x - x_hat| <= scale/2 holds (I8)."""
    low, high = low.float(), high.float()
    zero = (low - low.abs() * 2**-10).half()
    step = (high - zero.float()).clamp_min(0) / (2**bits - 1)
    return (step * (1 + 2**-10) + 2**-24).half(), zero  # the second term where float16 has gone subnormal


def quantise(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of x under x ~ code*scale + zero (shapes broadcast). A zero scale stores the constant `zero`."""
    step = scale.float()
    safe = torch.where(step == 0, torch.ones_like(step), step)
    codes = torch.round((x.float() - zero.float()) / safe)
    return torch.where(step == 0, torch.zeros_like(codes), codes).clamp_(0, 2**bits - 1).to(torch.uint8)


def encode_tokens(x: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token affine codes. x [..., d] -> (bytes [..., d*bits/8], scale fp16 [..., d/group], zero fp16 [..., d/group])."""
    d = x.shape[-1]
    if x.device.type == "cpu" and x.numel() <= FEW:
        return tuple(torch.from_numpy(found) for found in encode_few(x.float().detach().contiguous().numpy(), bits, group))
    grouped = x.float().unflatten(-1, (d // group, group))
    # `affine_range` and `quantise` in fewer operations, bit for bit: a decode step codes one row, so operations are its cost.
    # Scales are never 0 here (the second term of `affine_range`), and half meets float by promotion, exactly.
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    zero = torch.sub(low, low.abs(), alpha=2**-10).half()
    scale = torch.sub(high, zero).clamp_min_(0).div_(2**bits - 1).mul_(1 + 2**-10).add_(2**-24).half()
    codes = torch.sub(grouped, zero).div_(scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    return pack(codes, bits), scale.squeeze(-1), zero.squeeze(-1)


def encode_few(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`encode_tokens` of float32 x [..., d] for the few numbers of a decode step on a CPU, bit for bit: numpy's calls cost a
    fraction of torch's."""
    d, top = x.shape[-1], np.float32(2**bits - 1)
    grouped = x.reshape(*x.shape[:-1], d // group, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    zero = (low - np.abs(low) * np.float32(2**-10)).astype(np.float16)
    wide = zero.astype(np.float32)
    step = np.maximum(high - wide, np.float32(0)) / top
    scale = (step * np.float32(1 + 2**-10) + np.float32(2**-24)).astype(np.float16)
    found = np.rint((grouped - wide) / scale.astype(np.float32))
    codes = np.clip(found, np.float32(0), top, out=found).astype(np.uint8).reshape(x.shape)
    if bits < 8:
        width = d * bits // 8
        packed = codes[..., :width].copy()
        for i in range(1, 8 // bits):
            packed |= codes[..., i * width : (i + 1) * width] << np.uint8(bits * i)
        codes = packed
    return codes, scale[..., 0], zero[..., 0]


def decode_tokens(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `encode_tokens`, float32 [..., d]."""
    codes = unpack(packed, bits).float().unflatten(-1, (scale.shape[-1], -1))
    return (codes * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).flatten(-2)


def encode_channels(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-channel affine codes of one block. x [..., g, d] -> (bytes [..., g, d*bits/8], scale, zero fp16 [..., d])."""
    scale, zero = affine_range(x.amin(-2), x.amax(-2), bits)
    return pack(quantise(x, scale.unsqueeze(-2), zero.unsqueeze(-2), bits), bits), scale, zero


def token_logits(
    q: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """q . x_hat without building x_hat: q [..., R, d], bytes [..., N, .], scale and zero [..., N, groups] -> [..., R, N].

    They come out of each group's sum, q.(c*s + z) = s*(q.c) + z*sum(q), so the codes are only converted.
    """
    parts, groups = masked(packed, bits), scale.shape[-1]
    codes = (parts[0] if bits == 8 else torch.cat(parts, -1)).to(q.dtype)
    turned = q if bits == 8 else q * units(q, bits)
    scale, zero = scale.to(q.dtype), zero.to(q.dtype)
    if groups == 1:
        return torch.addcmul(q.sum(-1, keepdim=True) * zero.mT, turned @ codes.mT, scale.mT)
    out = q.unflatten(-1, (groups, -1)).sum(-1) @ zero.mT
    for g, (qs, part) in enumerate(zip(turned.chunk(groups, -1), codes.chunk(groups, -1))):
        out.addcmul_(qs @ part.mT, scale[..., g : g + 1].mT)
    return out


def token_mix(
    p: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """p @ x_hat without building x_hat: p [..., R, N], scale and zero [..., N, groups] -> [..., R, d]."""
    groups, width = scale.shape[-1], packed.shape[-1]
    size = width * 8 // bits // groups
    scale, zero = scale.to(p.dtype), zero.to(p.dtype)
    weighted = [p * scale[..., g : g + 1].mT for g in range(groups)]
    step = math.gcd(width, size)  # channels that share a slice of the bytes and a scale
    outs = [weighted[(i * width + at) // size] @ part[..., at : at + step].to(p.dtype)
            for i, part in enumerate(masked(packed, bits)) for at in range(0, width, step)]
    shift = (p * zero.mT).sum(-1, keepdim=True) if groups == 1 else (p @ zero).repeat_interleave(size, -1)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
    return out.add_(shift) if bits == 8 else torch.addcmul(shift, out, units(out, bits))
