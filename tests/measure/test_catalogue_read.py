"""The read side of the catalogue: what counts as read, budgets that meet a share, pairs of a sparse prompt, resuming."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import catalogue_common as common
from benchmarks import catalogue_prefill as prefill
from benchmarks import catalogue_read as reading
from lab.engine.attach import attach
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.measure.ledger import Ledger
from techniques.reading import run
from tiny_models import build, tokens

N = 80  # prompt tokens


def tiny(context: int = 512):
    return attach(build("llama", head_dim=16, max_position_embeddings=context))


class Tokenizer:
    """One token per character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [2 + ord(c) % 100 for c in text]}


def prompts(model, ids: list[int]) -> dict:
    read, dense = common.read(model, ids[:N])
    rows = common.follow(model, dense, ids[N:-1])
    needle = ("one", 0.5, read, ids[N : N + 2])
    return {"prose": (read, ids[N:]), "needles": [needle, ("many", 0.5, read, ids[:2])], "rows": rows}


@pytest.mark.parametrize("spec", [
    "dense", "quest(budget=0.2,dense_layers=0)", "block_topk(budget=0.1,local=16)", "streaming_llm(budget=0.25)",
    "block_topk(budget=0.1,local=16,mode=oracle)", "swat(window=32)",
])
def test_read_fractions_are_the_ledgers_where_nothing_is_coded(spec):
    session, _ = run(spec, prompt=150, steps=3)
    ledger = Ledger()
    ledger.note(session.cache)
    total = ledger.totals()
    attend, choose = reading.read16(session.cache)
    assert attend == pytest.approx(total["read_fraction"]) and choose == pytest.approx(total["probe_fraction"])


def test_codes_are_read_at_their_own_width():
    session, _ = run("int_codes(bits=4,group=16)", prompt=128, steps=0)
    session.step(torch.tensor([3]))
    attend, choose = reading.read16(session.cache)
    # codes and their scales, and one entry in 129 that is still exact
    ledger = Ledger()
    ledger.note(session.cache)
    assert choose == 0 and 4 / 16 < attend < 0.5 and attend > ledger.totals()["read_fraction"]
    assert reading.stored16(session.cache) == pytest.approx(attend, rel=0.02)


def test_float32_statistics_are_not_halved():
    session, _ = run("qada(sinks=4,window=32)", prompt=150, steps=2)
    _, choose = reading.read16(session.cache)
    layer = session.cache.lab_layers[0]
    assert choose == pytest.approx(layer.last_probe / (layer.seen * layer.heads * layer.widths * 2))


def test_bisection_meets_shares_in_every_direction():
    found = common.bisect("x(n={b})", 0.25, 512, lambda spec: int(spec[4:-1]) / 512)
    assert found is not None and abs(int(found[4:-1]) / 128 - 1) < 0.02
    falling = common.bisect("x(f={f})", 0.25, 512, lambda spec: 1 - float(spec[4:-1]))
    assert falling is not None and abs(float(falling[4:-1]) - 0.75) < 0.01
    rising = common.bisect("x(t={t})", 0.25, 512, lambda spec: float(spec[4:-1]) ** 2)
    assert rising is not None and abs(float(rising[4:-1]) - 0.5) < 0.01
    assert common.bisect("x(n={b})", 0.06, 512, lambda spec: 0.2 + int(spec[4:-1]) / 512) is None  # choosing alone costs more


def test_a_refused_budget_is_one_that_is_too_small():
    def reads(spec: str) -> float:
        if int(spec[4:-1]) < 100:
            raise LabError("too small")
        return int(spec[4:-1]) / 512

    assert common.bisect("x(n={b})", 0.25, 512, reads) is not None


