"""What an open run, a loaded model and a person's own words can tell a diagnostic: the Session of lab.inspect.diagnostics."""
from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from lab.errors import LabError

from .controller import Lab
from .opened import OpenRun

OF_MODEL = {"hidden", "values", "attention_out", "mlp_out", "embedding", "probe"}
MOST_TOKENS = 2048  # the probe reads whole T x T weights of a layer
MOST_TEXT = 40_000  # characters of documents or prompts
ALONE = {"lists", "prompts"}  # what a person gives stands for the run's own text


def of_model(needs: tuple[str, ...]) -> bool:
    """True when a diagnostic needs more than the run itself."""
    return bool(OF_MODEL & set(needs))


def session(lab: Lab, run: OpenRun, letter: str, declared: Any, given: dict[str, str] | None = None) -> Any:
    """A Session of one variant for a declared diagnostic, with what a person gave to it.

    Diagnostics that feed the model again read the run's first tokens where it is long; `read_of` says how many. Raises
    LabError when the model is another one, or for what was given and makes no sense.
    """
    from lab.inspect.diagnostics import Session
    from lab.inspect.lens import trim

    layers, ids, before = run.layers(letter), _ids(run, letter), len((run.record.get("prompt") or {}).get("token_ids") or [])
    captures = [run.capture(letter, n) for n in layers]
    fed = captures[0].tokens if captures else max(1, len(ids) - 1)
    told: dict[str, Any] = {"captures": captures or None, "prompt_tokens": before}
    told |= heard(lab, run, letter, declared, given or {}, fed)
    if not of_model(declared.needs):
        return Session(token_ids=ids[:fed], logprobs=_logprobs(run, letter, before), **told)
    probe = _probe(lab, run)
    if ALONE & set(declared.needs):
        return Session(probe=probe, **told)
    read = min(fed, MOST_TOKENS)
    told["captures"] = [trim(c, read) for c in captures] or None
    if not (OF_MODEL - {"probe"}) & set(declared.needs):
        return Session(probe=probe, token_ids=ids[:fed], **told)  # it takes what it reads from the ids itself
    found = probe.session(ids[:read], **told)
    if found.values and captures and len(found.values) != len(captures):
        found.values = [found.values[n] for n in layers]  # a diagnostic pairs each capture with its values
    return replace(found, prompt_tokens=min(before, read))


def read_of(run: OpenRun, letter: str, declared: Any) -> tuple[int, int] | None:
    """(tokens read, tokens of the run) where a diagnostic reads only the first of them, else None."""
    layers, ids = run.layers(letter), _ids(run, letter)
    fed = run.capture(letter, layers[0]).tokens if layers else max(1, len(ids) - 1)
    whole = (OF_MODEL - {"probe"}) & set(declared.needs)
    return (MOST_TOKENS, fed) if whole and fed > MOST_TOKENS else None


def _ids(run: OpenRun, letter: str) -> list[int]:
    return [*((run.record.get("prompt") or {}).get("token_ids") or []), *(run.variant(letter).get("token_ids") or [])]


def _logprobs(run: OpenRun, letter: str, before: int) -> list[float]:
    told = [t.get("logprob") for t in run.variant(letter).get("tokens") or []]
    return [float("nan")] * before + [float("nan") if x is None else x for x in told]


def _probe(lab: Lab, run: OpenRun) -> Any:
    """The loaded model. Raises LabError where none is, or another than the run's."""
    from lab.inspect.diagnostics.probe import ModelProbe

    model = run.record.get("model") or {}
    made = model.get("id")
    if not lab.loaded:
        raise LabError("This diagnostic reads the model itself, and none is loaded",
                       fix=f"Load {made or 'the model of this run'}: press Run in Compare once")
    if not lab.replayable(run):
        raise LabError(f"This run was made with {made}, and another model is loaded",
                       fix=f"Load that one first, in Compare or with: python -m lab serve --model {model.get('source') or made}")
    return ModelProbe(lab.ensure_model().model)


