"""The Compare tab: one prompt, up to four variants, streamed beside each other by one generator."""
from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lab.errors import LabError

from . import assets, modelpick
from .components import cards, charts, columns
from .controller import Lab, Outcome, sentence
from .format import count
from .live import LiveRun
from .opened import OpenRun
from .state import MAX_PROMPT_CHARS, MOST_SAMPLES, Decoding, decoding_value

PERIOD_S = 0.08  # the columns are sent at most this often; more is not seen and costs the model's cores
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
DEFAULT = {"mode": "greedy", "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0, "max_new_tokens": 64,
           "timing": "interleaved", "samples": 1, "chat": False, "truncate": False, "preset": ""}
EXAMPLE = "Recorded example: press Run to make your own."
OVER = {"over": True}  # nothing is running any more: the page forgets what it remembered of a run
BEFORE = "Press Run for what is set above: anything below was made with other settings."


@dataclass
class Parts:
    """The components other files fill."""

    info: gr.HTML
    prompt: gr.Textbox
    setup: gr.HTML
    settings: gr.HTML
    columns: gr.HTML
    charts: gr.HTML
    banner: gr.HTML
    unfinished: gr.HTML
    saved: gr.HTML
    model: gr.HTML
    status: gr.HTML
    run: gr.Button
    stop: gr.Button
    pick: modelpick.Parts


def build(lab: Lab) -> Parts:
    """Lay out the tab; `wire` attaches the events."""
    example = lab.shelf.get("recorded")
    record = example.record if example else None
    first = starting(lab, record)
    with gr.Row(elem_id="compare", equal_height=False):
        with gr.Column(scale=0, min_width=248, elem_id="aside"):
            gr.HTML('<button type="button" class="sidetoggle" aria-expanded="false" aria-controls="aside">'
                    "Model and decoding</button>", apply_default_css=False, elem_id="sidetoggle", js_on_load=SIDE_TOGGLE)
            model = gr.HTML(cards.model_card(lab.facts(), lab.loaded), apply_default_css=False, elem_classes="sidebody")
            pick = modelpick.build(lab)
            settings = gr.HTML(first["settings"], html_template="", apply_default_css=False, elem_id="settings",
                               elem_classes="sidebody", js_on_load=assets.script("settings"))
        with gr.Column(scale=1, min_width=0, elem_id="stage"):
            with gr.Column(elem_classes="panel promptpanel", elem_id="promptpanel"):
                info = gr.HTML(token_counter(lab)(first["prompt"], first["settings"], record),
                               html_template='<div class="h">Prompt</div>', apply_default_css=False,
                               js_on_load=assets.script("prompt"))
                prompt = gr.Textbox(first["prompt"], show_label=False, label="Prompt", lines=3, max_lines=9, container=False,
                                    placeholder="Write a prompt, or choose a preset. Ctrl+Enter runs it.", elem_id="prompt",
                                    max_length=MAX_PROMPT_CHARS)
                with gr.Row(elem_classes="runrow"):
                    run = gr.Button("Run", variant="primary", elem_id="run", scale=0, min_width=76)
                    stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=76, interactive=False)
                    status = gr.HTML(cards.status("Ready"), apply_default_css=False, elem_id="status")
            unfinished = gr.HTML({}, html_template="", apply_default_css=False, elem_id="unfinished",
                                 js_on_load=assets.script("unfinished"), server_functions=[left(lab)])
            setup = gr.HTML(first["setup"], html_template="", catalog=lab.catalog(), apply_default_css=False, elem_id="setup",
                            js_on_load=assets.script("setup"), server_functions=[planner(lab)])
            banner = gr.HTML(cards.banner(EXAMPLE) if record else "", apply_default_css=False, elem_id="banner")
            results = gr.HTML(columns.columns(record), html_template="", apply_default_css=False, elem_id="columns",
                              js_on_load=assets.script("columns"))
            plots = gr.HTML(charts.charts(record), apply_default_css=False, elem_id="charts")
            saved = gr.HTML(saved_value(record, True), html_template="", apply_default_css=False, elem_id="saved",
                            js_on_load=assets.script("saved"), server_functions=savers(lab))
    for told in (prompt.change, settings.chat):
        told(token_counter(lab), [prompt, settings], info, trigger_mode="always_last", queue=False, show_progress="hidden",
             **PRIVATE)
    return Parts(info, prompt, setup, settings, results, plots, banner, unfinished, saved, model, status, run, stop, pick)