def test_measured_shares_are_the_ones_solved_for():
    model = tiny()
    ids = tokens(N + 8).tolist()
    scene = prompts(model, ids)
    spec = reading.solve(model, scene, "quest(budget={b},dense_layers=0,page=4)", 0.6, 0)
    found = reading.measure(model, scene, spec, scene["rows"], 0)
    assert found["share"] == pytest.approx(found["attend"] + found["choose"]) and abs(found["share"] / 0.6 - 1) < 0.15
    assert found["choose"] == pytest.approx(1 / 4, rel=0.1)  # a minimum and a maximum for every four keys and values
    assert found["stored"] == 1.0
    assert reading.solve(model, scene, "quest(budget={b},dense_layers=0,page=4)", 0.2, 0) is None
    dense = reading.measure(model, scene, "dense", scene["rows"], 0)
    assert dense["share"] == 1.0 and dense["kl"] < 1e-6 and dense["agree"] == 1.0


def pairs(spec: str, n: int = N) -> float:
    model = tiny()
    return prefill.sparse(model, tokens(n)[None], spec, 0)[2] * n * (n + 1) / 2


def test_pairs_of_known_patterns():
    n, w, s = N, 10, 3
    band = sum(min(i + 1, w) + min(max(0, i + 1 - w), s) for i in range(n))
    assert pairs(f"a_shape(sinks={s},window={w})") == pytest.approx(band)
    assert pairs("dense") == pytest.approx(n * (n + 1) / 2)
    assert pairs("xattention(tau=1)") == pytest.approx(n * (n + 1) / 2)
    groups = sum(i % 20 + 1 for i in range(n))
    assert pairs("sf_attn(group=20,shifted=0,sinks=0)") == pytest.approx(groups)


def test_densely_corrected_rows_count():
    n = 300
    plain, fixed = (pairs("a_shape(sinks=4,window=16)" + more, n) for more in ("", "+delta(gamma=32)"))
    tail = n % 32 + 128
    anchors = [i for i in range(0, n - tail) if i % 32 == 0]
    assert fixed - plain == pytest.approx(sum(i + 1 for i in [*anchors, *range(n - tail, n)]))


@pytest.mark.parametrize("template", ["a_shape(sinks=2,window={b})", "vertical_slash(vertical={b},slash={b},window=8)",
                                      "xattention(tau={t},block=16,stride=4)"])
def test_prompts_meet_their_share(template):
    model = tiny()
    read, _ = common.read(model, tokens(128).tolist())
    spec = prefill.solve(model, {"prose": (read, [])}, template, 0.5, 0)
    # deeper layers see other inputs
    assert spec is not None and abs(prefill.sparse(model, read.ids, spec, 0)[2] / 0.5 - 1) < 0.25


def test_work_of_choosing():
    n = 512
    dense = n * (n + 1) / 2
    assert prefill.choosing("a_shape(window=4)", n) == 0
    assert prefill.choosing("vertical_slash(vertical=9,slash=9,window=32)", n) == pytest.approx(32 * n / dense)
    assert prefill.choosing("xattention(tau=0.5,block=16,stride=4)", n) == pytest.approx(n * n / 4 / dense)


def test_every_policy_parses():
    for side in (reading.READ, prefill.PREFILL):
        for template in side.policies.values():
            assert Stack.parse(template.format(b=32, f=0.5, t=0.5)).techniques, template


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Options of a small sweep whose results go to a temporary folder."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def write(name: str, payload: dict):
        (tmp_path / f"{name}.json").write_text(json.dumps(payload))
        return tmp_path / f"{name}.json"

    monkeypatch.setattr(common, "write", write)
    monkeypatch.setattr(common, "scenes", lambda tokenizer, text, options, seed: scene_of(seed))
    model = tiny()
    loaded = SimpleNamespace(model=model, tokenizer=Tokenizer(), facts=SimpleNamespace(to_dict=dict))
    monkeypatch.setattr("lab.models.load", lambda source: loaded)
    return lambda *more: common.arguments("").parse_args(["--prompt", str(N), "--next", "4", "--shares", "0.5", *more])


def scene_of(seed: int) -> dict:
    ids = tokens(N + 4, seed=seed).tolist()
    return {"prose": (ids[:N], ids[N:]), "needles": [(k, 0.5, ids[:N], ids[N : N + 2]) for k in ("one", "many")]}


