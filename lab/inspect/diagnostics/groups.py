"""Comparing sets of prompts: effect sizes, Welch's test with false-discovery control, and a cross-validated classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import Arrays, Figure, Input, Number, Paper, Session, diagnostic
from lab.inspect.diagnostics.measures import auroc
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.diagnostics.shapes import describe, without_first
from lab.inspect.scores import Progress


def cohens_d(a: np.ndarray, b: np.ndarray) -> float:
    """(mean a - mean b) over the pooled standard deviation; NaN when both are constant."""
    n, m = len(a), len(b)
    pooled = math.sqrt(((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2))
    return float((a.mean() - b.mean()) / pooled) if pooled > 0 else float("nan")


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(t, two-sided p) of Welch's unequal-variances test; p is 1 when neither varies and the means agree."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return (0.0, 1.0) if a.mean() == b.mean() else (math.copysign(math.inf, a.mean() - b.mean()), 0.0)
    t = (a.mean() - b.mean()) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return float(t), student_p(abs(t), freedom)


def student_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t, integrating the density over the angle atan(t / sqrt(freedom))."""
    angle = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20001)
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    density = np.exp(log_c) * np.cos(angle).clip(min=0) ** (freedom - 1)
    return float(min(1.0, 2 * np.trapezoid(density, angle)))


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg q-values of p-values (NaN stays NaN and does not count)."""
    q = np.full(len(p), np.nan)
    ok = np.flatnonzero(np.isfinite(p))
    order = ok[np.argsort(p[ok])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return q


def cross_validated_auroc(
    x: np.ndarray, y: np.ndarray, groups: Sequence, folds: int = 5, ridge: float = 1.0
) -> float:
    """AUROC of a ridge logistic classifier on held-out groups (matched prompts stay together); NaN below two
    groups."""
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        return float("nan")
    fold = {name: n % folds for n, name in enumerate(names)}
    where = np.array([fold[g] for g in groups])
    scores = np.full(len(y), np.nan)
    for f in range(min(folds, len(names))):
        train, test = where != f, where == f
        if len(set(y[train])) < 2:
            continue
        mean, std = x[train].mean(0), np.maximum(x[train].std(0), 1e-12)
        scores[test] = _logit((x[train] - mean) / std, y[train], (x[test] - mean) / std, ridge)
    ok = np.isfinite(scores)
    return auroc(scores[ok], y[ok])


def _logit(x: np.ndarray, y: np.ndarray, new: np.ndarray, ridge: float) -> np.ndarray:
    """Scores of ``new`` by logistic regression with an l2 penalty, fitted by Newton's method."""
    x, new = (np.hstack([np.ones((len(m), 1)), m]) for m in (x, new))
    penalty = np.diag([1e-6, *[ridge] * (x.shape[1] - 1)])
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + penalty, x.T @ (y - p) - penalty @ w)
        w += step
        if np.abs(step).max() < 1e-8:
            break
    return new @ w


METRICS = ("entropy", "effective_rank", "variance", "kurtosis", "mean_distance", "focus_1")
LONGEST, MOST = 128, 60
"""Tokens of a prompt that are read, and prompts of a set."""


