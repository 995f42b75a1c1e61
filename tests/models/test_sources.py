"""What a user may name, and the sentence for what cannot be loaded."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.models import load, places
from lab.models.sources import locate


def test_a_folder_is_found_and_marked_by_its_contents(tiny_folder: Path, tmp_path: Path) -> None:
    first = locate(str(tiny_folder))
    assert (first.folder, first.id, first.source) == (tiny_folder, "tiny-llama", str(tiny_folder))
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert locate(str(copy)).key != first.key


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pkl", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(LabError, match="can run code") as caught:
            load(str(source))
        assert "safetensors" in str(caught.value)


def test_a_pickle_is_refused_by_name_even_where_it_does_not_exist() -> None:
    with pytest.raises(LabError, match="pickle checkpoint"):
        load("/nowhere/pytorch_model.bin")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no config.json"):
        load(str(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(LabError, match="Give the file itself"):
        load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LabError, match="adapter, not a model"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LabError, match=r"no \*.safetensors"):
        load(str(tmp_path))


def test_files_of_the_wrong_kind(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(LabError, match="holds weights only"):
        load(str(tiny_folder / "model.safetensors"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(LabError, match="unknown kind"):
        load(str(tmp_path / "notes.txt"))
    with pytest.raises(LabError, match="There is no file"):
        load(str(tmp_path / "gone.gguf"))
    with pytest.raises(LabError, match="not a hub id"):
        load("/no/such/folder")
    with pytest.raises(LabError, match="No model was named"):
        load("  ")


def test_near_names_are_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.models import hub

    def silent(repo: str, progress: object) -> None:
        raise hub.Unreachable("huggingface.co does not answer")

    monkeypatch.setattr(hub, "fetch", silent)
    with pytest.raises(LabError, match="Did you mean default?"):
        load("defualt")
    with pytest.raises(LabError, match="Did you mean gemma3-270m?"):
        load("gemma3-270")


def test_a_config_that_asks_for_its_own_code_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "own-code")
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="surprise", auto_map={"AutoConfig": "surprise.Config", "AutoModelForCausalLM": "surprise.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "surprise.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(LabError, match="never runs"):
        load(str(folder))
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LabError, match="does not know"):
        load(str(folder))
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(LabError, match="could not be read"):
        load(str(folder))


def test_damaged_and_incomplete_weights_are_refused(tiny_folder: Path, tmp_path: Path, own_cache: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(LabError, match="could not be loaded"):
        load(str(folder), device="cpu")
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(LabError, match="damaged"):
        load(str(folder), device="cpu")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LabError, match="incomplete: model.layers.1.mlp.up_proj.weight is missing"):
        load(str(folder), device="cpu")


def test_a_folder_without_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, folder)
    with pytest.raises(LabError, match="tokenizer of mute"):
        load(str(folder), device="cpu")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(own_cache: Path) -> None:
    target = own_cache / "models" / "x"
    with pytest.raises(LabError, match="LAB_CACHE"), places.building(target) as folder:
        (folder / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(target.parent.iterdir()) == []


def test_what_a_killed_process_left_is_swept(own_cache: Path) -> None:
    target = own_cache / "models" / "x"
    left = target.parent / ".x-12345"
    (left / "scratch").mkdir(parents=True)
    (left / "scratch" / "half.whl").write_bytes(b"1" * 100)
    with places.locked("x"), places.building(target) as folder:
        with places.scratch(folder) as spare:
            (spare / "wheel").write_text("x")
        (folder / "kept").write_text("x")
    assert [item.name for item in target.parent.iterdir()] == ["x"]
    assert [item.name for item in target.iterdir()] == ["kept"]


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(LabError, match="could not be written"), places.locked("x"):
        pass


def _build(cache: str, number: int, queue: multiprocessing.Queue) -> None:
    import os
    import time

    os.environ["LAB_CACHE"] = cache
    target = Path(cache) / "models" / "shared"
    with places.locked("shared"):
        if not target.exists():
            with places.building(target) as folder:
                for piece in range(20):
                    (folder / f"{piece}").write_text(str(number))
                    time.sleep(0.005)
    queue.put({item.read_text() for item in target.iterdir()})


def test_processes_that_build_at_once_see_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(str(tmp_path), number, queue)) for number in range(4)]
    for worker in workers:
        worker.start()
    seen = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(len(found) == 1 for found in seen) and len(set(map(frozenset, seen))) == 1
    assert len(list((tmp_path / "models" / "shared").iterdir())) == 20


def test_progress_of_a_part_is_a_part_of_progress() -> None:
    heard: list[tuple[float, str]] = []
    inner = places.part(places.part(lambda fraction, text: heard.append((fraction, text)), 0.5, 1.0), 0.0, 0.5)
    for fraction in (0.0, 1.0, 7.0):
        inner(fraction, "x")
    assert heard == [(0.5, "x"), (0.75, "x"), (0.75, "x")]
