"""A run that goes on is kept every few seconds; a store that fails costs the checkpoints, never the run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toy

from lab.engine.events import Token
from lab.measure.experiment import Experiment
from lab.measure.keeping import kept
from lab.measure.request import RunRequest


@pytest.fixture(scope="module")
def loaded():
    return toy.loaded()


def experiment(loaded, **settings):
    return Experiment(loaded, RunRequest(toy.prompt(40), ("dense", "h2o(budget=0.5)"), max_new_tokens=10, **settings))


def test_a_checkpoint_holds_what_was_written_so_far(loaded):
    run, seen = experiment(loaded), []
    for event in kept(run, lambda record: seen.append(record), every=0.0, share=float("inf")):
        if isinstance(event, Token):
            pass
    assert len(seen) > 1 and all(record["status"] == "interrupted" for record in seen)
    lengths = [len(record["variants"][0]["token_ids"]) for record in seen]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    middle = next(r for r in seen if r["variants"][1]["token_ids"])
    variant = middle["variants"][1]
    assert variant["text"] and variant["finish"] == "interrupted" and variant["ttft_ms"] > 0
    late = seen[-1]["variants"][0]
    assert late["tpot_ms"] > 0 and late["kv_bytes"] == late["tokens"][-1]["kv_bytes"] > 0 and late["kept_fraction"] == 1
    assert run.record["status"] == "complete" and run.record["variants"][0]["finish"] == "length"


def test_a_store_takes_every_checkpoint_and_then_the_whole_run(loaded, tmp_path):
    storage = pytest.importorskip("storage", reason="duckdb is not installed", exc_type=ImportError)
    with storage.Store.open(tmp_path / "runs.duckdb") as store:
        run = experiment(loaded)
        store.begin(run.record)
        walk, tokens = kept(run, store.checkpoint, every=0.0, share=float("inf")), 0
        for event in walk:
            tokens += isinstance(event, Token)
            if tokens == 9:
                break
        walk.close()  # as if the process had been killed here
        found, _ = store.get(run.record["run_id"])
        assert found["status"] == "interrupted" and found["variants"][0]["text"] and found["variants"][0]["token_ids"]
        run = experiment(loaded)
        store.begin(run.record)
        for _ in kept(run, store.checkpoint, every=0.0, share=float("inf")):
            pass
        store.save(run.record, run.arrays)
        assert store.get(run.record["run_id"])[0]["status"] == "complete"


def test_a_failing_store_is_asked_once_and_the_run_goes_on(loaded, caplog):
    run, asked = experiment(loaded), []

    def full(record):
        asked.append(record)
        raise OSError("No space left on device")

    events = list(kept(run, full, every=0.0, share=float("inf")))
    assert len(asked) == 1 and "No space left" in caplog.text
    assert run.record["status"] == "complete" and events


def test_the_first_interrupt_ends_a_command_within_a_step_and_keeps_the_text(loaded):
    from lab.cli.run import Say, run as drive

    class Interrupting(Say):
        def progress(self, fraction, text):
            if text.startswith("token 4"):
                os.kill(os.getpid(), signal.SIGINT)

    work = experiment(loaded)
    before = signal.getsignal(signal.SIGINT)
    drive(work, Interrupting(quiet=True))
    assert work.record["status"] == "cancelled" and signal.getsignal(signal.SIGINT) is before
    assert 1 <= len(work.record["variants"][0]["token_ids"]) <= 5 and work.record["variants"][0]["text"]
