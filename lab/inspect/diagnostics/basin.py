"""The attention basin: documents at the ends of a list get more attention than those in the middle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Input, Number, Paper, Session, diagnostic
from lab.inspect.diagnostics.measures import bootstrap
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.scores import Progress, row_blocks, weights

PAPER = Paper("Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128", 2025)
SCORE = Number("score", "basin score {} (attention per token: ends minus middle, above 0 for a basin)")
SHORTEST, LONGEST, MOST_TOKENS = 4, 96, 1024
"""Tokens of a document that are read (all documents are cut to the shortest), and tokens of the whole list."""


def slot_attention(capture: Capture, slots: Sequence[tuple[int, int]], rows: tuple[int, int]) -> np.ndarray:
    """float64 [Hq, slots] attention per token of each slot, averaged over the rows."""
    out = np.zeros((capture.heads, len(slots)))
    for head in range(capture.heads):
        for block in row_blocks(capture, rows):
            mass = weights(capture, head, block, (0, block[1])).sum(0).cpu().numpy()
            out[head] += [mass[a:b].sum() / (b - a) for a, b in slots]
    return out / (rows[1] - rows[0])


def basin_score(curve: np.ndarray) -> float:
    """Mean of the first and last slot minus the mean of those between: positive for a basin."""
    return float((curve[0] + curve[-1]) / 2 - curve[1:-1].mean())


def average(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [K], 95 % interval [K, 2]) of curves [shuffles, K], so that what the documents say cancels out."""
    curves = np.asarray(curves, dtype=np.float64)
    return curves.mean(0), np.array([bootstrap(curves[:, k]) for k in range(curves.shape[1])])


def reorder(curve: np.ndarray, relevance: Sequence[float]) -> list[int]:
    """Which document goes to each slot so that the most relevant get the most attended slots (ties to the earlier)."""
    by_attention = np.argsort(-np.asarray(curve), kind="stable")
    by_relevance = np.argsort(-np.asarray(relevance, dtype=np.float64), kind="stable")
    out = [0] * len(by_attention)
    for slot, document in zip(by_attention, by_relevance):
        out[slot] = int(document)
    return out


