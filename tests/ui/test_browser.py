"""What a person does, in a real Chromium, on the synthetic lab."""
from __future__ import annotations

import json
import re
import threading

import pytest
from playwright.sync_api import expect

from lab.ui import maps

from . import fixture
from .conftest import visitor
from .hands import (
    TELLS_WEIGHT, WAIT_S, arrive, canvas, drawn, named_run, place, point, press, reload, status_says, tab, tells, tip, toasted,
    variant,
)

pytestmark = pytest.mark.browser


def test_first_visit_is_full_and_says_that_it_is_recorded(page):
    expect(page.locator("#banner")).to_contain_text("Recorded example")
    expect(page.locator("#columns .col")).to_have_count(3)
    expect(page.locator("#columns .col").nth(1)).to_contain_text("<script>alert(1)</script>")
    page.wait_for_selector("#setup .kv")
    canvas(page)
    tab(page, "Memory")
    page.wait_for_selector("#kvplot .js-plotly-plot")
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")


def test_run_streams_every_column_and_cannot_be_doubled(page, site):
    lab = site[1]
    before = lab.runs_made
    page.fill("#prompt textarea", "A prompt with <b>markup</b> & marks")
    with lab.held(after=4):
        page.click("#run")
        for letter in "ABC":
            expect(page.locator(f"#columns .v{letter} .t")).to_have_count(4)
        expect(page.locator("#columns .caret")).to_have_count(3)
        expect(page.locator("#run")).to_be_disabled()
        expect(page.locator("#stop")).to_be_enabled()
    status_says(page, "Done.")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    assert lab.runs_made == before + 1
    expect(page.locator("#banner")).to_have_text(re.compile(r"^\s*$"))
    expect(page).to_have_url(re.compile("run="))
    reload(page)
    expect(page.locator("#prompt textarea")).to_have_value("A prompt with <b>markup</b> & marks")


def test_stop_keeps_what_was_written(page, site):
    with site[1].held(after=4):
        page.click("#run")
        expect(page.locator("#columns .t")).to_have_count(12)
        page.click("#stop")
        status_says(page, "Stopped.")
    expect(page.locator("#columns")).to_contain_text("stopped by you")
    expect(page.locator("#columns .vA .t")).to_have_count(4)


def test_an_empty_prompt_is_one_sentence(page):
    page.fill("#prompt textarea", "   ")
    page.click("#run")
    expect(page.locator(".errorcard")).to_contain_text("The prompt is empty")
    expect(page.locator("#run")).to_be_enabled()


def test_cards_toggle_block_undo_and_predict(page):
    page.click('[data-key="edit-1"]')
    page.wait_for_selector('[data-key="sw-1-streaming"][aria-disabled]')
    expect(page.locator(".editor.vB .tech.off .why").first).to_contain_text("score slot")
    size = page.locator(".card.vB .kv")
    expect(size).to_contain_text(f"{len(fixture.split(fixture.STORY)) + 39} tokens")
    predicted = size.inner_text()
    page.click('[data-key="sw-1-kivi"]')
    expect(size).not_to_have_text(predicted)
    expect(page.locator('[data-key="sw-1-kivi"]')).to_have_attribute("aria-checked", "false")
    expect(page.locator('[data-key="al-1-kivi-bits"]')).to_have_count(0)
    page.click('[data-key="undo"]')
    page.wait_for_selector('[data-key="sw-1-kivi"][aria-checked="true"]')
    page.fill('[data-key="al-1-h2o-budget"]', "0.5")
    page.press('[data-key="al-1-h2o-budget"]', "Tab")
    expect(page.locator(".card.vB h3")).to_have_attribute("title", re.compile("budget=0.5"))
    page.click('[data-key="more"]')
    page.wait_for_selector(".card.vD")
    expect(page.locator('[data-key="more"]')).to_be_disabled()
    page.click('[data-key="rm-3"]')
    expect(page.locator(".card")).to_have_count(3)


