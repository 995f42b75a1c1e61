"""The roofline and the memory figure: dots where they belong, measured apart from predicted, any machine, any window."""
from __future__ import annotations

import copy
import re

import pytest

from lab.measure import cost, roofline
from lab.measure.hardware import Machine
from lab.measure.record import environment
from lab.ui import figures, memory, roof
from lab.ui.roof import Pick

from . import fixture
from .conftest import visitor

HERE = Machine("this machine", 1e11, 1e10, 8e9, "float32", "measured")
CARD = Machine("Card <b>", 100e12, 1e12, 9e6, "bfloat16", "https://example.org/card")


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setattr(roof, "machines", lambda: [HERE, CARD])
    return fixture.FakeLab(step_s=0)


@pytest.fixture
def record():
    made = copy.deepcopy(fixture.record_and_arrays()[0])
    made["environment"] = dict(environment())
    return made


def traces(figure, word):
    return [t for t in figure.data if word in (t.name or "")]


def test_predicted_dots_lie_on_the_roof_and_measured_ones_where_their_time_puts_them(lab, record):
    line = roof.draw(lab, record, Pick())[0]
    assert traces(line, "roof, measured")[0].line.dash == "solid"
    for trace in traces(line, "predicted"):
        assert trace.marker.symbol.endswith("-open")
        assert list(trace.y) == pytest.approx([min(1e11, x * 1e10) for x in trace.x])
    measured = traces(line, "decode, measured")[0]
    assert measured.marker.symbol == "circle"
    v, facts = record["variants"][0], record["model"]
    total = len(record["prompt"]["token_ids"]) + len(v["tokens"]) // 2
    said = cost.predict(facts, "dense", len(record["prompt"]["token_ids"]), total, 4, weight_bytes=4e6)
    assert measured.x[0] == pytest.approx(said.intensity)
    assert measured.y[0] == pytest.approx(said.step_flops / (v["tpot_ms"] / 1000))
    prompt = traces(line, "prompt, measured")[0]
    assert prompt.y[0] == pytest.approx(roofline.works(facts, "dense", 100, 100, HERE)["whole prompt"].flops / 1.92, rel=0.3)


def test_measured_dots_need_the_machine_that_measured_them(lab, record):
    def measured(pick, changed=record):
        return [r for r in roof.rows(lab, changed, pick) if r.measured]

    assert len(measured(Pick())) == 6  # three variants, a step and a prompt each
    assert not measured(Pick(CARD.name)) and not measured(Pick(view="attention")) and not measured(Pick(sequences=4))
    assert not measured(Pick(), {**record, "environment": {**record["environment"], "cpu": "another"}})
    record["variants"][1]["tpot_ms"] = None
    assert len(measured(Pick())) == 5
    line = roof.draw(lab, record, Pick(CARD.name))[0]
    assert not traces(line, ", measured") and traces(line, "data sheet")[0].line.dash == "dash"


def test_a_failed_variant_has_no_dot(lab, record):
    record["variants"][2]["error"] = "it failed"
    assert {r.letter for r in roof.rows(lab, record, Pick())} == {"A", "B"}
    record["prompt"] = {"text": "", "token_ids": [], "tokens": []}
    line, table, _, _ = roof.draw(lab, record, Pick())
    assert not traces(line, "predicted") and "Nothing to show" in table