def heard(lab: Lab, run: OpenRun, letter: str, declared: Any, given: dict[str, str], fed: int) -> dict[str, Any]:
    """Session fields from what a person gave: {options, marked, documents, lists, question, prompts}."""
    options: dict[str, Any] = {}
    told: dict[str, Any] = {"options": options}
    sets: dict[str, list[list[int]]] = {}
    for i in declared.inputs:
        text = str(given.get(i.name) or "").strip()[:MOST_TEXT]
        if i.kind == "position" and text:
            options[i.name] = position(text, fed)
        elif i.kind == "number" and text:
            options[i.name] = number(text, i)
        elif i.kind == "words":
            told["marked"] = marked(run, letter, text)
        elif i.name == "split":
            told["documents"] = paragraphs(run, text)
        elif i.kind == "documents":
            told["lists"] = [_tokens(lab, part + "\n") for part in parts_of(text or i.example)]
        elif i.kind == "prompts":
            lines = [line.strip() for line in (text or i.example).splitlines() if line.strip()]
            sets[i.label] = [_tokens(lab, line) for line in lines]
        elif i.kind == "text":
            told[i.name] = _tokens(lab, text or str(i.default or ""))
    if sets:
        told["prompts"] = sets
    weigh = run.result(f"{letter}/grid")
    if declared.name == "atlas" and weigh is not None:
        options["importance"] = _importance(weigh, run.layers(letter))
    return told


def _tokens(lab: Lab, text: str) -> list[int]:
    if not lab.loaded:
        return []  # the model is asked for in a moment, and its absence is the sentence that matters
    return list(lab.ensure_model().tokenizer(text, add_special_tokens=False)["input_ids"])


def position(text: str, fed: int) -> int:
    """A token's position as typed. Raises LabError for what is none."""
    plain = re.sub(r"[\s,]", "", text)
    if not plain.isdigit() or not 0 <= int(plain) < fed:
        raise LabError(f'"{text[:40]}" is no position in this run', f"Positions are 0 to {fed - 1:,}",
                       "Leave it empty for the last")
    return int(plain)


def number(text: str, i: Any) -> float | int:
    """A number as typed, within its bounds."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise LabError(f'"{text[:40]}" is no number', f"{i.label} is a number", "Leave it empty for the default") from None
    if (i.low is not None and value < i.low) or (i.high is not None and value > i.high) or value != value:
        bounds = f"at least {i.low:g}" if i.high is None else f"{i.low:g} to {i.high:g}"
        raise LabError(f"{i.label} is {value:g}", f"It is {bounds}", "Choose another")
    return int(value) if value.is_integer() else value


def parts_of(text: str) -> list[str]:
    """Documents: separated by blank lines, or one a line where there is no blank line."""
    split = re.split(r"\n\s*\n", text) if re.search(r"\n\s*\n", text.strip()) else text.splitlines()
    return [" ".join(part.split()) for part in split if part.strip()]


def paragraphs(run: OpenRun, separator: str = "") -> list[tuple[int, int]] | None:
    """Token ranges of the prompt's parts but the last, between blank lines or a separator; None with fewer than three."""
    tokens = list(map(str, (run.record.get("prompt") or {}).get("tokens") or []))
    text, starts = "".join(tokens), []
    at = 0
    for token in tokens:
        starts.append(at)
        at += len(token)
    pattern = re.escape(separator) if separator else r"\n\s*\n"
    cuts = [0] + [m.end() for m in re.finditer(pattern, text)]
    first = [next((n for n, s in enumerate(starts) if s >= cut), len(tokens)) for cut in cuts]
    ranges = [(a, b) for a, b in zip(first, first[1:], strict=False) if b > a]
    return ranges if len(ranges) >= 3 else None


def marked(run: OpenRun, letter: str, words: str) -> list[int] | None:
    """Positions of the prompt's tokens that belong to one of the given words; None when none is given."""
    wanted = {w.casefold() for w in words.replace(",", " ").split()}
    if not wanted:
        return None
    tokens = (run.record.get("prompt") or {}).get("tokens") or []
    found = [i for i, t in enumerate(tokens) if str(t).strip().casefold() in wanted]
    if not found:
        raise LabError("None of these words is a token of the prompt", fix="Give words as they stand in the prompt")
    return found


def _importance(kept: tuple[dict[str, Any], dict[str, Any]], layers: list[int]) -> Any:
    """[layers, heads] importance from a kept grid, NaN where it has none."""
    import numpy as np

    about, arrays = kept
    heads = int(arrays["heads"][:, 1].max()) + 1
    out = np.full((len(layers), heads), np.nan)
    column = about["measures"].index("importance") if "importance" in about["measures"] else None
    for (layer, head, _), values in zip(arrays["heads"].tolist(), arrays["values"], strict=True):
        if column is not None and layer in layers:
            out[layers.index(layer), head] = values[column]
    return out