def test_the_focus_stays_near_what_was_pressed(page):
    def focused(key):
        expect(page.locator(f'[data-key="{key}"]')).to_be_focused()

    page.focus('[data-key="slot-encode"]')
    page.keyboard.press("Enter")
    page.wait_for_selector(".slotpanel")
    focused("slot-encode")
    page.focus('[data-key="closeslot"]')
    page.keyboard.press("Enter")
    expect(page.locator(".slotpanel")).to_have_count(0)
    focused("slot-encode")
    page.focus('[data-key="edit-1"]')
    page.keyboard.press("Enter")
    page.wait_for_selector(".editor.vB")
    page.focus('[data-key="sw-1-kivi"]')
    page.keyboard.press("Space")
    expect(page.locator('[data-key="sw-1-kivi"]')).to_have_attribute("aria-checked", "false")
    focused("sw-1-kivi")
    inside = """() => { const n = document.activeElement.getBoundingClientRect();
        const b = document.querySelector('.picklist').getBoundingClientRect();
        return n.top >= b.top && n.bottom <= b.bottom; }"""
    assert page.evaluate(inside)
    page.keyboard.press("Escape")
    expect(page.locator(".editor")).to_have_count(0)
    focused("edit-1")
    page.focus('[data-key="undo"]')
    page.keyboard.press("Enter")
    expect(page.locator('[data-key="undo"]')).to_have_count(0)
    focused("more")
    page.focus('[data-key="rm-2"]')
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(2)
    focused("edit-1")


def test_a_card_that_could_not_run_offers_the_budget_that_could(page):
    page.click('[data-key="edit-1"]')
    page.fill('[data-key="al-1-h2o-budget"]', "0.02")
    page.press('[data-key="al-1-h2o-budget"]', "Enter")
    expect(page.locator(".card.vB > .why")).to_contain_text("must protect")
    expect(page.locator(".card.vB .kv")).to_have_count(0)
    offered = page.locator('[data-key="remedy-1"]')
    expect(offered).to_have_text("Set budget to 5%")
    offered.click()
    expect(page.locator(".card.vB .kv")).to_contain_text("tokens")
    expect(page.locator('[data-key="al-1-h2o-budget"]')).to_have_value("0.05")
    page.click('[data-key="undo"]')
    expect(offered).to_be_visible()


def test_a_field_keeps_what_is_typed_while_its_card_is_predicted_anew(page):
    def predict(tokens):
        page.evaluate("n => { dispatchEvent(new CustomEvent('al-prompt', {detail: {tokens: n}})); }", tokens)
        expect(page.locator(".card.vB .kv")).to_contain_text(f"at {tokens + 39} tokens")

    page.click('[data-key="edit-1"]')
    page.focus('[data-key="al-1-h2o-budget"]')
    page.keyboard.press("Control+A")
    predict(777)
    page.keyboard.type("0.")
    predict(778)
    page.keyboard.type("35")
    predict(779)
    expect(page.locator('[data-key="al-1-h2o-budget"]')).to_have_value("0.35")
    page.keyboard.press("Enter")
    expect(page.locator(".card.vB h3")).to_have_attribute("title", re.compile(r"budget=0\.35\)"))
    expect(page.locator('[data-key="al-1-h2o-budget"]')).to_be_focused()
    page.keyboard.press("Tab")
    page.click('[data-key="undo"]')
    expect(page.locator('[data-key="al-1-h2o-budget"]')).to_have_value("0.25")


def test_a_press_is_not_lost_where_its_button_is_drawn_anew_meanwhile(page):
    """What was predicted arrives between the press and the release."""
    page.wait_for_selector(".card.vB .kv")
    page.hover('[data-key="edit-1"]')
    page.mouse.down()
    with page.expect_response(re.compile("component_server")):
        page.evaluate("() => { dispatchEvent(new CustomEvent('al-prompt', {detail: {tokens: 777}})); }")
    page.evaluate("() => new Promise(done => setTimeout(() => requestAnimationFrame(done), 50))")  # it would be drawn by now
    page.mouse.up()
    page.wait_for_selector(".editor.vB")
    expect(page.locator(".card.vB .kv")).to_contain_text("at 816 tokens")


