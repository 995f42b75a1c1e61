"""Models from huggingface.co: what is already here, and what can be fetched, safetensors only."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lab.errors import LabError
from lab.models.places import Progress, nothing

ANSWER_SECONDS = 5.0

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MEGABYTE = 1_000_000

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """A model's files on this disk and the commit they belong to."""

    folder: Path
    revision: str


class Unreachable(LabError):
    """The hub did not answer in time, or this process is set to stay offline."""


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of a hub id: ``name`` or ``owner/name``."""
    return bool(_ID.fullmatch(text)) and ".." not in text and "--" not in text


def local_snapshot(repo: str) -> Snapshot | None:
    """The complete snapshot of ``repo`` in the Hugging Face cache, or None; never touches the network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=_WANTED))
    except (OSError, ValueError):
        return None
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return Snapshot(folder, folder.name) if whole else None


def fetch(repo: str, progress: Progress = nothing) -> Snapshot:
    """Download ``repo``'s safetensors, config and tokenizer, unless a complete copy is on this disk already.

    A copy that is here is used without asking, so that a model stays the one that earlier runs recorded; deleting it
    from the Hugging Face cache fetches the newest.

    Raises:
        Unreachable: no answer within ``ANSWER_SECONDS``.
        LabError: no such model, a gated one, or one without safetensors weights.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    found = local_snapshot(repo)
    if found is not None:
        return found
    progress(0.0, f"Asking huggingface.co for {repo}")
    try:
        info = _within(ANSWER_SECONDS, lambda: HfApi().model_info(repo, timeout=ANSWER_SECONDS, files_metadata=True))
    except errors.GatedRepoError as error:
        raise LabError(f"The model {repo} is gated: its owner asks for an agreement first",
                       fix="Accept it on huggingface.co and set HF_TOKEN, or choose an open model") from error
    except errors.RepositoryNotFoundError as error:
        raise _unknown(repo) from error
    except errors.HFValidationError as error:
        raise _unknown(repo) from error
    except Exception as error:  # the transport's own classes differ between huggingface_hub versions
        raise _no_answer(repo, error) from error
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    _refuse_unsafe(repo, sizes)
    wanted = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".json", ".model")))
    try:
        folder = Path(snapshot_download(repo, allow_patterns=_WANTED, tqdm_class=_bar(repo, wanted, progress)))
    except Exception as error:
        raise LabError(f"The download of {repo} broke off: {_first_line(error)}",
                       fix="Try again; what has arrived is kept and the rest is fetched") from error
    return Snapshot(folder, folder.name)


def _refuse_unsafe(repo: str, files: dict[str, int]) -> None:
    """Refuse repositories whose weights could run code, or that hold no weights this lab reads."""
    if any(name.endswith(".safetensors") and "/" not in name for name in files):
        return
    if any(name.endswith(".gguf") for name in files):
        raise LabError(f"{repo} holds only GGUF files", "A repository with safetensors weights was expected",
                       "Download one of its .gguf files and give that file's path")
    if any(name.endswith(_PICKLES) for name in files):
        raise LabError(f"{repo} holds only pickled weights, which can run code when they are opened",
                       "Only safetensors and GGUF weights are read",
                       "Choose a model that is published as safetensors")
    raise LabError(f"{repo} holds no model weights", "A repository with safetensors weights was expected")


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run ``work`` but give up after ``seconds``, even where name resolution hangs."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["value"] = work()
        except BaseException as error:  # handed to the caller's thread
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="hub-answer")
    thread.start()
    thread.join(seconds)
    if "error" in box:
        raise box["error"]
    if "value" not in box:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return box["value"]


def _bar(repo: str, total: int, progress: Progress) -> type:
    """A tqdm class that reports received bytes to ``progress`` and prints nothing."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            self.received = 0
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes and total:
                self.received += int(n or 0)
                progress(self.received / total, f"Fetching {repo}: {self.received / _MEGABYTE:.0f} of "
                                                f"{total / _MEGABYTE:.0f} MB")
            return super().update(n)

    return Bar


def _unknown(repo: str) -> LabError:
    return LabError(f"There is no model named {repo} on huggingface.co that this machine may read",
                    "A hub id such as Qwen/Qwen2.5-0.5B-Instruct, a folder, a .gguf file or `default` was expected",
                    "Check the spelling; private models need HF_TOKEN")


def _no_answer(repo: str, error: Exception) -> Unreachable:
    import huggingface_hub.constants as constants

    if constants.HF_HUB_OFFLINE:
        return Unreachable(f"The model {repo} is not on this machine and HF_HUB_OFFLINE forbids fetching it",
                           fix="Unset HF_HUB_OFFLINE, or give a folder, a .gguf file or `default`")
    return Unreachable(
        f"The model {repo} is not on this machine and huggingface.co does not answer ({_first_line(error)})",
        fix="Connect to the network, or give a folder, a .gguf file or `default`")


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return re.sub(r"\[Errno -?\d+\]\s*", "", line)
