"""What an open run and a loaded model can tell a diagnostic: the Session that lab.inspect.diagnostics asks for."""
from __future__ import annotations

from typing import Any

from lab.errors import LabError

from .controller import Lab
from .opened import OpenRun

OF_MODEL = {"hidden", "values", "attention_out", "mlp_out", "embedding", "probe"}
MOST_TOKENS = 2048  # the probe reads whole T x T weights of a layer


def of_model(needs: tuple[str, ...]) -> bool:
    """True when a diagnostic needs more than the run itself."""
    return bool(OF_MODEL & set(needs))


def session(lab: Lab, run: OpenRun, letter: str, needs: tuple[str, ...], words: str = "") -> Any:
    """A Session of one variant. Raises LabError when the model is another one or the run is too long for it."""
    from lab.inspect.diagnostics import Session

    prompt = run.record.get("prompt") or {}
    layers, variant = run.layers(letter), run.variant(letter)
    captures = [run.capture(letter, n) for n in layers]
    ids = [*(prompt.get("token_ids") or []), *(variant.get("token_ids") or [])]
    fed = captures[0].tokens if captures else max(1, len(ids) - 1)
    before = len(prompt.get("token_ids") or [])
    logprobs = [float("nan")] * before + [t.get("logprob") if t.get("logprob") is not None else float("nan")
                                          for t in variant.get("tokens") or []]
    told: dict[str, Any] = {"captures": captures or None, "prompt_tokens": before, "marked": marked(run, letter, words)}
    if not of_model(needs):
        return Session(token_ids=ids[:fed], logprobs=logprobs, **told)
    if not lab.loaded:
        raise LabError("This diagnostic reads the model itself, and none is loaded",
                       fix=f"Load {(run.record.get('model') or {}).get('id') or 'the model of this run'}: press Run in Compare once")
    if not lab.replayable(run):
        raise LabError(f"This run was made with {(run.record.get('model') or {}).get('id')}, and another model is loaded",
                       fix="Start the lab with that model")
    if fed > MOST_TOKENS:
        raise LabError(f"This run has {fed:,} tokens", f"Diagnostics that feed the model again read at most {MOST_TOKENS:,}",
                       "Make a shorter run")
    from lab.inspect.diagnostics.probe import ModelProbe

    found = ModelProbe(lab.ensure_model().model).session(ids[:fed], **told)
    if found.values and captures and len(found.values) != len(captures):
        found.values = [found.values[n] for n in layers]  # a diagnostic pairs each capture with its values
    return found


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