SIDE_TOGGLE = """const b = element.querySelector('button');
b.addEventListener('click', () => { const aside = document.getElementById('aside');
  const open = aside.classList.toggle('open'); b.setAttribute('aria-expanded', String(open)); });"""


def planner(lab: Lab) -> Any:
    """The setup component's question to the server: predicted bytes, conflicts, titles."""
    def plan(ask: dict[str, Any]) -> dict[str, Any]:
        return lab.plan(ask or {})
    return plan


def savers(lab: Lab) -> list[Any]:
    """Rename and export, as the saved line asks for them."""
    def rename(ask: dict[str, Any]) -> dict[str, Any]:
        try:
            lab.rename(str(ask["run_id"]), str(ask["name"]), owner_of(lab, ask))
            return {"ok": True}
        except Exception as problem:
            return {"error": sentence(problem)}

    def export(ask: dict[str, Any]) -> dict[str, Any]:
        try:
            name, kind, data = lab.library.export(str(ask["run_id"]), str(ask.get("format") or "json"), owner_of(lab, ask))
            return {"name": name, "type": kind, "data": base64.b64encode(data).decode("ascii")}
        except Exception as problem:
            return {"error": sentence(problem)}
    return [rename, export]


def left(lab: Lab) -> Any:
    """What has become of a run that a page left before its end: "going", "interrupted", "ended", or "none" that is kept."""
    def state(ask: dict[str, Any]) -> dict[str, Any]:
        run_id = str((ask or {}).get("run_id"))
        if run_id in lab.under_way():
            return {"state": "going"}
        try:
            status = lab.library.status(run_id, owner_of(lab, ask))
        except Exception:  # deleted, somebody else's, or never begun: there is nothing to open
            return {"state": "none"}
        return {"state": "interrupted" if status == "interrupted" else "ended"}
    return state


def owner_of(lab: Lab, ask: dict[str, Any]) -> str:
    """Whose runs a request may touch: everyone's on one's own machine, the visitor's own on a Space."""
    return str(ask.get("owner") or "nobody") if lab.public else ""


def token_counter(lab: Lab) -> Any:
    """Live count under the prompt's title."""
    def tokens(text: str, settings: dict[str, Any] | None = None, record: dict[str, Any] | None = None) -> dict[str, Any]:
        found = lab.count_tokens(text or "", bool((settings or {}).get("chat")))
        if found is None and record:
            found = len((record.get("prompt") or {}).get("token_ids") or [])
        limit = lab.limit()
        if found is None:
            words = count(len((text or "").split()))
            return {"tokens": None, "waiting": True, "text": f"{words} words, tokens counted once the model is loaded"}
        over = bool(limit and found > limit)
        beyond = f", the model reads {count(limit)}" if over else ""
        return {"tokens": found, "over": over, "text": f"{count(found)} tokens{beyond}"}
    return tokens


def starting(lab: Lab, record: dict[str, Any] | None) -> dict[str, Any]:
    """Prompt, variants and settings of a record, or of a first visit without one."""
    base = {**DEFAULT, "presets": [{k: p[k] for k in ("id", "title", "about")} for p in assets.presets()],
            "limits": {"max_new_tokens": lab.max_new_tokens, "samples": MOST_SAMPLES}}
    if not record:
        return {"prompt": "", "setup": {"variants": [{"techniques": []}], "rev": 0}, "settings": base}
    return {"prompt": str((record.get("prompt") or {}).get("text") or ""),
            "setup": {"variants": [{"techniques": v.get("techniques") or []} for v in record.get("variants") or []], "rev": 0},
            "settings": decoding_value(record.get("settings") or {}, base)}


def banner_of(lab: Lab, run: OpenRun | None) -> str:
    """What is to be known of the results in sight: that they are the example, or of another model than the next Run's."""
    if run is None:
        return ""
    made, now = run.record.get("model") or {}, lab.facts() or {}
    words = [EXAMPLE] if run.recorded else []
    if now and any(made.get(field) != now.get(field) for field in ("id", "dtype", "weights")):
        words.append(f"Made with {model_words(made)}. The model card, what is predicted, and Run are of {model_words(now)}.")
    return cards.banner(" ".join(words))


