"""KVzip (eviction sheet 10)."""

import pytest
import torch
from tiny_models import build, llama, tokens

from lab.engine.cache import LabCache
from lab.engine.session import Session
from lab.errors import LabError
from lab.techniques.kvzip import KVzip

IDS = tokens(100, seed=8).tolist()


class Spy(KVzip):
    """Keeps the scores it computed."""

    seen: list = []

    def reconstruct(self, model, contexts, ids):
        before = [(ctx.store.all_keys().clone(), ctx.store.seen, ctx.store.counts) for ctx in contexts]
        first = super().reconstruct(model, contexts, ids)
        again = super().reconstruct(model, contexts, ids)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), "scoring twice gives identical scores"
        for ctx, (keys, seen, counts) in zip(contexts, before):
            assert torch.equal(ctx.store.all_keys(), keys) and (ctx.store.seen, ctx.store.counts) == (seen, counts)
        Spy.seen = first
        return first


def prefilled(technique, chunk=None) -> Session:
    from lab.engine.stack import Stack

    session = Session(llama(), Stack((technique,)), chunk=chunk)
    session.prefill(IDS)
    return session


def test_scores_are_those_of_the_repetition_fed_by_hand():
    """One chunk, no tokenizer: the maximum over rows and group of the attention a second reading pays to the first."""
    prefilled(Spy(budget=0.5))
    model, double = build("llama", head_dim=16, max_position_embeddings=2048), torch.tensor([IDS + IDS])
    with torch.no_grad():
        weights = model(double, output_attentions=True).attentions
    for got, p in zip(Spy.seen, weights):
        want = p[0, :, 100:, :100].amax(1).view(2, 2, 100).amax(1)
        want[:, :4] = 1
        assert torch.allclose(got[0], want, atol=1e-5)


def test_chunks_attend_to_sinks_and_their_own_part():
    prefilled(Spy(budget=0.5, chunk=40), chunk=32)
    model = build("llama", head_dim=16, max_position_embeddings=2048)
    at, end = 40, 80
    fed = IDS[at - 8 : at] + IDS[at:end]
    mask = torch.ones(len(fed), 100 + len(fed)).tril(100).bool()
    mask[:, 4:at] = mask[:, end:100] = False
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([IDS]), past_key_values=cache)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        weights = model(torch.tensor([fed]), past_key_values=cache, attention_mask=bias, output_attentions=True).attentions
    for got, p in zip(Spy.seen, weights):
        want = p[0, :, :, at:end].amax(1).view(2, 2, -1).amax(1)
        assert torch.allclose(got[0, :, at:end], want, atol=1e-5)


def test_the_best_of_all_layers_and_heads_stay():
    session = prefilled(Spy(budget=40))
    flat = torch.stack([s[0] for s in Spy.seen]).flatten()
    threshold = flat.topk(40 * 6).values[-1]
    kept = [layer.positions()[0, h, :n].tolist() for layer in session.cache.lab_layers for h, n in enumerate(layer.counts)]
    assert sum(map(len, kept)) == 40 * 6
    for scores, places in zip(torch.stack([s[0] for s in Spy.seen]).flatten(0, 1), kept):
        assert set(places) >= set((scores > threshold).nonzero().flatten().tolist())
    assert all(n == 40 for layer in prefilled(KVzip(budget=40, scope="layer")).cache.lab_layers for n in layer.counts)


def test_ratio_zero_changes_nothing():
    dense, whole = Session(llama()), Session(llama(), "kvzip(budget=1)")
    assert torch.equal(dense.prefill(IDS), whole.prefill(IDS))
    assert torch.allclose(dense.step(torch.tensor([5])), whole.step(torch.tensor([5])), atol=1e-5)


def test_padded_batches_are_refused():
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    with pytest.raises(LabError, match="different lengths"), torch.no_grad():
        llama()(tokens(2, 20), attention_mask=mask, past_key_values=LabCache(llama(), "kvzip(budget=8)"))
