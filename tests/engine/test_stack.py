"""Stacks as text: parsing, canonical form, refusals with near names, conflicts, pipeline order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.engine.slots import PIPELINE
from lab.engine.stack import Stack, conflicts
from lab.errors import LabError
from lab.techniques import registry


@pytest.mark.parametrize("text", ["dense", " Dense ", "dense+dense"])
def test_dense_is_the_empty_stack(text):
    stack = Stack.parse(text)
    assert stack == Stack() and stack.spec == "dense" and stack.title == "Dense" and stack.fills() == {}


def test_text_is_read_in_any_order_and_written_in_pipeline_order():
    a, b = Stack.parse("kivi(bits=4) + h2o( budget = 0.5 )"), Stack.parse("h2o(budget=0.5)+kivi(bits=4)")
    assert a == b and hash(a) == hash(b) and a.spec == "h2o(budget=0.5)+kivi(bits=4)"
    assert list(a.fills()) == [s for s in PIPELINE if s in ("observe", "score", "encode")]
    assert Stack.parse("h2o(budget=0.25)").spec == "h2o"  # defaults are left out
    assert Stack.parse("H2O").spec == Stack.parse("h2o").spec and Stack.parse("head-pruning").spec == "head_pruning"
    assert a.describe()[0] == {"name": "h2o", "params": {"budget": 0.5, "recent": 0.5, "norm": False}}


@given(st.data())
@settings(max_examples=200)
def test_any_parameters_round_trip_through_text(data):
    """spec is canonical: reading it back gives the same technique, whatever the numbers."""
    cls = data.draw(st.sampled_from(list(registry().values())))
    values = {}
    for p in cls.parameters():
        if p.choices is not None:
            values[p.name] = data.draw(st.sampled_from(p.choices))
        elif p.type == "bool":
            values[p.name] = data.draw(st.booleans())
        elif p.type == "int":
            values[p.name] = data.draw(st.integers(int(p.min or 0), int(min(p.max if p.max is not None else 10**6, 10**7))))
        elif p.type == "float":
            values[p.name] = data.draw(st.floats(p.min or 0.0, p.max if p.max is not None else 1e6))
    try:
        technique = cls(**values)
    except LabError:
        return  # parameters that contradict each other
    spec = technique.spec
    others = {"delta": "a_shape+", "combine": ""}
    text = others.get(cls.name, "") + spec
    try:
        stack = Stack.parse(text)
    except LabError as error:
        assert "needs a technique" in str(error)
        return
    assert technique in stack.techniques and Stack.parse(stack.spec) == stack


@pytest.mark.parametrize("text,words", [
    ("h3o", ["no technique called", "h2o", "lab techniques lists them"]),
    ("qwertyuiop", ["no technique called", "Known names"]),
    ("h2o(buget=0.2)", ['no parameter "buget"', "Did you mean budget?"]),
    ("h2o(budget)", ["has no value", "budget=value"]),
    ("h2o(budget=0.2,budget=0.3)", ["given twice"]),
    ("h2o(budget=-1)", ["out of range"]),
    ("h2o(budget=nan)", ["out of range"]),
    ("h2o(budget=inf)", ["out of range"]),
    ("h2o(budget=much)", ["is not a number"]),
    ("h2o(norm=maybe)", ["is not true or false"]),
    ("snapkv(window=2.5)", ["is not a whole number"]),
    ("kivi(bits=3)", ["bits=3 is not offered"]),
    ("h2o(budget=0.2", ["parentheses", "do not match"]),
    ("h2o)budget=0.2(", ["parentheses"]),
    ("", ["variant is empty", "dense is the model as it is"]),
    ("  ", ["variant is empty"]),
    ("h2o+", ['In "h2o+" a technique is missing', "joins two techniques", "take the"]),
    ("+h2o", ["is missing beside"]),
    ("h2o++kivi", ["is missing beside"]),
    ("h2o(budget=0.2)kivi", ["is not a technique"]),
    ("h2o+snapkv", ["H2O and SnapKV both fill the score slot", "Switch one of them off"]),
    ("kivi+int_codes", ["both fill the encode slot"]),
    ("h2o+h2o(budget=0.5)", ["H2O is listed twice"]),
    ("delta", ["needs a technique that fills the select slot"]),
])
def test_refusals_say_what_was_wrong_and_what_to_do(text, words):
    with pytest.raises(LabError) as error:
        Stack.parse(text)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_every_pair_combines_or_is_refused_with_a_sentence():
    classes = list(registry().values())
    for a in classes:
        for b in classes:
            for sentence in conflicts([a(), b()]):
                assert a.title in sentence or b.title in sentence
                assert len(sentence.split()) > 3


def test_pairs_that_combine_make_a_stack_in_pipeline_order():
    classes = list(registry().values())
    for a in classes:
        for b in classes:
            if not conflicts([a(), b()]):
                stack = Stack.of([a(), b()])
                firsts = [min(PIPELINE.index(s) for s in t.slots) for t in stack.techniques]
                assert firsts == sorted(firsts) and stack == Stack.of([b(), a()]) == Stack.parse(stack.spec)
