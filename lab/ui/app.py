"""The whole page: header, four tabs, and what connects them. `serve` starts it; a Space calls the same launch."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr

from lab.errors import LabError

from . import assets, attention, compare, diagnostics, memory, modelpick, runs
from .components import cards, charts, columns
from .controller import Lab, on_space, sentence
from .state import TABS, Address
from .theme import theme

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
# What feeds the model goes one after another. Each such event names the limit: Gradio reads it at an event's first press alone.
ONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# Gradio selects the first tab while the page loads; the address must not follow before it was read. Then it names the tab that
# is shown, whatever it named before.
ARRIVED = """tab => { const u = new URL(location.href), asked = u.searchParams.get('tab');
  if (asked !== null && asked !== tab) { u.searchParams.set('tab', tab); history.replaceState(null, '', u); }
  window.alArrived = true; }"""
# A tab that was chosen is a place to come back to; Back and Forward choose tabs, and are not places themselves.
TAB_ADDRESS = """() => {{ if (!window.alArrived) return; const u = new URL(location.href), back = window.alBack;
  if (back) {{ if (back === '{tab}') window.alBack = null; return; }}
  if ((u.searchParams.get('tab') || 'compare') === '{tab}') return;
  u.searchParams.set('tab', '{tab}'); history.pushState(null, '', u); }}"""
PAGE = """addEventListener('popstate', () => {
  const name = new URL(location.href).searchParams.get('tab') || 'compare';
  const t = document.querySelector(`[role=tab][data-tab-id="${name}"]`); if (t && t.ariaSelected !== 'true') {
    window.alBack = name; t.click(); } });
// Opening a run leads to Compare, unless the person has gone on to another tab meanwhile.
window.alPlace = (() => { let from = null; const now = () => document.querySelector('[role=tab][aria-selected=true]');
  return {left: () => { from = (now() || {}).dataset?.tabId; },
    compare: () => { const t = document.querySelector('[role=tab][data-tab-id="compare"]');
      if (t && now() && now().dataset.tabId === from) t.click(); from = null; return []; }}; })();
document.addEventListener('keydown', e => { // arrows go along the tabs, Enter chooses
  if (!e.target.matches || !e.target.matches('[role=tab]')) return;
  const all = [...e.target.parentNode.querySelectorAll('[role=tab]')], i = all.indexOf(e.target), n = all.length;
  const to = {ArrowRight: (i + 1) % n, ArrowLeft: (i + n - 1) % n, Home: 0, End: n - 1}[e.key];
  if (to !== undefined) { e.preventDefault(); all[to].focus(); } });
