"""Steps that read chosen pages, in place and as captured: the ordinary step's numbers on other models, summaries that stay
true, the steps at which reading everything turns into choosing, and the kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny_models
import torch

from kernels import select
from kernels.backend import interpreting
from lab.engine.graph import GraphedDecode
from lab.engine.session import Session
from lab.engine.steady import FILLING, Unfit, paged
from lab.engine.steady.exact import Growing
from lab.engine.steady.paged import Paged

PROMPT, STEPS = 60, 40
IDS = tiny_models.tokens(PROMPT + STEPS, seed=9).tolist()
QUEST = "quest(budget=0.2,page=4,dense_layers=1)"
BLOCKS = "block_topk(budget=0.2,page=4,sinks=3,local=8)"


def started(model, spec, samples=1, ordinary=False, prompt=PROMPT) -> Session:
    session = Session(model, spec, new_tokens=STEPS, record=True)
    session.prefill(IDS[:prompt], samples=samples)
    if ordinary:
        session.cache.policy.not_in_place = "asked for"
    return session


def told(session: Session) -> list:
    cache = session.cache
    return [cache.kv_bytes, cache.read_fraction, [(x.last_read, x.last_probe, x.table_bytes) for x in cache.lab_layers]]


def fed(session: Session, step, ids) -> tuple[torch.Tensor, list]:
    """Logits, and what the cache tells after every step."""
    rows, figures = [], []
    with torch.inference_mode():
        for token in ids:
            rows.append(step(torch.tensor([token])))
            figures.append(told(session))
    return torch.stack(rows), figures


def alike(got: tuple[torch.Tensor, list], want: tuple[torch.Tensor, list]) -> bool:
    """What `fed` gave, of two bodies: the same figures, and logits equal up to rounding."""
    return got[1] == want[1] and bool((got[0] - want[0]).abs().max() < 2e-5 * want[0].abs().max())


def stepping(session: Session, captured: bool):
    """The session's own step, or the body that a graph captures, run as it is."""
    if not captured:
        return session.step
    with torch.inference_mode():
        return GraphedDecode(session.model, session.cache, 1, STEPS, capture=False).step


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma", "olmo2", "phi3", "gpt2", "granite", "qwen3_moe"])
def test_other_models(architecture, captured):
    model = tiny_models.build(architecture)
    ours, theirs = started(model, QUEST), started(model, QUEST, ordinary=True)
    step = stepping(ours, captured)
    got, want = fed(ours, step, IDS[PROMPT:]), fed(theirs, theirs.step, IDS[PROMPT:])
    assert [type(x.in_place) for x in ours.cache.lab_layers] == [Growing, Paged, Paged]
    assert alike(got, want)


@pytest.mark.parametrize("spec", ["quest(budget=0.2,page=4,dense_layers=0)", BLOCKS])
def test_summaries_grow_and_go_on_telling_what_is_looked_at(spec):
    """More new rows than the summaries had room for."""
    model, more = tiny_models.llama(), tiny_models.tokens(90, seed=10).tolist()
    ours, theirs = started(model, spec), started(model, spec, ordinary=True)
    got, want = fed(ours, ours.step, more), fed(theirs, theirs.step, more)
    assert all(isinstance(x.in_place, Paged) for x in ours.cache.lab_layers)
    assert alike(got, want)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("spec,chosen", [
    ("quest(budget=72,page=8,dense_layers=0)", range(81, 101)),  # 9 pages of 72 tokens and the newest, once there are 11
    ("quest(budget=0.93,page=4,dense_layers=0)", [73, 77, 81, 85, 86, 89, 90, 93, 94, 97, 98]),  # now so, now so
    ("block_topk(budget=56,page=8,sinks=4,local=8)", range(76, 101)),  # 7 pages, once 8 lie whole between the two ends
])
def test_choosing_begins_where_there_is_a_choice(spec, chosen, captured):
    """Everything is read, and nothing looked at for it, until more pages are stored than would be read."""
    model = tiny_models.llama()
    session = started(model, spec)
    step = stepping(session, captured)
    _, figures = fed(session, step, IDS[PROMPT:])
    for entries, (_, fraction, layers) in enumerate(figures, PROMPT + 1):
        assert {probe > 0 for _, probe, _ in layers} == {fraction < 1} == {entries in chosen}, entries
    assert {bytes_ > 0 for _, _, bytes_ in figures[chosen[0] - PROMPT - 2][2]} == {False}


