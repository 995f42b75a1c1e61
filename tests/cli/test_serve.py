"""Starting the browser app: the options of `app.py` and of `serve`, and a port that cannot be had."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lab.cli
from lab.cli import main, serve

ROOT = Path(__file__).resolve().parents[2]


def app(*arguments):
    return subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_app_py_shows_its_options_and_refuses_misspelt_ones():
    shown = app("--help")
    assert shown.returncode == 0 and all(word in shown.stdout for word in ("--port", "--host", "--db", "--model", "--weights"))
    wrong = app("--prot", "7860")
    assert wrong.returncode == 2 and "unrecognized arguments: --prot 7860" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("start", [lambda *a: lab.cli.app(list(a)), lambda *a: main(["serve", *a])], ids=["app.py", "serve"])
def test_both_ways_to_start_take_the_same_options(start, monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "act", lambda args: seen.append(vars(args)))
    assert start() == 0 and start("--port", "7999", "--db", "x.duckdb", "--weights", "int8") == 0
    plain, set_ = seen
    assert plain["port"] is None and plain["db"] is None and plain["model"] == "default"
    assert set_["port"] == 7999 and set_["db"] == Path("x.duckdb") and set_["weights"] == "int8"


def test_a_misspelt_option_is_told_with_the_verbs_own_usage(capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "--prompt", "abc", "--varient", "dense"])
    told = capsys.readouterr().err
    assert left.value.code == 2 and "usage: python -m lab run" in told and "unrecognized arguments: --varient dense" in told


def test_a_port_that_cannot_be_had_is_told_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lab.ui.app", None)  # importing it would fail
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
        assert f"Port {port} is in use" in capsys.readouterr().err
    assert main(["serve", "--port", "99999"]) == 2 and "from 1 to 65535" in capsys.readouterr().err
    assert main(["serve", "--host", "192.0.2.1"]) == 2 and "no address of this machine" in capsys.readouterr().err
