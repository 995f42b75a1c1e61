"""A run while it streams: events in, a record out that grows into the same shape as the finished one.

The columns are drawn from it by the same pure functions that draw a saved run.
"""
from __future__ import annotations

from typing import Any

from .components import cards, columns, tokens
from .format import LETTERS, duration


class LiveRun:
    """Collects one run's events. `record` always has the shape of the contract, missing figures are None."""

    def __init__(self, specs: list[dict[str, Any]], prompt: str) -> None:
        self.record: dict[str, Any] = {
            "run_id": "live", "prompt": {"text": prompt, "tokens": [], "token_ids": []},
            "variants": [{"letter": LETTERS[i], "spec": s["spec"], "title": s["title"],
                          "techniques": s.get("techniques") or [], "simulated": bool(s.get("simulated")),
                          "tokens": [], "fidelity": [], "layers": [],
                          "finish": None, "error": None, "first_divergence": None} for i, s in enumerate(specs)]}
        self.fraction: float | None = None
        self.text = "Starting"
        self._fragments: list[list[str]] = [[] for _ in specs]

    def apply(self, event: Any) -> None:
        """Take one engine event (lab.engine.events); unknown kinds are ignored."""
        kind = type(event).__name__
        i = getattr(event, "variant", None)
        if kind == "Progress":
            self.fraction, self.text = event.fraction, self._named(i, event.text)
        elif kind == "Failed":
            if i is not None:
                self.record["variants"][i]["error"] = event.message
            else:
                for variant in self.record["variants"]:
                    variant["error"] = variant["error"] or (None if variant["finish"] else event.message)
        elif i is None or not 0 <= i < len(self.record["variants"]):
            return
        elif kind == "Prefilled":
            self.record["variants"][i].update(ttft_ms=event.ttft_ms, kv_bytes=event.kv_bytes,
                                              kept_fraction=event.kept_fraction)
            self.text = self._named(i, f"read {event.prompt_tokens:,} tokens in {duration(event.ttft_ms)}")
        elif kind == "Token" and not getattr(event, "sample", 0):
            self._token(i, event)
        elif kind == "Fidelity":
            self.record["variants"][i]["fidelity"].append(
                {"kl": event.kl, "agree": event.agree, "ref_prob": event.ref_prob,
                 "var_prob": event.var_prob, "top": [list(a) for a in event.top or ()]})
        elif kind == "Finished":
            self.record["variants"][i].update(finish=event.reason, text=event.text)

    def _named(self, i: int | None, text: str) -> str:
        several = len(self.record["variants"]) > 1
        return f"{LETTERS[i]} · {text}" if several and i is not None and not text.startswith(LETTERS[i]) else text

    def _token(self, i: int, event: Any) -> None:
        variant = self.record["variants"][i]
        item = {"id": event.id, "text": event.text, "logprob": event.logprob, "entropy": event.entropy,
                "step_ms": event.step_ms, "kv_bytes": event.kv_bytes, "kept": event.kept,
                "alternatives": [list(a) for a in event.alternatives or ()]}
        variant["tokens"].append(item)
        if event.kv_bytes is not None:
            variant["kv_bytes"] = event.kv_bytes
        n = len(variant["tokens"]) - 1
        reference = self.record["variants"][0]["tokens"]
        if i and variant["first_divergence"] is None and n < len(reference) and reference[n]["id"] != item["id"]:
            variant["first_divergence"] = n
        fork = variant["first_divergence"]
        seen = variant["fidelity"][n] if n < len(variant["fidelity"]) and (fork is None or n <= fork) else None
        theirs = tokens.text_at(self.record["variants"][0], n) if n == fork else None
        self._fragments[i].append(tokens.token(item, seen, n, tokens.place_of(n, fork, not i), theirs))
        self.text = f"writing token {n + 1:,}"
        self.fraction = None

    def columns(self) -> dict[str, Any]:
        """What the columns component shows now."""
        light = {**self.record, "variants": [{**v, "tokens": []} for v in self.record["variants"]]}
        drawn = columns.columns(light, live=True)
        for column, fragments in zip(drawn["cols"], self._fragments, strict=True):
            column["own"] = list(fragments)
        return drawn

    def status(self) -> str:
        """The status line."""
        return cards.status(self.text, self.fraction, busy=True)
