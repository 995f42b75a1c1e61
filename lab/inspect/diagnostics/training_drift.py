"""Does the order of sums matter for training? The same small model trained with exact and tiled attention,
compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part
from lab.inspect.diagnostics.deviation import naive, tiled
from lab.inspect.diagnostics.measures import wasserstein
from lab.inspect.scores import Progress

VOCABULARY, WIDTH, LENGTH, BATCH = 16, 16, 24, 4
PAIRS = ("tiled against naive", "bfloat16 against float32", "another seed")


class Recall(torch.nn.Module):
    """One attention head that learns to name the token before each position; float32 weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = {
            "token": (VOCABULARY, WIDTH),
            "place": (LENGTH, WIDTH),
            "q": (WIDTH, WIDTH),
            "k": (WIDTH, WIDTH),
        }
        shapes |= {"v": (WIDTH, WIDTH), "out": (WIDTH, VOCABULARY)}
        for name, shape in shapes.items():
            start = torch.randn(shape, generator=g) / WIDTH**0.5
            self.register_parameter(name, torch.nn.Parameter(start))

    def forward(self, words: torch.Tensor, attend: Callable, dtype: torch.dtype) -> torch.Tensor:
        """[T] words to logits [T, V]; attention runs in ``dtype``."""
        x = self.token[words] + self.place[: len(words)]
        q, k, v = ((x @ w).to(dtype) for w in (self.q, self.k, self.v))
        return attend(q, k, v, WIDTH**-0.5).float() @ self.out


def train(
    attend: Callable, dtype: torch.dtype, steps: int, seed: int = 0, data_seed: int = 0,
    progress: Progress | None = None,
) -> tuple[np.ndarray, float]:
    """(all weights flat, last loss) after ``steps`` of Adam on random sequences."""
    model = Recall(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(data_seed)
    value = 0.0
    for step in range(steps):
        words = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=g)
        loss = (
            sum(torch.nn.functional.cross_entropy(model(w, attend, dtype)[1:], w[:-1]) for w in words) / BATCH
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        value = loss.item()
        if progress:
            progress((step + 1) / steps)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy(), value


@diagnostic(
    name="training_drift",
    title="Flash against exact in training",
    paper=Paper("Is Flash Attention Stable?", "2405.02803", 2024),
    needs=(),
    help="Rounding differences feed back in training: a weight that moves a little changes every "
    "later step. Here one small model is trained several times from the same start, with "
    "exact and with tiled attention in bfloat16, with float32, and from another start for "
    "scale.",
    explanation="Each bar is the distance between the weights of two finished models: hold tiled against "
    "naive beside the change that low precision itself makes, and both beside another seed. A "
    "one-head model trained for seconds says which effect is larger, not how large it is in "
    "a real training run.",
    figures=(
        Figure("wasserstein", "bars", ("pair",), "Wasserstein-1 between the trained weights", "in units of a weight"),
        Figure("difference", "bars", ("pair",), "Mean absolute difference, weight by weight", "in units of a weight"),
    ),
    before="Trains four small models here; it reads nothing of the run.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options``: "steps" (default 120), "block" keys per tile (default 8)."""
    steps, block = session.options.get("steps", 120), session.options.get("block", 8)

    def tiles(q, k, v, scale):
        return tiled(q, k, v, scale, block)

    runs = {}
    ways = {
        "naive": (naive, torch.bfloat16, 0),
        "tiled": (tiles, torch.bfloat16, 0),
        "exact": (naive, torch.float32, 0),
        "seed": (naive, torch.bfloat16, 1),
    }
    for n, (name, (attend, dtype, seed)) in enumerate(ways.items()):
        runs[name] = train(attend, dtype, steps, seed, progress=part(progress, n / len(ways), (n + 1) / len(ways)))
    base = runs["naive"][0]
    others = [runs[name][0] for name in ("tiled", "exact", "seed")]
    return {
        "wasserstein": np.array([wasserstein(base, o) for o in others]),
        "difference": np.array([np.abs(base - o).mean() for o in others]),
        "pairs": np.array(PAIRS),
        "losses": np.array([runs[name][1] for name in ways]),
    }
