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
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden && /C − A .* A .* C /.test(t.innerText))")
    page.mouse.down(), page.mouse.up()
    page.wait_for_function("document.querySelector('.mapnote').innerText.includes('pinned')")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('.mapnote').innerText.includes('pinned')")
    page.goto(page.url)
    page.wait_for_function("document.querySelector('.bars') && /differ/i.test(document.querySelector('.bars').innerText)", timeout=20_000)


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
    page.get_by_label("step: the row that was fed last").fill("40")
    page.wait_for_function("!document.querySelector('.cachebox .key').innerText.includes('evicted')")


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
    assert page.locator(".figbox:visible h4").count() == 3
    page.locator(".figtable summary").first.click()
    assert "threshold" in page.inner_text(".figtable >> nth=0")
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
    shades = alone.evaluate("""() => { const c = document.querySelector('#map'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
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
