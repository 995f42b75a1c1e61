"""The strip of figures under a column: what the variant cost and how far it strayed."""
from __future__ import annotations

from typing import Any

from ..format import DASH, decimal, duration, esc, missing, percent, ratio, size


def _change(value: float | None, reference: float | None) -> str:
    """'+5%' of a time against the reference's."""
    if missing(value) or missing(reference) or not reference:
        return ""
    return f"{(value / reference - 1) * 100:+.0f}%"


def _cell(name: str, value: str, soft: str = "", title: str = "") -> str:
    tail = f" <em>{esc(soft)}</em>" if soft else ""
    hint = f' title="{esc(title)}"' if title else ""
    return f'<div{hint}><dt>{esc(name)}</dt><dd><span class="num">{esc(value)}</span>{tail}</dd></div>'


def metrics(variant: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """Six cells. `reference` is None for the reference variant itself, whose fidelity cells stay empty."""
    ref = reference or {}
    kept, read = variant.get("kept_fraction"), variant.get("read_fraction")
    both = DASH if missing(kept) and missing(read) else f"{percent(kept)} / {percent(read)}"
    kl = variant.get("kl_mean") if reference else None
    agreement = variant.get("top1_agreement") if reference else None
    slack = variant.get("slack_bytes")
    dense = variant.get("kv_bytes_dense")
    stored = size(variant.get("kv_bytes"))
    kv_title = "bytes of the live cache tensors, scales and positions included"
    if not missing(slack):
        kv_title += f"; {size(slack)} more is allocated but empty"
    if not missing(dense):
        kv_title += f"; a dense cache would hold {size(dense)}"
    cells = [
        _cell("TTFT", duration(variant.get("ttft_ms")), _change(variant.get("ttft_ms"), ref.get("ttft_ms")),
              "time to the first token: the prompt's prefill, measured"),
        _cell("per token", duration(variant.get("tpot_ms")), ratio(variant.get("tpot_ms"), ref.get("tpot_ms")),
              "median measured time of one decode step"),
        _cell("KV", stored, ratio(variant.get("kv_bytes"), dense) if reference or variant.get("techniques") else "",
              kv_title),
        _cell("kept / read", both, "", "share of entries still stored / share a step reads"),
        _cell("agreement", decimal(agreement, 2), "",
              "share of the reference's tokens this variant would also have chosen, given the same text before them"),
        _cell("KL", decimal(kl, 3), "nats" if not missing(kl) else "",
              "mean KL(reference ‖ variant) per token, teacher-forced"),
    ]
    return f'<dl class="strip">{"".join(cells)}</dl>'
