"""What the generic tests need to know of each technique: one line each.

neutral: a stack under which the model must be the dense model (I1), for any prompt up to 200 tokens; None where none exists.
lossy: a stack that changes something on a prompt of 120 tokens.
unless: invariants that do not hold, each with its reason: "chunks" (a prompt fed in pieces gives the same), "causal" (a
prompt row does not depend on later tokens), "padding" (left padding changes nothing), "rope" (needs rotary embeddings),
"steady" (one entry leaves for each that comes).
A technique without a line is tested with its defaults and a budget of 40, and fails `test_every_technique_has_a_case`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PROMPT = 120


@dataclass(frozen=True)
class Case:
    neutral: str | None
    lossy: str
    unless: dict[str, str] = field(default_factory=dict)


def budget(name: str, more: str = "", **unless: str) -> Case:
    """A technique that keeps everything at budget 1 and 40 of 120 entries in the lossy case."""
    inside = f",{more}" if more else ""
    return Case(f"{name}(budget=1{inside})", f"{name}(budget=40{inside})", unless)


CASES: dict[str, Case] = {
    "adakv": budget("adakv"),
    "arkv": budget("arkv", "window=8", steady="an overflow drops a quarter of the past at once"),
    "arkv_score": budget("arkv_score", "window=8"),
    "cam": Case("h2o(budget=1)+cam", "h2o(budget=40)+cam(expected=true)"),
    "d2o_budget": budget("d2o_budget"),
    "d2o_merge": Case("h2o(budget=1)+d2o_merge", "h2o(budget=40)+d2o_merge(multiplicity=true)"),
    "dwb": Case("dwb(target=16)", "dwb(target=4,interval=1)", {
        "padding": "padding tokens are counted among the tokens seen"}),
    "expected_attention": budget("expected_attention", rope="it turns queries back to position 0"),
    "fp8": Case(None, "fp8"),
    "global_top": budget("global_top"),
    "hrp": budget("hrp"),
    "keydiff": budget("keydiff", "window=8"),
    "knorm": budget("knorm", "window=8"),
    "kvquant": Case(None, "kvquant", {"rope": "keys are coded as they were before rotation"}),
    "kvzip": budget("kvzip", padding="it repeats prompts of one length"),
    "min_variance": budget("min_variance"),
    "random_score": budget("random_score", "window=8"),
    "rotated": Case(None, "rotated(bits=3)"),
    "think": Case("think(prune=0)", "think", {"padding": "one set of channels serves the whole batch"}),
    "tova": budget("tova"),
    "uniform": budget("uniform"),
    "vatp": budget("vatp", "first=4"),
    "a_shape": Case("a_shape(window=4096)", "a_shape(window=16)"),
    "delta": Case("a_shape(window=8)+delta(gamma=1)", "a_shape(window=8)+delta(gamma=8)",
                  {"padding": "rows are anchored by their place in the padded prompt", "causal": "the prompt's tail is dense"}),
    "h2o": budget("h2o"),
    "head_pruning": Case("head_pruning", "head_pruning(heads=1)"),
    "int_codes": Case(None, "int_codes(bits=4)"),
    "kivi": Case("kivi(residual=512)", "kivi(group=16,residual=32)"),
    "pyramidkv": budget("pyramidkv"),
    "snapkv": budget("snapkv"),
    "streaming_llm": budget("streaming_llm", rope="renumbering turns rotary keys"),
    "zerotuning": Case("zerotuning(gamma=1)", "zerotuning(gamma=4)"),
}


def case_of(name: str, technique) -> Case:
    """The table's line, or what the declaration suggests."""
    if name in CASES:
        return CASES[name]
    names = [p.name for p in technique.parameters()]
    return budget(name) if "budget" in names else Case(None, name)
