"""What the generic tests need to know of each technique: one line each.

neutral: a stack under which the model must be the dense model (I1), for any prompt up to 200 tokens; None where none exists.
lossy: a stack that changes something on a prompt of 120 tokens.
unless: invariants that do not hold, each with its reason: "chunks" (a prompt fed in pieces gives the same), "causal" (a
prompt row does not depend on later tokens), "padding" (left padding changes nothing), "rope" (needs rotary embeddings),
"steady" (one entry leaves for each that comes), "budget" (about as many entries as the budget says), "changes" (the lossy
setting shows on a model of three layers).
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


TRIMMED = dict.fromkeys(("chunks", "causal", "padding"), "it chooses among the prompt's tokens as a whole")
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
    "act": Case("act(beta=1)", "act(alpha=0.01)",
                {"changes": "it starts at layer 2 and ends before the last: nothing, of three"}),
    "aha": Case("aha(bias=1000)", "aha(window=16,bias=-1000)"),
    "attention_reuse": Case("attention_reuse(every=1)", "attention_reuse"),
    "attnrank": Case("attnrank", "attnrank(profile=basin,documents=5-40;41-100)", TRIMMED),
    "autoselect": Case("autoselect(rate=1)", "autoselect(rate=0.5)", TRIMMED),
    "block_topk": budget("block_topk", "local=16"),
    "claa": Case("claa(rate=1)", "claa(rate=0.5)", TRIMMED),
    "duo_attention": Case("duo_attention(fraction=0)", "duo_attention(sinks=4,window=16)"),
    "flux": Case("flux(margin=1000)", "flux(sinks=4,window=16,margin=-1000)"),
    "focus_directions": Case("focus_directions(alpha=0)", "focus_directions(alpha=1)"),
    "gqa_conversion": Case(None, "gqa_conversion(kv_heads=1)"),
    "massive_activations": Case("massive_activations(threshold=1e9)", "massive_activations(threshold=1,ratio=1)", {
        k: "what is massive is judged by the median of all rows fed together" for k in ("chunks", "causal", "padding")}),
    "minference": Case("minference(share=1)", "minference(share=0.25)", {
        "chunks": "each piece of the prompt asks its own last rows", "causal": "the last rows choose what earlier rows read",
        "padding": "padded prompts are read in full"}),
    "moa": Case(None, "moa(density=0.25,first=4)", {"budget": "spans follow rules learnt at other lengths"}),
    "moh": Case("moh(active=1)", "moh"),
    "qada": Case("qada(tau=0)", "qada(tau=0.9,sinks=4,window=16)", {"padding": "rows of different length are read in full"}),
    "quest": budget("quest", "dense_layers=0"),
    "rectified": Case("rectified(share=1)", "rectified(share=0.3,block=8)", {
        "chunks": "blocks start with each piece of the prompt", "causal": "blocks of rows share their mean",
        "padding": "blocks are counted in the padded prompt"}),
    "sf_attn": Case("sf_attn(group=100000)", "sf_attn(group=30)", {"padding": "groups are counted in the padded prompt"}),
    "stable_sinks": budget("stable_sinks"),
    "swat": Case("swat(window=4096)", "swat(window=16)"),
    "top_theta": Case("top_theta(k=512)", "top_theta(k=32,first_k=32)"),
    "vertical_slash": Case("vertical_slash(vertical=1000,slash=1000)", "vertical_slash", {
        "chunks": "each piece of the prompt asks its own last rows", "causal": "the last rows choose what earlier rows read",
        "padding": "diagonals are counted in the padded prompt"}),
    "xattention": Case("xattention(tau=1)", "xattention(tau=0.5)", {
        "chunks": "blocks start with each piece of the prompt", "causal": "rows of a block choose together",
        "padding": "blocks are counted in the padded prompt"}),
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
