"""How far flash attention is from exact: the same q, k, v in several precisions and block sizes, against
float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics import own_kernels
from lab.inspect.diagnostics.base import Arrays, Figure, Input, Number, Paper, Session, diagnostic, head_values
from lab.inspect.diagnostics.measures import wasserstein
from lab.inspect.scores import Progress

BLOCKS = (16, 32, 64, 128, 256, 512)
TOKENS = 512
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[T, d] causal attention in three passes, every intermediate rounded to the inputs' dtype."""
    s = (q @ k.T) * scale
    future = torch.ones(s.shape, dtype=torch.bool, device=s.device).triu(s.shape[1] - s.shape[0] + 1)
    s = s.masked_fill(future, -torch.inf)
    e = (s - s.amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)) @ v


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int = 64, late: bool = True
) -> torch.Tensor:
    """[T, d] causal attention in one pass over key blocks with a running maximum, rounded to the inputs'
    dtype throughout.

    Args:
        block: keys per block; T / block is how many times the partial output is rescaled.
        late: divide by the row sum once at the end; False keeps the partial output normalised after every
            block.
    """
    t, n = q.shape[0], k.shape[0]
    top = torch.full((t, 1), -torch.inf, dtype=q.dtype, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros(t, v.shape[1], dtype=q.dtype, device=q.device)
    row = torch.arange(n - t, n, device=q.device)[:, None]
    for a in range(0, n, block):
        b = min(a + block, n)
        s = ((q @ k[a:b].T) * scale).masked_fill(torch.arange(a, b, device=q.device) > row, -torch.inf)
        new = torch.maximum(top, s.amax(1, keepdim=True))
        e = (s - new).exp()
        shrink = (top - new).exp()
        grown = total * shrink + e.sum(1, keepdim=True)
        out = out * shrink + e @ v[a:b] if late else (out * (total * shrink) + e @ v[a:b]) / grown
        top, total = new, grown
    return out / total if late else out


def compare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    ways: dict[str, tuple[torch.dtype, Attention]],
) -> dict[str, tuple[float, float, float]]:
    """{way: (max |error|, RMS error, Wasserstein-1 of the output values)} against float64 on the same
    rounded inputs.

    ``ways`` gives each a dtype and a function; inputs are rounded to that dtype first and the oracle reads
    the rounded
    ones, so only arithmetic is compared.
    """
    out = {}
    for name, (dtype, attend) in ways.items():
        low = [x.to(dtype) for x in (q, k, v)]
        oracle = naive(*(x.double() for x in low), scale)
        got = attend(*low, scale).double()
        error = got - oracle
        out[name] = (
            float(error.abs().max()),
            float(error.pow(2).mean().sqrt()),
            wasserstein(got.cpu().numpy(), oracle.cpu().numpy()),
        )
    return out


def passes(cascade: Sequence[tuple[str, ...]]) -> int:
    """How many times a cascade of steps must walk along the keys.

    Each step is ("reduce" | "map" | "running", name of its result, names of what it reads ...). A step that
    reads the
    finished result of a reduction along the axis cannot share its walk; a "running" step keeps a partial
    result corrected
    as it goes, so its readers can. Inputs are available from walk 1; the answer is the largest walk number.
    """
    walk: dict[str, int] = {}
    done: dict[str, int] = {}
    last = 0
    for kind, name, *reads in cascade:
        at = max([1, *(walk[r] for r in reads if r in walk), *(done[r] + 1 for r in reads if r in done)])
        if kind == "reduce":
            done[name] = at
        else:
            walk[name] = at
        last = max(last, at)
    return last


CASCADES: dict[str, list[tuple[str, ...]]] = {
    "naive softmax": [
        ("map", "s", "q", "k"),
        ("reduce", "max", "s"),
        ("map", "e", "s", "max"),
        ("reduce", "sum", "e"),
        ("map", "p", "e", "sum"),
        ("reduce", "out", "p", "v"),
    ],
    "local maximum, corrected": [
        ("map", "s", "q", "k"),
        ("running", "local max", "s"),
        ("map", "e", "s", "local max"),
        ("reduce", "corrections", "e", "local max"),
        ("map", "p", "e", "corrections"),
        ("reduce", "out", "p", "v"),
    ],
    "running (flash)": [
        ("map", "s", "q", "k"),
        ("running", "max", "s"),
        ("map", "e", "s", "max"),
        ("running", "sum", "e"),
        ("running", "out", "e", "v", "max"),
    ],
    "linear state": [("map", "f", "k"), ("reduce", "state", "f", "v"), ("reduce", "sum", "f")],
}
"""The steps along the keys of four ways to attend, for counting passes (FuseMax)."""


def standard_ways(blocks: Sequence[int] = BLOCKS) -> dict[str, tuple[torch.dtype, Attention]]:
    """Naive and tiled attention in float32, bfloat16 and float16, tiled in every block size, with early
    division too."""
    ways: dict[str, tuple[torch.dtype, Attention]] = {}
    for label, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ):
        ways[f"{label} naive"] = (dtype, naive)
        for b in blocks:
            ways[f"{label} tiled {b}"] = (dtype, lambda q, k, v, s, b=b: tiled(q, k, v, s, b))
            ways[f"{label} tiled {b} early"] = (
                dtype,
                lambda q, k, v, s, b=b: tiled(q, k, v, s, b, late=False),
            )
    return ways


