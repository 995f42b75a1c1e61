"""Generated text as tokens: underlined by KL, forked where the text first leaves the reference."""
from __future__ import annotations

import json
from typing import Any

from ..format import decimal, duration, esc, missing, percent, probability, size, visible

# KL in nats at which an underline appears, and at which it is at its heaviest.
KL_FAINT, KL_CLEAR, KL_HEAVY = 0.02, 0.1, 0.5


def kl_class(kl: float | None) -> str:
    """Underline weight for a KL in nats."""
    if missing(kl) or kl < KL_FAINT:
        return ""
    return "k1" if kl < KL_CLEAR else "k2" if kl < KL_HEAVY else "k3"


def _alternatives(entries: Any) -> list[list[str]]:
    return [[visible(str(entry[1])), decimal(float(entry[2]), 3)] for entry in (entries or [])[:5]]


def _kept(kept: float | int | None) -> str:
    """The record counts entries kept, or says the share of them."""
    if missing(kept):
        return ""
    return percent(kept) if isinstance(kept, float) and kept <= 1 else f"{int(kept):,} entries"


def card(token: dict[str, Any], fidelity: dict[str, Any] | None, index: int, place: str, theirs: str | None) -> str:
    """The hover card's content as JSON text; the browser fills it in with textContent only, and names the variants.

    `place` says whose token and whose text it is: "" the reference's own, "same" both wrote it after the same text, "fork" the
    first difference (the reference wrote `theirs`), "after" the variant's alone, "forced" the reference's, read by the variant.
    """
    facts: dict[str, Any] = {"n": index + 1, "t": visible(str(token.get("text") or "")),
                             "k": place}
    if place != "forced":
        facts["p"] = probability(token.get("logprob"))
    if place == "fork" and theirs is not None:
        facts["r"] = visible(theirs)
    if not missing(token.get("entropy")):
        facts["h"] = f"{decimal(token['entropy'], 2)} nats"
    if fidelity:
        if not missing(fidelity.get("kl")):
            facts["kl"] = f"{decimal(fidelity['kl'], 3)} nats"
        if fidelity.get("agree") is not None:
            facts["ok"] = bool(fidelity["agree"])
        if not missing(fidelity.get("ref_prob")):
            facts["rp"] = decimal(fidelity["ref_prob"], 3)
        if place in ("fork", "forced") and not missing(fidelity.get("var_prob")):
            facts["vp"] = decimal(fidelity["var_prob"], 3)  # of the reference's token; where both wrote it, it is "p"
    # Up to the first difference both texts are one, and so are the choices: one list tells them.
    facts["alt"] = _alternatives(token.get("alternatives") or (fidelity or {}).get("top"))
    cache = [part for part in (_kept(token.get("kept")) and f"kept {_kept(token.get('kept'))}",
                               size(token["kv_bytes"]) if not missing(token.get("kv_bytes")) else "") if part]
    if cache:
        facts["c"] = " · ".join(cache)
    if not missing(token.get("step_ms")):
        facts["ms"] = duration(token["step_ms"])
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))


def place_of(index: int, fork: int | None, reference: bool) -> str:
    """Where a token of free-running text stands, for its card; `fork` is the variant's first difference, if any."""
    return "" if reference else "same" if fork is None or index < fork else "fork" if index == fork else "after"


def token(item: dict[str, Any], fidelity: dict[str, Any] | None, index: int, place: str = "", theirs: str | None = None) -> str:
    """One token as a span, underlined by its KL. `place` and `theirs` as for `card`."""
    fork = place == "fork"
    names = " ".join(filter(None, ("t", kl_class((fidelity or {}).get("kl")), "fork" if fork else "")))
    text = esc(item.get("text") or "").replace("\n", '<i class="nl">⏎</i>\n')
    mark = '<b class="forkbar" role="img" aria-label="first divergence"></b>' if fork else ""
    told = esc(card(item, fidelity, index, place, theirs))
    return f'{mark}<span class="{names}" data-i="{index}" data-h="{told}">{text}</span>'


def own_text(variant: dict[str, Any], reference: dict[str, Any] | None = None) -> list[str]:
    """The variant's free-running text, one fragment a token; `reference` is None for the reference itself.

    Teacher-forced KL belongs to the same context only up to the first divergence, so underlines end there.
    """
    fidelity = variant.get("fidelity") or []
    fork = variant.get("first_divergence")
    fragments = []
    for i, item in enumerate(variant.get("tokens") or []):
        shared = i < len(fidelity) and (fork is None or i <= fork)
        fragments.append(token(item, fidelity[i] if shared else None, i, place_of(i, fork, reference is None),
                               text_at(reference, i) if i == fork else None))
    return fragments


def text_at(variant: dict[str, Any] | None, index: int) -> str | None:
    """Text of one token of a variant, None where it has none."""
    tokens = (variant or {}).get("tokens") or []
    return str(tokens[index].get("text") or "") if index < len(tokens) else None


def forced_text(variant: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """The reference's text as this variant saw it, teacher-forced: every token carries its KL."""
    fidelity = variant.get("fidelity") or []
    fragments = []
    for i, item in enumerate(reference.get("tokens") or []):
        fragments.append(token({"text": item.get("text")}, fidelity[i] if i < len(fidelity) else None, i, "forced"))
    return fragments
