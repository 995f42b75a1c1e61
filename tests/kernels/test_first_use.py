"""A use is new until it is noted, under one set of sources, on one card."""

from pathlib import Path

import pytest
import torch

from kernels import first_use


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setattr(first_use, "has_triton", lambda: True)
    monkeypatch.setattr(first_use, "_sources", lambda: "the kernels' sources")
    monkeypatch.setattr(first_use, "_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_a_use_is_new_once(card, monkeypatch):
    assert first_use.is_first("dense", card) and first_use.is_first("h2o", card)
    first_use.note("dense", card)
    assert not first_use.is_first("dense", card) and first_use.is_first("h2o", card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert first_use.is_first("dense", card)


def test_a_folder_that_cannot_be_written_is_no_error(card, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(first_use, "_folder", lambda: tmp_path / "file" / "cache")
    first_use.note("dense", card)
    assert first_use.is_first("dense", card)


def test_nothing_compiles_on_a_cpu():
    assert not first_use.is_first("dense", torch.device("cpu"))
    first_use.note("dense", torch.device("cpu"))


def test_the_folder_is_tritons():
    pytest.importorskip("triton")
    assert isinstance(first_use._folder(), Path) and len(first_use._sources()) == 64
