"""The recorded run that ships with the lab, so that every tab is full before any model is loaded.

`python -m lab.ui.recorded [FOLDER]` makes it afresh with the real engine; run it on a machine that does nothing else.
`python -m lab.ui.recorded --look` only computes anew what is shown beside it: heads and diagnostics, no times.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from typing import Any

import numpy as np

from .opened import OpenRun

SHIPPED = ("sinks", "shapes", "massive", "head_importance", "hallucination", "subspace")  # diagnostics of A
LAYERS = (2, 15, 27)  # enough to look around in; all layers would weigh ten times as much
VARIANTS = ("dense", "snapkv(budget=0.4)+kivi(bits=4,residual=32)", "streaming_llm(budget=0.4)")
PROMPT = (
    "The keeper wrote one line each evening: the wind, the height of the sea, and which of the nine boxes had been opened. "
    "Box six held a coil of rope. Box seven held the amber key. Box eight held a white stone with a hole through it. "
    "On the third night the lamp went out, and the log says only that the door was left open and that somebody had "
    "walked up the stair and down again without a light.\n\n"
    "In spring the boxes were carried down one by one and set in a row on the grass. Nobody counted them. The rope was "
    "used for a boat, the white stone was given to a child, and the amber key was hung on a nail beside the door, where "
    "it stayed for eleven years. The keeper's successor wrote longer lines. He noted ships, birds, the price of oil and "
    "the names of those who came to ask about the night without a lamp. He never answered them, but he kept a list of "
    "their questions, and at the end of each month he read the list aloud to the sea.\n\n"
    "When the archive took the log, the letters and the drawing of the lamp, it asked for the key as well, because the "
    "key opens the last box.\n\nWhich box held the amber key, and what happened to the key afterwards? Answer in two sentences."
)

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "recorded"


def load(folder: Path = FOLDER) -> OpenRun | None:
    """The recorded run, or None when the folder holds none. It was made by the engine, never by hand."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    arrays = {}
    if (folder / "arrays.npz").is_file():
        with np.load(folder / "arrays.npz", allow_pickle=False) as packed:
            arrays = {name: packed[name] for name in packed.files}
    return OpenRun(record, arrays, recorded=True)


def say(fraction: float, text: str) -> None:
    """Progress on the command line."""
    print(f"{fraction:4.0%} {text}", flush=True)


def _lab() -> Any:
    from .controller import Lab
    from .library import StoreLibrary

    return Lab(StoreLibrary.memory())


def looks(lab: Any, record: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """What is computed from the example and ships with it: every head of every layer, and a few diagnostics of A.

    Queries and keys of all layers are captured for it and not kept.
    """
    from lab.inspect.diagnostics import registry
    from lab.inspect.diagnostics import run as compute
    from lab.measure.replay import replay

    from . import diagnostics, grid, kept
    from .sessions import session
    from .tasks import Told

    out: dict[str, Any] = {}
    for variant in record["variants"]:
        letter = variant["letter"]
        say(0.0, f"looking at every head of {letter}")
        whole = OpenRun(record, {**arrays, **replay(lab.ensure_model(), record, letter)})
        grid.draw(lab, whole, letter, whole.layers(letter), Told())
        for name in SHIPPED if letter == "A" else ():
            say(0.0, f"computing {name}")
            found = compute(name, session(lab, whole, letter, registry()[name]), lambda fraction: None)
            about = {"given": {}, "layers": whole.layers(letter), "read": None}
            whole.remember(diagnostics.name_of(letter, name), about, found)
        out |= {name: array for name, array in whole.arrays.items() if name.startswith(kept.PREFIX)}
    return out


def look_again(folder: Path = FOLDER) -> Path:
    """Compute anew what ships with the example, without running it again."""
    run = load(folder)
    if run is None:
        raise SystemExit("There is no recorded example; make one first")
    own = {name: array for name, array in run.arrays.items() if not name.startswith("look/")}
    np.savez_compressed(folder / "arrays.npz", **own, **looks(_lab(), run.record, own))
    return folder


def make(folder: Path = FOLDER) -> Path:
    """Run the example on the default model and write run.json and arrays.npz. Raises LabError as a run does."""
    from lab.measure.experiment import Experiment
    from lab.measure.replay import replay
    from lab.measure.request import RunRequest

    lab = _lab()
    loaded = lab.ensure_model(say)
    experiment = Experiment(loaded, RunRequest(PROMPT, VARIANTS, 64, timing="clean", chat=True, capture=False,
                                               name="The lighthouse log"))
    for _ in experiment.events():
        pass
    arrays: dict[str, Any] = dict(experiment.arrays)
    for variant in experiment.record["variants"]:
        say(0.0, f"capturing {variant['letter']}")
        arrays.update(replay(loaded, experiment.record, variant["letter"], layers=set(LAYERS)))
    arrays.update(looks(lab, experiment.record, arrays))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(experiment.record, ensure_ascii=False, separators=(",", ":"))
    (folder / "run.json").write_text(text, encoding="utf-8")
    np.savez_compressed(folder / "arrays.npz", **arrays)
    return folder


if __name__ == "__main__":
    if sys.argv[1:] == ["--look"]:
        print(look_again())
    else:
        print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