def model_words(facts: dict[str, Any]) -> str:
    """A model's short name and what its weights are held in."""
    return f"{str(facts.get('id') or 'a model').split('/')[-1]} ({facts.get('weights') or facts.get('dtype') or 'weights'})"


def saved_value(record: dict[str, Any] | None, example: bool = False, problem: str | None = None) -> dict[str, Any]:
    """What the saved line shows."""
    if not record:
        return {"run_id": None}
    return {"run_id": record.get("run_id"), "name": record.get("name") or "", "example": example, "problem": problem}


def apply_preset(lab: Lab) -> Any:
    """Load a preset into prompt, cards and controls."""
    def choose(current: dict[str, Any], event: gr.EventData) -> tuple[Any, ...]:
        try:
            entry = assets.preset(str(event._data.get("id") or ""))
            setup = {"variants": [lab.cards_of(spec) for spec in entry["variants"]], "rev": int(time.time() * 1000)}
            settings = {**(current or {}), **DEFAULT, **entry.get("settings", {}), "preset": entry["id"]}
            return assets.prompt_of(entry), setup, settings, cards.status("Ready"), cards.banner(BEFORE)
        except Exception as problem:
            return gr.skip(), gr.skip(), gr.skip(), cards.error(sentence(problem)), gr.skip()
    return choose


def runner(lab: Lab) -> Any:
    """The one generator behind Run. It yields every output; a closed tab or Stop ends it within a step."""

    def run(prompt: str, setup: dict[str, Any], decoding: dict[str, Any], owner: str, request: gr.Request) -> Iterator[Any]:
        visitor = visitor_of(request)
        if lab.passes(visitor):
            yield frame()
            return
        cancel = lab.begin(visitor)
        if cancel is None:
            yield frame(status=cards.status("A run is already under way; Stop ends it.", busy=True))
            return
        try:
            yield from _run(lab, prompt, setup, decoding, owner, cancel)
        except GeneratorExit:
            cancel.stop()
            raise
        except Exception as problem:
            yield frame(status=cards.error(sentence(problem)), running=False)
        finally:
            cancel.stop()
            lab.end(visitor)
    return run


def frame(*, columns: Any = None, status: Any = None, running: bool | None = None, key: Any = None, saved: Any = None,
          model: Any = None, banner: Any = None, charts: Any = None, began: str | None = None) -> tuple[Any, ...]:
    """One yield: (columns, status, run, stop, view key, saved, model, banner, charts, unfinished); what is None stays as it is.
    `began`: id of the run that the page remembers until one yield says that nothing is running any more."""
    def kept(value: Any) -> Any:
        return gr.skip() if value is None else value
    run = gr.skip() if running is None else gr.Button(interactive=not running)
    stop = gr.skip() if running is None else gr.Button(interactive=running)
    unfinished = OVER if running is False else {"run_id": began} if began else gr.skip()
    return kept(columns), kept(status), run, stop, kept(key), kept(saved), kept(model), kept(banner), kept(charts), unfinished


