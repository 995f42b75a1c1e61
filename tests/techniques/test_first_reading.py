"""A-shape, Delta, ZeroTuning, head pruning: the Test lines of their sheets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import heads, visibility
from tiny_models import tokens

from lab.engine.session import Session
from lab.engine.stack import Stack
from lab.errors import LabError

T = 300


def naive(drive: Drive, n: int, **extra):
    return heads(drive.q[0, :, :n], drive.k[0, :, :n], drive.v[0, :, :n], 0.25,
                 extra.pop("visible", visibility(range(n), range(n))), **extra)


# -- A-shape -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [
    {}, dict(softcap=3.0), dict(window=12), dict(window=30), dict(sink=torch.tensor([0.5, -1.0, 2.0, 0.0])),
])
@pytest.mark.parametrize("chunks", [[60], [25, 35], [59, 1]])
def test_a_shape_reads_sinks_and_window(shape, chunks):
    """Row i reads j < S or i - j < W, inside the model's own window; the row that stands alone in a chunk too."""
    drive = Drive("a_shape(sinks=3,window=17)", 60, prompt=60, **shape)
    out = torch.cat([drive.feed(n) for n in chunks], 2)
    see = visibility(range(60), range(60), shape.get("window"), [(3, 17)])
    want, _, _ = naive(drive, 60, visible=see, softcap=shape.get("softcap"), sinks=shape.get("sink"))
    assert np.allclose(out[0], want, atol=5e-5)


def test_a_shape_decodes_densely():
    drive, dense = Drive("a_shape(window=8)", 40, prompt=30), Drive("dense", 40, prompt=30)
    drive.feed(30), dense.feed(30)
    for _ in range(10):
        assert torch.allclose(drive.feed(1), dense.feed(1), atol=1e-6)
    assert drive.layer.live_bytes == dense.layer.live_bytes  # it reads less and stores the same