def inputs(
    capture: Capture, values: torch.Tensor | None, head: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 q, k, v of the first ``TOKENS`` tokens of a head; keys stand in where no values were
    captured."""
    t = min(TOKENS, capture.tokens)
    kv = capture.kv_head(head)
    v = capture.k[kv] if values is None else values
    return capture.q[head, :t].double(), capture.k[kv, :t].double(), v[:t].double()


@diagnostic(
    name="deviation",
    title="Flash against exact",
    paper=Paper("Is Flash Attention Stable?", "2405.02803", 2024),
    needs=("captures",),
    help="Flash attention computes the same sums in another order, block by block, rescaling as it "
    "goes. In exact arithmetic nothing changes; in 16-bit arithmetic each rescale rounds. "
    "This measures how much, against float64, and puts the lab's own kernels beside it.",
    explanation="Each line is the error of one precision as blocks get smaller and rescales more, with every step rounded "
    "to that precision. The lab's kernels keep partial results in float32 and so lie far below that worst case, and the "
    "last figure counts how often each way to attend must walk along the keys.",
    figures=(
        Figure("rms", "lines", ("precision", "keys per block"), "RMS error by block size", "RMS error", log="x"),
        Figure("wasserstein", "lines", ("precision", "keys per block"), "Distance of outputs from exact ones", "Wasserstein-1",
               log="x"),
        Figure("relative", "lines", ("precision", "keys per block"), "RMS error over naive bfloat16's", "times", log="x"),
        Figure("kernel_rms", "matrix", ("kernel", "precision"), "The lab's kernels: RMS error over naive bfloat16's", "times"),
        Figure("kernel_wasserstein", "matrix", ("kernel", "precision"), "The lab's kernels: distance from exact outputs",
               "Wasserstein-1"),
        Figure("passes", "bars", ("cascade",), "How often each way walks along the keys", "passes"),
    ),
    numbers=(Number("shown_layer", "values of layer {},"), Number("shown_head", "query head {}")),
    before=f"Reads the first {TOKENS} tokens of one head of a captured layer.",
    inputs=(
        Input("layer", "number", "layer", "A captured layer; empty: the middle one.", low=0),
        Input("head", "number", "query head", "Empty: the first one.", low=0),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """One head of one captured layer.

    ``options``: "layer" (its number, default the middle capture), "head" (default 0), "ways" {name: (dtype, f)} to be
    compared as well. On the capture's device the lab's own kernels always are.
    """
    n = _chosen(session)
    capture = session.captures[n]
    head = capture.check_head(int(session.options.get("head") or 0))
    q, k, v = inputs(capture, head_values(session, n, head) if session.values else None, head)
    blocks = [b for b in BLOCKS if b <= q.shape[0]] or [q.shape[0]]
    more, own = session.options.get("ways", {}), own_kernels.ways(q.device)
    ways = standard_ways(blocks) | own | more
    found = {}
    for m, (name, way) in enumerate(ways.items()):
        found |= compare(q, k, v, capture.scale, {name: way})
        progress((m + 1) / len(ways))
    labels = tuple(own_kernels.DTYPES)
    out = {}
    for column, measure in enumerate(("max", "rms", "wasserstein")):
        out[measure] = np.array([[found[f"{p} tiled {b}"][column] for b in blocks] for p in labels])
        out[f"{measure}_early"] = np.array([[found[f"{p} tiled {b} early"][column] for b in blocks] for p in labels])
        out[f"{measure}_naive"] = np.array([found[f"{p} naive"][column] for p in labels])
    base = max(out["rms_naive"][1], 1e-300)
    names = list(own_kernels.kernels(q.device))
    errors = np.array([[found[f"{name} | {p}"] for p in labels] for name in names])
    return out | {
        "relative": out["rms"] / base,
        "kernel_rms": errors[:, :, 1] / base,
        "kernel_wasserstein": errors[:, :, 2],
        "kernels": np.array(names),
        "precisions": np.array(labels),
        "keys per block": np.array(blocks),
        "ways": np.array(list(more), dtype=np.str_),
        "ways_errors": np.array([found[name] for name in more]).reshape(-1, 3),
        "passes": np.array([passes(c) for c in CASCADES.values()]),
        "cascades": np.array(list(CASCADES)),
        "shown_layer": np.array(-1 if capture.layer is None else capture.layer),
        "shown_head": np.array(head),
    }


def _chosen(session: Session) -> int:
    wanted = session.options.get("layer")
    if wanted is None:
        return len(session.captures) // 2
    have = [c.layer for c in session.captures]
    if int(wanted) not in have:
        raise LabError(f"Layer {int(wanted)} is not captured", f"Captured layers are {', '.join(map(str, have))}",
                       "Choose one of them, or replay the run")
    return have.index(int(wanted))
