"""Tables: what every variant cost, and what each layer holds."""
from __future__ import annotations

from typing import Any

from lab.measure.told import stores_all, verdict

from ..format import BITS, DASH, decimal, duration, esc, missing, percent, ratio, size
from .dial import label

STORES_ALL = "stores everything, reads less"
COSTS = {
    "time to first token": "reading the prompt, up to the first new token",
    "per token": "median of the variant's own steps",
    "KV cache": "bytes of the live tensors at the end of the run: codes, scales, positions, running sums",
    "of dense": "KV cache as a multiple of the dense cache's bytes",
    "allocated, empty": "room that the cache holds ready and does not use",
    "kept": "entries still stored, of all tokens read",
    "read": "entries that the newest step attended to, of all tokens read",
    "bytes read": "what the newest step read in order to attend, as a share of a dense step's bytes",
    "to choose": "what it read only in order to choose the entries, as a share of a dense step's bytes",
    "break-even": "whether choosing cost less than it saved",
    "perplexity": "of the reference's text under this variant; 1 is certainty",
    "KL, nats": "mean KL(reference‖variant) per token; 0 is the same beliefs",
    "agreement": "share of tokens at which the variant's first choice is the reference's",
}


def badge(letter: Any) -> str:
    """A variant's letter in its colour."""
    return f'<span class="badge v{esc(letter)}">{esc(letter)}</span>'


def _letter(variant: dict[str, Any]) -> str:
    return badge(variant.get("letter"))


def folded(
    summary: str, caption: str, head: tuple[str, ...], body: list[tuple[str, list[str]]], note: str, opened: bool = False
) -> str:
    """A table behind a figure. body: (row's head as HTML, cells as text); note is HTML."""
    heads = "".join(f'<th scope="col">{esc(h)}</th>' for h in head)
    lines = "".join(f'<tr><th scope="row">{name}</th>' + "".join(f'<td class="num">{esc(c)}</td>' for c in cells) + "</tr>"
                    for name, cells in body)
    table = (f'<div class="tablebox"><table class="lines"><caption class="sr">{esc(caption)}</caption>'
             f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
             ) if body else '<p class="soft note">Nothing to show for this run.</p>'
    return f'{note}<details class="figtable"{" open" if opened else ""}><summary>{esc(summary)}</summary>{table}</details>'


def _reads(variant: dict[str, Any]) -> list[str]:
    """Bytes that the newest step read to attend and to choose, of a dense step's, and whether choosing paid."""
    reads = variant.get("reads") or {}
    attend, choose = reads.get("attend"), reads.get("choose")
    return [percent(attend), percent(choose) if choose else DASH, verdict(variant) or DASH]


def costs(record: dict[str, Any]) -> str:
    """One line a variant: times, bytes, entries. All measured."""
    rows = []
    for i, v in enumerate(record.get("variants") or []):
        cells = [duration(v.get("ttft_ms")), duration(v.get("tpot_ms")), size(v.get("kv_bytes")),
                 ratio(v.get("kv_bytes"), v.get("kv_bytes_dense")) or DASH, size(v.get("slack_bytes")),
                 percent(v.get("kept_fraction")), percent(v.get("read_fraction")), *_reads(v), decimal(v.get("perplexity"), 2),
                 decimal(v.get("kl_mean"), 3) if i else DASH, decimal(v.get("top1_agreement"), 2) if i else DASH]
        title = esc(v.get("title") or v.get("spec"))
        if v.get("techniques"):
            title += f' <span class="soft num">{esc(v.get("spec"))}</span>'
            title += f'<span class="soft stores">{STORES_ALL}</span>' if stores_all(v) else ""
        why = v.get("error") or ("" if v.get("tokens") else "The run ended before it wrote a token.")
        if why:
            title += f'<span class="soft stores">{esc(why)}</span>'
        figures = "".join(f'<td class="num" data-name="{esc(name)}">{esc(c)}</td>' for name, c in zip(COSTS, cells, strict=True))
        rows.append(f'<tr><th scope="row">{_letter(v)} {title}</th>{figures}</tr>')
    head = '<th scope="col">variant</th>' + "".join(
        f'<th scope="col" title="{esc(t)}">{esc(name)}</th>' for name, t in COSTS.items()
    )
    return (f'<div class="tablebox"><table class="lines costs"><caption class="sr">measured cost of each variant</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>")


def _bar(bits: dict[str, Any]) -> str:
    counts = {b: int(bits.get(str(b)) or 0) for b in BITS}
    whole = sum(counts.values())
    if not whole:
        return ""
    words = ", ".join(f"{label(b)} {percent(n / whole)}" for b, n in counts.items() if n)
    spans = "".join(f'<span class="bits b{b}" style="width:{n / whole * 100:.2f}%"></span>' for b, n in counts.items() if n)
    return f'<div class="dial mini" role="img" aria-label="{esc(words)}" title="{esc(words)}">{spans}</div>'


def layers(record: dict[str, Any]) -> str:
    """Bytes and bits of every layer, variants beside each other."""
    variants = [v for v in record.get("variants") or [] if v.get("layers")]
    if not variants:
        return '<p class="soft">This run did not record its layers.</p>'
    head = "".join(f'<th scope="col" colspan="2">{_letter(v)} {esc(v.get("title") or v.get("spec"))}</th>' for v in variants)
    table = {(i, layer.get("layer")): layer for i, v in enumerate(variants) for layer in v["layers"]}
    rows = []
    for number in sorted({n for _, n in table if not missing(n)}):
        cells = []
        for i in range(len(variants)):
            layer = table.get((i, number)) or {}
            cells.append(f'<td class="num">{esc(size(layer.get("kv_bytes")))}</td>'
                         f'<td class="bar">{_bar(layer.get("bits") or {})}</td>')
        rows.append(f'<tr><th scope="row" class="num">{esc(number)}</th>{"".join(cells)}</tr>')
    return (f'<div class="tablebox"><table class="lines layers"><caption class="sr">KV bytes and bits by layer</caption>'
            f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>')
