"""Looking inside, in a real Chromium, on the synthetic lab: differences, the grid, token measures, diagnostics, export."""
from __future__ import annotations

import re
import threading
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect

from lab.ui import app
from lab.ui.state import Address

from .conftest import visitor
from .hands import TELLS_WEIGHT, WAIT_S, arrive, canvas, drawn, point, press, tab, tells, tip, variant

pytestmark = pytest.mark.browser
SCALE = "#attention .att .mapscale"


def test_a_difference_names_both_sides_and_survives_a_reload(page):
    canvas(page)
    variant(page, "C − A")
    expect(page.locator(SCALE)).to_contain_text("A more")
    expect(page.locator(SCALE)).to_contain_text("texts differ")
    assert "minus=A" in page.url and "variant=C" in page.url
    point(page, ".mapcanvas", (0.3, 0.6), tells(page, re.compile("C − A .* A .* C ", re.S)))
    press(page, ".mapcanvas", (0.3, 0.6))
    expect(page.locator(".mapnote")).to_contain_text("pinned")
    page.keyboard.press("Escape")
    expect(page.locator(".mapnote")).not_to_contain_text("pinned")
    arrive(page, page.url)
    expect(page.locator(".bars")).to_contain_text(re.compile("differ", re.I))


def test_rollout_says_which_layers_it_saw(page):
    canvas(page)
    page.get_by_label("head", exact=True).select_option("rollout")
    expect(page.locator(SCALE)).to_contain_text("captured layers 0, 3, 7")
    assert "head=rollout" in page.url


def test_a_thumbnail_opens_its_head_by_click_and_by_key(page):
    canvas(page)
    page.click('[data-key="grid"]')
    expect(page.locator(".thumb")).to_have_count(18)
    page.locator(".thumb").nth(13).click()
    expect(page.get_by_label("head", exact=True)).to_have_value("1")
    expect(page.locator(".thumb.on")).to_have_count(1)
    assert "layer=7" in page.url
    page.locator(".thumb").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("location.search.includes('layer=0') && location.search.includes('head=1')")
    page.get_by_label("sort heads by").select_option("entropy")
    page.wait_for_selector(".gridsorted")
    page.get_by_label("least entropy").fill("99")
    page.keyboard.press("Tab")
    expect(page.locator(".gridbox").first).to_contain_text("No head reaches")
    page.click('.gridbox [data-key="as-true"] >> nth=0')
    page.get_by_label("sort heads by").select_option("layer")
    expect(page.locator(".gridbox tbody tr")).to_have_count(18)


def test_the_time_slider_goes_back_to_before_the_eviction(page):
    canvas(page)
    variant(page, "B")
    cache, key = page.locator(".cachebox"), page.locator(".cachebox .key")
    expect(key).to_contain_text("evicted")
    expect(cache).to_contain_text("step 24 of 24")
    slider = page.get_by_label("step of the run")
    assert int(slider.get_attribute("max")) < 40, "decode steps, not rows"
    slider.fill("1")
    expect(key).not_to_contain_text("evicted")
    expect(cache).to_contain_text("the prompt is read")
    expect(slider).to_have_attribute("aria-valuetext", "the prompt is read")
    slider.press("ArrowRight")
    expect(key).to_contain_text("evicted")
    expect(cache).to_contain_text("step 1 of")
    page.get_by_text("Table: entries by layer at this step").click()
    expect(page.locator(".cachebox details[open] tbody tr")).to_have_count(8)
    with page.expect_response(re.compile("component_server")):
        page.get_by_label("KV head of the cache map").select_option("1")
    expect(key).to_contain_text("evicted")


def test_a_click_on_a_token_tells_its_life_and_what_it_was_merged_into(page):
    canvas(page)
    variant(page, "B")
    expect(page.locator(".cachebox .key")).to_contain_text("evicted")
    page.click('.tk[data-i="120"]')
    page.click('.tk[data-i="20"]')
    life, of = page.locator(".life"), page.locator(".life .row .h")
    expect(of).to_have_text("Life of token 20")
    expect(life).to_contain_text("merged into")
    expect(life).to_contain_text(" 1 (")
    expect(life).to_contain_text(re.compile("still there at the end|nothing of it"))
    page.get_by_text("Table: entry by entry").click()
    expect(page.locator(".life details[open] table")).to_contain_text("merged")
    page.locator(".life button.link").first.click()
    expect(of).to_have_text("Life of token 1")
    page.focus(".cachecanvas")
    page.keyboard.press("ArrowRight")
    expect(of).to_have_text("Life of token 2")
    page.locator(".tokview .vC .tv").nth(3).click()
    page.wait_for_function("location.search.includes('variant=C')")
    drawn(page)
    expect(page.locator(".mapnote")).to_contain_text("pinned")