def small_side(policies: dict, measured: list) -> common.Side:
    def measure(model, prompts, spec, rows, seed):
        measured.append((spec, seed))
        return reading.measure(model, prompts, spec, rows, seed)

    return common.Side("x", policies, reading.solve, measure, reading.FIGURES, lambda rows, path: path.write_text("page"))


def test_a_stopped_run_goes_on_and_takes_new_policies_in(desk, tmp_path):
    measured: list = []
    first = {"Window": "swat(window={b})", "Never": "quest(budget={b},page=1,dense_layers=0)"}
    common.sweep(small_side(first, measured), desk("--seeds", "1"))
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["unreached"] == [["Never", 0.5]]  # bounds of single tokens are as many bytes as all keys and values
    assert {r["policy"] for r in saved["rows"]} == {"Dense", "Window"} and not (tmp_path / "x.html").exists()
    before = list(measured)
    second = {**first, "Codes": "int_codes(bits=8)"}
    found = common.sweep(small_side(second, measured), desk("--seeds", "2", "--resume", "--html"))
    fresh = measured[len(before):]
    assert sorted(seed for spec, seed in fresh if spec.startswith("int_codes")) == [0, 1]
    assert [seed for spec, seed in fresh if spec == "dense"] == [1]
    assert {k[0]: len(v) for k, v in found.items()} == {"Dense": 2, "Window": 2, "Codes": 2}
    row = next(r for r in json.loads((tmp_path / "x.json").read_text())["rows"] if r["policy"] == "Window")
    low, high = (row["values"][i]["kl"] for i in (0, 1))
    assert row["kl"]["mean"] == pytest.approx((low + high) / 2)
    assert row["kl"]["half"] == pytest.approx(12.706 * abs(low - high) / 2)
    assert (tmp_path / "x.html").read_text() == "page"


def test_other_settings_do_not_resume(desk, tmp_path):
    common.sweep(small_side({}, []), desk("--seeds", "1"))
    with pytest.raises(LabError, match="next"):
        common.sweep(small_side({}, []), desk("--seeds", "2", "--resume", "--next", "5"))


def test_tables_print(desk, capsys):
    side = small_side({"Window": "swat(window={b})"}, [])
    reading.show(common.sweep(side, desk("--seeds", "2")))
    out = capsys.readouterr().out
    assert "| Window | 50.0% |" in out and "| Dense | - | 100.0% | 0.0% | 100.0% | 0.000 ± 0.000" in out


def test_the_readmes_table_says_what_cannot_be_met():
    from benchmarks.catalogue_read_table import table

    def row(name: str, target: float | None, kl: float) -> dict:
        values = [{"kl": kl, "perplexity": 4.0, "one": 1.0, "many": 0.5},
                  {"kl": kl + 0.2, "perplexity": 8.0, "one": 1.0, "many": 0.5}]
        return {"policy": name, "target": target, "values": values, "kl": {"mean": kl + 0.1},
                "choose": {"mean": 0.03 if target else 0.0}, "share": {"mean": target or 1.0}, "stored": {"mean": 1.0}}

    dense = row("Dense", None, 0.0)
    dense["values"] = [{**v, "perplexity": p} for v, p in zip(dense["values"], (2.0, 4.0))]
    rows = [dense, row("Slow", 0.5, 0.3), row("Good", 0.5, 0.1), row("Good", 0.25, 0.4)]
    lines = table({"rows": rows, "unreached": [["Slow", 0.25], ["Never", 0.5], ["Never", 0.25]]}, "of bytes").splitlines()
    assert lines[0].startswith("| policy, at shares of bytes | KL at 50% | KL at 25% | perplexity ×, 25% |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| Good", "| Slow", "| Never"]
    assert "| 2.00 ± 0.00 | 1.00 ± 0.00 | 0.50 ± 0.00 | 25.0% | 3.0% |" in lines[2] and "0.50 ± 1.27" in lines[2]
    assert lines[3].count("cannot") == 5 and lines[4].count("cannot") == 6 and lines[4].endswith("– |")
