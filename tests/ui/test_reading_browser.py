"""What a reader sees beside the map, in a real Chromium: replays, fingers, lives, playing through time, runs compared."""
from __future__ import annotations

import re
import threading

import pytest
from playwright.sync_api import expect

from lab.ui import export, maps
from lab.ui.opened import OpenRun

from . import fixture
from .conftest import visitor
from .hands import WAIT_S, arrive, canvas, drawn, tab, variant

pytestmark = pytest.mark.browser
LIFE = ".life .row .h"


def test_while_a_variant_is_replayed_what_needs_it_says_that_it_waits(page, site, monkeypatch):
    go, bars, grid = threading.Event(), page.locator(".bars"), page.locator(".gridbox").first
    monkeypatch.setattr(site[1], "replay", lambda *_: go.wait(WAIT_S))
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("5")
    page.get_by_role("button", name="Replay to capture layer 5").click()
    expect(page.locator(".mapcover")).to_contain_text("Replaying variant A")
    expect(bars).to_have_text("Waits for the replay of variant A.")
    expect(grid).to_contain_text("Waits for the replay of variant A.")
    expect(grid.get_by_role("button", name="Replay to capture them")).to_have_count(0)
    go.set()
    expect(page.locator("#attstatus")).not_to_contain_text("Replaying")
    expect(grid).not_to_contain_text("Waits for")
    expect(bars).not_to_contain_text("Waits for")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_checked_box_looks_checked_and_can_be_tapped(browser, site, scheme):
    with visitor(browser, color_scheme=scheme) as page:
        arrive(page, site[0])
        tab(page, "Runs")
        box = page.locator("table.runs input[type=checkbox]").first
        expect(box).to_be_visible()
        look = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e, '::before').content]"
        before, size = box.evaluate(look), box.bounding_box()
        assert size["width"] >= 24 and size["height"] >= 24
        box.check()
        accent = {"light": "rgb(47, 95, 208)", "dark": "rgb(134, 168, 255)"}[scheme]
        expect(box).to_have_css("background-color", accent)
        assert box.evaluate(look) == [accent, '""'] and before[0] != accent and before[1] == "none"


def test_a_tap_on_the_map_tells_the_cell_below_it_until_it_is_released(browser, site):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with visitor(browser, **phone) as page:
        arrive(page, site[0])
        canvas(page)
        note, card = page.locator(".mapnote"), page.locator(".pincard")
        expect(note).to_contain_text("a tap pins")
        expect(note).not_to_contain_text("wheel")
        expect(card).to_be_hidden()
        size = page.locator(".mapcanvas").bounding_box()
        page.evaluate("document.querySelector('.mapcanvas').scrollIntoView({block: 'start'}); scrollBy(0, -560)")
        page.locator(".mapcanvas").tap(position={"x": size["width"] * 0.1, "y": size["height"] * 0.3})
        expect(card).to_contain_text(re.compile("row .* col .*weight .* rank .* of", re.DOTALL))
        expect(card).to_be_in_viewport(ratio=1)
        expect(note).to_contain_text("pinned")
        expect(note).not_to_contain_text("Esc")
        expect(page.locator(".mapside " + LIFE)).to_contain_text("Life of token")
        expect(page.locator(".al-tip:not([hidden])")).to_have_count(0)
        variant(page, "B")
        page.locator(".mapcanvas").tap(position={"x": size["width"] * 0.3, "y": size["height"] * 0.7})
        card.get_by_role("button", name="Release").tap()
        expect(card).to_be_hidden()
        expect(note).not_to_contain_text("pinned")


def test_a_life_is_told_where_its_token_was_chosen_and_speaks_of_steps(page):
    canvas(page)
    variant(page, "B")
    for token, home in ((".tk[data-i='20']", ".tokbox"), (".tokview .vB .tv >> nth=2", ".tokview"), (".mapcanvas", ".attside"),
                        (".cachecanvas", ".cachebox")):
        page.click(token)
        expect(page.locator(f"{home} {LIFE}")).to_contain_text("Life of token")
        expect(page.locator(LIFE)).to_have_count(1)
    page.click(".tk[data-i='20']")
    life = page.locator(".life")
    expect(life).to_contain_text("written while the prompt was read")
    expect(life).to_contain_text("at step 1")
    expect(life).to_contain_text("16 entries in the cache, one for each of 8 layers × 2 KV heads")
    expect(life).not_to_contain_text(re.compile(r"\brow"))
    life.get_by_role("button", name="close the life of this token").click()
    expect(page.locator(LIFE)).to_have_count(0)


