"""CLAA and baselines, AutoSelect, AttnRank: each sheet's Test line."""

from __future__ import annotations

import pytest
import torch

from lab.errors import LabError
from lab.measure.oracle import answer_scores, overlap, spearman
from lab.techniques.attnrank import AttnRank, reorder
from lab.techniques.autoselect import noised, retain
from lab.techniques.claa import CLAA, chosen
from techniques.conftest import loaded
from techniques.reading import differs, ledger_agrees, random, run, same


def test_rate_one_is_dense():
    same("claa(rate=1)")
    same("autoselect(rate=1)")
    differs("claa")


METHODS = ["claa", "fastkv", "gemfilter", "speculative", "oracle", "random"]


@pytest.mark.parametrize("rerun", ["yes", "no"])
@pytest.mark.parametrize("method", METHODS)
def test_deeper_layers_hold_the_chosen_tokens_at_their_own_positions(method, rerun):
    session, _ = run(f"claa(method={method},rate=0.3,rerun={rerun})", prompt=200, steps=4)
    below, above = session.cache.lab_layers[0], session.cache.lab_layers[-1]
    assert below.counts == ([204, 204] if rerun == "no" else [64, 64]) and above.counts == [64, 64]
    pos = above.positions()[0, 0]
    assert pos[0] == 0 and pos[-36:].tolist() == list(range(168, 204)) and (pos[1:] > pos[:-1]).all()
    ledger_agrees(f"claa(method={method},rate=0.3,rerun={rerun})")


def test_gemfilter_and_speculative_prefill_rerun_by_themselves():
    for method in METHODS:
        assert CLAA(method=method).depth(10) == (0 if method in ("gemfilter", "speculative") else 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_rerun_is_reading_only_the_chosen_tokens(method, monkeypatch):
    """The same as feeding the model those tokens with their own positions."""
    import tiny_models
    from lab.engine.session import Session
    from techniques.reading import model

    import lab.techniques.claa as module

    ids, seen = tiny_models.tokens(90), []
    original = module.chosen
    monkeypatch.setattr(module, "chosen", lambda *a: seen.append(original(*a)) or seen[-1])
    session = Session(model(), f"claa(method={method},rate=0.5,rerun=yes,window=8)")
    got = session.prefill(ids.flatten().tolist())
    with torch.no_grad():
        want = model()(input_ids=ids.view(1, -1)[:, seen[0]], position_ids=seen[0][None]).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_rankings_do_not_depend_on_where_the_cut_is():
    """A first reading up to the cut ranks as the prompt's own reading does."""
    for method in ("claa", "fastkv", "gemfilter"):
        a, b = (run(f"claa(method={method},rerun={r})", steps=0)[0].cache.lab_layers[-1].positions() for r in ("yes", "no"))
        assert torch.equal(a, b)


def test_the_draft_is_a_model_of_the_first_layers():
    import tiny_models
    from lab.engine.attach import attach
    from lab.techniques.answers import answer_importance

    whole = loaded().model
    short = attach(tiny_models.build("llama", num_hidden_layers=2))
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if "layers.2." not in k})
    ids = tiny_models.tokens(50).tolist()
    torch.testing.assert_close(answer_importance(whole, ids, 4, depth=2), answer_importance(short, ids, 4))
    assert (answer_importance(whole, ids, 4) - answer_importance(whole, ids, 4, depth=2)).abs().max() > 1e-4
    assert not any("forward" in layer.__dict__ for layer in whole.model.layers)


def test_the_largest_head_instead_of_the_sum():
    a, b = (run(f"claa(heads={h})", steps=0)[0].cache.lab_layers[-1].positions() for h in ("sum", "max"))
    assert not torch.equal(a, b)


