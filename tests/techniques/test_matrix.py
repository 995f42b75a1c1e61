"""Any score x any budget, and any score x any code, for a few steps on a tiny model; and some of everything at once."""

from __future__ import annotations

import pytest
import torch
from drive import Drive  # noqa: F401  (puts the tests' folder on the path for tiny_models)
from tiny_models import llama, tokens

from lab.engine.session import Session
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.techniques import registry

IDS = tokens(84, seed=14).tolist()
SMALL = {"window": 6, "first": 2, "sinks": 2, "rows": 32, "residual": 16, "group": 16, "interval": 2}


def filling(slot: str) -> list[str]:
    return [n for n, t in registry().items() if slot in t.slots]


def small(name: str, **more) -> str:
    """The technique with its windows cut to what a prompt of 80 tokens can hold."""
    values = dict(more)
    for p in registry()[name].parameters():
        if p.name in SMALL and p.name not in values and p.default is not None and p.type == "int":
            if p.choices is None or SMALL[p.name] in p.choices:
                values[p.name] = SMALL[p.name]
    if name != "kivi":
        values.pop("group", None)
    return f"{name}({','.join(f'{k}={v}' for k, v in values.items())})"


def scored(name: str) -> str:
    return small(name, budget=24)


def run(spec: str) -> Session:
    session = Session(llama(), spec, chunk=40, new_tokens=4)
    session.prefill(IDS[:80])
    for t in IDS[80:]:
        out = session.step(torch.tensor([t]))
        assert torch.isfinite(out).all(), spec
    return session


def alone(slot: str, *others: str) -> list[str]:
    """Techniques that fill this slot and none of the others: what is left to combine."""
    return [n for n in filling(slot) if not set(others) & set(registry()[n].slots)]


SCORES, BUDGETS = alone("score", "allocate", "encode"), alone("allocate", "score", "encode")
CODES, MERGES = alone("encode", "score", "allocate"), alone("reduce", "score")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_score_by_budget(score, budget):
    session = run(f"{scored(score)}+{small(budget)}")
    cache, lanes = session.cache, 6
    kept = cache.policy.scorer.evicts_in_decode
    assert cache.entries <= lanes * (24 + (0 if kept else 4)) + 3


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("code", CODES)
def test_score_by_code(score, code):
    session = run(f"{scored(score)}+{small(code)}")
    assert session.cache.entries <= 6 * 28


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("score", SCORES)
def test_score_by_merge(score, merge):
    if "reduce" in registry()[score].slots:
        with pytest.raises(LabError, match="reduce slot"):
            Stack.parse(f"{score}+{merge}")
        return
    run(f"{scored(score)}+{merge}")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("code", CODES)
def test_budget_by_code(budget, code):
    spec = f"{scored('h2o')}+{small(budget)}+{small(code)}"
    if registry()[budget].sets_tiers and code in ("think",) or budget == "dwb" and code == "fp8":
        with pytest.raises(LabError, match="bits"):
            Stack.parse(spec)
        return
    run(spec)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("code", ["int_codes", "kivi", "rotated"])
def test_everything_at_once(merge, budget, code):
    run(f"{scored('h2o')}+{small(budget)}+{small(code)}+{merge}")


@pytest.mark.parametrize("slot", ["score", "allocate", "encode", "reduce"])
def test_exclusive_slots_are_refused_with_a_sentence(slot):
    a, b = filling(slot)[:2]
    with pytest.raises(LabError) as caught:
        Stack.parse(f"{a}+{b}+snapkv" if slot in ("allocate", "reduce") else f"{a}+{b}")
    text = str(caught.value)
    assert registry()[a].title in text and registry()[b].title in text and f"the {slot} slot" in text
