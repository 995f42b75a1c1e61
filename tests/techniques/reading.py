"""Shared by the tests of reading techniques: one tiny model, one way to run a stack, one hand-made layer context."""

from __future__ import annotations

import torch

import tiny_models
from lab.engine.attach import attach
from lab.engine.context import LayerContext
from lab.engine.layer import LabLayer
from lab.engine.session import Session
from lab.measure import cost


def model():
    return attach(tiny_models.llama())


def facts() -> dict:
    c = tiny_models.llama().config
    return {"layers": c.num_hidden_layers, "heads": c.num_attention_heads, "kv_heads": c.num_key_value_heads,
            "head_dim": c.head_dim}


def run(spec: str, prompt: int = 200, steps: int = 12, chunk: int | None = 512, seed: int = 0):
    """(session after `steps` decode steps, logits of every row fed last [steps+1, V])."""
    ids = tiny_models.tokens(prompt + steps, seed=seed).tolist()
    session = Session(model(), spec, chunk=chunk)
    rows = [session.prefill(ids[:prompt])]
    rows += [session.step(torch.tensor([ids[prompt + i]])) for i in range(steps)]
    return session, torch.cat(rows)


def same(spec: str, atol: float = 1e-4, **sizes) -> None:
    """The stack's logits are the dense model's (I1)."""
    torch.testing.assert_close(run(spec, **sizes)[1], run("dense", **sizes)[1], atol=atol, rtol=1e-4)


def differs(spec: str, **sizes) -> None:
    assert (run(spec, **sizes)[1] - run("dense", **sizes)[1]).abs().max() > 1e-3


def ledger_agrees(spec: str, prompt: int = 200, steps: int = 12) -> None:
    """Bytes stored, entries read and bytes read to choose are as predicted."""
    session, _ = run(spec, prompt, steps)
    found = cost.predict(facts(), spec, prompt, prompt + steps)
    assert found.kv_bytes == session.cache.kv_bytes
    assert abs(found.read_fraction - session.cache.read_fraction) < 1e-9
    assert sum(x.probe_bytes for x in found.per_layer) == sum(x.last_probe for x in session.cache.lab_layers)


def context(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, layer: int = 5, layers: int = 10, **changes
) -> LayerContext:
    """A layer holding keys k [B,Hk,N,d] (values v) whose newest rows are q [B,Hq,T,d]; decode when T is 1."""
    store = LabLayer(layer)
    store.update(k, v if v is not None else k)
    store.append(k, v if v is not None else k, None, None)
    rows = q.shape[2]
    given = dict(
        store=store, layer=layer, layers=layers, phase="decode" if rows == 1 else "prefill", q=q, pos_q=None,
        first=k.shape[2] - rows, scale=q.shape[-1] ** -0.5, softcap=None, window=None, prompt=k.shape[2],
    )
    return LayerContext(**{**given, **changes})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