def test_memory_runs_out_where_it_should(lab, record):
    _, _, figure, table = roof.draw(lab, record, Pick(CARD.name, 4))
    found = roofline.room(record["model"], "dense", CARD, 4)
    per_token = fixture.LAYERS * fixture.KV * fixture.DIM * 2 * 2
    assert found.longest == int((9e6 - 2e6) // (4 * per_token))
    crosses = [t for t in figure.data if t.mode == "markers+text"]
    assert crosses[0].x[0] == found.longest and crosses[0].y[0] == pytest.approx(9e6 / 2**30)
    assert all(t.line.dash == "dash" for t in figure.data if t.name and t.name[0] in "ABC" and t.mode == "lines")
    assert f"after {found.longest:,}" in table and "fits at 2,048" in roof.draw(lab, record, Pick())[3]
    nothing = {**record, "model": {**record["model"], "context": None}}
    assert "Nothing to show" in roof.draw(lab, nothing, Pick())[3]


def test_names_are_escaped(lab, record):
    record["variants"][0]["title"] = "<script>alert(1)</script>"
    for part in roof.draw(lab, record, Pick(CARD.name)):
        text = part if isinstance(part, str) else part.to_json()
        assert "<script" not in text and "Card <b>" not in text
    assert "Card <b>" not in memory.chooser()


def test_what_is_not_offered_falls_back():
    assert Pick.read(None) == Pick.read("x") == Pick.read({"sequences": "7", "view": "nonsense"}) == Pick()
    assert Pick.read({"machine": "NVIDIA T4", "sequences": "64", "view": "attention"}) == Pick("NVIDIA T4", 64, "attention")
    assert roof.machine_of(Pick("no such machine")).source == "measured"


def test_dots_on_each_other_share_a_label():
    dots = [{"letter": x, "intensity": i, "flops": 1.0} for x, i in (("A", 1.0), ("B", 1.05), ("C", 9.0))]
    assert figures._named(dots) == ["A B", "", "C"]


# -- in a browser ---------------------------------------------------------------------------------------------------
@pytest.fixture
def opened(page, site, record):
    """The tab on a run that was measured here."""
    record.update(run_id="20251231-230000-cccc", name="measured here")
    site[1].library.save(record, {})
    from playwright.sync_api import expect

    from .hands import arrive

    arrive(page, site[0] + "?tab=memory&run=20251231-230000-cccc")
    expect(page.locator("#header .chip").nth(1)).to_have_text("measured here")
    expect(page.locator("#roofplot")).to_contain_text("decode, measured")
    return page


def test_another_machine_moves_the_roof_and_the_memory(opened):
    from playwright.sync_api import expect

    table, plot = opened.locator("#rooftable"), opened.locator("#roofplot")
    expect(table).to_contain_text(re.compile("this machine:.*measured once", re.S))
    opened.get_by_label("machine", exact=True).select_option("NVIDIA T4")
    expect(table).to_contain_text("65 TFLOP/s")
    expect(plot).to_contain_text("data sheet")
    expect(plot).not_to_contain_text("decode, measured")
    expect(plot).to_contain_text("decode, predicted")
    expect(opened.locator("#rooftable a").first).to_have_attribute("href", re.compile("^https://www.nvidia.com/"))
    expect(opened.locator("#roomplot")).to_contain_text("memory of NVIDIA T4")
    opened.click("#rooftable summary")
    expect(opened.locator("#rooftable tbody tr:visible")).to_have_count(6)


def test_the_control_works_from_the_keyboard_and_survives_another_run(opened):
    from playwright.sync_api import expect

    from .hands import tab

    opened.get_by_label("decoded at once").focus()
    opened.keyboard.press("ArrowDown")
    expect(opened.locator("#roomtable")).to_contain_text("4 × 2,048 tokens")
    opened.get_by_label("roofline of the").select_option("attention")
    expect(opened.locator("#rooftable")).to_contain_text("decode attention")
    tab(opened, "Runs")
    opened.locator("table.runs tbody tr", has_text="older run").get_by_role("button", name="Open").click()
    expect(opened.locator("#header .chip").nth(1)).to_have_text("older run")
    tab(opened, "Memory")
    expect(opened.get_by_label("roofline of the")).to_have_value("attention")
    expect(opened.locator("#roomtable")).to_contain_text("4 × 2,048 tokens")
    expect(opened.locator("#rooftable")).to_contain_text("decode attention")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all(browser, site, scheme):
    from playwright.sync_api import expect

    from .hands import arrive

    with visitor(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        arrive(page, site[0] + "?tab=memory")
        page.wait_for_selector("#roofplot .legendtext")
        page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
        for name in ("#roofplot", "#roomplot", "#roofpick select"):
            page.wait_for_function("""name => { const r = document.querySelector(name).getBoundingClientRect();
                                      return r.width > 0 && r.left >= 0 && r.right <= 390; }""", arg=name)
        fill = "rgb(154, 161, 174)" if scheme == "dark" else "rgb(92, 98, 112)"
        expect(page.locator("#roofplot .legendtext").first).to_have_css("fill", fill)


def test_without_a_run_the_tab_says_what_to_do(browser):
    from playwright.sync_api import expect

    from lab.ui.app import serve

    from .conftest import free_port
    from .hands import arrive

    port = free_port()
    demo = serve(port, lab=fixture.FakeLab(example=False), block=False, preload=False)
    try:
        with visitor(browser) as page:
            arrive(page, f"http://127.0.0.1:{port}/?tab=memory")
            expect(page.locator(".memorytab .empty", has_text="No run is open")).to_be_visible()
            expect(page.locator("#rooftable")).to_contain_text("Waits for a run")
            with page.expect_response(re.compile("/(run|queue)/")) as answer:
                page.get_by_label("machine", exact=True).select_option("NVIDIA L4")  # asks for nothing that is not there
            assert answer.value.ok and "error" not in answer.value.json()
            expect(page.locator(".errorcard")).to_have_count(0)
    finally:
        demo.close()
