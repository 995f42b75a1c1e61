"""Looking inside, in a real Chromium, on the synthetic lab: differences, the grid, token measures, diagnostics, export."""
from __future__ import annotations

import re

import pytest

from .test_browser import canvas

pytestmark = pytest.mark.browser


def test_a_difference_names_both_sides_and_survives_a_reload(page):
    box = canvas(page)
    page.get_by_role("button", name="C − A").click()
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('A more')")
    assert "minus=A" in page.url and "variant=C" in page.url
    assert "texts differ" in page.inner_text(".mapscale")
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6)
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden "
                           "&& /C − A .* A .* C /.test(t.innerText))")
    page.mouse.down(), page.mouse.up()
    page.wait_for_function("document.querySelector('.mapnote').innerText.includes('pinned')")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('.mapnote').innerText.includes('pinned')")
    page.goto(page.url)
    page.wait_for_function("document.querySelector('.bars') && /differ/i.test(document.querySelector('.bars').innerText)",
                           timeout=20_000)


def test_rollout_says_which_layers_it_saw(page):
    canvas(page)
    page.get_by_label("head", exact=True).select_option("rollout")
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('captured layers 0, 3, 7')")
    assert "head=rollout" in page.url


def test_a_thumbnail_opens_its_head_by_click_and_by_key(page):
    canvas(page)
    page.click('[data-key="grid"]')
    page.wait_for_selector(".thumb")
    assert page.locator(".thumb").count() == 18
    page.locator(".thumb").nth(13).click()
    page.wait_for_function("document.querySelector('#attention select[aria-label=head]').value === '1'")
    assert "layer=7" in page.url and page.locator(".thumb.on").count() == 1
    page.locator(".thumb").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("location.search.includes('layer=0') && location.search.includes('head=1')")
    page.get_by_label("sort heads by").select_option("entropy")
    page.wait_for_selector(".gridsorted")
    page.get_by_label("least entropy").fill("99")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('.gridbox').innerText.includes('No head reaches')")
    page.click('.gridbox [data-key="as-true"] >> nth=0')
    page.get_by_label("sort heads by").select_option("layer")
    assert page.locator(".gridbox tbody tr").count() == 18


def test_the_time_slider_goes_back_to_before_the_eviction(page):
    canvas(page)
    page.get_by_role("button", name="B", exact=True).first.click()
    page.wait_for_function("document.querySelector('.cachebox .key').innerText.includes('evicted')")
    slider = page.get_by_label("step: the row that was fed last")
    assert "step 24 of 24" in page.inner_text(".cachebox") and int(slider.get_attribute("max")) < 40, "decode steps, not rows"
    slider.fill("1")
    page.wait_for_function("!document.querySelector('.cachebox .key').innerText.includes('evicted')")
    assert "the prompt is read" in page.inner_text(".cachebox") and slider.get_attribute("aria-valuetext") == "the prompt is read"
    slider.press("ArrowRight")
    page.wait_for_function("document.querySelector('.cachebox .key').innerText.includes('evicted')")
    assert "step 1 of" in page.inner_text(".cachebox")
    page.get_by_text("Table: entries by layer at this step").click()
    assert page.locator(".cachebox details[open] tbody tr").count() == 8
    page.get_by_label("KV head of the cache map").select_option("1")
    page.wait_for_function("document.querySelector('.cachebox .key').innerText.includes('evicted')")


def test_a_click_on_a_token_tells_its_life_and_what_it_was_merged_into(page):
    canvas(page)
    page.get_by_role("button", name="B", exact=True).first.click()
    page.wait_for_function("document.querySelector('.cachebox .key').innerText.includes('evicted')")
    page.click('.tk[data-i="120"]')
    page.click('.tk[data-i="20"]')
    page.wait_for_function("/life of token 20/i.test(document.querySelector('.life').innerText)")
    assert "merged into" in page.inner_text(".life") and " 1 (" in page.inner_text(".life")
    assert "still there at the end" in page.inner_text(".life") or "nothing of it" in page.inner_text(".life")
    page.get_by_text("Table: entry by entry").click()
    assert "merged" in page.inner_text(".life details[open] table")
    page.locator(".life button.link").first.click()
    page.wait_for_function("/life of token 1$/im.test(document.querySelector('.life .row').innerText.split('\\n')[0])")
    page.focus(".cachecanvas")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("/life of token 2/i.test(document.querySelector('.life').innerText)")
    page.locator(".tokview .vC .tv").nth(3).click()
    page.wait_for_function("location.search.includes('variant=C') "
                           "&& document.querySelector('.mapnote').innerText.includes('pinned')")


def test_layers_are_combined_and_the_link_remembers(page, site):
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("mean")
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('Mean over only the captured layers 0, 3, 7')")
    assert "layer=mean" in page.url
    page.get_by_label("head", exact=True).select_option("max")
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('max over heads')")
    box = page.locator(".mapcanvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.6)
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden && /weight .* rank/.test(t.innerText))")
    page.goto(site[0] + "?tab=attention&variant=A&layer=mean&head=max")
    page.wait_for_selector(".bars tr", timeout=20_000)
    assert page.get_by_label("layer", exact=True).input_value() == "mean"
    page.get_by_label("layer", exact=True).select_option("max")
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('Largest over')")
    page.get_by_label("layer", exact=True).select_option("3")
    page.wait_for_function("!document.querySelector('.mapscale').innerText.includes('over only')")


