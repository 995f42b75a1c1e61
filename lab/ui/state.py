"""What a visitor's page remembers, and how the address bar names it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LETTERS = ("A", "B", "C", "D")
TABS = ("compare", "attention", "memory", "runs")
MAX_PROMPT_CHARS = 400_000
MOST_SAMPLES = 8  # continuations of one prompt that a column can still show


@dataclass(frozen=True)
class Address:
    """The shareable part of the page: ?tab=&run=&variant=&layer=&head=&minus="""

    tab: str = "compare"
    run: str | None = None
    variant: str | None = None
    layer: int | str | None = None  # a number, or "mean" or "max" over layers
    head: int | str | None = None
    minus: str | None = None
    unknown: str = ""  # what was named as a tab and is none
    wrong: tuple[tuple[str, str], ...] = ()  # (name, value) of what could be no variant, layer or head

    @classmethod
    def read(cls, query: Any) -> Address:
        """From query parameters; whatever is not understood is left out and noted."""
        wrong: list[tuple[str, str]] = []

        def one(name: str, words: tuple[str, ...], numbers: bool = True) -> Any:
            value = str(query.get(name) or "")
            if not value or value in words:
                return value or None
            if numbers and value.isdecimal() and len(value) < 6:
                return int(value)
            wrong.append((name, value[:20]))
            return None
        tab, run = str(query.get("tab") or ""), str(query.get("run") or "")[:80]
        letter, layer = one("variant", LETTERS, False), one("layer", ("mean", "max"))
        head, minus = one("head", ("mean", "max", "rollout")), one("minus", LETTERS, False)
        return cls(tab if tab in TABS else "compare", run or None, letter, layer, head, minus,
                   tab[:40] if tab not in ("", *TABS) else "", tuple(wrong))

    @property
    def names_view(self) -> bool:
        """True when it names anything of the Attention tab."""
        return bool(self.wrong) or any(x is not None for x in (self.variant, self.layer, self.head, self.minus))


@dataclass(frozen=True)
class Decoding:
    """Decoding controls as the browser sends them, checked against the lab's limits."""

    mode: str = "greedy"
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    timing: str = "interleaved"
    samples: int = 1
    chat: bool = False
    truncate: bool = False

    @classmethod
    def read(cls, value: dict[str, Any] | None, most_tokens: int) -> Decoding:
        """From the settings component's value. Out-of-range numbers are brought to the nearest bound."""
        v, base = value or {}, cls()

        def bounded(name: str, low: float, high: float) -> float:
            try:
                return min(max(float(v.get(name, getattr(base, name))), low), high)
            except (TypeError, ValueError):
                return getattr(base, name)
        return cls("sampled" if v.get("mode") == "sampled" else "greedy", bounded("temperature", 0.05, 5.0),
                   int(bounded("top_k", 0, 1000)), bounded("top_p", 0.01, 1.0), int(bounded("seed", 0, 2**31 - 1)),
                   int(bounded("max_new_tokens", 1, most_tokens)), "clean" if v.get("timing") == "clean" else "interleaved",
                   int(bounded("samples", 1, MOST_SAMPLES)), v.get("chat") is True, v.get("truncate") is True)

    def settings(self) -> dict[str, Any]:
        """The run record's settings; greedy is temperature 0."""
        sampled = self.mode == "sampled"
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature if sampled else 0.0,
                "top_k": self.top_k if sampled else 0, "top_p": self.top_p if sampled else 1.0, "seed": self.seed,
                "timing": self.timing, "samples": self.samples if sampled else 1, "chat": self.chat, "truncate": self.truncate}


def decoding_value(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The settings component's value for a saved run."""
    sampled = bool(settings.get("temperature"))
    changes = {"mode": "sampled" if sampled else "greedy", "preset": "", "seed": settings.get("seed", 0),
               "max_new_tokens": settings.get("max_new_tokens", 64), "timing": settings.get("timing", "interleaved"),
               "chat": bool(settings.get("chat"))}
    if sampled:
        changes |= {k: settings[k] for k in ("temperature", "top_k", "top_p", "samples") if settings.get(k) is not None}
    return {**base, **changes}