@pytest.mark.parametrize("captured", [False, True])
def test_summaries_stay_those_of_the_stored_keys(captured):
    model = tiny_models.llama()
    session = started(model, QUEST)
    step = stepping(session, captured)
    for at in range(PROMPT, PROMPT + STEPS):
        fed(session, step, IDS[at : at + 1])
        layer = session.cache.lab_layers[2]
        for p, rows in enumerate(layer.all_keys().split(4, 2)):
            assert torch.equal(layer.state["quest/low"][:, :, p], rows.amin(2))
            assert torch.equal(layer.state["quest/high"][:, :, p], rows.amax(2))
        assert layer.state["quest/low"].shape[2] == -(-(at + 1) // 4)


@pytest.mark.parametrize("captured", [False, True])
def test_means_of_whole_pages_stay_those_of_the_stored_keys(captured):
    session = started(tiny_models.llama(), BLOCKS)
    step = stepping(session, captured)
    for at in range(PROMPT, PROMPT + STEPS):
        fed(session, step, IDS[at : at + 1])
        layer, whole = session.cache.lab_layers[2], (at + 1 - 3) // 4
        pages = layer.all_keys()[:, :, 3 : 3 + 4 * whole].unflatten(2, (whole, 4))
        assert torch.allclose(layer.state["block_topk/mean"][:, :, :whole], pages.mean(3), atol=1e-6)


def test_a_prompt_within_the_entries_in_front_is_asked_again():
    session = started(tiny_models.llama(), "block_topk(budget=0.2,page=4,sinks=64,local=8)")
    for at in range(PROMPT, PROMPT + 5):
        with torch.inference_mode(), pytest.raises(Unfit, match=FILLING):
            GraphedDecode(session.model, session.cache, 1, STEPS, capture=False)
        session.step(torch.tensor([IDS[at]]))
    step = stepping(session, True)
    with torch.inference_mode():
        assert step(torch.tensor([7])).isfinite().all()


def test_room_for_pages_to_come_is_slack():
    session = started(tiny_models.llama(), "quest(budget=0.2,page=4,dense_layers=0)")
    fed(session, session.step, IDS[PROMPT : PROMPT + 3])
    layer = session.cache.lab_layers[0]
    held = [x.untyped_storage().nbytes() for x in layer.step.tables]
    rows = sum(x.rows.allocated_bytes for x in (layer.exact_k, layer.exact_v))
    assert layer.allocated_bytes == rows + sum(held) and sum(held) > layer.table_bytes > 0
    layer.settle()
    assert layer.allocated_bytes == rows + layer.table_bytes == rows + sum(
        x.untyped_storage().nbytes() for name, x in layer.state.items() if name != "quest/seen")


def test_equal_pages_are_read_from_the_front():
    """Rule R4, also in place: of pages with equal summaries the earlier ones are read."""
    session = started(tiny_models.llama(), "quest(budget=0.2,page=4,dense_layers=0)")
    fed(session, session.step, IDS[PROMPT : PROMPT + 1])
    step = session.cache.lab_layers[0].step
    step.tables = [torch.ones(x.shape) for x in step.tables]
    assert step._best(torch.randn(1, 4, 1, 16), 61).tolist() == [[0, 1, 2, 3]] * 2


def test_a_turn_in_between_and_a_fork():
    model = tiny_models.llama()
    ours, theirs = started(model, QUEST), started(model, QUEST, ordinary=True)
    for at in (PROMPT, PROMPT + 11):  # pages are begun and not filled on both sides of the turn
        assert fed(ours, ours.step, IDS[at : at + 11])[1] == fed(theirs, theirs.step, IDS[at : at + 11])[1]
        twins = ours.fork(), theirs.fork()
        assert torch.allclose(*(fed(t, t.step, IDS[:6])[0] for t in twins), atol=1e-4)
        for session in (ours, theirs):
            with torch.inference_mode():
                session.model(torch.tensor([IDS[:6]]), past_key_values=session.cache)
    assert torch.allclose(fed(ours, ours.step, IDS[:9])[0], fed(theirs, theirs.step, IDS[:9])[0], atol=1e-4)


@pytest.mark.parametrize("spec,prompt", [
    ("quest(budget=0.2,page=16,dense_layers=0)", 76), ("quest(budget=0.2,page=7,dense_layers=1)", 66),
    ("snapkv(budget=0.5,window=8)+adakv+quest(budget=0.3,page=4,dense_layers=0)", 76),
    ("quest(budget=0.2,page=4,dense_layers=0)+head_pruning(heads=1)", 76),
    ("block_topk(budget=0.2,page=8,sinks=3,local=10)", 76), ("block_topk(budget=0.2,page=7,local=9)", 66),
])
@pytest.mark.skipif(not interpreting(), reason="runs kernels on a CPU, in Triton's interpreter")
def test_by_the_kernels(spec, prompt, monkeypatch):
    """Triton's interpreter runs what a graph would capture: joined launches, and pages of no power of two in several.

    Within eight steps from these prompts a page begins and one page more is read. Two layers, as the first may be dense and
    the interpreter is slow.
    """
    pytest.importorskip("triton")
    for name in ("attend_best", "grow_bounds", "grow_means", "page_summaries"):
        monkeypatch.setattr(paged.select, name, functools.partial(getattr(select, name), impl="triton"))
    model, ids = tiny_models.build("llama", head_dim=16, num_hidden_layers=2), IDS[prompt : prompt + 8]
    ours, theirs = started(model, spec, prompt=prompt), started(model, spec, ordinary=True, prompt=prompt)
    with torch.inference_mode():
        graph = GraphedDecode(model, ours.cache, 1, STEPS, capture=False)
    got, want = fed(ours, graph.step, ids), fed(theirs, theirs.step, ids)
    assert got[1] == want[1] and torch.allclose(got[0], want[0], atol=1e-4)
    for mine, other in zip(ours.cache.lab_layers, theirs.cache.lab_layers):  # also what no step has looked at yet
        assert all(torch.allclose(table, other.state[name], atol=1e-5) for name, table in mine.state.items())
    assert ours.cache.lab_layers[1].state


def test_what_samples_share_has_no_kernel_yet():
    session = started(tiny_models.llama(), QUEST, samples=2)
    with torch.inference_mode(), pytest.raises(Unfit, match="samples share"):
        GraphedDecode(session.model, session.cache, 2, STEPS, capture=False)
    assert all(layer.static is None for layer in session.cache.lab_layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["quest(budget=0.3,page=16,dense_layers=1)", "quest(budget=0.3,page=7,dense_layers=1)",
                                  "block_topk(budget=0.3,page=16)", "block_topk(budget=0.3,page=7,sinks=70,local=40)"])
def test_captured_over_many_pages(spec, dtype):
    """A long prompt: several slices a lane, a share that grows while the graph is replayed, trial runs that leave no trace.

    In bfloat16 ordinary steps round the scores of pages to 8 bits, so that 5 to 30 of these pages tie at the bound and the
    earlier are read; the kernels' scores are float32. Either reads pages that the other does not, and what must hold is that
    captured steps come as near to the float32 model's as ordinary ones do.
    """
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=8192).to("cuda", dtype)
    sessions = [Session(model, spec, new_tokens=STEPS) for _ in range(2)]
    if dtype != torch.float32:
        sessions.append(Session(copy.deepcopy(model).float(), spec, new_tokens=STEPS))
    ids = tiny_models.tokens(6000 + STEPS, seed=3).tolist()
    for session in sessions:
        session.prefill(ids[:6000])
    for session in sessions[1:]:
        session.path = "step by step: asked for"
    logits = []
    for token in ids[6000:]:
        logits.append(torch.stack([s.step(torch.tensor([token], device="cuda")) for s in sessions]))
        assert told(sessions[0]) == told(sessions[1])
    assert sessions[0].path == "CUDA graph"
    ours, theirs, exact = (torch.stack(logits)[:, i] for i in (0, 1, -1))
    if dtype == torch.float32:
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()
    else:
        assert (ours - exact).norm() < 1.2 * (theirs - exact).norm() < 0.3 * exact.norm()
    for layer in sessions[0].cache.lab_layers:
        for name, join in (("quest/low", torch.amin), ("quest/high", torch.amax)):
            if name in layer.state:
                pages = layer.all_keys().split(sessions[0].stack.techniques[0].page, 2)
                assert torch.equal(layer.state[name], torch.stack([join(rows, 2) for rows in pages], 2))