def test_layers_are_combined_and_the_link_remembers(page, site):
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("mean")
    scale, layer = page.locator(SCALE), page.get_by_label("layer", exact=True)
    expect(scale).to_contain_text("Mean over only the captured layers 0, 3, 7")
    assert "layer=mean" in page.url
    page.get_by_label("head", exact=True).select_option("max")
    expect(scale).to_contain_text("max over heads")
    drawn(page)
    point(page, ".mapcanvas", (0.2, 0.6), tells(page, TELLS_WEIGHT))
    arrive(page, site[0] + "?tab=attention&variant=A&layer=mean&head=max")
    drawn(page)
    expect(layer).to_have_value("mean")
    layer.select_option("max")
    expect(scale).to_contain_text("Largest over")
    layer.select_option("3")
    expect(scale).not_to_contain_text("over only")


def test_entries_read_at_few_bits_are_drawn_as_such_and_the_map_has_a_table(page):
    canvas(page)
    expect(page.locator(SCALE)).not_to_contain_text("read at")
    variant(page, "B")
    expect(page.locator(SCALE)).to_contain_text("read at 2 bit")
    page.get_by_text("Table: largest weights in sight").click()
    expect(page.locator(".mapside details[open] tbody tr")).to_have_count(24)
    page.locator(".mapside details[open] tbody button").first.click()
    expect(page.locator(".mapnote")).to_contain_text("pinned")


def test_what_was_computed_comes_back_with_the_saved_run(page, site):
    def opened():
        arrive(page, site[0] + "?tab=attention&run=20251231-230000-aaaa&variant=A")
        drawn(page)

    opened()
    page.click('[data-key="grid"]')
    page.wait_for_selector(".thumb")
    page.click('[data-key="p-sinks"]')
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    opened()
    expect(page.locator(".thumb")).to_have_count(18)
    page.click('[data-key="p-sinks"].kept')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    expect(page.locator("#diagnostics")).to_contain_text("Below: Attention sinks of A")


def test_diagnostics_take_words_places_and_separators(page):
    canvas(page)
    page.click('[data-key="p-iou"]')
    page.get_by_label("words that matter").fill("amber key")
    page.get_by_label("token to look from").fill("9999")
    page.click('[data-key="d-run"]')
    why, numbers = page.locator("#diagnostics .why"), page.locator("#diagnostics .numbers")
    expect(why).to_contain_text("no position in this run")
    page.click('.tk[data-i="100"]')
    page.get_by_role("button", name="use the pinned row, 100").click()
    expect(page.get_by_label("token to look from")).to_have_value("100")
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    expect(numbers).to_contain_text("row 100")
    page.click('[data-key="p-basin"]')
    page.get_by_label("what separates documents").fill(".")
    page.click('[data-key="d-run"]')
    expect(page.locator("#diagnostics")).to_contain_text("Below: Attention basin")
    expect(numbers).to_contain_text("score")
    page.click('[data-key="p-groups"]')
    expect(page.get_by_label("first set")).to_have_value(re.compile("(.+\n){2}.+"))
    page.click('[data-key="d-run"]')
    expect(why).to_contain_text("no model")


@pytest.mark.parametrize("asked, told, follows", [
    ("layer=99&head=77", ["Layer 99: this model has layers 0 to 7.", "Query head 77: this model has query heads 0 to 5.",
                          "Shown: variant A, layer 3, query head 0."], "variant=A&layer=3&head=0"),
    ("variant=Z&layer=7&head=mean", ["Variant Z: this run has A, B, C.", "Shown: variant A, layer 7, mean."],
     "variant=A&layer=7&head=mean"),
    ("variant=B&minus=B&layer=abc", ["Layer abc", "Variant B minus itself is nothing."], "variant=B&layer=3&head=0"),
])
def test_what_an_address_names_and_is_not_there_is_told_in_place_and_the_address_follows(page, site, asked, told, follows):
    arrive(page, f"{site[0]}?tab=attention&{asked}")
    line = page.locator("#attention .toldbox")
    for words in told:
        expect(line).to_contain_text(words)
    shown = {tuple(pair.split("=")) for pair in follows.split("&")}
    named = page.evaluate("[...new URL(location.href).searchParams]")
    assert {(name, value) for name, value in named if name != "tab"} == shown
    page.get_by_role("group", name="variant", exact=True).get_by_role("button", name="C", exact=True).click()
    expect(line).to_have_text("")


