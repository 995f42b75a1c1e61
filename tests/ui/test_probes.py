"""How diagnostics are drawn: words along every axis, nothing left out unsaid, and work that can be stopped."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.inspect.capture import Capture
from lab.inspect.diagnostics import COUNTED, Figure, Session, registry
from lab.inspect.diagnostics import run as compute
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.scores import Cancelled
from lab.ui import diagnostics, probes

from . import fixture

LENGTH, LAYERS, HEADS = 180, 3, 4


class Counting:
    """A probe that counts how often the model is read between two reports of progress."""

    def __init__(self, probe: ModelProbe) -> None:
        self.now = self.most = 0
        probe.model.register_forward_pre_hook(self._read)

    def _read(self, *_: object) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def heard(self, fraction: float) -> None:
        """Progress: where a cancel would be heard."""
        assert -1e-9 <= fraction <= 1 + 1e-9
        self.now = 0


@pytest.fixture(scope="module")
def probe() -> ModelProbe:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="sdpa")
    return ModelProbe(transformers.LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def tiny(probe) -> Session:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (LENGTH,), generator=g).tolist()
    captures = [Capture(torch.randn(HEADS, LENGTH, 4, generator=g), torch.randn(2, LENGTH, 4, generator=g), layer=n)
                for n in range(LAYERS)]
    words = [torch.randint(1, 60, (6,), generator=g).tolist() for _ in range(8)]
    return probe.session(ids, captures=captures, prompt_tokens=150, marked=[160, 161], lists=words[:4], question=words[4],
                         prompts={"first set": words[:4], "second set": words[4:]},
                         documents=[(0, 30), (30, 60), (60, 90), (90, 120)],
                         options={"steps": 3, "permutations": 2, "shuffles": 2, "penalties": (0.0, 1.0),
                                  "importance": np.ones((LAYERS, HEADS))})


@pytest.fixture(scope="module")
def results(tiny, probe):
    """{name: (declared, arrays, most model reads without a word)} of every diagnostic, on a run longer than its windows."""
    counting, out = Counting(probe), {}
    for name, declared in registry().items():
        counting.now = counting.most = 0
        out[name] = declared, compute(name, tiny, counting.heard), counting.most
    return out


def test_no_axis_shows_a_bare_index(results):
    layers = list(range(LAYERS))
    for name, (declared, arrays, _) in results.items():
        for figure in declared.figures:
            if figure.kind == "scatter":
                continue
            for axis, size in zip(figure.axes, arrays[figure.array].shape, strict=True):
                found = probes.along(figure, axis, size, arrays, layers)
                assert found is not None, f"{name}: {figure.array} has nothing to write along {axis!r}"
                assert len(found) == size
    bare = Figure("x", "bars", ("share removed",), "t")
    assert probes.along(bare, "share removed", 3, {"x": np.zeros(3)}, layers) is None, "the test can fail"
    assert set(COUNTED) >= {"layer", "head", "token"}


def test_axes_hold_values_where_there_are_values(results):
    def x(name: str, array: str) -> list:
        declared, arrays, _ = results[name]
        figure = next(f for f in declared.figures if f.array == array)
        return list(probes.draw(figure, arrays, [0, 1, 2]).data[0].x)
    assert x("head_importance", "curve") == pytest.approx(np.linspace(0, 1, 11))
    assert x("atlas", "silhouette") == list(range(4, 12)), "with twelve heads at most eleven groups are tried"
    assert x("limits", "distance")[0] == 0.01 and x("subspace", "spectrum")[0] == 1 and x("basin", "curve") == [1, 2, 3, 4]
    assert x("faithfulness", "scores")[0] == str(LENGTH - 1 - 128)
    assert x("rollout", "flow") == list(range(LENGTH - 48, LENGTH)), "a window is drawn as wide as the window"


def test_every_figure_says_what_it_draws_and_series_go_by_words(results):
    for name, (declared, arrays, _) in results.items():
        for figure in declared.figures:
            assert figure.kind in ("groups", "scatter") or figure.unit, f"{name}: {figure.array} has no unit"
            if not probes.drawable(figure, arrays):
                assert figure.absent, f"{name}: {figure.array} vanishes without a word"
                continue
            drawn, told = probes.draw(figure, arrays, [0, 1, 2]), probes.table(figure, arrays, [0, 1, 2])
            names = [t.name or "" for t in drawn.data if t.showlegend] + probes._grid(figure, arrays, [0, 1, 2])[1]
            assert not any("_" in n for n in names), (name, names)
            if figure.kind == "lines" and arrays[figure.array].ndim == 2:
                assert all(any(c.isalpha() for c in n) for n in names), (name, names)
            assert ".0000" not in told and drawn.layout.xaxis.title.text != "aggregation"
    declared, arrays, _ = results["groups"]
    for figure in declared.figures:  # long names stand beside the y axis, where a phone can show them
        assert "attention to the token before, no sink" in probes.draw(figure, arrays, []).data[0].y
    assert all(len(title) <= 32 for _, title in COUNTED.values()), "an axis title fits a phone"


def test_every_single_number_has_words_and_whole_ones_are_whole(results):
    for name, (declared, arrays, _) in results.items():
        single = {k for k, x in arrays.items() if x.ndim == 0}
        assert single == {n.array for n in declared.numbers}, name
        for before, value, after in probes.numbers(declared, arrays):
            assert any(c.isalpha() for c in before + after) and "_" not in before + after and not value.endswith(".0000")
    told = {x[1]: x[0] + "{}" + x[2] for x in probes.numbers(*results["faithfulness"][:2])}
    assert told[str(LENGTH - 1)] == "explains why token {} was predicted"
    assert probes.numbers(*results["long_heads"][:2])[0][1] == "40 %"
    old = probes.numbers(SimpleNamespace(numbers=()), {"an_old_one": np.array(277.0)})
    assert old == [["an old one ", "277", ""]]
    for x, words in ((0.1334, "0.133"), (12.345, "12.3"), (1234567, "1,234,567"), (np.nan, "–"), (0.00001, "1.0e-05")):
        assert probes.number(x) == words


def test_a_long_run_is_read_in_a_window_and_says_so(results):
    declared, arrays, _ = results["faithfulness"]
    assert arrays["first"] == LENGTH - 1 - 128 and arrays["scores"].shape == (12, 128)
    assert arrays["overlap"].size == 12 and "128" in declared.before
    prompt = arrays["scores"][0]
    assert np.isfinite(prompt[: 150 - 51]).all() and np.isnan(prompt[150 - 51 :]).all()


@pytest.mark.parametrize("name", list(registry()))
def test_cancel_is_heard_before_the_model_is_read_many_times(results, name):
    assert results[name][2] <= 4, "more model reads than this between two looks at Cancel"


@pytest.mark.parametrize("name", ["sinks", "shapes", "counterfactual", "limits", "deceive", "training_drift", "rollout"])
def test_work_of_its_own_is_told_in_small_steps_and_stops_at_once(tiny, name):
    told: list[float] = []

    def stop(fraction: float) -> None:
        told.append(fraction)
        if len(told) == 3:
            raise Cancelled()
    with pytest.raises(Cancelled):
        compute(name, tiny, stop)
    assert told[-1] < 0.7


def test_many_layers_are_all_drawn_and_coloured_by_depth():
    figure = Figure("x", "lines", ("layer", "direction"), "t", "share", phrase="layer {}")
    drawn = probes.draw(figure, {"x": np.random.default_rng(0).random((30, 5))}, [])
    lines, key = drawn.data[:-1], drawn.data[-1]
    assert [t.name for t in lines] == [f"layer {n}" for n in range(30)] and not any(t.showlegend for t in lines)
    assert len({t.line.color for t in lines}) == 30 and key.marker.showscale and (key.marker.cmin, key.marker.cmax) == (0, 29)
    assert key.marker.colorbar.title.text == "layer"


def test_a_line_that_towers_over_the_others_gets_a_logarithmic_axis_that_says_so():
    figure = Figure("x", "lines", ("part", "state"), "t", "magnitude", {"part": ("largest", "median")})
    jump = {"x": np.array([[1.0, 2.0, 25000.0, 25000.0], [0.5, 0.6, 0.7, 0.8]])}
    drawn = probes.draw(figure, jump, [])
    assert drawn.layout.yaxis.type == "log" and drawn.layout.yaxis.title.text == "magnitude (log scale)"
    assert probes.draw(figure, {"x": np.array([[1.0, 2.0], [0.5, 0.6]])}, []).layout.yaxis.type != "log"


def test_one_bright_column_is_drawn_by_order_of_magnitude_with_zeros_blank():
    cells = np.full((4, 40), 0.02)
    cells[:, 8], cells[0, :8] = 1.0, 0.0
    heat = probes.draw(Figure("x", "matrix", ("state", "token"), "t", "change"), {"x": cells}, []).data[0]
    assert heat.z[1][8] == 0 and heat.z[1][9] == pytest.approx(np.log10(0.02)) and heat.z[0][0] is None
    assert heat.customdata[0][0] == 0 and heat.colorbar.title.text == "change (log scale, blank: 0)"
    assert "0.1" in heat.colorbar.ticktext


def test_the_atlas_draws_its_exemplars_and_its_groups_apart(results):
    declared, arrays, _ = results["atlas"]
    by = {f.array: f for f in declared.figures}
    groups = int(arrays["cluster"].max()) + 1
    thumbs, cells, points = (probes.draw(by[n], arrays, [2, 15, 27]) for n in ("exemplars", "cluster", "position"))
    members = arrays["exemplars"]
    assert len(thumbs.layout.annotations) == (members >= 0).sum() and len(thumbs.layout.yaxis.ticktext) == groups
    layer, head = divmod(int(members[0, 0]), HEADS)
    assert thumbs.layout.annotations[0].text == f"layer {[2, 15, 27][layer]}<br>head {head}"
    shown = np.array(thumbs.data[0].z, dtype=float)
    cells_each = np.isfinite(arrays["thumbnails"][0, 0]).sum()
    assert np.nanmax(shown) == 1 and np.isfinite(shown).sum() == (members >= 0).sum() * cells_each
    assert [t.name for t in cells.data[1:]] == [t.name for t in points.data] == [f"group {n + 1}" for n in range(groups)]
    assert [t.marker.color for t in cells.data[1:]] == [t.marker.color for t in points.data] == list(probes.GROUPS[:groups])
    assert not cells.data[0].showscale and len(set(probes.GROUPS)) == 12
    assert sum(len(t.x) for t in points.data) == LAYERS * HEADS
    assert "layer 2, head 0" in probes.table(by["position"], arrays, [2, 15, 27])


def last(lab, **ask):
    """What the panel shows when a diagnostic has ended."""
    return list(diagnostics.runner(lab)(SimpleNamespace(_data={"key": "recorded", "letter": "A", **ask})))[-1]


def test_what_is_refused_leaves_the_figures_and_what_is_absent_is_said():
    lab = fixture.FakeLab(step_s=0)
    lab.shelf.put(fixture.OpenRun(*fixture.record_and_arrays()), "recorded")
    out = last(lab, name="atlas")
    assert [title for title, _ in out[0]["done"]["absent"]] == ["Mean importance of the heads of each group"]
    assert "head grid" in out[0]["done"]["absent"][0][1]
    out = last(lab, name="iou")
    assert out[0]["problem"] and all(update.get("__type__") == "update" and "visible" not in update for update in out[1:])


def test_what_is_needed_is_said_before_it_runs():
    lab = fixture.FakeLab(step_s=0)
    run = fixture.OpenRun(*fixture.record_and_arrays())
    lab.shelf.put(run, "recorded")
    told = {d["name"]: " ".join(d["before"]) for d in diagnostics.value(lab, "recorded")["list"]}
    assert "128 tokens" in told["faithfulness"] and "below" in told["basin"] and "words of the prompt" in told["iou"]
    assert "none is loaded" not in told["mixing"] and "none is loaded" not in told["sinks"]

    class Bare(fixture.FakeLab):
        loaded = False

    bare = Bare(step_s=0)
    bare.shelf.put(run, "recorded")
    said = {d["name"]: " ".join(d["before"]) for d in diagnostics.value(bare, "recorded")["list"]}
    assert "none is loaded" in said["mixing"] and "none is loaded" not in said["sinks"]
    run.record["prompt"]["tokens"] = ["One.\n\n", "Two.\n\n", "Three.\n\n", "Why?"]
    assert "fewer than three" in told["basin"]
    again = {d["name"]: " ".join(d["before"]) for d in diagnostics.value(lab, "recorded")["list"]}
    assert "fewer than three" not in again["basin"]
