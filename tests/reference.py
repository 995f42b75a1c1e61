"""Independent float64 references: whole matrices, one head at a time, nothing shared with the code under test."""

from __future__ import annotations

import numpy as np


def attention(q, k, v, scale, visible=None, *, softcap=None, sink=None, bias=None):
    """One head. q [R,d], k [N,d], v [N,dv] array-likes; visible bool [R,N]; sink a logit without a value; bias [R,N]
    added to the logits. Returns (out [R,dv], lse [R], weights [R,N]), zeros and -inf for rows that see nothing."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    s = q @ k.T * scale
    if softcap:
        s = softcap * np.tanh(s / softcap)
    if bias is not None:
        s = s + np.asarray(bias, dtype=np.float64)
    if visible is not None:
        s = np.where(np.asarray(visible, dtype=bool), s, -np.inf)
    joined = s if sink is None else np.concatenate([s, np.full((len(s), 1), float(sink))], 1)
    top = joined.max(1, keepdims=True)
    top = np.where(np.isinf(top), 0.0, top)
    total = np.exp(joined - top).sum(1, keepdims=True)
    p = np.exp(s - top) / np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[:, 0]
    return p @ v, lse, p


def visibility(pos_q, pos_k, window=None, bands=()):
    """bool [R,N]: causal, within a sliding window, within every band (sinks, width)."""
    i, j = np.asarray(pos_q)[:, None], np.asarray(pos_k)[None]
    seen = j <= i
    if window:
        seen &= i - j < window
    for sinks, width in bands:
        seen &= (j < sinks) | (i - j < width)
    return seen


def heads(q, k, v, scale, visible=None, *, sinks=None, bias=None, **extra):
    """All heads of one sequence. q [Hq,R,d], k, v [Hk,N,d]; head h reads KV head h // (Hq/Hk). sinks [Hq]; bias
    [Hq,R,N]. Returns (out [Hq,R,d], lse [Hq,R], weights [Hq,R,N])."""
    groups = len(q) // len(k)
    parts = [
        attention(
            q[h], k[h // groups], v[h // groups], scale, visible, sink=None if sinks is None else float(sinks[h]),
            bias=None if bias is None else bias[h], **extra,
        )
        for h in range(len(q))
    ]
    return tuple(np.stack(x) for x in zip(*parts))


def rope(x, pos, frequencies, interleaved=False):
    """Rotate x [N,d] to positions pos [N] by frequencies [r/2] (channels beyond r stay)."""
    x, angle = np.asarray(x, dtype=np.float64).copy(), np.asarray(pos, dtype=np.float64)[:, None] * np.asarray(frequencies)
    half = angle.shape[1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = x[:, first].copy(), x[:, second].copy()
    x[:, first], x[:, second] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return x


def kept(scores, budget, protected):
    """Slots that stay: protected bool [N] first, then the highest scores, ties to the lower slot (rules R4, R5)."""
    order = sorted(range(len(scores)), key=lambda n: (not protected[n], -scores[n], n))
    return sorted(order[:budget])
