"""How a diagnostic is declared, what it may ask for, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.scores import Progress

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Paper:
    """Where a diagnostic comes from."""

    title: str
    arxiv: str
    year: int


COUNTED = {
    "layer": (0, "layer"), "head": (0, "query head"), "token": (0, "token, by its position"),
    "state": (0, "hidden state, 0 the embedding"), "generated token": (0, "generated token, the first is 0"),
    "direction": (1, "directions taken"), "place": (1, "place in the list"), "document": (1, "document"), "group": (1, "group"),
}
"""Axes that may be counted, with their first number and what a reader is told; any other axis has words or values of its own."""


@dataclass(frozen=True)
class Figure:
    """How one array is best drawn.

    Attributes:
        array: name of the array in the result.
        kind: "matrix", "groups" (a matrix of group numbers), "lines" (first axis: one line each when 2-D), "bars",
            "scatter" ([n, 2]) or "thumbnails" ([groups, n] numbers of heads whose small maps are shown).
        axes: name of each axis of the array, in order: one of ``COUNTED``, or one that has ``words``, or that an array of the
            result is named like.
        title: one line.
        unit: what the drawn number is, with its unit; beside the y axis or the colours.
        words: {axis: words or values along it}, a longer list is cut to the array; or {axis: {name: word}} for the names that
            an array of the result holds.
        phrase: how a line is called in the legend, "{}" being its word or number.
        log: "x" where the values along x are evenly spread in their logarithm.
        cells: a scatter: the [layers, heads] array whose cells are its points, groups where it holds integers; thumbnails: the
            [layers, heads, s, s] small maps.
        absent: what stands in the figure's place when nothing of it was computed: why, and what to do.
    """

    array: str
    kind: str
    axes: tuple[str, ...]
    title: str
    unit: str = ""
    words: Mapping[str, Sequence[str | float] | Mapping[str, str]] = field(default_factory=dict)
    phrase: str = "{}"
    log: str = ""
    cells: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Number:
    """How a single number of the result is told: ``text`` with "{}" where the number stands; a share is told in per cent."""

    array: str
    text: str
    share: bool = False


@dataclass(frozen=True)
class Input:
    """Something a person may give before a diagnostic runs.

    Attributes:
        name: the option it becomes (``Session.options``), or the session field of the kinds that are one.
        kind: "position" (a token of the run), "number", "words" (of the prompt), "text", "documents" (separated by
            blank lines) or "prompts" (one a line).
        label, help: for the person.
        default: what is taken when nothing is given; None for the last token, or nothing.
        low, high: bounds of a number.
        example: a text to start from.
    """

    name: str
    kind: str
    label: str
    help: str
    default: float | str | None = None
    low: float | None = None
    high: float | None = None
    example: str = ""


OUTPUT = Input("output", "position", "token to look from", "Its position, counted from 0; empty: the last one.")
MARKED = Input("marked", "words", "words that matter", "Words of the prompt, as they stand there.")


@dataclass
class Session:
    """What is known of one run; a diagnostic says in ``needs`` which of these it cannot do without.

    Attributes:
        captures: one Capture per captured layer, ascending.
        token_ids: ids of prompt and generated tokens, as many as the captures have rows.
        prompt_tokens: how many of them are the prompt.
        logprobs: float [T] natural log-probability of each token given those before it; NaN where unknown.
        hidden: L+1 hidden states [T, D]; state 0 is the embedding.
        values: one [Hk, T, d] per capture.
        attention_out, mlp_out: one [T, D] per layer, what attention and MLP add to the residual stream.
        embedding: [V, D] the input embedding.
        probe: differentiable access to the model, see ``probe.ModelProbe``.
        documents: token ranges of equal documents in the prompt, half-open, ascending.
        marked: token positions the user highlighted.
        groups: {"name": [metrics of each prompt: dict[str, float]]} for comparisons between sets of prompts.
        prompts: {"name": [token ids of each prompt]}, two sets to be measured with the probe.
        lists: token ids of documents to be put in every order.
        question: token ids that follow the documents.
        options: settings of single diagnostics by name, such as {"output": 12}.
    """

    captures: Sequence[Capture] | None = None
    token_ids: Sequence[int] | None = None
    prompt_tokens: int | None = None
    logprobs: Sequence[float] | None = None
    hidden: Sequence[torch.Tensor] | None = None
    values: Sequence[torch.Tensor] | None = None
    attention_out: Sequence[torch.Tensor] | None = None
    mlp_out: Sequence[torch.Tensor] | None = None
    embedding: torch.Tensor | None = None
    probe: object | None = None
    documents: Sequence[tuple[int, int]] | None = None
    marked: Sequence[int] | None = None
    groups: dict[str, list[dict[str, float]]] | None = None
    prompts: dict[str, list[list[int]]] | None = None
    lists: Sequence[Sequence[int]] | None = None
    question: Sequence[int] | None = None
    options: dict = field(default_factory=dict)


_GET = {
    "captures": ("captured queries and keys", "Replay the run with its model to capture attention"),
    "token_ids": ("the run's token ids", "Open a run that holds its tokens"),
    "prompt_tokens": ("the length of the prompt", "Open a run that holds its prompt"),
    "logprobs": ("the probability of each token", "Open a run with generated tokens"),
    "hidden": ("hidden states", "Load the run's model"),
    "values": ("the value vectors", "Load the run's model"),
    "attention_out": ("what attention adds to each layer", "Load the run's model"),
    "mlp_out": ("what the MLP adds to each layer", "Load the run's model"),
    "embedding": ("the model's embedding", "Load the run's model"),
    "probe": ("the model itself", "Load the run's model"),
    "documents": ("documents in the prompt", "Give a prompt with at least three documents, a blank line between them"),
    "marked": ("highlighted words", "Highlight the words that you think matter"),
    "groups": ("two sets of prompts", "Give prompts for each set, one a line"),
    "prompts": ("two sets of prompts", "Give prompts for each set, one a line"),
    "lists": ("documents", "Paste at least three documents, a blank line between them"),
    "question": ("a question", "Give the question that follows the documents"),
}


@dataclass(frozen=True)
class Diagnostic:
    """A probe of the literature.

    Attributes:
        name, title: identifier and heading.
        paper: where it comes from.
        needs: names of ``Session`` fields it cannot do without.
        help: what it shows, for a student.
        explanation: two sentences beside the figure: how to read it, and what not to conclude.
        figures: how to draw the arrays; the first is the main one.
        compute: the function from session to named arrays.
        inputs: what a person may give first.
        instead: a session field that, when it is there, makes the needs unnecessary.
        numbers: the single numbers of the result and their words.
        before: what a person should know before it runs: what it reads of a long run, what it needs, how long it takes.
    """

    name: str
    title: str
    paper: Paper
    needs: tuple[str, ...]
    help: str
    explanation: str
    figures: tuple[Figure, ...]
    compute: Callable[[Session, Progress], Arrays]
    inputs: tuple[Input, ...] = ()
    instead: str | None = None
    numbers: tuple[Number, ...] = ()
    before: str = ""

    def missing(self, session: Session) -> list[str]:
        """Needed session fields that are absent or empty."""
        if self.instead and getattr(session, self.instead):
            return []
        return [n for n in self.needs if getattr(session, n) is None or _empty(getattr(session, n))]


_registry: dict[str, Diagnostic] = {}


def diagnostic(
    *,
    name: str,
    title: str,
    paper: Paper,
    needs: tuple[str, ...],
    help: str,
    explanation: str,
    figures: tuple[Figure, ...],
    inputs: tuple[Input, ...] = (),
    instead: str | None = None,
    numbers: tuple[Number, ...] = (),
    before: str = "",
):
    """Declare the decorated ``compute(session, progress) -> arrays`` as a diagnostic."""

    def register(compute: Callable[[Session, Progress], Arrays]) -> Callable[[Session, Progress], Arrays]:
        if name in _registry:
            raise ValueError(f"two diagnostics are called {name}")
        _registry[name] = Diagnostic(name, title, paper, needs, help, explanation, figures, compute, inputs, instead, numbers,
                                     before)
        return compute

    return register


def run(name: str, session: Session, progress: Progress | None = None) -> Arrays:
    """Compute one diagnostic.

    Returns:
        Named numpy arrays, ready to be cached with the run.

    Raises:
        LabError: no such diagnostic, or the session lacks something; the sentence says what to load.
    """
    if name not in _registry:
        raise LabError(f'There is no diagnostic "{name}"', f"There are {', '.join(sorted(_registry))}")
    found = _registry[name]
    missing = found.missing(session)
    if missing:
        what = " and ".join(_GET[m][0] for m in missing)
        raise LabError(
            f"{found.title} needs {what}, which this run does not hold",
            None,
            "; ".join(dict.fromkeys(_GET[m][1] for m in missing)),
        )
    arrays = found.compute(session, progress or (lambda fraction: None))
    return {key: np.asarray(value) for key, value in arrays.items()}


def declared() -> dict[str, Diagnostic]:
    """Everything declared so far; ``lab.inspect.diagnostics.registry`` imports them all first."""
    return dict(_registry)


def part(progress: Progress, start: float, end: float) -> Progress:
    """Progress of a part of the work: its 0..1 becomes ``start``..``end`` of the whole. Each call may also stop the work."""
    return lambda fraction: progress(start + (end - start) * fraction)


def _empty(value: object) -> bool:
    return hasattr(value, "__len__") and len(value) == 0


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """float32 array of a tensor, detached."""
    return x.detach().float().cpu().numpy()


def head_values(session: Session, layer: int, head: int) -> torch.Tensor:
    """float32 [T, d] values that query head ``head`` of the ``layer``-th capture reads.

    Raises:
        LabError: when values and captures do not belong to the same layers and tokens.
    """
    capture = session.captures[layer]
    if len(session.values) != len(session.captures) or session.values[layer].shape[1] < capture.tokens:
        raise LabError(
            f"Values of {len(session.values)} layers do not fit {len(session.captures)} captured layers",
            "Each captured layer needs the values of its tokens",
            "Load the run's model and replay it",
        )
    v = session.values[layer]
    return v[head // max(1, capture.heads // v.shape[0])][: capture.tokens].float()
