"""Other attention, same answer? Permuted and adversarial rows that leave a head's output nearly where it was."""

from __future__ import annotations

import numpy as np
import torch

from lab.inspect.diagnostics.base import OUTPUT, Arrays, Figure, Number, Paper, Session, diagnostic, head_values, part
from lab.inspect.diagnostics.measures import jensen_shannon, total_variation
from lab.inspect.scores import Progress, weights

EPSILON = 0.05
TOKENS = 256


def readout(v: torch.Tensor):
    """A small fixed readout of heads: y(a) = softmax of the weighted values, a [..., n] and v [..., n, d] to
    [..., d]."""
    scale = v.std().clamp(min=1e-6)
    return lambda a: torch.softmax(torch.einsum("...n,...nd->...d", a, v) / scale, -1)


def permutation_effect(a: torch.Tensor, y, permutations: int = 100, seed: int = 0) -> float:
    """Median total variation between y(a) and y of the same weights given to shuffled tokens."""
    g = torch.Generator().manual_seed(seed)
    before = y(a)
    found = [
        float(total_variation(y(a[torch.randperm(len(a), generator=g)]), before)) for _ in range(permutations)
    ]
    return float(np.median(found))


def adversary(
    a: torch.Tensor,
    y,
    epsilon: float = EPSILON,
    steps: int = 200,
    penalty: float = 20.0,
    lr: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights [..., n], JSD from ``a`` in nats [...], TVD of outputs [...]): as different as possible with
    TVD <= epsilon.

    Adam on the rows' logits, from the row itself with a little noise, from an even row and from the row
    turned over, since
    the row itself is where the distance has no slope. The best admissible step counts; ``a`` itself if there
    is none.
    """
    g = torch.Generator().manual_seed(seed)
    log = a.clamp(min=1e-6).log()
    starts = torch.stack([log, torch.zeros_like(log), -log.clamp(max=-1e-3)])
    logits = (starts + 0.1 * torch.randn(starts.shape, generator=g).to(a)).requires_grad_(True)
    optimiser = torch.optim.Adam([logits], lr=lr)
    before = y(a).detach()
    best, best_jsd, best_tvd = (
        a.expand_as(starts).clone(),
        torch.zeros(starts.shape[:-1]),
        torch.zeros(starts.shape[:-1]),
    )
    for step in range(steps):
        other = torch.softmax(logits, -1)
        jsd, tvd = jensen_shannon(other, a), total_variation(y(other), before)
        better = (tvd <= epsilon) & (jsd > best_jsd)
        best[better], best_jsd[better], best_tvd[better] = (
            other[better].detach(),
            jsd[better].detach(),
            tvd[better].detach(),
        )
        optimiser.zero_grad()
        (penalty * (tvd - epsilon).clamp(min=0) - jsd).sum().backward()
        optimiser.step()
        if progress:
            progress((step + 1) / steps)
    jsd, start = best_jsd.max(0)
    return (
        torch.take_along_dim(best, start[None, ..., None], 0)[0],
        jsd,
        torch.take_along_dim(best_tvd, start[None], 0)[0],
    )


@diagnostic(
    name="counterfactual",
    title="Other attention, same answer",
    paper=Paper("Attention is not Explanation", "1902.10186", 2019),
    needs=("captures", "values"),
    help="If quite different attention weights lead to the same output, then the weights alone do "
    "not explain it. One test shuffles a row; the other searches for the most different row "
    "whose output stays within 5 %.",
    explanation="Bright heads are those for which an adversary found attention far from the real one "
    "(0.69 is the most there can be) with almost the same head output. It shows that the "
    "weights were not necessary for this head's output, not that the model could have "
    "produced them.",
    figures=(
        Figure("adversarial", "matrix", ("layer", "head"), "Jensen-Shannon distance of the adversary", "nats, 0.69 at most"),
        Figure(
            "permuted", "matrix", ("layer", "head"), "Median change of the output when weights are shuffled",
            "total variation, 0 to 1",
        ),
        Figure(
            "scatter", "scatter", ("largest weight", "median change"), "Peaked rows should react to shuffling",
            cells="adversarial",
        ),
    ),
    numbers=(Number("output", "looked from token {}"),),
    before=f"Reads one row of every captured head over its {TOKENS} newest entries.",
    inputs=(OUTPUT,),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """One row of every head over at most its ``TOKENS`` newest entries.

    ``options``: "output" (the row, default the last), "permutations", "steps".
    """
    captures = session.captures
    shape = (len(captures), captures[0].heads)
    jsd, tvd, permuted, peak = (np.zeros(shape) for _ in range(4))
    t = captures[0].check_row(int(session.options.get("output", captures[0].tokens - 1))) + 1
    a0 = max(0, t - TOKENS)
    for n, capture in enumerate(captures):
        told = part(progress, n / len(captures), (n + 1) / len(captures))
        a = torch.cat([weights(capture, h, (t - 1, t), (a0, t)) for h in range(capture.heads)]).cpu()
        a = a / a.sum(1, keepdim=True).clamp(min=1e-30)
        v = torch.stack([head_values(session, n, h)[a0:t] for h in range(capture.heads)]).cpu()
        for head in range(capture.heads):
            permuted[n, head] = permutation_effect(
                a[head], readout(v[head]), session.options.get("permutations", 100)
            )
            told((head + 1) / capture.heads / 2)
        _, jsd[n], tvd[n] = adversary(a, readout(v), steps=session.options.get("steps", 200), progress=part(told, 0.5, 1))
        peak[n] = a.amax(1)
        told(1.0)
    return {
        "adversarial": jsd,
        "adversarial_tvd": tvd,
        "permuted": permuted,
        "peak": peak,
        "scatter": np.stack([peak.ravel(), permuted.ravel()], axis=1),
        "output": np.array(t - 1),
    }