def test_text_is_coloured_by_any_measure_and_tells_both_sides(page):
    canvas(page)
    page.wait_for_selector(".toktext .tv")
    page.locator(".tokview .vB .tv").nth(2).focus()
    for words in ("KL", "B's choices", "A's choices", "<i>door</i>"):
        expect(tip(page)).to_contain_text(words)
    page.keyboard.press("ArrowRight")
    expect(page.locator(".tokview .vB .tv").nth(3)).to_be_focused()
    page.get_by_label("colour the text by").select_option("prompt_mass")
    expect(page.locator(".tokview .vA .tv").nth(5)).to_be_attached()
    expect(page.locator(".tokview .note").first).to_contain_text("Captured layers only: 0, 3, 7")


def test_a_diagnostic_runs_and_shows_figures_with_tables(page):
    canvas(page)
    page.click('[data-key="p-sinks"]')
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    expect(page.locator(".figbox h4:visible")).to_have_count(5)
    page.locator(".probes .figtable summary").first.click()
    expect(page.locator(".probes .figtable").first.get_by_text("over 0.1").first).to_be_visible()
    page.click('[data-key="p-basin"]')
    page.click('[data-key="d-run"]')
    expect(page.locator("#diagnostics .why")).to_contain_text("documents")


def test_an_exported_page_opens_from_a_file_without_network(page, browser, tmp_path):
    canvas(page)
    variant(page, "B")
    with page.expect_download() as got:
        page.get_by_role("button", name="Export page").click()
    file, wrong = tmp_path / "view.html", []
    got.value.save_as(file)
    with visitor(browser, offline=True) as alone:
        alone.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        alone.on("pageerror", lambda e: wrong.append(str(e)))
        alone.goto(file.as_uri())
        alone.wait_for_selector("body[data-ready]")
        alone.wait_for_function("""() => { const c = document.querySelector('#map'), g = c.getContext('2d');
                                   const d = g.getImageData(0, 0, c.width, c.height).data;
                                   return new Set(d.filter((_, i) => i % 4 === 0)).size > 10; }""")
        where, key, read = alone.locator("#where"), alone.locator("#key"), alone.locator("#read")
        point(alone, "#map", (0.1, 0.6), lambda timeout: expect(read).to_contain_text("weight", timeout=timeout))
        press(alone, "#map", (0.1, 0.6))
        expect(where).to_contain_text("pinned")
        alone.keyboard.press("Escape")
        expect(where).not_to_contain_text("pinned")
        expect(key).to_contain_text("evicted")
        alone.locator("#time").fill("0")
        expect(key).not_to_contain_text("evicted")
        expect(alone.locator(".cols")).to_contain_text("<script>alert(1)</script>")
        expect(alone.locator("table").first).to_contain_text("per token")
    assert wrong == []


def test_a_replay_that_ends_after_another_run_was_opened_leaves_that_in_sight(page, site, monkeypatch):
    go, status = threading.Event(), page.locator("#attstatus")
    monkeypatch.setattr(site[1], "replay", lambda *_: go.wait(WAIT_S))
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("5")
    page.get_by_role("button", name="Replay to capture layer 5").click()
    expect(status).to_contain_text("Replaying")
    tab(page, "Runs")
    page.locator("table.runs tbody tr", has_text="older run").get_by_role("button", name="Open").click()
    expect(page.locator("#header .chip").nth(1)).to_have_text("older run")
    tab(page, "Attention")
    page.get_by_label("layer", exact=True).select_option("7")
    drawn(page)
    go.set()
    expect(status).not_to_contain_text("Replaying")
    with page.expect_request(lambda r: '"tile"' in (r.post_data or "")) as asked:
        page.get_by_label("layer", exact=True).select_option("3")
    assert '"recorded"' not in asked.value.post_data


def test_a_link_is_followed_where_the_map_was_looked_at_before_it_was_read(page, site, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(app, "Address", SimpleNamespace(read=lambda asked: go.wait(WAIT_S) and Address.read(asked)))
    page.goto(site[0] + "?variant=B&layer=7&head=4")
    page.get_by_role("tab", name="Attention").click()
    drawn(page)
    expect(page.get_by_label("head", exact=True)).to_have_value("0")
    go.set()
    expect(page.get_by_label("head", exact=True)).to_have_value("4")
    expect(page.get_by_label("layer", exact=True)).to_have_value("7")
    drawn(page)


def test_share_copies_a_link_that_opens_the_run(page, site):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab(page, "Runs")
    page.get_by_role("button", name="share older run").click()
    expect(page.locator("#runs table")).to_contain_text("shared")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == site[0] + "?run=20251231-230000-aaaa"
    arrive(page, link)
    expect(page.locator("#header .chip").nth(1)).to_have_text("older run")
    tab(page, "Runs")
    page.get_by_role("button", name="stop sharing older run").click()
    expect(page.locator("#runs table")).not_to_contain_text("shared")