def test_entries_read_at_few_bits_are_drawn_as_such_and_the_map_has_a_table(page):
    canvas(page)
    assert "read at" not in page.inner_text(".mapscale")
    page.get_by_role("button", name="B", exact=True).first.click()
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('read at 2 bit')")
    page.get_by_text("Table: largest weights in sight").click()
    page.wait_for_selector(".mapside details[open] tbody tr")
    assert page.locator(".mapside details[open] tbody tr").count() == 24
    page.locator(".mapside details[open] tbody button").first.click()
    page.wait_for_function("document.querySelector('.mapnote').innerText.includes('pinned')")


def test_what_was_computed_comes_back_with_the_saved_run(page, site):
    def opened():
        page.goto(site[0] + "?tab=attention&run=20251231-230000-aaaa&variant=A")
        page.wait_for_selector(".bars tr", timeout=20_000)

    opened()
    page.click('[data-key="grid"]')
    page.wait_for_selector(".thumb")
    page.click('[data-key="p-sinks"]')
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    opened()
    page.wait_for_selector(".thumb")
    assert page.locator(".thumb").count() == 18
    page.wait_for_selector('[data-key="p-sinks"].kept')
    page.click('[data-key="p-sinks"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    assert "Below: Attention sinks of A" in page.inner_text("#diagnostics")


def test_diagnostics_take_words_places_and_separators(page):
    canvas(page)
    page.click('[data-key="p-iou"]')
    page.get_by_label("words that matter").fill("amber key")
    page.get_by_label("token to look from").fill("9999")
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#diagnostics .why")
    assert "no position in this run" in page.inner_text("#diagnostics .why")
    page.click('.tk[data-i="100"]')
    page.get_by_role("button", name="use the pinned row, 100").click()
    assert page.get_by_label("token to look from").input_value() == "100"
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    assert "row 100" in page.inner_text("#diagnostics .numbers")
    page.click('[data-key="p-basin"]')
    page.get_by_label("what separates documents").fill(".")
    page.click('[data-key="d-run"]')
    page.wait_for_function("document.querySelector('#diagnostics').innerText.includes('Below: Attention basin')")
    assert "score" in page.inner_text("#diagnostics .numbers")
    page.click('[data-key="p-groups"]')
    assert len(page.get_by_label("first set").input_value().splitlines()) >= 3
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#diagnostics .why")
    assert "no model" in page.inner_text("#diagnostics .why")


def test_a_layer_out_of_range_is_one_sentence(page, site):
    page.goto(site[0] + "?tab=attention&layer=99")
    page.wait_for_selector(".al-toast")
    assert re.search(r"Layer 99 does not exist.*0 to 7", page.inner_text(".al-toast"))


def test_text_is_coloured_by_any_measure_and_tells_both_sides(page):
    canvas(page)
    page.wait_for_selector(".toktext .tv")
    page.locator(".tokview .vB .tv").nth(2).focus()
    tip = page.locator(".al-tip:not([hidden])").first
    assert all(word in tip.inner_text() for word in ("KL", "B's choices", "A's choices", "<i>door</i>"))
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "3"
    page.get_by_label("colour the text by").select_option("prompt_mass")
    page.wait_for_function("document.querySelectorAll('.tokview .vA .tv').length > 5")
    assert "Captured layers only: 0, 3, 7" in page.inner_text(".tokview .note")


def test_a_diagnostic_runs_and_shows_figures_with_tables(page):
    canvas(page)
    page.click('[data-key="p-sinks"]')
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#probe0 .js-plotly-plot")
    assert page.locator(".figbox:visible h4").count() == 5
    page.locator(".probes .figtable summary").first.click()
    assert "threshold" in page.inner_text(".probes .figtable >> nth=0")
    page.click('[data-key="p-basin"]')
    page.click('[data-key="d-run"]')
    page.wait_for_selector("#diagnostics .why")
    assert "documents" in page.inner_text("#diagnostics .why")


def test_an_exported_page_opens_from_a_file_without_network(page, browser, tmp_path):
    canvas(page)
    page.get_by_role("button", name="B", exact=True).first.click()
    page.wait_for_function("document.querySelector('.cachebox .key').innerText.includes('evicted')")
    with page.expect_download() as got:
        page.get_by_role("button", name="Export page").click()
    file = tmp_path / "view.html"
    got.value.save_as(file)
    context = browser.new_context(offline=True)
    alone, wrong = context.new_page(), []
    alone.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    alone.on("pageerror", lambda e: wrong.append(str(e)))
    alone.goto(file.as_uri())
    alone.wait_for_selector("body[data-ready]")
    shades = alone.evaluate("""() => { const c = document.querySelector('#map'), g = c.getContext('2d');
                               const d = g.getImageData(0, 0, c.width, c.height).data;
                               return new Set(d.filter((_, i) => i % 4 === 0)).size; }""")
    assert shades > 10
    alone.hover("#map", position={"x": 40, "y": 300})
    assert "weight" in alone.inner_text("#read")
    alone.click("#map", position={"x": 40, "y": 300})
    assert "pinned" in alone.inner_text("#where")
    alone.keyboard.press("Escape")
    assert "pinned" not in alone.inner_text("#where")
    assert "evicted" in alone.inner_text("#key")
    alone.locator("#time").fill("0")
    assert "evicted" not in alone.inner_text("#key")
    assert "<script>alert(1)</script>" in alone.inner_text(".cols") and "per token" in alone.inner_text("table")
    context.close()
    assert wrong == []


def test_share_copies_a_link_that_opens_the_run(page, site):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="share older run").click()
    page.wait_for_function("document.querySelector('#runs').innerText.includes('shared')")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == site[0] + "?run=20251231-230000-aaaa"
    page.goto(link)
    page.wait_for_function("(document.querySelectorAll('#header .chip')[1] || {}).innerText === 'older run'")
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="stop sharing older run").click()
    page.wait_for_function("!document.querySelector('#runs table').innerText.includes('shared')")