def test_a_prompt_without_tokens_is_refused_where_it_has_to_be_read_again():
    from lab.engine.cache import LabCache
    from techniques.reading import model

    m = model()
    embedded = m.get_input_embeddings()(torch.arange(2, 82).view(1, -1))
    with torch.no_grad(), pytest.raises(LabError, match="input_ids"):
        m(inputs_embeds=embedded, past_key_values=LabCache(m, "claa(method=oracle)"), use_cache=True)


def test_keeping_every_token_through_the_trimmed_path_is_dense():
    """The trimmed forward itself (positions, rotary tables, cache) loses nothing."""
    import lab.techniques.claa as module

    want = run("dense", prompt=90, steps=6)[1]
    original = module.chosen
    try:
        module.chosen = lambda scores, count, window: torch.arange(1, len(scores))  # all but one token
        got = run("claa(rate=0.3)", prompt=90, steps=6)[1]
    finally:
        module.chosen = original
    assert 1e-6 < (got - want).abs().max() < 3


def test_one_layer_is_fastkv_and_the_maximum_is_never_below_a_layer(monkeypatch):
    a, b = run("claa(layers=1)")[1], run("claa(method=fastkv)")[1]
    assert torch.equal(a, b)
    scores = []
    original = CLAA.rank
    monkeypatch.setattr(CLAA, "rank", lambda self, ctx: scores.append(original(self, ctx)) or scores[-1])
    run("claa(layers=2)", steps=0)
    total = torch.stack(scores).amax(0)
    assert len(scores) == 2 and all((total >= s).all() for s in scores)


def test_chosen_always_has_token_0_and_the_window():
    got = chosen(torch.arange(50.0).flip(0), 12, 5).tolist()
    assert got == sorted(got) and got[0] == 0 and got[-5:] == [45, 46, 47, 48, 49] and len(got) == 12
    assert chosen(torch.zeros(50), 12, 5).tolist() == [0, 1, 2, 3, 4, 5, 6, *range(45, 50)]  # ties to the front


def test_other_techniques_work_on_the_trimmed_cache():
    for other in ("kivi(residual=32)", "snapkv(budget=40)", "h2o(budget=0.2)", "quest(budget=0.2,dense_layers=0)", "int_codes"):
        assert torch.isfinite(run(f"claa+{other}")[1]).all()


def test_oracle_ranks_a_planted_needle_first():
    """Attention of the answer, with a needle that one head of one layer looks at."""
    q, k = 0.01 * random(2, 4, 3, 16), 0.01 * random(2, 2, 40, 16, seed=1)  # two layers
    q[1, 2, :, 0], k[1, 1, 23, 0] = 8.0, 8.0
    scores = answer_scores([(q[i], k[i]) for i in range(2)], 16**-0.5)
    assert int(scores.argmax()) == 23
    assert overlap(scores, scores, 0.2) == 1.0 and spearman(scores, scores) == pytest.approx(1.0)
    assert spearman(scores, -scores) == pytest.approx(-1.0)


def test_oracle_on_a_model():
    from lab.measure.oracle import oracle

    found = oracle(loaded().model, list(range(2, 62)), new_tokens=4)
    assert found.shape == (60,) and float(found.sum()) > 0


# -- AutoSelect ------------------------------------------------------------------------------------------------------
def test_noise_keeps_the_mean_square_and_full_retention_keeps_the_token():
    x = random(400, 64)
    for r in (0.0, 0.3, 0.9):
        got = torch.stack([noised(x, torch.full((400,), r), random(400, 64, seed=s)) for s in range(1, 31)])
        torch.testing.assert_close(got.pow(2).mean(), x.pow(2).mean(), rtol=0.02, atol=0)
    assert torch.equal(noised(x, torch.ones(400), random(400, 64)), x)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_retain_rates_sum_to_the_budget_and_every_token_gets_a_gradient(temperature):
    z = random(1, 50).double().requires_grad_()
    r = retain(z, 20.0, temperature)
    assert float((r.detach().sum() - 20).abs()) < 1e-3
    (r * random(1, 50, seed=1)).sum().backward()
    assert (z.grad != 0).all()


