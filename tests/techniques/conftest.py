"""Calibrations of the tiny model, learnt once per test run, so that techniques that need one can be tested."""

from __future__ import annotations

import os
from contextlib import suppress
from types import SimpleNamespace

import pytest

import tiny_models
from lab.engine.attach import attach

# How much less is measured than a real model needs: tests ask what is learnt, not how finely.
LESS = {
    "focus_directions": {"steps": "100"},
    "minference": {"sequences": "2", "length": "384"},
    "top_theta": {"sequences": "2", "length": "640"},  # still longer than its largest k
}


def loaded():
    """The tiny model as the loader would hand it over, without a tokenizer."""
    model = attach(tiny_models.llama())
    facts = SimpleNamespace(id="tiny-llama", revision="1", weights="float32")
    model.lab_facts = facts
    return SimpleNamespace(model=model, tokenizer=None, facts=facts)


@pytest.fixture(scope="session")
def calibrations(tmp_path_factory):
    """A folder that LAB_CALIBRATION points to, with a file for every technique that learns; later processes use it too."""
    from lab.measure.calibrate import calibratable, calibrate, default_name

    folder, several = tmp_path_factory.mktemp("calibration"), "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp().parent / "calibration"  # of all processes of one run
    if several and shared.exists():
        folder = shared
    else:
        who = loaded()
        for name in calibratable():
            calibrate(name, who, options=LESS.get(name)).save(folder / default_name(name, who))
        if several:
            with suppress(OSError):  # another process was as quick
                folder = folder.rename(shared)
    before = os.environ.get("LAB_CALIBRATION")
    os.environ["LAB_CALIBRATION"] = str(folder)
    yield folder
    if before is None:
        os.environ.pop("LAB_CALIBRATION", None)
    else:
        os.environ["LAB_CALIBRATION"] = before
