"""Codes and scales for weight matrices: int8 per output, int4 per group of inputs."""

from __future__ import annotations

import torch

GROUP = 32

_BLOCK_WEIGHTS = 1 << 19
_SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.74)
_REFITS = 2
_EXACT = 1e-5


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale per output.

    Args:
        weight: [N, K], any float dtype.

    Returns:
        codes int8 [N, K] in -127..127 and scales bfloat16 [N]; W ~= codes * scales[:, None]. The scale is rounded to
        bfloat16 before the codes are chosen, so its rounding costs nothing.
    """
    weight = weight.detach().float()
    scales = (weight.abs().amax(1).clamp_min(1e-12) / 127).to(torch.bfloat16)
    codes = (weight / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Affine int4 per group of 32 inputs, the scale chosen by a small search for the least squared error.

    Each group first takes the grid that spans its minimum and maximum, which reproduces weights that lie on a 16-step
    grid already (those of a 4-bit GGUF file). Groups where an error remains also try narrower grids, each refitted by
    least squares, and keep the best.

    Args:
        weight: [N, K] with K a multiple of 32.

    Returns:
        codes int32 [N, K] in 0..15 (what torch's packing wants), nibbles uint8 [N, K/2] (see ``pack_nibbles``), and
        affine bfloat16 [N, K/32, 2] holding (scale, centre); W ~= (code - 8) * scale + centre.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int32)
    affine = torch.empty(rows, columns // GROUP, 2, dtype=torch.bfloat16)
    step = max(1, _BLOCK_WEIGHTS // columns)
    for at in range(0, rows, step):  # blocks that stay in the processor's cache
        groups = weight[at:at + step].detach().float().reshape(-1, GROUP)
        scale, centre = _search(groups)
        block = _code(groups, scale, centre)
        codes[at:at + step] = block.view(-1, columns).to(torch.int32)
        affine[at:at + step] = torch.stack([scale, centre], -1).view(-1, columns // GROUP, 2).to(torch.bfloat16)
    return codes, pack_nibbles(codes), affine


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes [N, K] in 0..15 -> uint8 [N, K/2]: in each group, byte j holds input j (low) and input j + 16 (high)."""
    halves = codes.view(codes.shape[0], -1, 2, GROUP // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).to(torch.uint8).view(codes.shape[0], -1)


def unpack_int4(nibbles: torch.Tensor, affine: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in ``dtype`` from nibbles uint8 [N, K/2] and affine [N, K/32, 2]."""
    rows = nibbles.shape[0]
    halves = [half.to(dtype).view(rows, -1, GROUP // 2) for half in (nibbles & 15, nibbles >> 4)]
    out = torch.stack(halves, 2)
    scale, centre = affine.to(dtype).split(1, -1)
    # The steps are exact in bfloat16. Not addcmul, which has no fast path for it.
    out.sub_(8)
    return out.view(rows, -1, GROUP).mul_(scale).add_(centre).view(rows, -1)


def _search(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre [n, 1], already rounded to bfloat16, for groups [n, 32]."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, centre = _grid(low, high, 1.0)
    error = _error(groups, scale, centre)
    energy = (groups - groups.mean(1, keepdim=True)).square().sum(1, keepdim=True)
    hard = (error > _EXACT * energy).squeeze(1).nonzero().squeeze(1)
    if len(hard):
        subset = groups[hard]
        better = _narrower(subset, low[hard], high[hard], scale[hard], centre[hard], error[hard])
        scale[hard], centre[hard] = better
    return scale, centre


def _narrower(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor,
    error: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the given grid and of narrower ones, each refitted."""
    for shrink in (1.0, *_SHRINKS):
        tried_scale, tried_centre = _grid(low, high, shrink)
        for _ in range(_REFITS):
            tried_scale, tried_centre = _refit(groups, tried_scale, tried_centre)
        tried = _error(groups, tried_scale, tried_centre)
        wins = tried < error
        scale = torch.where(wins, tried_scale, scale)
        centre = torch.where(wins, tried_centre, centre)
        error = torch.where(wins, tried, error)
    return scale, centre


def _grid(low: torch.Tensor, high: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16-step grid that spans [low, high] drawn in by ``shrink`` around its middle."""
    middle, half = (high + low) / 2, (high - low) / 2 * shrink
    scale = _rounded(half * (2 / 15)).clamp_min(1e-30)
    # Codes run from -8 to 7 around the centre, so the centre lies half a step above the middle.
    return scale, _rounded(middle + scale / 2)


def _refit(groups: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and centre for the codes that the given ones lead to."""
    steps = _code(groups, scale, centre) - 8
    mean_step, mean = steps.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    spread = steps - mean_step
    fitted = (spread * groups).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp_min(1e-6)
    fitted = _rounded(torch.where(fitted > 0, fitted, scale))
    return fitted, _rounded(mean - mean_step * fitted)


def _code(groups: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    return ((groups - centre) / scale).round_().clamp_(-8, 7).add_(8)


def _error(groups: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Squared error of each group, [n, 1]."""
    back = (_code(groups, scale, centre) - 8) * scale + centre
    return (back - groups).square_().sum(1, keepdim=True)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()