const dark = on => document.body.classList.toggle('dark', on);
try { const kept = localStorage.getItem('attention-lab-theme'); if (kept) dark(kept === 'dark'); } catch {}
document.addEventListener('click', e => {
  const b = e.target.closest && e.target.closest('button[data-tab], button[data-theme]'); if (!b) return;
  if (b.dataset.tab) { const t = document.querySelector(`[role=tab][data-tab-id="${b.dataset.tab}"]`); if (t) t.click(); return; }
  dark(!document.body.classList.contains('dark'));
  const name = document.body.classList.contains('dark') ? 'dark' : 'light';
  try { localStorage.setItem('attention-lab-theme', name); } catch {} });"""
OWNER = """() => { try { let k = localStorage.getItem('attention-lab-owner');
  if (!k) { k = [...crypto.getRandomValues(new Uint8Array(16))].map(b => b.toString(16).padStart(2, '0')).join('');
    localStorage.setItem('attention-lab-owner', k); } return k; } catch { return ''; } }"""


def build(lab: Lab | None = None) -> gr.Blocks:
    """The app as Blocks. `lab` is the controller; tests pass one without an engine."""
    lab = lab or default_lab()
    with gr.Blocks(title="Attention Lab", fill_width=True, analytics_enabled=False) as demo:
        view = gr.State("recorded" if lab.has_example else "")
        followed = gr.State("recorded" if lab.has_example else "")  # what the other tabs show
        owner = gr.Textbox("", visible="hidden", label="visitor", elem_id="owner")
        shown_tab = gr.Textbox("compare", visible="hidden", label="tab", elem_id="shown-tab")
        header = gr.HTML(header_of(lab, "recorded"), apply_default_css=False, elem_id="header", js_on_load=PAGE)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Compare", id="compare") as tab_compare:
                c = compare.build(lab)
            with gr.Tab("Attention", id="attention") as tab_attention:
                att, att_status = attention.build(lab)
                probe, probed = diagnostics.build(lab)
            with gr.Tab("Memory & speed", id="memory") as tab_memory:
                mem = memory.build(lab)
            with gr.Tab("Runs", id="runs") as tab_runs:
                table = runs.build(lab)
        for tab, name in ((tab_compare, "compare"), (tab_attention, "attention"), (tab_memory, "memory"), (tab_runs, "runs")):
            tab.select(None, None, None, js=TAB_ADDRESS.format(tab=name), **PRIVATE)
        ran = _compare_events(lab, c, view, owner)
        pick = c.pick
        # As with Run, the press is answered at once and the button rests; no later press is lost while the first one ends.
        asked = pick.load.click(modelpick.waiter(lab), None, [pick.status, pick.load], **QUIET)
        changed = asked.then(modelpick.loader(lab, lambda: header_of(lab, None)), [pick.source, pick.weights],
                             [pick.status, c.model, header, pick.load], **ONE, show_progress="hidden",
                             trigger_mode="multiple", **PRIVATE)
        changed.failure(modelpick.refused, None, [pick.status, pick.load], **QUIET)
        changed.then(compare.token_counter(lab), [c.prompt, c.settings], c.info, **QUIET)
        changed.then(lambda key: compare.banner_of(lab, lab.shelf.get(key)), view, c.banner, **QUIET)
        shown = [c.prompt, c.setup, c.settings, c.columns, c.charts, c.saved, c.banner, c.status, c.model]
        att.replay(attention.replayer(lab), None, [att, att_status], **ONE, show_progress="hidden",
                   trigger_mode="multiple", **PRIVATE)
        # What reads the run alone may go on beside a generation; what feeds the model waits for its turn. The page offers no
        # second press while one is under way; one that comes before the last answer is wholly over is answered too.
        work = diagnostics.runner(lab)
        probe.compute(work, None, probed, show_progress="hidden", trigger_mode="multiple", concurrency_limit=2, **PRIVATE)
        probe.probe(work, None, probed, show_progress="hidden", trigger_mode="multiple", **ONE, **PRIVATE)
        mem.control.pick(memory.picker(lab), followed, [mem.picked, *mem.outputs[4:]], trigger_mode="multiple", **QUIET)
        opened = [part.open(opener(lab), None, [view, *shown], trigger_mode="multiple", **QUIET)
                  for part in (table, c.unfinished)]
        for part in (table, c.saved):
            part.renamed(renamed(lab), view, [header, c.saved], trigger_mode="multiple", **QUIET)
        arrived = demo.load(None, None, owner, js=OWNER, **PRIVATE)
        told = [shown_tab, header, pick.source, pick.weights, view, tabs, att, *shown]
        looked = arrived.then(arrival(lab), owner, told, **QUIET)
        rest = [followed, header, att, *mem.outputs, table, *probed]
        now = [c.prompt, c.setup, c.settings]
        for event in opened:
            event.then(None, None, None, js="() => window.alPlace.compare()", **PRIVATE)
            event.success(None, now, None, js="(...now) => window.alDraft.replaced('The opened run', ...now)", **PRIVATE)
        for event in (ran, *opened):
            event.then(follow(lab), [view, followed, mem.picked], rest, **QUIET)
        restored = looked.then(None, now, [*now, c.unfinished], js="(...now) => window.alRun.restored(...now)", **PRIVATE)
        all_shown = restored.then(follow(lab), [view, followed, mem.picked], rest, **QUIET)
        all_shown.then(None, shown_tab, None, js=ARRIVED, **PRIVATE)
    demo.queue(default_concurrency_limit=4, max_size=32)
    return demo


def _compare_events(lab: Lab, c: compare.Parts, view: gr.State, owner: gr.Textbox) -> Any:
    outputs = [c.columns, c.status, c.run, c.stop, view, c.saved, c.model, c.banner, c.charts, c.unfinished]
    c.run.click(None, [c.prompt, c.setup, c.settings], None, js="(...now) => window.alRun.pressed(...now)", **PRIVATE)
    asked = c.run.click(compare.waiter(lab), None, [c.run, c.stop, c.status, c.unfinished], **QUIET)
    ran = asked.then(compare.runner(lab), [c.prompt, c.setup, c.settings, owner], outputs, **ONE,
                     trigger_mode="multiple", show_progress="hidden", **PRIVATE)
    ran.failure(compare.refused(lab), None, [c.run, c.stop, c.status, c.unfinished], **QUIET)
    c.stop.click(compare.stopping(lab), None, c.status, **QUIET).then(
        compare.stopper(lab), None, [c.run, c.stop, c.status, c.unfinished], **QUIET)
    now = [c.prompt, c.setup, c.settings]
    chosen = c.settings.preset(compare.apply_preset(lab), c.settings, [*now, c.status, c.banner],
                               trigger_mode="multiple", **QUIET)
    chosen.then(None, now, None, js="(...now) => window.alDraft.replaced('The preset', ...now)", **PRIVATE)
    c.unfinished.back(None, now, now, js="(...now) => window.alDraft.back(...now)", **PRIVATE)
    c.info.ready(lambda *now: (compare.token_counter(lab)(*now), cards.model_card(lab.facts(), lab.loaded)),
                 [c.prompt, c.settings], [c.info, c.model], **QUIET)
    return ran


def follow(lab: Lab) -> Any:
    """When another run is opened: header, map, figures and the marked line of the table follow."""
    def moved(key: str, before: str, picked: Any) -> tuple[Any, ...]:
        if key == before:
            return tuple(gr.skip() for _ in range(13 + len(diagnostics.empty())))
        run = lab.shelf.get(key)
        return (key, header_of(lab, key), attention.value(lab, key), *memory.draw(lab, key, picked),
                {"current": run.record.get("run_id") if run else None}, diagnostics.value(lab, key), *diagnostics.empty())
    return moved


def shown_as_saved(lab: Lab, key: str) -> tuple[Any, ...]:
    """Compare exactly as it was when the run ended."""
    run = lab.shelf.get(key)
    record = run.record if run else None
    start = compare.starting(lab, record)
    return (start["prompt"], {**start["setup"], "rev": key}, start["settings"], columns.columns(record), charts.charts(record),
            compare.saved_value(record, bool(run and run.recorded)),
            compare.banner_of(lab, run), cards.status("Opened as it was saved."), cards.model_card(lab.facts(), lab.loaded))


def opener(lab: Lab) -> Any:
    """Open a run from the table."""
    def opened(event: gr.EventData) -> tuple[Any, ...]:
        try:
            key = lab.open(str(event._data.get("run_id")), str(event._data.get("owner") or "nobody"))
        except Exception as problem:
            return (*[gr.skip()] * 8, cards.error(sentence(problem)), gr.skip())
        return (key, *shown_as_saved(lab, key))
    return opened


def renamed(lab: Lab) -> Any:
    """A run got another name: the open one is shown with its own."""
    def shown(key: str) -> tuple[Any, ...]:
        run = lab.shelf.get(key)
        saved = gr.skip() if run is None or run.recorded else compare.saved_value(run.record)
        return header_of(lab, key), saved
    return shown


def arrival(lab: Lab) -> Any:
    """A first look at the address: which run, tab, layer and head somebody linked to."""
    def arrived(owner: str, request: gr.Request) -> tuple[Any, ...]:
        address = Address.read(dict(request.query_params))
        tab = gr.Tabs(selected=address.tab) if address.tab != "compare" else gr.skip()
        nowhere = LabError(f'There is no tab "{address.unknown}"', f"The tabs are {', '.join(TABS)}", "This is Compare")
        told = cards.error(sentence(nowhere)) if address.unknown else None
        if address.run is None:
            key = "recorded" if lab.has_example else ""
            att = attention.value(lab, key, address) if address.names_view else gr.skip()
            model = cards.model_card(lab.facts(), True) if lab.loaded else gr.skip()
            banner = compare.banner_of(lab, lab.shelf.get(key))
            return (address.tab, *now(key), gr.skip(), tab, att, *[gr.skip()] * 6, banner, told or gr.skip(), model)
        try:
            key = lab.open(address.run, owner or "nobody")
        except Exception as problem:
            # told in Compare's status line, so that is the tab to see, whatever the address names
            compare_tab = gr.Tabs(selected="compare")
            return ("compare", *now("recorded"), gr.skip(), compare_tab, gr.skip(), *[gr.skip()] * 7,
                    cards.error(sentence(problem)), gr.skip())
        saved = shown_as_saved(lab, key)
        return (address.tab, *now(key), key, tab, attention.value(lab, key, address), *saved[:7], told or saved[7], saved[8])

    def now(key: str) -> tuple[str, str, str]:  # the page was built when the server started: another model may be loaded since
        return header_of(lab, key), lab.source, lab.weights
    return arrived


def header_of(lab: Lab, key: str | None) -> str:
    """Chips: the model and the open run."""
    run = lab.shelf.get(key)
    facts = lab.facts() or {}
    name = str(facts.get("id") or "").split("/")[-1]
    weights = f"{facts['weights']} weights" if facts.get("weights") else ""
    model = " · ".join(filter(None, [name, weights, str(facts.get("device") or "").upper()]))
    shown = ""
    if run is not None:
        shown = "recorded example" if run.recorded else str(run.record.get("name") or run.record.get("run_id") or "")
    return cards.header(model, shown)


def default_lab(db: str | Path | None = None, model: str = "default", device: str = "auto", dtype: str = "auto",
                weights: str = "auto") -> Lab:
    """The controller on the real engine and the saved runs. A database asked for by name is used or refused."""
    import storage

    from .library import StoreLibrary

    library = StoreLibrary(storage.Store.open(db, fallback=db is None))
    return Lab(library, source=model, device=device, dtype=dtype, weights=weights, public=on_space())


def launch_options() -> dict[str, Any]:
    """What every launch needs: theme and style, no run history, no server-side rendering, no public routes."""
    return {"theme": theme(), "css_paths": [assets.CSS], "head": assets.head(), "run_history": False, "ssr_mode": False,
            "footer_links": [], "show_error": False, "max_file_size": "256mb", "quiet": True}


def serve(port: int | None = None, *, share: bool = False, host: str | None = None, db: str | Path | None = None,
          model: str = "default", device: str = "auto", dtype: str = "auto", weights: str = "auto",
          open_browser: bool = False, lab: Lab | None = None, block: bool = True, preload: bool | None = None) -> gr.Blocks:
    """Start the browser app on `port` (None: the first free one from 7860).

    `preload` loads the model in the background (default yes, LAB_PRELOAD=0 turns it off; on a Space always unless
    turned off). With `block=False` it returns at once, for tests. Raises LabError for a database that cannot be used.
    """
    lab = lab or default_lab(db, model, device, dtype, weights)
    demo = build(lab)
    if preload if preload is not None else os.environ.get("LAB_PRELOAD", "1") != "0":
        lab.preload()
    demo.launch(server_port=port, server_name=host or ("0.0.0.0" if on_space() else None), share=share, inbrowser=open_browser,
                prevent_thread_lock=True, **launch_options())
    if block:
        print(f"Attention Lab is at {demo.share_url or demo.local_url} (Ctrl-C ends it)", flush=True)
        demo.block_thread()
    return demo
