"""Calibration files: whole round trip, and refusal of everything that does not belong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lab.engine.cache import LabCache
from lab.engine.learnt import SHIPPED, Calibration, file_name, find
from lab.errors import LabError
from lab.measure.calibrate import calibratable, calibrate, default_name
from lab.techniques import registry
from lab.techniques.moh import MoH
from techniques.conftest import loaded


def test_round_trip(tmp_path, calibrations):
    first = Calibration.load(calibrations / file_name("moh", "tiny-llama"))
    again = Calibration.load(first.save(tmp_path / "a" / "x.safetensors"))
    assert (again.technique, again.version, again.model, again.revision, again.settings) == (
        "moh", 1, "tiny-llama", "1", first.settings)
    assert torch.equal(first.tensors["importance"], again.tensors["importance"]) and again.note
    assert not list((tmp_path / "a").glob("*.part"))


def test_what_does_not_match_is_refused(calibrations, tmp_path):
    good = Calibration.load(calibrations / file_name("moh", "tiny-llama"))
    technique = MoH(order="importance")
    good.check(technique, "tiny-llama", "1")
    replace(good, revision="*").check(technique, "tiny-llama", "anything")
    for wrong, word in ((replace(good, model="other"), "other"), (replace(good, revision="2"), "revision 2"),
                        (replace(good, version=9), "version 9"), (replace(good, technique="aha"), "aha")):
        with pytest.raises(LabError, match=word):
            wrong.check(technique, "tiny-llama", "1")
        path = wrong.save(tmp_path / "wrong.safetensors")
        with pytest.raises(LabError, match=word):
            LabCache(loaded().model, f"moh(order=importance,calibration={path})")


def test_missing_and_broken_files_say_what_to_do(calibrations, tmp_path):
    with pytest.raises(LabError, match="no calibration file"):
        find(MoH(order="importance", calibration=str(tmp_path / "none")), loaded().model)
    (tmp_path / "bad").write_bytes(b"not a calibration")
    with pytest.raises(LabError, match="not a calibration"):
        find(MoH(order="importance", calibration=str(tmp_path / "bad")), loaded().model)
    model = loaded().model
    model.lab_facts.id, before = "unknown-model", model.lab_facts.id
    try:
        with pytest.raises(LabError, match="lab calibrate moh"):
            LabCache(model, "moh(order=importance)")
    finally:
        model.lab_facts.id = before


def test_only_what_learns_can_be_calibrated():
    with pytest.raises(LabError, match="learns nothing"):
        calibrate("h2o", loaded())
    known = registry()
    assert all(name in known and "calibrate" in known[name].slots for name in calibratable())


def test_how_much_is_measured_can_be_said():
    found = calibrate("moh", loaded(), options={"sequences": "2", "length": "20"})
    assert found.settings["sequences"] == 2 and found.settings["length"] == 20
    for wrong, word in (({"steps": "5"}, "no option"), ({"length": "x"}, "not a number")):
        with pytest.raises(LabError, match=word):
            calibrate("moh", loaded(), options=wrong)
    with pytest.raises(LabError, match="not calibrated by"):
        calibrate("zerotuning", loaded(), options={"by": "luck"})


def test_set_pairs():
    from lab.cli.calibrate import pairs

    assert pairs(["steps=5", "by = labelled"]) == {"steps": "5", "by": "labelled"}
    with pytest.raises(LabError, match="has no value"):
        pairs(["steps"])


def test_progress_is_reported():
    seen = []
    calibrate("moh", loaded(), lambda f, text: seen.append(f))
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_packed_weights_are_refused_where_gradients_are_needed():
    who = loaded()
    who.facts.weights = "int8"
    with pytest.raises(LabError, match="weights=float32"):
        calibrate("moh", who)


@pytest.mark.parametrize("name", calibratable())
def test_a_file_ships_for_the_default_model(name):
    path = SHIPPED / file_name(name, "HuggingFaceTB/SmolLM2-135M-Instruct")
    found = Calibration.load(path)
    found.check(registry()[name](), "HuggingFaceTB/SmolLM2-135M-Instruct", "any revision")
    assert all(torch.isfinite(t.float()).all() or name == "top_theta" for t in found.tensors.values())
    assert default_name(name, type("L", (), {"facts": type("F", (), {"id": found.model})})) == path.name