@torch.no_grad()
def measure(probe: ModelProbe, ids: Sequence[int]) -> dict[str, float]:
    """Head metrics of one prompt, means over all heads: with token 0, without it (``no_sink_``), and of hidden states.

    ``sink`` is the mean weight on token 0, ``hidden_variance`` the log of the median token variance of each state, averaged
    over states, ``hidden_kurtosis`` its channels' excess kurtosis; token 0 is left out of both.
    """
    batch = torch.as_tensor(list(ids)[:LONGEST], device=probe.device)
    a = probe.attention(batch)
    found: dict[str, list[float]] = {}
    for one in a.flatten(0, 1):
        for prefix, matrix in (("", one), ("no_sink_", without_first(one))):
            told = describe(matrix)
            for name in METRICS:
                found.setdefault(prefix + name, []).append(told[name])
    out = {name: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan") for name, values in found.items()}
    states = [h[0, 1:].float() for h in probe.states(probe.embed(batch[None]))]
    centred = [h - h.mean(1, keepdim=True) for h in states]
    variance = [c.pow(2).mean(1) for c in centred]
    out["sink"] = float(a[..., 1:, 0].mean())
    out["hidden_variance"] = float(np.mean([float(v.median().clamp(min=1e-12).log()) for v in variance]))
    out["hidden_kurtosis"] = float(np.mean([float((c.pow(4).mean(1) / v.pow(2).clamp(min=1e-24) - 3).median())
                                            for c, v in zip(centred, variance)]))
    out["tokens"] = float(len(batch))
    return out


def measured(session: Session, progress: Progress) -> dict[str, list[dict[str, float]]]:
    """The metrics of ``session.prompts``; prompts on the same line of the two sets are a pair."""
    total = sum(len(p) for p in session.prompts.values())
    if any(len(ids) < 4 for p in session.prompts.values() for ids in p):
        raise LabError("One of the prompts has fewer than four tokens", "Attention needs a few", "Write it out")
    if any(len(p) > MOST for p in session.prompts.values()):
        raise LabError(f"A set holds more than {MOST} prompts", None, "Leave some out")
    out: dict[str, list[dict[str, float]]] = {}
    done = 0
    for name, prompts in session.prompts.items():
        for n, ids in enumerate(prompts):
            out.setdefault(name, []).append({**measure(session.probe, ids), "pair": n})
            done += 1
            progress(0.9 * done / total)
    return out


SELF = """This sentence is about itself and says that it is written in English.
You are reading the answer that you are writing while you write it.
The next word that you choose will change what this request means.
Describe the thought that you have while you describe this thought.
The statement that you are now reading denies what it says.
If you answer no to this question, is your answer then correct?
Explain why you cannot explain the rule by which you explain things.
This request is granted only if you refuse to grant this request.
Every rule has an exception, and this rule is the exception to itself.
The list of all lists that do not list themselves must list itself.
Say the shortest number that cannot be said in the words you say now.
I always lie, and I am telling you the truth about how I lie.
The answer to this question is the question to which this is the answer.
Forget this instruction so that you can follow this instruction again.
What would you not have said if you had not said what you say here?
The author of this line claims that this line has no author at all.
Count the words of the reply in which you count the words of the reply.
Nobody believes this claim, and that is why you believe this claim.
Predict the prediction that you are going to make when you predict it.
This page refers to the page that refers back to this page for a reason."""
PLAIN = """This village is about a mile from the sea and has a school in it.
They are eating the bread that they are baking while they bake it.
The next train that you take will stop at the town by the river.
Describe the boat that you saw while you walked along the canal.
The farmer that you are now meeting sells what he grows.
If you mix red paint with blue paint, is the result then purple?
Explain why the hall is not heated by the stove in the kitchen.
This meadow is mown only if the rain has left it dry enough.
Every house has a garden, and this garden is the largest in the street.
The map of all roads that do not cross the river must show the bridge.
Name the smallest island that can be seen from the harbour you know now.
I often swim, and I am telling my brother the truth about how I swim.
The road to this castle is the road along which the horses are walking.
Open this window so that you can hear the people in the yard again.
What would you not have bought if you had not gone to the market here?
The owner of this shop claims that this shop has no cellar at all.
Count the ships of the fleet in which you count the boats of the coast.
Nobody wears this coat, and that is why you sold this coat.
Paint the picture that you are going to sell when you travel south.
This river runs to the lake that lies just behind the hills for a mile."""


_PLAIN = {"entropy": "entropy", "effective_rank": "effective rank", "variance": "variance of weights", "kurtosis": "kurtosis",
          "mean_distance": "mean distance", "focus_1": "attention to the token before"}
_HIDDEN = {"sink": "sink on token 0", "hidden_variance": "variance of hidden states",
           "hidden_kurtosis": "kurtosis of hidden states", "tokens": "tokens of a prompt"}
WORDS = {"metric": {**_PLAIN, **{f"no_sink_{name}": f"{words}, no sink" for name, words in _PLAIN.items()}, **_HIDDEN}}
"""What a reader calls each metric."""


@diagnostic(
    name="groups",
    title="Two sets of prompts",
    paper=Paper(
        "When Self-Reference Fails to Close: Matrix-Level Dynamics in Large Language Models",
        "2604.12128",
        2026,
    ),
    needs=("probe", "prompts"),
    instead="groups",
    help="Does a kind of prompt change how attention looks? Give two matched sets, paradoxes "
    "against plain facts for instance, and every head metric is compared: how large the "
    "difference is, and whether chance could make it.",
    explanation="A bar is the difference of a metric in standard deviations, first set minus second; believe it where its "
    "false-discovery rate in the second figure is below 5 %. The direction is reported, not "
    "assumed, and prompts that differ in length or vocabulary will differ in attention for "
    "that reason alone.",
    figures=(
        Figure("d", "bars", ("metric",), "First set minus second, Cohen's d", "standard deviations", WORDS),
        Figure("q", "bars", ("metric",), "False-discovery rate of each metric", "believe below 0.05", WORDS),
        Figure("means", "lines", ("set", "metric"), "Mean of each metric in each set", "over the mean in both", WORDS),
    ),
    numbers=(Number("auroc", "a classifier of held-out prompts tells the sets apart with AUROC {} (0.5 is chance)"),),
    before="Reads the prompts below, not the run: the examples are taken when you change nothing.",
    inputs=(
        Input("first", "prompts", "first set", example=SELF,
              help="One prompt a line, at least three; with fewer than about fifteen only very large differences show."),
        Input("second", "prompts", "second set", "One prompt a line; the same line of both sets is a matched pair.",
              example=PLAIN),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Compares two sets, first minus second: ``session.groups``, or ``session.prompts`` measured with the probe.

    "pair" in a prompt's metrics names its match.
    """
    sets = session.groups or session.prompts
    if len(sets) != 2 or any(len(g) < 3 for g in sets.values()):
        raise LabError(
            "Comparing needs exactly two sets of at least three prompts each",
            f"The sets hold {' and '.join(str(len(g)) for g in sets.values())}",
            "Write more prompts, one a line",
        )
    (first, a), (second, b) = (session.groups or measured(session, progress)).items()
    shared = set.intersection(*(set(p) for p in a + b)) - {"pair"}
    names = sorted(n for n in shared if all(np.isfinite(p[n]) for p in a + b))
    if not names:
        raise LabError(
            "The two sets share no metric", "Both need the same finite measurements", "Measure them again"
        )
    xa, xb = (np.array([[p[n] for n in names] for p in g]) for g in (a, b))
    tests = np.array([welch(xa[:, n], xb[:, n]) for n in range(len(names))])
    progress(0.95)
    pairs = [p.get("pair", f"{side}{n}") for side, g in (("a", a), ("b", b)) for n, p in enumerate(g)]
    y = np.array([1] * len(a) + [0] * len(b))
    rng = np.random.default_rng(0).permutation(len(y))
    score = cross_validated_auroc(np.vstack([xa, xb])[rng], y[rng], [pairs[n] for n in rng])
    progress(1.0)
    return {
        "metrics": np.array(names),
        "d": np.array([cohens_d(xa[:, n], xb[:, n]) for n in range(len(names))]),
        "t": tests[:, 0],
        "p": tests[:, 1],
        "q": false_discovery(tests[:, 1]),
        "auroc": np.array(score),
        "means": np.stack([x.mean(0) for x in (xa, xb)]) / np.where(np.abs(np.vstack([xa, xb]).mean(0)) > 1e-12,
                                                                    np.vstack([xa, xb]).mean(0), 1.0),
        "sets": np.array([first, second]),
    }
