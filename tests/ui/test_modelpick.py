"""Changing the model from the page: progress, the old one kept when the new one cannot be had, none on a Space."""
from __future__ import annotations

import threading

import pytest

from lab.errors import LabError
from lab.ui import modelpick
from lab.ui.app import build

from . import fixture


class Changing(fixture.FakeLab):
    """A lab whose models are names. Loading goes on once it was `seen`."""

    def __init__(self, step_s):
        super().__init__(step_s)
        self.seen = threading.Event()

    def change_model(self, source, weights="auto", report=None):
        report(0.4, "Loading weights")
        assert self.seen.wait(600)
        if source == "nope":
            raise LabError('There is no model called "nope"', "A hub id, a folder or a .gguf file", "Check the name")
        self.source = source


@pytest.fixture
def lab():
    return Changing(step_s=0)


def test_it_tells_how_far_it_is_and_then_shows_the_new_model(lab):
    frames = []
    for frame in modelpick.loader(lab, lambda: "HEADER")(" some/model", "int8"):
        frames.append(frame)
        if "Loading weights" in str(frame[0]) and "40" in str(frame[0]):
            lab.seen.set()
    assert lab.seen.is_set() and len(frames) > 1
    assert "Loaded" in frames[-1][0] and "Model" in frames[-1][1] and frames[-1][2] == "HEADER"


def test_a_model_that_is_not_there_leaves_the_old_one(lab):
    lab.seen.set()
    last = list(modelpick.loader(lab, str)("nope", "auto"))[-1]
    assert "no model called" in last[0] and "still loaded" in last[0] and lab.source == "default"
    assert "No model was named" in next(modelpick.loader(lab, str)("  ", "auto"))[0]


def test_a_failed_change_of_the_real_controller_keeps_everything(monkeypatch):
    from lab import models
    from lab.ui.controller import Lab
    from lab.ui.library import StoreLibrary

    controller = Lab(StoreLibrary.memory())
    controller._model = before = object()

    def fails(*args, **kwargs):
        raise LabError("There is not enough memory")

    monkeypatch.setattr(models, "load", fails, raising=False)
    with pytest.raises(LabError, match="memory"):
        controller.change_model("big/model")
    assert controller._model is before and controller.source == "default"


def test_strangers_who_share_a_space_cannot_change_the_model(lab):
    lab.public = True
    shown = [c for c in build(lab).get_config_file()["components"] if c["props"].get("elem_id") == "changemodel"]
    assert shown and shown[0]["props"]["visible"] is False