def _run(lab: Lab, prompt: str, setup: dict[str, Any], decoding: dict[str, Any], owner: str, cancel: Any) -> Iterator[Any]:
    if cancel.stopped:
        yield frame(status=cards.status("Stopped before it began."), running=False)
        return
    if not (prompt or "").strip():
        raise LabError("The prompt is empty", fix="Write something, or choose a preset")
    variants = (setup or {}).get("variants") or [{"techniques": []}]
    described = [describe(lab, v) for v in variants]
    settings = Decoding.read(decoding, lab.max_new_tokens).settings()
    live = LiveRun(described, prompt)
    yield frame(status=cards.status("Starting", 0.0, True), running=True)
    if not lab.loaded:
        yield from loading(lab, cancel)
        if cancel.stopped:
            yield frame(status=cards.status("Stopped."), running=False)
            return
        yield frame(model=cards.model_card(lab.facts()))
    last, outcome, begun = 0.0, None, False
    for event in lab.run(prompt, variants, settings, cancel, owner):
        if not begun:  # a request that is refused leaves the results before it in sight
            begun = True
            yield frame(columns=live.columns(), banner="", charts="", saved=saved_value(None), began=cancel.run_id)
        if isinstance(event, Outcome):
            outcome = event
            continue
        live.apply(event)
        now = time.monotonic()
        if now - last >= PERIOD_S:
            last = now
            yield frame(columns=live.columns(), status=live.status())
    if outcome is None:
        yield frame(columns=live.columns(), status=cards.status("The run ended without a result."), running=False)
        return
    key, problem = lab.keep(outcome, owner)
    record = outcome.record
    wrote = any(v.get("tokens") for v in record.get("variants") or [])
    stopped = "Stopped. What was written so far is kept." if wrote else "Stopped before anything was written."
    ends = {"cancelled": stopped, "failed": "The run failed."}
    broken = [v["letter"] for v in record.get("variants") or [] if v.get("error")]
    told = f"Done, but {' and '.join(broken)} could not run: the reason is in the column." if broken else "Done."
    text = ends.get(record.get("status"), told)
    yield frame(columns=columns.columns(record), status=cards.status(text), running=False, key=key,
                saved=saved_value(record, problem=problem), model=cards.model_card(record.get("model")),
                charts=charts.charts(record))


def loading(lab: Lab, cancel: Any) -> Iterator[Any]:
    """Load the model while the status line tells how far it is."""
    import threading

    told: dict[str, Any] = {"fraction": 0.0, "text": "Loading the model", "done": False, "problem": None}

    def report(fraction: float, text: str) -> None:
        told.update(fraction=fraction, text=text)

    def work() -> None:
        try:
            lab.ensure_model(report)
        except Exception as problem:
            told["problem"] = problem
        told["done"] = True
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not told["done"] and not cancel.stopped:
        yield frame(status=cards.status(told["text"], told["fraction"], True))
        thread.join(0.25)
    if told["problem"] is not None:
        raise told["problem"]


def describe(lab: Lab, variant: dict[str, Any]) -> dict[str, Any]:
    """Spec and title of a card. Raises LabError for what cannot run, before the model is touched."""
    stack = lab.stack(variant)
    return {"spec": stack.spec, "title": stack.title, "techniques": stack.describe()}


def waiter(lab: Lab) -> Any:
    """Run was pressed: it rests until the run is over, and whoever has to queue can still change their mind."""
    def wait(request: gr.Request) -> Any:
        before = lab.wait(visitor_of(request))
        others = "Another run is under way" if before == 1 else f"{before} runs were before yours when you pressed"
        told = cards.status(f"{others}; yours waits for its turn.", busy=True) if before else gr.skip()
        return gr.Button(interactive=False), gr.Button(interactive=True), told, {}
    return wait


def refused(lab: Lab) -> Any:
    """The queue took no more, or the run broke off outside the generator: Run can be pressed again."""
    def again(request: gr.Request) -> Any:
        lab.leave(visitor_of(request))
        told = LabError("The run could not be queued", "At most 32 visitors wait at a time", "Press Run again in a moment")
        return gr.Button(interactive=True), gr.Button(interactive=False), cards.error(sentence(told)), OVER
    return again


def visitor_of(request: gr.Request) -> str:
    """One page of one visitor."""
    return str(getattr(request, "session_hash", "") or "local")


def stopping(lab: Lab) -> Any:
    """Stop was pressed: this is shown before the job is asked to end, so that it never covers what the job says in the end."""
    def tell(request: gr.Request) -> Any:
        return cards.status("Stopping after this step", busy=True) if lab.has(visitor_of(request)) else gr.skip()
    return tell


def stopper(lab: Lab) -> Any:
    """Ask the job to end; the generator itself reports the rest. Who still queues leaves the queue, and may press Run again."""
    def stop(request: gr.Request) -> Any:
        visitor = visitor_of(request)
        if lab.unqueue(visitor):
            told = cards.status("Taken out of the queue; nothing was run.")
            return gr.Button(interactive=True), gr.Button(interactive=False), told, OVER
        told = gr.skip() if lab.stop(visitor) else cards.status("The run was over already.")
        return gr.skip(), gr.skip(), told, gr.skip()
    return stop
