"""The hub, played by a small server on this machine, in processes of their own (its address is read at import)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from lab.models import hub

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Just enough of huggingface.co: repository listings, and files with their headers."""

    repos: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repos:
            self.listing("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve" and parts[4] in self.repos.get("/".join(parts[:2]), {}):
            self.file(self.repos["/".join(parts[:2])][parts[4]])
        elif "gated" in path:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def listing(self, repo: str, rest: list[str]) -> None:
        files = self.repos[repo]
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for name, data in files.items()]
            self.send(200, json.dumps(entries).encode())
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        content = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "downloads": 0, "tags": [],
                   "siblings": siblings}
        self.send(200, json.dumps(content).encode())

    def file(self, data: bytes) -> None:
        self.send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT,
                              "Accept-Ranges": "bytes"})

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[str]:
    files = {item.name: item.read_bytes() for item in tiny_folder.iterdir()}
    pickled = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    Hub.repos = {
        "someone/tiny": {**files, "pytorch_model.bin": b"\x80\x04.", "modeling_own.py": b"raise SystemExit"},
        "someone/pickled": {**pickled, "pytorch_model.bin": b"\x80\x04."},
        "someone/ggufs": {"model.gguf": b"GGUF"},
        "someone/empty": {"README.md": b"hello"},
    }
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()


def run(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` with empty caches and patience for a slow machine; LabErrors print as sentences."""
    wrapped = ("from lab.errors import LabError\nfrom lab.models import hub\nhub.ANSWER_SECONDS = 120.0\n"
               f"try:\n    {code}\nexcept LabError as error:\n    print(error)")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LAB_"))}
    return subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, cwd=ROOT, timeout=600,
        env={**clean, "HF_HOME": str(tmp_path / "hf"), "LAB_CACHE": str(tmp_path / "lab"), **environment})


def test_a_hub_model_loads_and_loads_again_offline(server: str, tmp_path: Path) -> None:
    code = ("from lab.models import load; told = []; "
            "m = load('someone/tiny', device='cpu', progress=lambda f, t: told.append((f, t))); "
            "print(m.facts.id, m.facts.revision, m.facts.layers, any(' MB' in t for _, t in told), "
            "max(f for f, _ in told))")
    Hub.asked.clear()
    first = run(code, tmp_path, HF_ENDPOINT=server)
    assert first.stdout.strip() == f"someone/tiny {COMMIT} 2 True 1.0", first.stderr
    fetched = {line.rsplit("/", 1)[1] for line in Hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert "model.safetensors" in fetched and not fetched & {"pytorch_model.bin", "modeling_own.py"}
    again = run(code, tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout.startswith(f"someone/tiny {COMMIT} 2"), again.stderr


def test_repositories_that_cannot_be_used(server: str, tmp_path: Path) -> None:
    reasons = {
        "someone/pickled": "holds only pickled weights, which can run code",
        "someone/ggufs": "holds only GGUF files",
        "someone/empty": "holds no model weights",
        "someone/nothing": "There is no model named someone/nothing",
        "someone/gated": "is gated",
    }
    code = (f"from lab.models.sources import locate\n    for repo in {list(reasons)}:\n        try: locate(repo)\n"
            "        except LabError as error: print(error)")
    done = run(code, tmp_path, HF_ENDPOINT=server)
    lines = done.stdout.splitlines()
    assert len(lines) == len(reasons), done.stderr
    assert all(reason in line for line, reason in zip(lines, reasons.values(), strict=True)), lines


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    code = "from lab.models.sources import locate; locate('Qwen/Qwen3-0.6B')"
    done = run(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "huggingface.co does not answer" in done.stdout and "`default`" in done.stdout, done.stderr
    done = run(code, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids fetching it" in done.stdout, done.stderr


def test_a_silent_hub_is_given_up_on() -> None:
    answer, heard = threading.Event(), threading.Event()
    with pytest.raises(TimeoutError):
        hub._within(0.05, lambda: answer.wait(600) and heard.set())
    assert not heard.is_set(), "it was given up on before it answered"
    answer.set()
    with pytest.raises(ZeroDivisionError):
        hub._within(600, lambda: 1 / 0)
    assert hub._within(600, lambda: 7) == 7


@pytest.mark.parametrize("text, wanted", [
    ("gpt2", True), ("Qwen/Qwen3-0.6B", True), ("a/b/c", False), ("../x", False), ("/abs", False), ("~/x", False),
    ("a b", False), ("a--b/c", False), ("", False), (".hidden", False),
])
def test_what_looks_like_a_hub_id(text: str, wanted: bool) -> None:
    assert hub.is_id(text) is wanted
