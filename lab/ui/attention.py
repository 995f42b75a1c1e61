"""The Attention tab: the map, the token strip, where a row looks, the heads of a layer, and the cache map."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from . import assets, export, grid, maps, tokenview
from .components import cards
from .controller import Lab, sentence
from .opened import OpenRun
from .state import Address
from .tasks import Told, gently

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
GONE = "This run is no longer open on the server. Open it again from Runs."


def value(lab: Lab, key: str | None, address: Address | None = None) -> dict[str, Any]:
    """What the component draws: which run, and the shape of each variant. Maps are asked for later."""
    run = lab.shelf.get(key)
    if run is None:
        return {"key": None, "variants": []}
    model = run.record.get("model") or {}
    prompt = len((run.record.get("prompt") or {}).get("tokens") or [])
    variants, absent = [], []
    for v in run.record.get("variants") or []:
        letter = v["letter"]
        never = not v.get("tokens") and not run.layers(letter) and not run.overview_layers(letter)
        if v.get("error") or never:
            absent.append({"letter": letter, "why": str(v.get("error") or "The run ended before this variant began.")})
            continue
        variants.append({"letter": letter, "title": v.get("title") or v.get("spec"), "layers": run.layers(letter),
                         "overview": run.overview_layers(letter),
                         "layers_total": model.get("layers") or 1, "heads": model.get("heads") or 1,
                         "kv_heads": model.get("kv_heads") or 1, "prompt": prompt, "tokens": fed(run, letter),
                         "fork": None if v.get("first_divergence") is None else prompt + int(v["first_divergence"])})
    sel, told = chosen(address or Address(), variants, absent)
    return {"key": key, "rev": time.time(), "variants": variants, "absent": absent, "sel": sel, "told": told}


def chosen(address: Address, variants: list[dict[str, Any]], absent: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What an address chooses of a run, and a sentence for each choice that the run has not; what is drawn instead is the
    page's to say."""
    sel = {"letter": address.variant, "layer": address.layer, "head": address.head, "minus": address.minus}
    wrong = {"letter" if name == "variant" else name: value for name, value in address.wrong}
    have, gone = [v["letter"] for v in variants], {v["letter"]: v["why"] for v in absent}
    told = []
    for name in ("letter", "minus"):
        named = wrong.get(name, sel[name])
        if named is not None and named not in have:
            sel[name] = None
            told.append(f"Variant {named}: " + gone.get(named, f"this run has {', '.join(have)}."))
    if sel["minus"] is not None and sel["minus"] == sel["letter"]:
        told.append(f"Variant {sel['letter']} minus itself is nothing.")
        sel["minus"] = None
    for name, words, field in (("layer", "layer", "layers_total"), ("head", "query head", "heads")):
        most = max((v[field] for v in variants), default=1)
        if name in wrong or isinstance(sel[name], int) and sel[name] >= most:
            told.append(f"{words.capitalize()} {wrong.get(name, sel[name])}: this model has {words}s 0 to {most - 1}.")
            sel[name] = None
    return sel, told if variants else []


def fed(run: OpenRun, letter: str) -> int:
    """Tokens that went through the model: what captures and cache arrays cover."""
    for layer in run.layers(letter):
        return int(run.arrays[f"qk/{letter}/{layer}/k"].shape[1])
    kept = run.arrays.get(f"cache/{letter}/bits")
    if kept is not None:
        return int(kept.shape[-1])
    prompt = len((run.record.get("prompt") or {}).get("tokens") or [])
    return max(1, prompt + max(0, len(run.variant(letter).get("tokens") or []) - 1))


