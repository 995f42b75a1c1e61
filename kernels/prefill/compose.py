"""Sparse prefill built from `attend`: A-shape, and Delta correction over it."""

from __future__ import annotations

import torch

from kernels.backend import choose
from kernels.prefill.api import Prefilled, attend


def a_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, sinks: int, window: int, **options) -> Prefilled:
    """Each row sees the first `sinks` keys and its last `window` (MInference's A-shape, arXiv 2407.02490)."""
    return attend(q, k, v, scale, sinks=sinks, window=window, **options)


def delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, gamma: int = 64, sinks: int = 4, window: int = 2048,
    impl: str = "auto", way: str = "auto", **options,
) -> torch.Tensor:
    """A-shape with Delta correction (arXiv 2505.11254), out [B,Hq,T,d].

    Every gamma-th row (the anchors) is also computed densely; the difference between its dense and sparse output is
    added to the rows up to the next anchor. The last (T mod gamma) + max(128, gamma) rows are dense. Anchor rows are
    exact. Costs the sparse prefill plus T*N/(2*gamma).

    way: "joined" computes what the chosen rows' A-shape leaves out and joins it in while the A-shape is stored (two launches,
    see `kernels.prefill.triton_delta`); "passes" computes the A-shape, the dense rows and the correction one after another;
    "auto" joins where the call allows it.
    """
    if way not in ("auto", "joined", "passes"):
        raise ValueError(f"unknown way {way!r}; expected 'auto', 'joined' or 'passes'.")
    rows = q.shape[2]
    start = options.pop("start", None)
    start = k.shape[2] - rows if start is None else start
    tail = min(rows, rows % gamma + max(128, gamma))
    body = rows - tail  # a multiple of gamma wherever it is not zero
    anchors = torch.arange(0, body, gamma, device=q.device, dtype=torch.int32)
    exact = torch.cat([anchors, torch.arange(body, rows, device=q.device, dtype=torch.int32)]) + start
    one_window = not (torch.is_tensor(window) or torch.is_tensor(sinks))  # spans of each head take the three passes
    if way != "passes" and one_window and _joins(q, k, v, start, gamma, impl, options, way == "joined"):
        from kernels.prefill.joined import run

        return run(q, k, v, scale, exact, body, gamma=gamma, sinks=sinks, window=window, start=start)
    out = attend(q, k, v, scale, start=start, sinks=sinks, window=window, impl=impl, **options).out
    dense = attend(q, k, v, scale, start=start, rows=exact, impl=impl, **options).out
    n = len(anchors)
    if n:
        blocks = out[:, :, :body].unflatten(2, (n, gamma))
        shift = dense[:, :, :n] - blocks[:, :, :, 0]
        blocks += shift.unsqueeze(3)
    out[:, :, body:] = dense[:, :, n:]
    return out


def _joins(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, gamma: int, impl: str, options: dict, must: bool
) -> bool:
    """Whether the two launches can serve; ValueError where they must and cannot."""
    if q.shape[1] % k.shape[1] == 0 and start >= 0 and choose(impl, q) == "triton":
        from kernels.prefill.joined import serves

        if serves(q, k, v, gamma, options):
            return True
    if must:
        raise ValueError("way='joined' takes Triton, plain softmax logits, one head width up to 256 and gamma 16, 32, 64 or 128; "
                         "use way='auto'.")
    return False
