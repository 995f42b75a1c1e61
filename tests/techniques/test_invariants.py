"""The invariants every technique shares (I1 to I10 of the conventions sheet), over the whole registry.

A technique is covered by its line in cases.py; nothing here names one.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from techniques.cases import CASES, PROMPT, case_of
from tiny_models import build, llama, tokens

from lab.engine.attach import attach
from lab.engine.cache import LabCache
from lab.engine.history import NEVER
from lab.engine.session import Session
from lab.engine.stack import Stack, conflicts
from lab.engine.tiers import held_bits
from lab.errors import LabError
from lab.techniques import registry

STEPS = 8
NAMES = list(registry())
IDS = tokens(PROMPT + STEPS, seed=11).tolist()


@pytest.fixture(scope="module", autouse=True)
def learnt(calibrations):
    """Techniques that learn find what they learnt from the tiny model."""


def case(name: str):
    return case_of(name, registry()[name])


def learns(spec: str) -> bool:
    return any(t.learns for t in Stack.parse(spec).techniques)


def without(reason: str) -> list[str]:
    return [n for n in NAMES if reason not in case(n).unless]


def feed(model, stack: str, *, chunk: int | None = None, ids: list[int] = IDS, steps: int = STEPS, **options):
    """(logits [1 + steps, V], session): the prompt, then teacher-forced decode steps."""
    session = Session(model, stack, chunk=chunk, new_tokens=steps, **options)
    cut = len(ids) - steps
    rows = [session.prefill(ids[:cut])[0]]
    rows += [session.step(torch.tensor([t]))[0] for t in ids[cut:]]
    return torch.stack(rows), session


@cache
def model_of(name: str):
    return attach(build(name))


@cache
def dense(model) -> torch.Tensor:
    return feed(model, "dense")[0]


@cache
def lossy(name: str) -> torch.Tensor:
    return feed(llama(), case(name).lossy)[0]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the size of the logits."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))


def same(got: torch.Tensor, want: torch.Tensor, cache: LabCache, near: float = 2e-5) -> bool:
    """Equal up to rounding, though the rows were computed in batches of other shapes. A number on the edge of two codes may
    then take the other one, on one processor and not on the next: with codes, the whole may be a tenth off (two texts are 1.3
    apart)."""
    coded = any(n and 0 < bits < 16 for layer in cache.lab_layers for bits, n in layer.bits_count().items())
    return far(got, want) < near or coded and float((got - want).norm() / want.norm()) < 0.1


def test_every_technique_has_a_case():
    missing = sorted(set(NAMES) - set(CASES))
    assert not missing, f"add a line to tests/techniques/cases.py for {', '.join(missing)}"
    assert all(reason.strip() for c in CASES.values() for reason in c.unless.values())


# -- declaration -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_declaration(name):
    """Everything the faces show is there, and a stack's text is read back as the same stack."""
    cls = registry()[name]
    assert cls.name == name and cls.title and cls.paper.title and 1900 < cls.paper.year < 2100
    assert 40 < len(cls.help) < 700 and cls.help.rstrip().endswith(".")
    assert cls.saves and (not cls.does_not_save or cls.does_not_save.endswith("."))
    assert cls() == cls() and hash(cls()) == hash(cls())
    for p in cls.parameters():
        assert p.help.strip() and p.type in {"int", "float", "bool", "str"}, p.name
        assert p.check(name, p.default) == p.default
        if p.max is not None and p.type in {"int", "float"}:
            with pytest.raises(LabError):
                p.check(name, p.max * 2 + 1)
    for text in filter(None, (case(name).neutral, case(name).lossy)):
        assert Stack.parse(Stack.parse(text).spec) == Stack.parse(text)


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_slot_is_the_identity_and_slots_are_known(name):
    from lab.engine.slots import PIPELINE

    cls = registry()[name]
    assert cls.slots and set(cls.slots) <= set(PIPELINE)
    assert list(cls.slots) == sorted(cls.slots, key=PIPELINE.index)


@pytest.mark.parametrize("name", NAMES)
def test_a_technique_is_refused_twice_in_one_stack(name):
    assert conflicts([registry()[name](), registry()[name]()])[0] == f"{registry()[name].title} is listed twice"


