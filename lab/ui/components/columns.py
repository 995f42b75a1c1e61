"""The result columns: for every variant a title, the dial, the streamed text and the figures under it.

The browser receives them as small pieces (one per token), so that a stream sends only what is new.
"""
from __future__ import annotations

from typing import Any

from ..format import esc, titles
from . import dial, metrics, tokens

ENDINGS = {
    "length": "reached the token limit", "stop": "ended by itself", "cancelled": "stopped by you",
    "interrupted": "interrupted before the end",
}


def saving(variant: dict[str, Any]) -> str:
    """The chip beside the title."""
    if not variant.get("techniques"):
        return "full cache"
    words = [w for w in variant.get("saves") or [] if w and w != "nothing"]
    if variant.get("simulated"):
        return "reads less, stores the same"
    if any(w.startswith("memory") for w in words):
        return ""
    return words[0] if words else "saves nothing" if variant.get("saves") else ""


def head(variant: dict[str, Any], reference: bool, title: str) -> str:
    """Letter, title and chips of one column."""
    chips = ['<span class="chip">reference</span>'] if reference else []
    note = saving(variant)
    if note and not reference:
        chips.append(f'<span class="chip">{esc(note)}</span>')
    spec = esc(variant.get("spec") or "dense")
    return (f'<span class="badge" aria-label="variant {esc(variant.get("letter"))}">{esc(variant.get("letter"))}</span>'
            f'<h3>{esc(title)}</h3>{"".join(chips)}<p class="spec num soft" title="{spec}">{spec}</p>')


def note(variant: dict[str, Any]) -> str:
    """One line under the text: how it ended, or the error that ended it."""
    if variant.get("error"):
        return f'<p class="error" role="alert">{esc(variant["error"])}</p>'
    ending = ENDINGS.get(str(variant.get("finish") or ""))
    fork = variant.get("first_divergence")
    parts = [f'{len(variant.get("tokens") or []):,} tokens' if ending else "", ending or ""]
    if ending and fork is not None:
        parts.append(f"first differs at token {fork + 1}")
    if ending and uncoded(variant):
        parts.append("nothing is coded so far: every entry kept is exact")
    return (f'<p class="ending">{esc(" · ".join(p for p in parts if p))}</p>' if ending else "") + others(variant)


def uncoded(variant: dict[str, Any]) -> bool:
    """True where a code was asked for and the cache holds no coded entry."""
    asked = {str(bits) for t in variant.get("techniques") or [] if (bits := (t.get("params") or {}).get("bits"))}
    rows = [row.get("bits") or {} for row in variant.get("layers") or []]
    if not asked or not rows or any(not asked <= row.keys() for row in rows):  # older runs did not count every width
        return False
    return not any(n for row in rows for b, n in row.items() if b not in ("16", "0"))


def others(variant: dict[str, Any]) -> str:
    """The further continuations of the same prompt; figures and marks above are those of the first."""
    texts = (variant.get("samples") or [])[1:]
    if not texts:
        return ""
    rows = "".join(f"<li>{esc(text)}</li>" for text in texts)
    name = f"{len(texts)} more continuation{'s' if len(texts) > 1 else ''}"
    return f'<details class="samples"><summary>{name}</summary><ol start="2">{rows}</ol></details>'


def columns(record: dict[str, Any] | None, live: bool = False) -> dict[str, Any]:
    """What the columns component draws: {"run", "live", "cols": [{letter, head, dial, own, forced, note, strip}]}."""
    if not record:
        return {"run": None, "live": False, "cols": []}
    variants = record.get("variants") or []
    reference = variants[0] if variants else {}
    drawn, names = [], titles(variants)
    for i, variant in enumerate(variants):
        drawn.append({
            "letter": str(variant.get("letter") or "?"), "head": head(variant, i == 0, names[str(variant.get("letter"))]),
            "dial": dial.dial(variant),
            "spec": str(variant.get("spec") or "dense"),
            "own": tokens.own_text(variant, reference if i else None),
            "forced": tokens.forced_text(variant, reference) if i and not live else [],
            "note": note(variant), "strip": metrics.metrics(variant, reference if i else None),
            "writing": live and not variant.get("finish") and not variant.get("error"),
        })
    return {"run": record.get("run_id"), "live": live, "cols": drawn}
