"""How numbers become text. One place, so that units and missing values look the same everywhere.

A missing value is None and is shown as an en dash, never as zero.
"""
from __future__ import annotations

import html
import math
from datetime import datetime, timezone
from typing import Any

DASH = "–"
BITS = (16, 8, 4, 3, 2, 0)
LETTERS = "ABCD"


def esc(text: Any) -> str:
    """Escape text for HTML bodies and for double-quoted attributes."""
    return html.escape("" if text is None else str(text), quote=True)


def missing(value: Any) -> bool:
    """True for None and for numbers that are not finite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def count(value: float | None) -> str:
    """1234567 -> '1,234,567'."""
    return DASH if missing(value) else f"{int(value):,}"


def short_count(value: float | None) -> str:
    """134515008 -> '135 M'."""
    if missing(value):
        return DASH
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units: 46080 -> '45.0 KiB'."""
    if missing(value):
        return DASH
    step = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(step) < 1024 or unit == "GiB":
            break
        step /= 1024
    return f"{step:.0f} B" if unit == "B" else f"{step:,.1f} {unit}"


def rate(value: float | None, unit: str = "") -> str:
    """A large number in decimal units: 9.89e14 -> '989 T'; the unit follows."""
    if missing(value):
        return DASH
    for prefix, step in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= step:
            return f"{value / step:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(ms: float | None) -> str:
    """Milliseconds below one second, seconds above, microseconds below a tenth of one: 21.43 -> '21.4 ms', 1920 -> '1.92 s'."""
    if missing(ms):
        return DASH
    if 0 < ms < 0.1:
        return f"{ms * 1000:.3g} µs"
    if ms >= 60_000:
        return f"{int(ms // 60_000)} min {int(ms % 60_000 // 1000)} s"
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def percent(fraction: float | None) -> str:
    """0.25 -> '25%'; small but not zero -> '<1%'."""
    if missing(fraction):
        return DASH
    if 0 < fraction < 0.005:
        return "<1%"
    return f"{fraction * 100:.0f}%"


def ratio(value: float | None, reference: float | None) -> str:
    """'0.79×' against a reference, or nothing when either is missing."""
    if missing(value) or missing(reference) or not reference:
        return ""
    return f"{value / reference:.2f}×"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of digits; tiny values keep two significant ones."""
    if missing(value):
        return DASH
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def probability(logprob: float | None) -> str:
    """exp of a natural log-probability, three digits."""
    return DASH if missing(logprob) else decimal(math.exp(min(logprob, 0.0)), 3)


def when(iso: str | None, now: datetime | None = None) -> str:
    """'just now', '12 min ago', 'yesterday', or the date."""
    try:
        moment = datetime.fromisoformat((iso or "").replace("Z", "+00:00"))
    except ValueError:
        return iso or DASH
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    seconds = ((now or datetime.now(timezone.utc)) - moment).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 86_400:
        return f"{int(seconds // 3600)} h ago"
    return moment.strftime("%Y-%m-%d %H:%M")


def visible(text: str) -> str:
    """Make a token that is only white space visible."""
    if text and not text.strip():
        return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return text.replace("\n", "⏎")


def titles(variants: list[dict[str, Any]]) -> dict[str, str]:
    """Title of each variant by its letter; those that share one also name the parameters that tell them apart."""
    def params(variant: dict[str, Any]) -> dict[tuple[str, str], Any]:
        chosen = variant.get("techniques") or []
        return {(t["name"], key): value for t in chosen for key, value in (t.get("params") or {}).items()}

    plain = {str(v.get("letter")): str(v.get("title") or v.get("spec") or "Dense") for v in variants}
    found = {}
    for v in variants:
        letter, mine = str(v.get("letter")), params(v)
        twins = [params(w) for w in variants if plain[str(w.get("letter"))] == plain[letter]]
        own = [f"{key[1].replace('_', ' ')} {value}" for key, value in mine.items() if any(t.get(key) != value for t in twins)]
        found[letter] = " · ".join([plain[letter], *own])
    return found
