"""From what a user names to a folder of safetensors on this disk."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path

from lab.errors import LabError
from lab.models.places import Located, Progress, building, cache_dir, locked, nothing

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_EXPECTED = "A folder with config.json and *.safetensors, a .gguf file, a hub id or `default` was expected"


def locate(source: str, progress: Progress = nothing) -> Located:
    """Resolve ``source`` (``default``, an alias, a folder, a ``.gguf`` file or a hub id) to a folder.

    Raises:
        LabError: the source names nothing that can be loaded; the sentence says why.
    """
    from lab.models import default, hub, packaged

    source = source.strip()
    if not source:
        raise LabError("No model was named", _EXPECTED)
    if source == "default":
        return default.locate(progress)
    if source in packaged.PACKAGED:
        return packaged.locate(source, progress)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), source)
    if path.is_file() or path.suffix.lower() in (".gguf", ".safetensors", *_PICKLES):
        return _file(path, source, progress)
    if not hub.is_id(source):
        raise LabError(f"There is no folder or file {source}, and it is not a hub id", _EXPECTED,
                       _near(source, ["default", *packaged.PACKAGED]))
    try:
        snapshot = hub.fetch(source, progress)
    except LabError as error:
        near = _near(source, ["default", *packaged.PACKAGED])
        if near and "/" not in source:
            raise LabError(error.what, error.expected, near) from error
        raise
    return Located(snapshot.folder, source, source, snapshot.revision)


def _folder(folder: Path, source: str) -> Located:
    """Check that ``folder`` holds a model in safetensors."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise LabError(f"The folder {folder} holds an adapter, not a model",
                           fix="Merge the adapter into its base model and give the merged folder")
        ggufs = sorted(folder.glob("*.gguf"))
        fix = f"Give the file itself: {ggufs[0]}" if ggufs else None
        raise LabError(f"The folder {folder} is no model: it has no config.json", _EXPECTED, fix)
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        return Located(folder, folder.name, source, _mark([folder / "config.json", *weights]))
    pickles = [item.name for item in sorted(folder.iterdir()) if item.suffix.lower() in _PICKLES]
    if pickles:
        raise _pickled(f"The folder {folder} holds only pickled weights ({pickles[0]})")
    raise LabError(f"The folder {folder} has a config.json but no *.safetensors weights", _EXPECTED)


def _file(path: Path, source: str, progress: Progress) -> Located:
    """A GGUF file, converted once into the cache; every other kind of file is refused."""
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise _pickled(f"{path.name} is a pickle checkpoint")
    if not path.is_file():
        raise LabError(f"There is no file {path}", _EXPECTED)
    if suffix == ".safetensors":
        raise LabError(f"{path.name} holds weights only", "The folder that also holds its config.json was expected",
                       f"Give {path.resolve().parent}")
    if suffix != ".gguf":
        raise LabError(f"{path} is a file of an unknown kind", _EXPECTED)
    return _converted(path.resolve(), source, progress)


def _converted(path: Path, source: str, progress: Progress) -> Located:
    """The folder that ``path`` was, or now is, converted into."""
    from lab.models import gguf

    gguf.read_header(path)
    mark = _mark([path])
    target = cache_dir() / "models" / f"gguf-{hashlib.sha256(f'{path}{mark}'.encode()).hexdigest()[:16]}"
    located = Located(target, path.stem, source, mark)
    if (target / "model.safetensors").is_file():
        return located
    with locked(target.name, progress):
        if not (target / "model.safetensors").is_file():
            with building(target) as folder:
                gguf.convert(path, folder, progress)
    return located


def _pickled(what: str) -> LabError:
    return LabError(f"{what}, which can run code when it is opened", "Only safetensors and GGUF weights are read",
                    "Convert it with the tool of its origin, or choose a model published as safetensors")


def _mark(files: list[Path]) -> str:
    """A mark that changes when any of ``files`` is replaced (names, sizes and times, not contents)."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return "local-" + hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _near(source: str, names: list[str]) -> str | None:
    close = difflib.get_close_matches(source.lower(), names, n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else None