def test_the_pipeline_is_the_navigation(page):
    page.focus('[data-slot="encode"]')
    page.keyboard.press("Enter")
    expect(page.locator(".slotpanel")).to_contain_text("KIVI")
    expect(page.locator(".slotpanel")).to_contain_text("2024")
    page.click('.slotpanel [data-key="sw-0-kivi"]')
    page.wait_for_selector('.card.vA [data-key="chip-0-kivi"]')


def test_a_token_tells_its_story_by_mouse_and_by_keyboard(page):
    point(page, "#columns .vB .t >> nth=6", (0.5, 0.5), tells(page, re.compile("probability.*KL.*kept", re.S)))
    page.focus('#columns .vB .t[tabindex="0"]')
    page.keyboard.press("ArrowRight")
    expect(page.locator('#columns .vB .t[data-i="1"]')).to_be_focused()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reference text").click()
    expect(page.locator("#columns .vB .t")).to_have_count(page.locator("#columns .vA .t").count())


def test_map_hover_pin_zoom_drag_and_keys(page):
    canvas(page)
    note, looked = page.locator(".mapnote"), page.locator(".bars .h .num")
    point(page, ".mapcanvas", (0.2, 0.6), tells(page, TELLS_WEIGHT))
    press(page, ".mapcanvas", (0.2, 0.6))
    expect(note).to_contain_text("pinned")
    row = int(re.search(r"row (\d+)", tip(page).inner_text()).group(1))
    expect(looked).to_have_text(f"row {row}")
    page.keyboard.press("ArrowDown")
    expect(looked).to_have_text(f"row {row + 1}")
    page.keyboard.press("Escape")
    expect(note).not_to_contain_text("pinned")
    point(page, ".mapcanvas", (0.47, 0.47), tells(page, "row"))
    page.mouse.wheel(0, -400)
    expect(note).to_contain_text("in sight")
    point(page, ".mapcanvas", (0.47, 0.47), tells(page, "row"))
    held = re.match(r"row \d+ .*col \d+", tip(page).inner_text()).group(0)
    box, to = page.locator(".mapcanvas").bounding_box(), place(page, ".mapcanvas", (0.6, 0.6))
    page.mouse.down()
    page.mouse.move(box["x"] + to["x"], box["y"] + to["y"], steps=4)
    page.mouse.up()
    point(page, ".mapcanvas", (0.6, 0.6), tells(page, held))  # what was dragged is still under the pointer
    page.get_by_role("button", name="Whole run").click()
    expect(note).not_to_contain_text("in sight")