# -- I1 ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in NAMES if case(n).neutral])
def test_i1_dense_limit(name):
    """I1: the neutral setting is the dense model, through prompt and decode, whatever the chunks."""
    for chunk in (None, 50):
        assert far(feed(llama(), case(name).neutral, chunk=chunk)[0], dense(llama())) < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("name", [n for n in NAMES if case(n).neutral])
def test_i1_dense_limit_with_softcap_windows_sinks_and_without_rope(name, kind):
    """I1 on models with soft caps and sliding windows (Gemma 2), learned sink logits (gpt-oss), and no RoPE (GPT-2)."""
    model = model_of(kind)
    if learns(case(name).neutral):
        pytest.skip("it has learnt from the tiny Llama only")
    if kind == "gpt2" and "rope" in case(name).unless:
        with pytest.raises(LabError, match="rotary"):
            feed(model, case(name).neutral)
        return
    assert far(feed(model, case(name).neutral)[0], dense(model)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_lossy_setting_changes_the_model(name):
    if "changes" in case(name).unless:
        pytest.skip(case(name).unless["changes"])
    assert 1e-6 < far(lossy(name), dense(llama())) and torch.isfinite(lossy(name)).all()


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", NAMES)
def test_lossy_settings_run_on_softcap_windows_and_sinks(name, kind):
    if learns(case(name).lossy):
        pytest.skip("it has learnt from the tiny Llama only")
    got, session = feed(model_of(kind), case(name).lossy, chunk=50)
    assert torch.isfinite(got).all()
    accounted(session.cache)


# -- I6, chunks, padding -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", without("chunks"))
def test_chunks_of_the_prompt_do_not_matter(name):
    """Chunk invariance, the last chunk being one row long included."""
    for chunk in (37, PROMPT - 1):
        assert far(feed(llama(), case(name).lossy, chunk=chunk)[0], lossy(name)) < 2e-5, chunk


@pytest.mark.parametrize("name", without("causal"))
def test_i6_causality(name):
    """I6: another last token leaves the logits of all earlier prompt rows as they are."""
    rows = []
    for last in (5, 9):
        ids = torch.tensor([IDS[: PROMPT - 1] + [last]])
        with torch.no_grad():
            rows.append(llama()(ids, past_key_values=LabCache(llama(), case(name).lossy)).logits[:, :-1])
    assert torch.equal(*rows)


@pytest.mark.parametrize("name", without("padding"))
def test_left_padding_changes_nothing(name):
    """A short prompt in a padded batch gives what it gives alone, prompt and decode."""
    pads, spec = 23, case(name).lossy
    long, short = IDS[:PROMPT], IDS[pads:PROMPT]
    ids, mask = torch.tensor([long, [1] * pads + short]), torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[1, :pads] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    batch, single = LabCache(llama(), spec), LabCache(llama(), spec)
    with torch.no_grad():
        both = [llama()(ids, attention_mask=mask[:, :PROMPT], position_ids=places[:, :PROMPT],
                        past_key_values=batch).logits[1, -1]]
        alone = [llama()(torch.tensor([short]), past_key_values=single).logits[0, -1]]
        for t in range(STEPS):
            new, n = torch.tensor([[IDS[PROMPT + t]]] * 2), PROMPT + t + 1
            both.append(
                llama()(new, attention_mask=mask[:, :n], position_ids=places[:, n - 1 : n], past_key_values=batch).logits[1, -1]
            )
            alone.append(llama()(new[:1], past_key_values=single).logits[0, -1])
    assert same(torch.stack(both), torch.stack(alone), single)


# -- I7, I10, budgets --------------------------------------------------------------------------------------------------
def held_storage(cache: LabCache) -> int:
    """Bytes of the tensors a cache's layers hold for their entries, found by walking them."""
    found: dict[int, int] = {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            [walk(v) for v in x.values()]
        elif isinstance(x, (list, tuple)):
            [walk(v) for v in x]
        elif hasattr(x, "rows") or hasattr(x, "fields"):
            walk(vars(x))

    for layer in cache.lab_layers:
        walk([layer.coded_k, layer.coded_v, layer.exact_k, layer.exact_v, layer.meta, layer.state])
        walk(vars(layer.common) if layer.common is not None else ())  # what samples hold once
    return sum(size for pointer, size in found.items() if pointer)


def accounted(cache: LabCache) -> None:
    """I10: reported bytes are those of the tensors, and nothing else large stays behind."""
    assert cache.kv_bytes + cache.slack_bytes == held_storage(cache)
    assert 0 <= cache.slack_bytes
    assert cache.entries == sum(sum(layer.bits_count().values()) for layer in cache.lab_layers)
    assert all(layer.queries is None for layer in cache.lab_layers), "prompt queries stay in memory"


@pytest.mark.parametrize("name", NAMES)
def test_i10_accounting_at_every_step(name):
    session = Session(llama(), case(name).lossy, chunk=50, new_tokens=STEPS)
    session.prefill(IDS[:PROMPT])
    accounted(session.cache)
    for t in IDS[PROMPT:]:
        session.step(torch.tensor([t]))
        accounted(session.cache)
        for layer in session.cache.lab_layers:
            assert layer.get_seq_length() == layer.seen and max(layer.counts) <= layer.seen


@pytest.mark.parametrize("name", NAMES)
def test_i7_protected_positions_survive(name):
    """I7, after the prompt and after every decode step of a scorer that evicts while decoding."""
    session = Session(llama(), case(name).lossy, chunk=None, new_tokens=STEPS)
    session.prefill(IDS[:PROMPT])
    scorer = session.cache.policy.scorer
    if scorer is None:
        pytest.skip("it evicts nothing")
    for t in [None, *IDS[PROMPT:]]:
        if t is not None:
            session.step(torch.tensor([t]))
        for layer in session.cache.lab_layers:
            if layer.budget is None or (t is not None and not scorer.evicts_in_decode):
                continue
            size = layer.budget if isinstance(layer.budget, int) else int(layer.budget.min())
            first, last = scorer.protected(size, PROMPT)
            must = {p for p in range(layer.seen) if p < first or p >= layer.seen - last}
            pos = layer.positions()[0]
            for head, n in zip(pos.tolist(), layer.counts):
                assert must <= set(head[:n])
                assert len(set(head[:n])) == n, "a position is stored twice"


@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_met(name):
    """The cache holds no more entries than the budget in the mean over layers and heads, then and while decoding."""
    session = Session(llama(), case(name).lossy, chunk=None, new_tokens=STEPS)
    session.prefill(IDS[:PROMPT])
    cache, policy = session.cache, session.cache.policy
    total = policy.total(PROMPT)
    if total is None or "budget" in case(name).unless:
        pytest.skip("it sets no budget" if total is None else case(name).unless["budget"])
    lanes = sum(len(layer.counts) for layer in cache.lab_layers)
    assert cache.entries <= lanes * total + len(cache.lab_layers)
    assert cache.entries >= lanes * total * 0.9, "much less is kept than the budget allows"
    before = cache.entries
    for t in IDS[PROMPT:]:
        session.step(torch.tensor([t]))
    if "steady" in case(name).unless:
        assert cache.entries <= before
    elif not policy.scorer.evicts_in_decode:
        assert cache.entries == before + lanes * STEPS
    elif all(isinstance(layer.budget, int) for layer in cache.lab_layers):
        assert cache.entries == before
    else:  # heads without a budget grow
        assert before <= cache.entries <= before + lanes * STEPS


@pytest.mark.parametrize("name", NAMES)
def test_i2_a_larger_budget_keeps_a_superset(name):
    """I2 for one-shot compression of the prompt: keep(B1) is part of keep(B2)."""
    spec = case(name).lossy
    if "budget=40" not in spec or "whole" in case(name).unless:
        pytest.skip("it has no budget")
    kept = []
    for budget in (40, 60):
        session = Session(llama(), spec.replace("budget=40", f"budget={budget}"), chunk=None)
        session.prefill(IDS[:PROMPT])
        layer = session.cache.lab_layers[0]
        if session.cache.policy.scorer is None:
            pytest.skip("it evicts nothing")
        kept.append([set(head[:n]) for head, n in zip(layer.positions()[0].tolist(), layer.counts)])
    protect = [session.cache.policy.scorer.protected(b, PROMPT) for b in (40, 60)]
    if protect[0] != protect[1]:
        pytest.skip("what it protects grows with the budget, so the rankings differ")
    assert all(small <= large for small, large in zip(*kept))


# -- streams -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_fork_goes_on_by_itself(name):
    """A forked session continues as the original would have, and neither disturbs the other."""
    want, session = lossy(name), Session(llama(), case(name).lossy, chunk=None, new_tokens=STEPS)
    session.prefill(IDS[:PROMPT])
    session.step(torch.tensor([IDS[PROMPT]]))
    twin = session.fork()
    for t in tokens(4, seed=5).tolist():  # the original goes elsewhere
        session.step(torch.tensor([t]))
    got = [twin.step(torch.tensor([t]))[0] for t in IDS[PROMPT + 1 :]]
    assert far(torch.stack(got), want[2:]) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_one_prompt(name):
    """Three samples of one prompt behave as three runs of it, each with its own continuation."""
    session = Session(llama(), case(name).lossy, chunk=None, new_tokens=STEPS)
    first = session.prefill(IDS[:PROMPT], samples=3)
    assert first.shape[0] == 3 and far(first, lossy(name)[:1].expand(3, -1)) < 2e-5
    streams = torch.tensor([IDS[PROMPT:], tokens(STEPS, seed=6).tolist(), IDS[PROMPT:]])
    got = torch.stack([session.step(streams[:, t]) for t in range(STEPS)])
    other = feed(llama(), case(name).lossy, ids=IDS[:PROMPT] + streams[1].tolist())[0]
    assert same(got[:, 0], lossy(name)[1:], session.cache) and same(got[:, 2], lossy(name)[1:], session.cache)
    assert same(got[:, 1], other[1:], session.cache)
    accounted(session.cache)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_generate_equals_the_session(name):
    """`model.generate(..., past_key_values=LabCache(model, spec))` in anyone's script gives the session's tokens."""
    spec, ids = case(name).lossy, torch.tensor([IDS[:PROMPT]])
    got = llama().generate(ids, max_new_tokens=STEPS, do_sample=False, past_key_values=LabCache(llama(), spec))[0, PROMPT:]
    session, want = Session(llama(), spec, chunk=None, new_tokens=STEPS), []
    logits = session.prefill(IDS[:PROMPT])
    for _ in range(STEPS):
        want.append(int(logits.argmax()))
        logits = session.step(torch.tensor(want[-1:]))
    assert got.tolist() == want


@pytest.mark.parametrize("name", NAMES)
def test_two_turns_and_prefill_chunks_in_a_foreign_script(name):
    """A second turn refeeds only what is new; a chunked prompt runs; both stay accounted for."""
    cache = LabCache(llama(), case(name).lossy)
    ids = torch.tensor([IDS[:PROMPT]])
    first = llama().generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    turn = torch.cat([first, tokens(1, 20, seed=7)], 1)
    out = llama().generate(turn, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert out.shape[1] == turn.shape[1] + 3 and torch.equal(out[:, : turn.shape[1]], turn)
    assert all(layer.seen == out.shape[1] - 1 for layer in cache.lab_layers)
    accounted(cache)
    cache = LabCache(llama(), case(name).lossy, prompt=PROMPT)
    out = llama().generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache, prefill_chunk_size=50)
    assert out.shape[1] == PROMPT + 3
    accounted(cache)


# -- the record of what happened ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_history_agrees_with_what_is_stored(name):
    """The maps a run saves: the living are those stored, at the width they are stored at."""
    _, session = feed(llama(), case(name).lossy, chunk=50, record=True)
    for layer in session.cache.lab_layers:
        bits, death, demoted = layer.history.upto(layer.seen)
        pos, held, counts = layer.positions(), held_bits(layer), layer.counts
        for h in range(layer.heads):
            n = counts[h]
            living = {p: b for p, b in zip(pos[0, h, :n].tolist(), held[0, h, :n].tolist())}
            assert {p for p in range(layer.seen) if death[0, h, p] == NEVER} == set(living)
            for p in range(layer.seen):
                assert int(bits[0, h, p]) == living.get(p, 0)
                if death[0, h, p] != NEVER:  # a token that never entered a layer is dead to its own row
                    assert p <= int(death[0, h, p]) <= layer.seen
                if demoted[0, h, p] != NEVER:
                    assert p < int(demoted[0, h, p]) <= min(layer.seen, int(death[0, h, p]))
                elif p in living:
                    assert living[p] == 16


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_caches(name):
    if learns(case(name).lossy):
        pytest.skip("it has learnt from the float32 model only")
    model = attach(build("llama", head_dim=16).bfloat16())
    got, session = feed(model, case(name).lossy, chunk=50)
    assert torch.isfinite(got).all()
    accounted(session.cache)
