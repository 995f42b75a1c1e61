"""What a run that broke off did not come to sum up: where its texts part, what its tokens average to, a dense cache's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lab.errors import LabError
from lab.measure import cost
from lab.measure import record as rec


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what is missing in its variants and follows from the rest; nothing that was written is changed."""
    variants = record.get("variants") or []
    reference = _ids(variants[0]) if variants else []
    filled = []
    for i, variant in enumerate(variants):
        more: dict[str, Any] = {}
        if i and variant.get("first_divergence") is None:
            more["first_divergence"] = rec.first_divergence(_ids(variant), reference)
        known = _known(lambda i=i, variant=variant: rec.averages(variant, i == 0)) or {}
        more.update({name: value for name, value in known.items() if variant.get(name) is None})
        if variant.get("kv_bytes") is not None and variant.get("kv_bytes_dense") is None:
            more["kv_bytes_dense"] = _known(lambda variant=variant: _dense(record, variant))
        filled.append({**variant, **more})
    return {**record, "variants": filled}


def _ids(variant: dict[str, Any]) -> list[Any]:
    return [t.get("id") for t in variant.get("tokens") or []]


def _known(work: Callable[[], Any]) -> Any:
    """What `work` finds; None where the record does not say enough, for an imported one may hold anything."""
    try:
        return work()
    except (LabError, KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _dense(record: dict[str, Any], variant: dict[str, Any]) -> int:
    """Bytes that the tokens a variant has read take without any technique."""
    facts, prompt = record.get("model") or {}, len((record.get("prompt") or {}).get("token_ids") or [])
    read = prompt + max(0, len(variant.get("tokens") or []) - 1)  # the newest token is not read yet
    samples = int((record.get("settings") or {}).get("samples") or 1)
    return cost.stored(facts, "dense", max(1, prompt), read, cost.ELEMENT.get(str(facts.get("dtype")), 4), samples)
