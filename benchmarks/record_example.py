"""Make the recorded run that ships with the lab, with the real engine on the default model.

    python benchmarks/record_example.py

Queries and keys are kept for a few layers of the first two variants, so that the repository stays small; other layers
can be replayed once a model is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

PROMPT = (
    "The keeper of the lighthouse wrote one line each evening: the wind, the height of the sea, and what he had put "
    "away. On Monday the wind was low and he put the brass compass in the blue drawer. On Tuesday a ship passed far out "
    "and he put the amber key in the green box. On Wednesday it rained all day and he mended the net. On Thursday the "
    "lamp needed oil and he carried four cans up the stairs. On Friday nobody came, and he wrote a long letter and "
    "burned it. On Saturday he painted the door. On Sunday he rested and listened to the sea.\n\n"
    "Where did the keeper put the amber key, and what did he do on the other days?"
)
VARIANTS = ("dense", "h2o(budget=0.3)+kivi(bits=2,residual=32)", "snapkv(budget=0.3,window=16)", "streaming_llm(budget=0.3)")
LAYERS = (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
FOLDER = Path(__file__).resolve().parent.parent / "assets" / "recorded"


def main() -> None:
    from lab.engine.events import Failed
    from lab.measure import record
    from lab.measure.experiment import Experiment
    from lab.measure.request import RunRequest
    from lab.models import load

    record.CAPTURE_LIMIT = 2**30  # every layer is captured, the few below are kept
    loaded = load("default", device="cpu")
    request = RunRequest(PROMPT, VARIANTS, max_new_tokens=72, timing="clean", chat=True, name="Recorded example")
    experiment = Experiment(loaded, request)
    for event in experiment.events():
        if isinstance(event, Failed):
            raise SystemExit(event.message)
    kept = {
        name: array for name, array in experiment.arrays.items()
        if not name.startswith("qk/") or (name.split("/")[1] in "AB" and int(name.split("/")[2]) in LAYERS)
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "run.json").write_text(json.dumps(experiment.record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(FOLDER / "arrays.npz", **kept)
    for v in experiment.record["variants"]:
        print(v["letter"], v["spec"], "|", v["text"].replace("\n", " / "), "|", v["kl_mean"], v["kv_bytes"], v["tpot_ms"])
    print(sum(f.stat().st_size for f in FOLDER.iterdir()) / 2**20, "MiB in", FOLDER)


if __name__ == "__main__":
    main()
