"""Memory is really freed: storages shrink, old ones die, and nobody holds them back (I10)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from drive import Drive
from tiny_models import llama, tokens

from lab.engine.session import Session

PROMPT = 1500
SPECS = {  # spec: (largest share of the dense bytes it may hold, after the prompt)
    "h2o(budget=0.1)": 0.13,
    "streaming_llm(budget=0.1)": 0.13,
    "snapkv(budget=0.1)": 0.15,
    "pyramidkv(budget=0.1)": 0.15,
    "int_codes(bits=4)": 0.22,
    "kivi(bits=2,group=16,residual=32)": 0.30,
    "h2o(budget=0.2)+kivi(bits=2,group=16,residual=32)": 0.10,
}


def large_tensors(least: int) -> dict[int, int]:
    """{storage address: bytes} of every live tensor of at least `least` bytes that Python can reach."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor:
            storage = x.untyped_storage()
            if storage.nbytes() >= least:
                found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_holds_what_was_dropped(spec):
    """After the prompt, all tensors alive that were not there before are the cache's own, as small as it says."""
    ids = tokens(PROMPT).tolist()
    model = llama()
    Session(model, "dense", chunk=300).prefill(ids[:10])  # whatever a first run leaves behind
    before = large_tensors(4096)
    session = Session(model, spec, chunk=300, new_tokens=4)
    session.prefill(ids)
    for t in (5, 6):
        session.step(torch.tensor([t]))
    held = session.cache.kv_bytes + session.cache.slack_bytes
    dense = (PROMPT + 2) * 3 * 2 * 16 * 2 * 4
    assert held <= SPECS[spec] * dense
    new = {p: n for p, n in large_tensors(4096).items() if p not in before}
    assert sum(new.values()) <= held + 3 * 4096, "something outside the cache keeps tensors alive"


@pytest.mark.parametrize("spec", [s for s in SPECS if "int_codes" not in s and not s.startswith("kivi")])
def test_old_storages_die_at_once(spec):
    drive = Drive(spec, PROMPT, prompt=PROMPT)
    drive.feed(PROMPT // 2)
    old = [weakref.ref(x) for part in drive.layer._parts() for x in getattr(part, "rows", part).fields.values()]
    drive.feed(PROMPT - PROMPT // 2)
    assert all(ref() is None for ref in old)


def test_decode_at_a_budget_does_not_grow():
    """H2O and StreamingLLM: bytes stay put for as long as one likes."""
    for spec in ("h2o(budget=40)", "streaming_llm(budget=40,renumber=false)", "h2o(budget=40)+int_codes(bits=4)"):
        drive = Drive(spec, 400, prompt=100)
        drive.feed(100)
        sizes = set()
        for row in range(100, 400):
            drive.feed(1)
            if row > 140:
                sizes.add(drive.layer.allocated_bytes)
        assert len(sizes) <= 3 and max(sizes) <= 1.5 * min(sizes), spec


def test_a_sliding_window_layer_stays_bounded():
    drive = Drive("dense", 1000, window=50)
    for _ in range(10):
        drive.feed(90)
    most = 0
    for _ in range(100):
        drive.feed(1)
        most = max(most, drive.layer.longest)
    assert most <= 50 + 64 and drive.layer.allocated_bytes <= 3 * (50 + 64) * 2 * 2 * 16 * 4


def test_room_for_the_whole_answer_is_made_once():
    """The dense cache of a session does not copy itself while decoding."""
    session = Session(llama(), "dense", chunk=100, new_tokens=50)
    session.prefill(tokens(300).tolist())
    layer = session.cache.lab_layers[0]
    address = layer.exact_k.rows.fields["x"].data_ptr()
    for t in range(50):
        session.step(torch.tensor([t + 2]))
    assert layer.exact_k.rows.fields["x"].data_ptr() == address
    assert session.cache.slack_bytes <= 0.1 * session.cache.kv_bytes


def test_closing_a_session_frees_its_cache():
    session = Session(llama(), "dense", chunk=None)
    session.prefill(tokens(300).tolist())
    ref = weakref.ref(session.cache.lab_layers[0].exact_k.rows.fields["x"])
    session.close()
    gc.collect()
    assert ref() is None