@pytest.mark.usefixtures("calibrations")
def test_autoselect_in_a_model():
    differs("autoselect")
    ledger_agrees("autoselect(rate=0.4)")


# -- AttnRank --------------------------------------------------------------------------------------------------------
def test_reorder_is_a_permutation_and_sorts_under_a_monotone_preference():
    likeness = random(6)
    assert sorted(reorder(likeness, random(6, seed=1))) == list(range(6))
    falling = reorder(likeness, torch.arange(6).flip(0).float())
    assert falling == likeness.argsort(descending=True).tolist()


def test_attnrank_moves_whole_documents():
    technique = AttnRank(documents="4-9;10-19;20-24", profile="basin")
    embedded = random(40, 8)
    embedded[30:] += 5
    embedded[10:20] += 4  # the second document is like the question
    order = technique.order(embedded, technique.spans(), torch.tensor([0.1, 0.2, 0.9]))
    assert sorted(order) == list(range(40)) and order[:4] == [0, 1, 2, 3] and order[25:] == list(range(25, 40))
    assert order[15:25] == list(range(10, 20))  # in the best place, the last
    same("attnrank(profile=basin)")
    with pytest.raises(LabError, match="gaps"):
        AttnRank(documents="4-9;12-19")


@pytest.mark.usefixtures("calibrations")
def test_attnrank_with_a_learnt_profile():
    """Reordering the embeddings is reordering the tokens."""
    import tiny_models
    from lab.engine.session import Session
    from lab.engine.stack import Stack
    from techniques.reading import model

    ids = tiny_models.tokens(60).tolist()
    stack = Stack.parse("attnrank(documents=4-9;10-19;20-24)")
    seen = []
    original = AttnRank.order
    AttnRank.order = lambda self, *a: seen.append(original(self, *a)) or seen[-1]
    try:
        got = Session(model(), stack).prefill(ids)
    finally:
        AttnRank.order = original
    torch.testing.assert_close(got, Session(model(), "dense").prefill([ids[i] for i in seen[0]]), atol=1e-4, rtol=1e-4)


def test_profile_is_stable_to_reshuffling():
    from lab.measure.fitting.attnrank import fit

    who = loaded()
    a = fit(None, who.model, None, lambda f, t: None, prompts=2, counts=(3,), length=12)["profile_3"]
    b = fit(None, who.model, None, lambda f, t: None, prompts=4, counts=(3,), length=12)["profile_3"]
    assert (a > 0).all() and float((a - b).abs().max() / b.mean()) < 0.5


@pytest.mark.parametrize("method", ["gemfilter", "speculative", "oracle"])
def test_a_rerun_prompt_forks_samples_and_generates(method):
    """What the invariants ask of every technique, for the settings that read the prompt twice."""
    import tiny_models
    from lab.engine.cache import LabCache
    from lab.engine.session import Session
    from techniques.reading import model

    spec, ids = f"claa(method={method},rerun=yes,window=8)", tiny_models.tokens(90).flatten().tolist()
    session = Session(model(), spec, new_tokens=6, record=True)
    first = session.prefill(ids, samples=2)
    twin = session.fork()
    a, b = session.step(torch.tensor([5, 6])), twin.step(torch.tensor([5, 6]))
    assert torch.equal(first[0], first[1]) and torch.equal(a, b) and not torch.equal(a[0], a[1])
    bits, death, _ = session.cache.lab_layers[0].history.upto(91)
    assert int((bits[0, 0] > 0).sum()) == session.cache.lab_layers[0].counts[0] == int((death[0, 0] > 91).sum())
    cache = LabCache(model(), spec)
    out = model().generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, past_key_values=cache)
    again = Session(model(), spec, new_tokens=6)
    logits, want = again.prefill(ids), []
    for _ in range(4):
        want.append(int(logits.argmax()))
        logits = again.step(torch.tensor(want[-1:]))
    assert out[0, 90:].tolist() == want
