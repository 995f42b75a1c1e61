"""Small pieces: model card, status line, banner, error and empty states, chips in the header."""
from __future__ import annotations

from typing import Any

from ..format import count, decimal, esc, missing, short_count, size


def _row(name: str, value: str, title: str = "") -> str:
    hint = f' title="{esc(title)}"' if title else ""
    return f"<dt{hint}>{esc(name)}</dt><dd class=\"num\">{esc(value)}</dd>"


def model_card(facts: dict[str, Any] | None, loaded: bool = True) -> str:
    """The model's facts as a definition list."""
    if not facts:
        return ('<section class="side"><h2>Model</h2><p class="soft">Loads at the first Run '
                "(SmolLM2-135M-Instruct).</p></section>")
    name = str(facts.get("id") or "model").split("/")[-1]
    rows = [_row("parameters", short_count(facts.get("parameters"))), _row("layers", count(facts.get("layers"))),
            _row("heads Q / KV", f"{count(facts.get('heads'))} / {count(facts.get('kv_heads'))}",
                 "query heads share key-value heads in groups"),
            _row("head dim", count(facts.get("head_dim"))), _row("context", count(facts.get("context"))),
            _row("KV per token", size(facts.get("kv_bytes_per_token")))]
    if facts.get("sliding_window"):
        rows.append(_row("sliding window", count(facts["sliding_window"])))
    if facts.get("weights"):
        rows.append(_row("weights", str(facts["weights"])))
    if not missing(facts.get("weights_kl")):
        rows.append(_row("their KL to float32", f"{decimal(facts['weights_kl'], 4)} nats", "measured on real text"))
    rows.append(_row("device", str(facts.get("device") or "")))
    state = "" if loaded else '<p class="soft">As recorded. Loads at your first Run.</p>'
    return (f'<section class="side"><h2>Model</h2><p class="name">{esc(name)}</p>'
            f'<dl class="facts">{"".join(rows)}</dl>{state}</section>')


def status(text: str, fraction: float | None = None, busy: bool = False) -> str:
    """The line under the buttons. Read out politely by screen readers."""
    width = f"{min(max(fraction, 0.0), 1.0) * 100:.1f}%" if fraction is not None else "0%"
    shown = "" if fraction is None else f' data-on="1" style="--done:{width}"'
    state = " busy" if busy else ""
    return (f'<div class="status{state}" role="status" aria-live="polite"><span>{esc(text)}</span>'
            f'<div class="bar"{shown}><i></i></div></div>')


def banner(text: str) -> str:
    """A one-line notice above the results."""
    return f'<div class="banner">{text and esc(text)}</div>' if text else ""


def error(sentence: str) -> str:
    """A failure in one sentence, in place of a traceback."""
    return f'<div class="errorcard" role="alert"><b>That did not work.</b> <span>{esc(sentence)}</span></div>'


def empty(sentence: str, action: str = "", target: str = "") -> str:
    """An empty panel with one thing to do. `target` is the tab the action opens."""
    button = f'<button type="button" data-tab="{esc(target)}">{esc(action)}</button>' if action else ""
    return f'<div class="empty"><p>{esc(sentence)}</p>{button}</div>'


def header(model: str, run: str) -> str:
    """Brand on the left, chips on the right."""
    chips = "".join(f'<span class="chip">{esc(text)}</span>' for text in (model, run) if text)
    toggle = ('<button type="button" class="quiet" data-theme aria-label="switch between light and dark" '
              'title="light or dark">◐</button>')
    return f'<div class="top"><b class="brand">Attention Lab</b><span class="sp"></span>{chips}{toggle}</div>'