@diagnostic(
    name="basin",
    title="Attention basin of this prompt",
    paper=PAPER,
    needs=("captures", "documents"),
    help="Give a model a list of documents and it looks most at the first and the last, least at "
    "those in the middle. The paragraphs of this run's prompt are the documents, the last one the question: the curve is the "
    "attention each gets, per token, from what comes after them.",
    explanation="A curve high at both ends and low between is a basin, and its score is the height of the "
    "ends over the middle. One run shows place and content mixed: average runs with shuffled "
    "documents before you believe the shape.",
    figures=(
        Figure("curve", "bars", ("place",), "Attention per token of each document", "share of attention per token"),
        Figure("by_layer", "matrix", ("layer", "place"), "The same for each layer", "share per token"),
    ),
    numbers=(SCORE,),
    before="Needs at least three paragraphs in the prompt and a question after them.",
    inputs=(
        Input("split", "text", "what separates documents", "Empty: a blank line. The last part is the question.", default=""),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Reads the rows after the last document. ``options["curves"]``: earlier shuffles [n, K] to average with."""
    slots, t = list(session.documents), session.captures[0].tokens
    if len(slots) < 3 or any(not 0 <= a < b <= t for a, b in slots) or slots[-1][1] >= t:
        raise LabError(
            "The attention basin needs at least three documents with text after them",
            f"Document ranges lie inside the run's {t} tokens",
            "Mark the documents again",
        )
    by_layer = []
    for n, capture in enumerate(session.captures):
        by_layer.append(slot_attention(capture, slots, (slots[-1][1], t)).mean(0))
        progress((n + 1) / len(session.captures))
    by_layer = np.stack(by_layer)
    curves = np.concatenate(
        [np.reshape(session.options.get("curves", []), (-1, len(slots))), by_layer.mean(0)[None]]
    )
    mean, interval = average(curves)
    return {
        "curve": mean,
        "interval": interval,
        "by_layer": by_layer,
        "score": np.array(basin_score(mean)),
        "curves": curves,
    }


EXAMPLE = """The harbour of Ellmore has two piers, and the longer one was built for the herring boats in the last century.
The bridge at Tarn was closed for a winter after a flood, and carts had to go round by the mill.
The amber key was found in box seven, under a white stone with a hole through it.
The school in Varley has a bell that is rung by hand, every morning at eight, by the youngest pupil.
The library keeps its maps in a long drawer, sorted by the name of whoever drew them.
The orchard behind the church gives apples every second year, more than the village can eat.
The lamp in the lighthouse was replaced by an electric one, but the old one is still oiled each month.
The ferry leaves at seven and at noon, unless there is fog, and then it does not leave at all."""


def ordered(
    probe: ModelProbe, documents: Sequence[Sequence[int]], question: Sequence[int], order: Sequence[int]
) -> np.ndarray:
    """float64 [L, K] attention per token that each slot gets from the question's tokens, mean over heads."""
    length = len(documents[0])
    ids = [token for n in order for token in documents[n]] + list(question)
    first = length * len(documents)
    mass = probe.attention(torch.as_tensor(ids, device=probe.device), first).mean((1, 2))
    return mass[:, :first].unflatten(1, (len(documents), length)).mean(2).double().cpu().numpy()


def even(lists: Sequence[Sequence[int]], question: Sequence[int]) -> list[list[int]]:
    """The documents cut to the length of the shortest, ``LONGEST`` at most.

    Raises:
        LabError: too few documents, one of them too short, or all of them together too long.
    """
    if len(lists) < 3:
        raise LabError(f"There are {len(lists)} documents", "A basin has two ends and a middle: at least three",
                       "Leave a blank line between documents")
    length = min(LONGEST, *(len(d) for d in lists))
    if length < SHORTEST:
        n = min(range(len(lists)), key=lambda k: len(lists[k]))
        raise LabError(f"Document {n + 1} has only {len(lists[n])} tokens", f"All are cut to the shortest, at least {SHORTEST}",
                       "Write more, or leave it out")
    if length * len(lists) + len(question) > MOST_TOKENS:
        raise LabError(f"{len(lists)} documents of {length} tokens are too many to read in every order",
                       f"All together at most {MOST_TOKENS:,} tokens", "Use fewer or shorter documents")
    return [list(d)[:length] for d in lists]


@diagnostic(
    name="basin_shuffled",
    title="Attention basin of your documents",
    paper=PAPER,
    needs=("probe", "lists", "question"),
    help="Your documents are put in many random orders, each read by the model with the question after them, and the "
    "attention from the question is averaged for each place in the list. What the documents say cancels out, and what is "
    "left is the pull of the place itself.",
    explanation="High ends and a low middle are the basin, with a 95 % interval in the table; the second figure is what each "
    "document drew wherever it stood, which tells the relevant one. To use it, put what matters most where the curve is "
    "highest.",
    figures=(
        Figure("curve", "bars", ("place",), "Attention by place, mean over orders", "share of attention per token"),
        Figure("content", "bars", ("document",), "Attention by document, mean over places", "share of attention per token"),
        Figure("by_layer", "matrix", ("layer", "place"), "By place in each layer", "share per token"),
        Figure("interval", "lines", ("end", "place"), "95 % interval of the mean by place", "share of attention per token",
               {"end": ("lower end", "upper end")}),
    ),
    numbers=(SCORE, Number("tokens", "each document was cut to {} tokens")),
    before="Reads your documents, not the run: the example below is taken when you change nothing.",
    inputs=(
        Input("lists", "documents", "documents", "At least three, one a line or with blank lines between; all are cut to the "
              "shortest.", example=EXAMPLE),
        Input("question", "text", "question after them", "The tokens whose attention is read.",
              default="Question: in which box was the amber key found? Answer:"),
        Input("shuffles", "number", "orders", "Random orders to average over; more take longer.", default=16, low=2, high=200),
    ),
)
def compute_shuffled(session: Session, progress: Progress) -> Arrays:
    """``options``: "shuffles" (default 16), "seed"."""
    documents = even(session.lists, session.question)
    count, rng = int(session.options.get("shuffles") or 16), np.random.default_rng(session.options.get("seed", 0))
    curves, content, layers = [], np.zeros(len(documents)), 0
    for n in range(count):
        order = rng.permutation(len(documents))
        by_layer = ordered(session.probe, documents, session.question, order)
        curves.append(by_layer.mean(0))
        content[order] += curves[-1] / count
        layers = layers + by_layer / count
        progress((n + 1) / count)
    mean, interval = average(np.stack(curves))
    return {
        "curve": mean,
        "interval": interval.T,
        "ends": np.array(("lower", "upper")),
        "by_layer": layers,
        "content": content,
        "score": np.array(basin_score(mean)),
        "curves": np.stack(curves),
        "tokens": np.array(len(documents[0])),
    }
