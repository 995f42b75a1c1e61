"""The dial: the state of one variant's cache in a single bar, 16 bits down to evicted."""
from __future__ import annotations

from typing import Any

from ..format import BITS, esc, percent


def shares(variant: dict[str, Any]) -> list[tuple[int, float]]:
    """(bits, share of entries) summed over layers, widest first; empty when the run has no layer table."""
    totals = {bits: 0 for bits in BITS}
    for layer in variant.get("layers") or []:
        for bits, entries in (layer.get("bits") or {}).items():
            totals[int(bits)] = totals.get(int(bits), 0) + int(entries or 0)
    whole = sum(totals.values())
    return [(bits, totals[bits] / whole) for bits in BITS if totals[bits]] if whole else []


def label(bits: int) -> str:
    """'2 bit' or 'evicted'."""
    return f"{bits} bit" if bits else "evicted"


def dial(variant: dict[str, Any]) -> str:
    """The bar and its key. The bar is one image to a screen reader; the key says the same in words."""
    parts = shares(variant)
    if not parts:
        return '<div class="dial dial-empty" role="img" aria-label="cache state not known yet"></div><div class="key"></div>'
    words = ", ".join(f"{label(bits)} {percent(share)}" for bits, share in parts)
    bar = "".join(f'<span class="bits b{bits}" style="width:{share * 100:.3f}%"></span>' for bits, share in parts)
    key = "".join(f'<span><s class="bits b{bits}"></s>{label(bits)} <b class="num">{percent(share)}</b></span>'
                  for bits, share in parts)
    return (f'<div class="dial" role="img" aria-label="cache: {esc(words)}">{bar}</div>'
            f'<div class="key" aria-hidden="true">{key}</div>')
