"""Attention that hides what it uses: a small classifier trained to look away from the words it depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part
from lab.inspect.scores import Progress

VOCABULARY, LENGTH, WIDTH = 40, 12, 24
TELLING = (1, 2)
"""The impermissible words: one of the two is in every sentence and is its class."""


class Classifier(torch.nn.Module):
    """Embeds, lets every word see the mean of the others, attends once, and classifies the weighted sum."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
            self.mix = torch.nn.Linear(2 * WIDTH, WIDTH)
            self.query = torch.nn.Linear(WIDTH, 1)
            self.out = torch.nn.Linear(WIDTH, 2)

    def forward(
        self, words: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] words to (logits [B, 2], attention [B, T]); ``hidden`` bool [B, T] removes words from
        everything."""
        x = self.embedding(words)
        keep = torch.ones_like(words, dtype=x.dtype) if hidden is None else (~hidden).to(x.dtype)
        mean = (x * keep[..., None]).sum(1, keepdim=True) / keep.sum(1).clamp(min=1)[:, None, None]
        h = torch.tanh(self.mix(torch.cat([x, mean.expand_as(x)], -1)))
        a = torch.softmax(self.query(h)[..., 0].masked_fill(keep == 0, -1e9), -1)
        return self.out((a[..., None] * h).sum(1)), a


@dataclass(frozen=True)
class Outcome:
    """Accuracy, mean attention on the telling words, and accuracy once those words are removed; all 0..1."""

    accuracy: float
    mass: float
    ablated: float


def sentences(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(words [n, LENGTH], class [n]): noise with exactly one of the two telling words somewhere."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCABULARY, (n, LENGTH), generator=g)
    label = torch.randint(0, 2, (n,), generator=g)
    place = torch.randint(0, LENGTH, (n,), generator=g)
    words[torch.arange(n), place] = torch.tensor(TELLING)[label]
    return words, label


def train(
    penalty: float, steps: int = 250, seed: int = 0, progress: Progress | None = None
) -> tuple[Classifier, Outcome]:
    """Train with loss CE - penalty * mean ln(1 - mass on telling words), and judge on new sentences."""
    model = Classifier(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    words, label = sentences(512, seed + 1)
    for step in range(steps):
        logits, a = model(words)
        mass = (a * _telling(words)).sum(1)
        loss = (
            torch.nn.functional.cross_entropy(logits, label)
            - penalty * (1 - mass).clamp(min=1e-6).log().mean()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if progress:
            progress((step + 1) / steps)
    words, label = sentences(512, seed + 2)
    with torch.no_grad():
        logits, a = model(words)
        without, _ = model(words, _telling(words))
    return model, Outcome(
        float((logits.argmax(1) == label).float().mean()),
        float((a * _telling(words)).sum(1).mean()),
        float((without.argmax(1) == label).float().mean()),
    )


def _telling(words: torch.Tensor) -> torch.Tensor:
    return (words == TELLING[0]) | (words == TELLING[1])


@diagnostic(
    name="deceive",
    title="Attention that hides its reasons",
    paper=Paper("Learning to Deceive with Attention-Based Explanations", "1909.07913", 2020),
    needs=(),
    help="A small classifier is trained here, twice: once plainly, once with a penalty for "
    "attending to the words that give the answer away. The second still uses them, through "
    "the mixing of words before attention, and shows clean attention.",
    explanation="With a penalty the attention on the telling words falls to almost nothing while accuracy "
    "stays, and removing those words brings accuracy down to chance either way. So attention "
    "that avoids a word is no proof that a model does.",
    figures=(
        Figure(
            "outcomes",
            "matrix",
            ("penalty", "outcome"),
            "What a penalty on looking changes",
            "share, 0 to 1",
            {"outcome": ("accuracy", "attention on the telling words", "accuracy without them")},
        ),
    ),
    before="Trains three small classifiers here; it reads nothing of the run.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options["penalties"]`` (default 0, 0.1, 1)."""
    penalties = session.options.get("penalties", (0.0, 0.1, 1.0))
    rows = []
    for n, penalty in enumerate(penalties):
        _, o = train(penalty, progress=part(progress, n / len(penalties), (n + 1) / len(penalties)))
        rows.append((o.accuracy, o.mass, o.ablated))
    return {"outcomes": np.array(rows), "penalty": np.array(penalties)}
