"""Attention the slow way: the whole matrix in float64, pooled by loops. What every view is compared with."""

from __future__ import annotations

import numpy as np

from lab.inspect.capture import Capture
from lab.inspect.view import View


def full(capture: Capture, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights [T, T], visible [T, T], evicted [T, T]) of one head."""
    t = capture.tokens
    kv = head // (capture.heads // capture.kv_heads)
    s = capture.q[head].double().numpy() @ capture.k[kv].double().numpy().T * capture.scale
    if capture.softcap:
        s = capture.softcap * np.tanh(s / capture.softcap)
    i, j = np.arange(t)[:, None], np.arange(t)[None]
    reach = j <= i
    if capture.window:
        reach = reach & (i - j < capture.window)
    gone = np.zeros_like(reach)
    if capture.death is not None:
        gone = reach & (i >= capture.death[kv].numpy()[None])
    seen = reach & ~gone
    if capture.key_bias is not None:
        s = s + capture.key_bias[head].double().numpy()[None]
        seen = seen & np.isfinite(s)
    s = np.where(seen, s, -np.inf)
    top = np.where(seen.any(1, keepdims=True), s.max(1, keepdims=True), 0.0)
    e = np.exp(s - top)
    return e / np.maximum(e.sum(1, keepdims=True), 1e-300), seen, (reach, gone)


def check(
    v: View, captures: list[Capture], heads: list[tuple[int, int]], reduce: str, atol: float = 3e-5,
    layers: str | None = None,
) -> None:
    """Assert that every cell of ``v`` is what pooling the combined full matrices gives: heads first, then layers."""
    parts = [full(captures[c], h) for c, h in heads]
    w = np.stack([p[0] for p in parts])
    if layers is None:
        w = w.max(0) if reduce == "max" else w.mean(0)
    else:
        per = [np.stack([p[0] for p, (n, _) in zip(parts, heads) if n == c]) for c in range(len(captures))]
        per = np.stack([x.max(0) if reduce == "max" else x.mean(0) for x in per])
        w = per.max(0) if layers == "max" else per.mean(0)
    seen = np.stack([p[1] for p in parts]).any(0)
    groups = {(c, h // (captures[c].heads // captures[c].kv_heads)): p[2] for (c, h), p in zip(heads, parts)}
    count = {}
    for c, h in heads:
        key = (c, h // (captures[c].heads // captures[c].kv_heads))
        count[key] = count.get(key, 0) + 1
    reach = sum(n * groups[key][0].astype(int) for key, n in count.items())
    gone = sum(n * groups[key][1].astype(int) for key, n in count.items())
    assert v.values.dtype == np.float32 and v.evicted.dtype == np.uint8 and v.values.shape == v.evicted.shape
    for y in range(v.shape[0]):
        for x in range(v.shape[1]):
            (r0, r1), (c0, c1) = v.tokens_of(y, x)
            block, mask = w[r0:r1, c0:c1], seen[r0:r1, c0:c1]
            if not mask.any():
                assert np.isnan(v.values[y, x])
            else:
                want = block[mask].max() if v.pool == "max" else block[mask].mean()
                assert abs(v.values[y, x] - want) < atol, (y, x, v.values[y, x], want)
            lost, total = gone[r0:r1, c0:c1].sum(), reach[r0:r1, c0:c1].sum()
            if lost == 0:
                assert v.evicted[y, x] == 0
            elif lost == total:
                assert v.evicted[y, x] == 255
            else:
                assert 0 < v.evicted[y, x] < 255 and abs(v.evicted[y, x] / 255 - lost / total) < 0.01
