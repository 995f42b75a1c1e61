"""What a run that broke off did not come to sum up: where its texts part, what its tokens average to, a dense cache's size."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from statistics import fmean
from typing import Any

from lab.errors import LabError
from lab.measure import cost


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what is missing in its variants and follows from the rest; nothing that was written is changed."""
    variants = record.get("variants") or []
    reference = _ids(variants[0]) if variants else []
    filled = []
    for i, variant in enumerate(variants):
        more: dict[str, Any] = {}
        if i and variant.get("first_divergence") is None:
            pairs = enumerate(zip(_ids(variant), reference, strict=False))
            more["first_divergence"] = next((n for n, (mine, theirs) in pairs if mine != theirs), None)
        for name, sums in (_OF_OTHERS if i else _OF_REFERENCE).items():
            if variant.get(name) is None:
                more[name] = _known(lambda sums=sums, variant=variant: sums(variant))
        if variant.get("kv_bytes") is not None and variant.get("kv_bytes_dense") is None:
            more["kv_bytes_dense"] = _known(lambda variant=variant: _dense(record, variant))
        filled.append({**variant, **more})
    return {**record, "variants": filled}


def _ids(variant: dict[str, Any]) -> list[Any]:
    return [t.get("id") for t in variant.get("tokens") or []]


def _perplexity(logprobs: list[float]) -> float:
    return exp(-fmean(logprobs))


_OF_REFERENCE: dict[str, Callable[[dict[str, Any]], float]] = {
    "perplexity": lambda v: _perplexity([t["logprob"] for t in v["tokens"]])}
_OF_OTHERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "kl_mean": lambda v: fmean(row["kl"] for row in v["fidelity"]),
    "top1_agreement": lambda v: fmean(row["agree"] for row in v["fidelity"]),
    "perplexity": lambda v: _perplexity([log(max(row["var_prob"], 1e-45)) for row in v["fidelity"]])}


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