def functions(lab: Lab) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The component's server functions. A key that nobody can guess says which open run is meant."""

    def answer(work: Callable[[OpenRun, dict[str, Any]], dict[str, Any]], ask: dict[str, Any]) -> dict[str, Any]:
        run = lab.shelf.get(str((ask or {}).get("key")))
        if run is None:
            return {"error": GONE}
        try:
            with gently(lab):
                return work(run, ask)
        except Exception as problem:
            return {"error": asking(lab, run, sentence(problem))}

    def tile(ask: dict[str, Any]) -> dict[str, Any]:
        told = Told()

        def draw(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
            run.tasks["tile", ask.get("id")] = told
            try:
                return maps.tile(run, ask, told.progress, told.cancelled)
            finally:
                run.tasks.pop(("tile", ask.get("id")), None)
        found = answer(draw, ask)
        run = lab.shelf.get(str((ask or {}).get("key")))
        have = run.layers(str(ask.get("letter"))) if run is not None else []
        if found.get("stored"):
            found["replay"] = lab.replayable(run)
        elif "error" in found and run is not None and (not have or ask.get("over") is None and ask.get("layer") not in have):
            found["replay"], found["auto"] = lab.replayable(run), lab.replays_by_itself(run)
        return found

    def drawing(ask: dict[str, Any]) -> dict[str, Any]:
        """How far a tile is; `drop` gives it up."""
        run = lab.shelf.get(str((ask or {}).get("key")))
        told = run.tasks.get(("tile", ask.get("id"))) if run else None
        if told is not None and ask.get("drop"):
            told.cancel()
        return {"fraction": told.fraction if told else None}

    def cell(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.cell, ask)

    def row(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.row, ask)

    def largest(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.largest, ask)

    def stats(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.stats, ask)

    def cache(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.cache, ask)

    def life(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(maps.life, ask)

    def heads(ask: dict[str, Any]) -> dict[str, Any]:
        found = answer(lambda run, ask: grid.grid(lab, run, ask), ask)
        run = lab.shelf.get(str((ask or {}).get("key")))
        return {**found, "replay": run is not None and lab.loaded and lab.replayable(run)}

    def texts(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(tokenview.texts, ask)

    def attended(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda run, ask: tokenview.attention(lab, run, ask), ask)

    def exported(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda run, ask: export.follow(lab, run, ask), ask)

    def replays(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(replaying, ask)

    def tokens(ask: dict[str, Any]) -> dict[str, Any]:
        return answer(lambda run, _: {"tokens": words(run, str(ask.get("letter")))}, ask)
    return [tile, drawing, cell, row, largest, stats, cache, life, heads, texts, attended, exported, replays, tokens]


def asking(lab: Lab, run: OpenRun, told: str) -> str:
    """A failure as `sentence` tells it, which asks for the run's model only while that is not in memory."""
    return told.replace("Load the run's model and replay it", "Replay it") if lab.replays_by_itself(run) else told


def words(run: OpenRun, letter: str) -> list[str]:
    """Token texts of the prompt and of what a variant wrote, as far as they were fed."""
    generated = [str(t.get("text") or "") for t in run.variant(letter).get("tokens") or []]
    return [*map(str, (run.record.get("prompt") or {}).get("tokens") or []), *generated][: fed(run, letter)]


def build(lab: Lab) -> tuple[gr.HTML, gr.HTML]:
    """The component and its status line."""
    status = gr.HTML("", apply_default_css=False, elem_id="attstatus")
    view = gr.HTML(value(lab, "recorded"), html_template="", apply_default_css=False, elem_id="attention",
                   js_on_load=assets.script("attention", "map", "panels", "cachemap", "grid", "tokens", "attention_shell"),
                   server_functions=functions(lab))
    return view, status


class Replay(Told):
    """One variant run through the model again, in a thread of its own; every page that asks follows the same one."""

    def __init__(self, lab: Lab, run: OpenRun, letter: str, layer: int) -> None:
        super().__init__()
        self.text, self.problem = "Replaying", None
        self._thread = threading.Thread(target=self._work, args=(lab, run, letter, layer), daemon=True)
        self._thread.start()

    def _work(self, lab: Lab, run: OpenRun, letter: str, layer: int) -> None:
        try:
            lab.replay(run, letter, layer, self._report, self.cancelled)
        except Exception as problem:
            self.problem = "The replay was cancelled." if self.cancelled() else sentence(problem)

    def _report(self, fraction: float, text: str) -> None:
        self.progress(fraction)
        self.text = text

    def join(self, seconds: float) -> bool:
        """Wait a moment; True once it is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def replaying(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """How far a variant's replay is, {"fraction": None, "after"} when it is not under way; `drop` gives it up.

    `after`: the variant of this run whose replay is under way instead, or None.
    """
    task = run.tasks.get(("replay", str(ask.get("letter"))))
    if task is None or task.join(0):
        others = [name[1] for name, other in list(run.tasks.items()) if name[0] == "replay" and not other.join(0)]
        return {"fraction": None, "after": others[0] if others else None}
    if ask.get("drop"):
        task.cancel()
    return {"fraction": task.fraction, "text": task.text}


def replayer(lab: Lab) -> Any:
    """Run a saved variant through the model again to capture what was not recorded."""

    def replay(event: gr.EventData) -> Iterator[Any]:
        ask = event._data
        key, letter, layer = str(ask.get("key")), str(ask.get("letter")), int(ask.get("layer") or 0)
        run = lab.shelf.get(key)
        if run is None:
            yield gr.skip(), cards.error(GONE)
            return
        task = run.tasks.get(("replay", letter))
        if task is not None and not task.join(0):
            pass  # another page asked for the same variant: follow it
        else:
            task = run.tasks["replay", letter] = Replay(lab, run, letter, layer)
        while not task.join(0.3):
            yield gr.skip(), cards.status(f"{task.text} variant {letter} to capture its attention", task.fraction, True)
        if task.problem is not None:
            failed = [f"{key}/{letter}/{layer}", task.problem]
            yield {**value(lab, key), "replayed": True, "failed": failed}, cards.error(task.problem)
            return
        yield {**value(lab, key), "replayed": True}, ""
    return replay