def test_a_view_that_moves_while_another_picture_is_on_its_way_does_not_lose_it(page, monkeypatch):
    """Linear in place of log, then the wheel and Whole run before the answer: it arrives all the same."""
    canvas(page)
    note, scale, busy = page.locator(".mapnote"), page.locator("#attention .att .mapscale"), page.locator(".mapbox")
    asked, go, real = threading.Event(), threading.Event(), maps.tile

    def slow(run, ask, *more):
        if not ask["log"]:
            asked.set()
            go.wait(WAIT_S)
        return real(run, ask, *more)
    monkeypatch.setattr(maps, "tile", slow)
    page.get_by_role("button", name="linear", exact=True).click()
    expect(busy).to_have_attribute("aria-busy", "true")
    assert asked.wait(WAIT_S)
    expect(page.locator('[data-key="map-stop"]')).to_be_visible()
    page.get_by_role("button", name="zoom in").click()
    expect(note).to_contain_text("in sight")
    page.get_by_role("button", name="Whole run").click()
    expect(note).not_to_contain_text("in sight")
    expect(scale).to_contain_text("log")
    go.set()
    expect(busy).to_have_attribute("aria-busy", "false")
    expect(scale).to_contain_text("linear")
    go.clear()
    page.get_by_role("button", name="log", exact=True).click()
    expect(scale).to_contain_text("log")
    page.get_by_role("button", name="linear", exact=True).click()
    page.click('[data-key="map-stop"]')  # what was in sight is still there, and chosen
    expect(page.get_by_role("button", name="log", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(busy).to_have_attribute("aria-busy", "false")
    expect(page.locator(".mapcover")).to_be_hidden()
    go.set()


def test_map_and_token_strip_are_linked_both_ways(page):
    canvas(page)
    page.click('.tk[data-i="90"]')
    expect(page.locator(".bars .h .num")).to_have_text("row 90")
    expect(page.locator(".tk.q")).to_have_attribute("data-i", "90")
    variant(page, "B")
    page.click('.tk[data-i="118"]')
    expect(page.locator(".bars .h .num")).to_have_text("row 118")
    expect(page.locator(".tk.gone").nth(10)).to_be_attached()
    expect(page.locator(".bars")).to_contain_text("evicted")


def test_layers_that_were_not_captured_offer_what_can_be_done(page):
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("5")
    expect(page.locator(".mapcover").filter(has_text="Captured layers are 0, 3, 7")).to_be_visible()
    page.get_by_role("button", name="Show layer 7").click()
    drawn(page)
    expect(page).to_have_url(re.compile("layer=7"))


def test_a_link_opens_tab_run_layer_and_head(page, site):
    arrive(page, site[0] + "?tab=attention&run=20251231-230000-aaaa&variant=B&layer=7&head=4")
    drawn(page)
    expect(page.get_by_label("head", exact=True)).to_have_value("4")
    expect(page.get_by_label("layer", exact=True)).to_have_value("7")
    expect(page.locator("#header .chip").nth(1)).to_have_text("older run")
    for tab_named in ("nonsense", "attention"):
        arrive(page, site[0] + f"?tab={tab_named}&run=missing&layer=x")
        expect(page.locator(".errorcard")).to_be_visible()  # in sight, whichever tab was asked for
        expect(page.locator(".errorcard")).to_contain_text("missing")


def test_runs_open_rename_tag_delete_undo_compare_export(page):
    page.click("#run")
    status_says(page, "Done.")
    made = named_run(page)
    tab(page, "Runs")
    rows = page.locator("table.runs tbody tr")
    mine = rows.filter(has=page.get_by_role("button", name=f"share {made}"))
    expect(mine).to_have_count(1)  # the run that was just made is listed
    total = rows.count()
    mine.get_by_role("button", name="Rename").click()
    expect(page.locator(".editing")).to_be_focused()
    page.evaluate("() => { document.querySelector('#runs input[type=search]').dispatchEvent(new Event('input')); }")  # a redraw
    page.fill(".editing", 'my <i>run</i> "1"')
    page.keyboard.press("Enter")
    named = rows.filter(has_text='my <i>run</i> "1"')
    expect(named).to_have_count(1)
    named.get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(total - 1)
    page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(total)
    for row in (named, rows.filter(has_text="older run")):
        row.get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare 2 runs").click()
    fields = page.locator("table.cmp tbody tr")
    expect(fields.first).to_be_visible()
    few = fields.count()
    page.get_by_role("button", name="all fields").click()
    expect(fields.nth(few)).to_be_visible()
    with page.expect_download() as got:
        rows.first.locator("select").select_option("json")
    assert json.loads(open(got.value.path(), encoding="utf-8").read())
    search = page.locator("#runs input[type=search]").first
    search.fill("nothing matches this")
    expect(page.locator("#runs")).to_contain_text("No run matches")
    search.fill("older")
    expect(rows).to_have_count(1)
    rows.first.get_by_role("button", name="Open").click()
    expect(page.locator("#columns .col").first).to_be_visible()
    status_says(page, "Opened as it was saved.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_width_overflows_in_light_and_dark(browser, site, width, scheme):
    full = {"Compare": "#columns .col", "Attention": "#attention .mapbox[aria-busy=false]", "Memory": "#roofplot .legendtext",
            "Runs": "table.runs tbody tr"}
    with visitor(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        arrive(page, site[0])
        for name, there in full.items():
            tab(page, name)
            expect(page.locator(there).first).to_be_visible()
            page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
        dark = "rgb(20, 22, 26)" if scheme == "dark" else "rgb(251, 251, 250)"
        expect(page.locator(".gradio-container").first).to_have_css("background-color", dark)
        if width == 390:
            tab(page, "Compare")
            expect(page.locator("#settings select").first).to_be_hidden()
            page.click(".sidetoggle")
            expect(page.locator("#settings select").first).to_be_visible()


def test_the_theme_can_be_switched_and_is_remembered(page):
    ground = page.locator(".gradio-container").first
    expect(ground).to_have_css("background-color", "rgb(251, 251, 250)")
    page.click("[data-theme]")
    expect(ground).to_have_css("background-color", "rgb(20, 22, 26)")
    reload(page)
    expect(ground).to_have_css("background-color", "rgb(20, 22, 26)")


def test_two_visitors_do_not_see_each_other(browser, site, page):
    page.fill("#prompt textarea", "first visitor's own words")
    with visitor(browser) as other:
        arrive(other, site[0])
        expect(other.locator("#prompt textarea")).to_have_value(re.compile("^The keeper wrote"))


def test_a_second_visitor_waits_in_sight_and_may_give_up(browser, site, page):
    with visitor(browser) as other:
        with site[1].held(after=2):
            page.click("#run")
            expect(page.locator("#columns .caret").first).to_be_visible()
            arrive(other, site[0])
            other.click("#run")
            expect(other.locator("#status")).to_contain_text("Another run is under way; yours waits for its turn.")
            other.click("#stop")
            expect(other.locator("#status")).to_contain_text("Taken out of the queue")
            expect(other.locator("#run")).to_be_enabled()
    status_says(page, "Done.")


def test_the_count_and_the_predicted_size_follow_the_chat_turn(page):
    told, size = page.locator("#promptpanel .h"), page.locator("#setup .kv").first
    before, words = len(fixture.split(fixture.STORY)), "{:,} tokens"
    expect(told).to_contain_text(words.format(before))
    expect(size).to_contain_text(words.format(before + 39))
    page.get_by_label("prompt is: chat turn").click()
    expect(told).to_contain_text(words.format(before + 9))
    expect(size).to_contain_text(words.format(before + 9 + 39))
    page.get_by_label("prompt is: text").click()
    expect(told).to_contain_text(words.format(before))


INSIDE = (
    "s => { const r = document.querySelector(s).getBoundingClientRect(), "
    "box = document.querySelector(s).closest('.tablebox')\n"
    "  .getBoundingClientRect(); return r.width > 0 && r.right <= box.right + 1 && r.left >= box.left - 1; }"
)


@pytest.mark.parametrize("width", [1440, 900, 768, 390])
def test_tables_hide_nothing_beside_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")
    page.wait_for_function(INSIDE, arg="table.runs tbody tr td.acts button[aria-label^=delete]")
    tab(page, "Memory")
    page.wait_for_selector("table.costs")
    if width in (1440, 390):
        page.wait_for_function(INSIDE, arg="table.costs tbody tr:last-child td:last-child")
    expect(page.locator("table.costs td[data-name=agreement]")).to_have_count(3)


def test_runs_are_imported_from_a_file_and_a_wrong_file_is_told(page, site, tmp_path):
    name, _, data = site[1].library.export("20251231-230000-aaaa", "parquet")
    (tmp_path / name).write_bytes(data)
    (tmp_path / "table.csv").write_bytes(site[1].library.export("20251231-230000-aaaa", "csv")[2])
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")
    for file, told in ((name, "This run is here already. Nothing was changed."), ("table.csv", "CSV leaves out")):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import").click()
        chooser.value.set_files(tmp_path / file)
        toasted(page, told)