# -- Delta -------------------------------------------------------------------------------------------------------------
SHAPES = [{}, dict(softcap=3.0), dict(window=40), dict(sink=torch.tensor([0.5, -1.0, 2.0, 0.0]))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", ["a_shape(window=16)", "a_shape(window=16)+zerotuning(gamma=4)"])
def test_delta_with_gamma_one_is_dense(base, shape):
    """gamma = 1 is dense attention, under everything else that shapes it (soft cap, window, sink logit, edits)."""
    other = base.partition("+")[2] or "dense"
    fixed, want = Drive(f"{base}+delta(gamma=1)", T, **shape), Drive(other, T, **shape)
    assert torch.allclose(fixed.feed(T), want.feed(T), atol=2e-5)


@pytest.mark.parametrize("chunks", [[T], [128, 172], [70, 1, 229], [299, 1]])
@pytest.mark.parametrize("gamma", [8, 64])
def test_delta_equals_its_sheet(gamma, chunks):
    """o_i + (dense_a - sparse_a), a = gamma * floor(i / gamma); the last (T mod gamma) + max(128, gamma) rows dense."""
    drive = Drive(f"a_shape(sinks=3,window=16)+delta(gamma={gamma})", T, prompt=T)
    out = torch.cat([drive.feed(n) for n in chunks], 2)[0].double().numpy()
    dense, _, _ = naive(drive, T)
    sparse, _, _ = naive(drive, T, visible=visibility(range(T), range(T), bands=[(3, 16)]))
    anchor = np.arange(T) // gamma * gamma
    want = sparse + (dense - sparse)[:, anchor]
    tail = T - (T % gamma + max(128, gamma))
    want[:, tail:] = dense[:, tail:]
    assert np.allclose(out, want, atol=1e-4)
    assert np.allclose(out[:, :tail:gamma], dense[:, :tail:gamma], atol=1e-4)  # anchors are exact


def test_delta_on_a_dense_base_corrects_nothing():
    drive = Drive("a_shape(window=1000)+delta(gamma=8)", T)
    assert torch.allclose(drive.feed(T), Drive("dense", T).feed(T), atol=1e-5)


def test_delta_recompute_replaces_anchors_only():
    drive = Drive("a_shape(sinks=3,window=16)+delta(gamma=16,recompute=true)", T)
    out = drive.feed(T)[0].double().numpy()
    dense, _, _ = naive(drive, T)
    sparse, _, _ = naive(drive, T, visible=visibility(range(T), range(T), bands=[(3, 16)]))
    tail = T - (T % 16 + 128)
    want = sparse.copy()
    want[:, :tail:16], want[:, tail:] = dense[:, :tail:16], dense[:, tail:]
    assert np.allclose(out, want, atol=1e-4)


def test_delta_i6_before_the_tail():
    """I6: a <= i, so a later token leaves earlier corrected rows as they are, bit for bit."""
    outs = []
    for change in (0.0, 1.0):
        drive = Drive("a_shape(window=16)+delta(gamma=16)", T)
        drive.k[:, :, 100:] += change
        outs.append(drive.feed(T)[:, :, :100])
    assert torch.equal(*outs)


def test_delta_alone_is_refused():
    with pytest.raises(LabError, match="needs a technique that fills the select slot"):
        Stack.parse("delta")


def test_delta_in_a_second_turn_over_coded_entries():
    """The dense rows of a correction see every stored entry, coded ones included."""
    drive = Drive("a_shape(window=8)+delta(gamma=1)+int_codes(bits=8)", 200)
    dense = Drive("int_codes(bits=8)", 200)
    for n in (150, 50):
        assert torch.allclose(drive.feed(n), dense.feed(n), atol=2e-5)


# -- ZeroTuning --------------------------------------------------------------------------------------------------------
@given(st.floats(0.05, 20), st.sampled_from([{}, dict(softcap=3.0), dict(window=12)]), st.integers(0, 99))
@settings(max_examples=25)
def test_zerotuning_equals_its_closed_form(gamma, shape, seed):
    """a0' = gamma a0 / D and ai' = ai / D with D = (gamma - 1) a0 + 1, in the prompt and in decode."""
    drive = Drive(f"zerotuning(gamma={gamma!r})", 40, seed=seed, prompt=30, **shape)
    out = torch.cat([drive.feed(n) for n in (13, 17, *[1] * 10)], 2)[0]
    see = visibility(range(40), range(40), shape.get("window"))
    _, _, p = naive(drive, 40, visible=see, softcap=shape.get("softcap"))
    p[:, :, 0] *= gamma
    p /= p.sum(-1, keepdims=True)
    assert np.allclose(out, np.einsum("hij,hjd->hid", p, np.repeat(drive.v[0].double().numpy(), 2, 0)), atol=5e-5)


def weights(spec: str) -> np.ndarray:
    """Attention weights [Hq, N] of the last row, read off with one-hot values."""
    drive = Drive(spec, 16, dim=16)
    drive.v = torch.eye(16).expand(1, 2, 16, 16).clone()
    drive.feed(15)
    return drive.feed(1)[0, :, 0].double().numpy()


def test_zerotuning_keeps_the_ratios_of_other_tokens_and_is_monotone():
    plain = weights("dense")
    last = np.zeros(4)
    for gamma in (0.25, 0.5, 1, 2, 5):
        now = weights(f"zerotuning(gamma={gamma})")
        assert np.allclose(now[:, 1:] / now[:, 1:2], plain[:, 1:] / plain[:, 1:2], rtol=1e-3)
        assert (now[:, 0] > last).all() and np.allclose(now.sum(1), 1, atol=1e-5)
        last = now[:, 0]


def test_zerotuning_acts_on_the_named_heads_and_layers():
    tuned, plain = Drive("zerotuning(gamma=9,heads=1;3)", 20), Drive("dense", 20)
    a, b = tuned.feed(20), plain.feed(20)
    assert torch.allclose(a[:, [0, 2]], b[:, [0, 2]], atol=1e-6) and not torch.allclose(a[:, [1, 3]], b[:, [1, 3]], atol=1e-3)
    other = Drive("zerotuning(gamma=9,layers=1-2)", 20, index=0)
    assert torch.equal(other.feed(20), b)
    for bad in ("zerotuning(heads=1-3)", "zerotuning(layers=5-2)", "head_pruning(heads=x)"):
        with pytest.raises(LabError, match="is not a"):
            Stack.parse(bad)


def test_zerotuning_under_left_padding_finds_each_sequences_first_token():
    drive, alone = Drive("zerotuning(gamma=9)", 20, batch=2), Drive("zerotuning(gamma=9)", 15)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :5] = False
    for name in "qkv":
        setattr(alone, name, getattr(drive, name)[1:, :, 5:])
    assert torch.allclose(drive.feed(20, mask)[1, :, 5:], alone.feed(15)[0], atol=1e-5)


# -- head pruning ------------------------------------------------------------------------------------------------------
def test_pruned_heads_are_closed_and_others_untouched():
    drive, dense = Drive("head_pruning(heads=0;2)", 20), Drive("dense", 20)
    for n in (15, *[1] * 5):
        a, b = drive.feed(n), dense.feed(n)
        assert (a[:, [0, 2]] == 0).all() and torch.equal(a[:, [1, 3]], b[:, [1, 3]])
    assert drive.layer.live_bytes == dense.layer.live_bytes


def test_pruning_a_head_equals_zeroing_its_columns_of_the_output_projection():
    """Gate before W_o: the same as weights of zero there."""
    from tiny_models import build

    model, ids = build("llama", head_dim=16), tokens(20).tolist()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, 16:32] = 0
    want = Session(model, "dense").prefill(ids)
    assert torch.allclose(Session(build("llama", head_dim=16), "head_pruning(heads=1)").prefill(ids), want, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 1.0])
def test_a_share_of_heads_is_closed_exactly_and_repeatably(fraction):
    closed = []
    for seed in (0, 0, 1):
        gates = []
        for layer in range(3):
            drive = Drive(f"head_pruning(fraction={fraction})", 8, layers=3, index=layer)
            drive.policy.seed = seed
            gates.append((drive.feed(8)[0].abs().sum((1, 2)) == 0).tolist())
        closed.append(gates)
        assert sum(map(sum, gates)) == round(fraction * 12)
    assert closed[0] == closed[1] and (closed[0] != closed[2] or fraction in (0.01, 1.0))


def test_a_share_of_nothing_leaves_the_listed_heads_closed():
    assert (Drive("head_pruning(heads=1,fraction=0.01)", 8).feed(8)[:, 1] == 0).all()