def test_the_cache_map_names_its_axes_and_plays_to_the_end(page, monkeypatch):
    go, real = threading.Event(), maps.cache
    canvas(page)
    variant(page, "B")
    expect(page.locator(".cachebox .key")).to_contain_text("evicted")  # the stops are those of B by now
    cache, slider = page.locator(".cachebox"), page.get_by_label("step of the run")
    expect(cache.locator(".axis.down")).to_have_text("0layer7")
    expect(cache.locator(".axis").nth(1)).to_contain_text("token")
    expect(cache).to_contain_text("layer 3, the map's")
    last = slider.get_attribute("max")
    expect(slider).to_have_value(last)
    slider.fill(str(int(last) - 3))
    cache.get_by_role("button", name="Play").click()
    expect(slider).to_have_value(last)
    expect(cache.get_by_role("button", name="Play")).to_be_visible()
    # From the start again, whose answer waits: the play is under way until it is paused, however slow the machine is.
    monkeypatch.setattr(maps, "cache", lambda run, ask: (ask["row"] == 0 and go.wait(WAIT_S), real(run, ask))[1])
    slider.press(" ")
    pause = cache.get_by_role("button", name="Pause")
    expect(pause).to_be_visible()
    pause.click()
    expect(cache.get_by_role("button", name="Play")).to_be_visible()
    go.set()
    expect(slider).to_have_value("0")


def test_with_reduced_motion_a_press_is_a_step(browser, site):
    with visitor(browser, reduced_motion="reduce") as page:
        arrive(page, site[0])
        canvas(page)
        slider, step = page.get_by_label("step of the run"), page.get_by_role("button", name="Next step")
        expect(slider).not_to_have_value("1")
        for value in ("0", "1", "2"):
            step.click()
            expect(slider).to_have_value(value)


def test_a_logarithmic_scale_says_where_it_begins(page):
    canvas(page)
    scale = page.locator("#attention .att .mapscale")
    expect(scale).to_contain_text("≤ 1e-5")
    page.get_by_role("button", name="linear", exact=True).click()
    expect(scale).to_contain_text("linear")
    expect(scale).not_to_contain_text("≤")
    page.get_by_role("button", name="log", exact=True).click()
    page.get_by_label("head", exact=True).select_option("rollout")
    drawn(page)
    expect(scale).to_contain_text("≤ 1e-7")


def test_runs_are_compared_in_words(page, site):
    page.click("#run")
    expect(page.locator("#status")).to_contain_text("Done.")
    tab(page, "Runs")
    boxes = page.locator("table.runs input[type=checkbox]")
    expect(boxes.nth(1)).to_be_visible()
    for n in (0, 1):
        boxes.nth(n).check()
    page.get_by_role("button", name="Compare 2 runs").click()
    table = page.locator("table.cmp")
    page.get_by_role("button", name="all fields").click()
    expect(table.locator("tr", has_text="per token").first).to_contain_text("ms")
    expect(table).not_to_contain_text("tpot_ms")
    page.get_by_label("search fields").fill("KV cache")
    expect(table.locator("tbody tr:not(.group)").first).to_contain_text("KiB")
    expect(table).to_contain_text("1.00×")


@pytest.mark.parametrize("width", [1440, 390])
def test_an_exported_page_hides_no_figure_and_hatches_what_was_evicted(browser, tmp_path, width):
    run = OpenRun(*fixture.record_and_arrays())
    view = {"letter": "B", "layer": 3, "over": None, "head": 1, "pool": "max", "log": True}
    (tmp_path / "page.html").write_text(export.page(run, view)[1], encoding="utf-8")
    with visitor(browser, viewport={"width": width, "height": 900}) as page:
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("body[data-ready]")
        expect(page.locator("#scale")).to_contain_text("≤ 1e-5")
        for key in ("#scale", "#key"):
            expect(page.locator(f"{key} s.gone")).to_have_css("background-image", re.compile("repeating-linear-gradient"))
        expect(page.locator("#read")).to_contain_text("Point at the map")
        cut = page.locator("table.costs td").evaluate_all(
            "all => all.filter(e => { const r = e.getBoundingClientRect(); return !r.width || r.right > innerWidth; }).length")
        assert cut == 0
        page.locator("#time").fill("0")
        expect(page.locator("#step")).to_have_text("the prompt is read up to token 0")
        page.locator("#strip [data-i='20']").click()
        expect(page.locator("#read")).to_contain_text("(step 1)")
