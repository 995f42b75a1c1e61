"""What a person does, in a real Chromium, on the synthetic lab."""
from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.browser


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def status_says(page, text: str, timeout: int = 20_000) -> None:
    page.wait_for_function("t => document.querySelector('#status').innerText.includes(t)", arg=text, timeout=timeout)


def test_first_visit_is_full_and_says_that_it_is_recorded(page):
    assert "Recorded example" in page.inner_text("#banner")
    assert page.locator("#columns .col").count() == 3
    assert "<script>alert(1)</script>" in page.inner_text("#columns .col >> nth=1")
    page.wait_for_function("document.querySelector('#setup .kv')")
    tab(page, "Attention")
    page.wait_for_selector(".bars tr")
    page.wait_for_selector(".heads tbody tr")
    tab(page, "Memory")
    page.wait_for_selector("#kvplot .js-plotly-plot")
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")


def test_run_streams_every_column_and_cannot_be_doubled(page, site):
    lab = site[1]
    before = lab.runs_made
    page.fill("#prompt textarea", "A prompt with <b>markup</b> & marks")
    page.click("#run")
    page.wait_for_function("""[...document.querySelectorAll('#columns .col')].every(c => c.querySelector('.caret')
                              && c.querySelectorAll('.t').length > 2)""")
    lengths = page.evaluate("[...document.querySelectorAll('#columns .col')].map(c => c.querySelectorAll('.t').length)")
    assert max(lengths) - min(lengths) <= 2
    assert page.is_disabled("#run") and page.is_enabled("#stop")
    status_says(page, "Done.")
    assert lab.runs_made == before + 1
    assert page.is_enabled("#run") and page.is_disabled("#stop")
    assert "run=" in page.url and page.locator("#banner").inner_text().strip() == ""
    page.reload()
    page.wait_for_function("(document.querySelector('#prompt textarea') || {value: ''}).value.includes('<b>markup</b>')")


def test_stop_keeps_what_was_written(page):
    page.click("#run")
    page.wait_for_selector("#columns .caret")
    page.wait_for_function("document.querySelectorAll('#columns .col .t').length > 9")
    page.click("#stop")
    status_says(page, "Stopped.", 10_000)
    assert "stopped by you" in page.inner_text("#columns")
    assert page.locator("#columns .vA .t").count() > 2


def test_an_empty_prompt_is_one_sentence(page):
    page.fill("#prompt textarea", "   ")
    page.click("#run")
    page.wait_for_selector(".errorcard")
    assert "The prompt is empty" in page.inner_text(".errorcard")
    assert page.is_enabled("#run")


def test_cards_toggle_block_undo_and_predict(page):
    page.click('[data-key="edit-1"]')
    page.wait_for_selector('[data-key="sw-1-streaming"][aria-disabled]')
    assert "score slot" in page.inner_text(".editor.vB .tech.off .why")
    predicted = page.inner_text(".card.vB .kv")
    page.click('[data-key="sw-1-kivi"]')
    page.wait_for_function("t => document.querySelector('.card.vB .kv').innerText !== t", arg=predicted)
    assert page.get_attribute('[data-key="sw-1-kivi"]', "aria-checked") == "false"
    assert page.locator('[data-key="al-1-kivi-bits"]').count() == 0
    page.click('[data-key="undo"]')
    page.wait_for_selector('[data-key="sw-1-kivi"][aria-checked="true"]')
    page.fill('[data-key="al-1-h2o-budget"]', "0.5")
    page.press('[data-key="al-1-h2o-budget"]', "Tab")
    page.wait_for_function("document.querySelector('.card.vB h3').title.includes('budget=0.5')")
    page.click('[data-key="more"]')
    page.wait_for_selector(".card.vD")
    assert page.is_disabled('[data-key="more"]')
    page.click('[data-key="rm-3"]')
    page.wait_for_function("document.querySelectorAll('.card').length === 3")


def test_the_pipeline_is_the_navigation(page):
    page.focus('[data-slot="encode"]')
    page.keyboard.press("Enter")
    page.wait_for_selector(".slotpanel")
    assert "KIVI" in page.inner_text(".slotpanel") and "2024" in page.inner_text(".slotpanel")
    page.click('.slotpanel [data-key="sw-0-kivi"]')
    page.wait_for_selector('.card.vA [data-key="chip-0-kivi"]')


def test_a_token_tells_its_story_by_mouse_and_by_keyboard(page):
    page.hover("#columns .vB .t >> nth=6")
    tip = page.locator("#al-token-tip, .al-tip:not([hidden])").first
    assert all(word in tip.inner_text() for word in ("probability", "KL", "kept"))
    page.focus('#columns .vB .t[tabindex="0"]')
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "1"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reference text").click()
    assert page.locator("#columns .vB .t").count() == page.locator("#columns .vA .t").count()


def canvas(page) -> dict:
    tab(page, "Attention")
    page.wait_for_selector(".bars tr")
    page.wait_for_timeout(300)
    return page.locator(".mapcanvas").bounding_box()


def test_map_hover_pin_zoom_drag_and_keys(page):
    box = canvas(page)
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.6)
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden && /weight .* rank/.test(t.innerText))")
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.6)
    assert "pinned" in page.inner_text(".mapnote")
    row = page.inner_text(".bars .h .num")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("t => document.querySelector('.bars .h .num').innerText !== t", arg=row)
    page.keyboard.press("Escape")
    assert "pinned" not in page.inner_text(".mapnote")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.wheel(0, -400)
    page.wait_for_function("document.querySelector('.mapnote').innerText.includes('in sight')")
    before = page.evaluate("document.querySelector('.mapcanvas').toDataURL().length")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()
    page.wait_for_timeout(400)
    assert page.evaluate("document.querySelector('.mapcanvas').toDataURL().length") != before
    page.get_by_role("button", name="Whole run").click()
    page.wait_for_function("!document.querySelector('.mapnote').innerText.includes('in sight')")


def test_map_and_token_strip_are_linked_both_ways(page):
    canvas(page)
    page.click('.tk[data-i="90"]')
    page.wait_for_function("document.querySelector('.bars .h .num').innerText === 'row 90'")
    assert page.locator(".tk.q").get_attribute("data-i") == "90"
    page.get_by_role("button", name="B", exact=True).first.click()
    page.wait_for_function("document.querySelectorAll('.tk.gone').length === 0 || true")
    page.click('.tk[data-i="118"]')
    page.wait_for_function("document.querySelectorAll('.tk.gone').length > 10")
    assert "evicted" in page.inner_text(".bars")


def test_layers_that_were_not_captured_offer_what_can_be_done(page):
    canvas(page)
    page.get_by_label("layer", exact=True).select_option("5")
    page.wait_for_selector(".mapcover:not([hidden])")
    assert "Captured layers are 0, 3, 7" in page.inner_text(".mapcover")
    page.get_by_role("button", name="Show layer 7").click()
    page.wait_for_selector(".mapcover", state="hidden")
    assert "layer=7" in page.url


def test_a_link_opens_tab_run_layer_and_head(page, site):
    page.goto(site[0] + "?tab=attention&run=20251231-230000-aaaa&variant=B&layer=7&head=4")
    page.wait_for_selector(".bars tr")
    page.wait_for_function("document.querySelector('#attention select[aria-label=head]').value === '4'")
    assert page.get_by_label("layer", exact=True).input_value() == "7"
    page.wait_for_function("document.querySelectorAll('#header .chip')[1].innerText === 'older run'")
    for tab_named in ("nonsense", "attention"):
        page.goto(site[0] + f"?tab={tab_named}&run=missing&layer=x")
        page.wait_for_selector(".errorcard")  # in sight, whichever tab was asked for
        assert "missing" in page.inner_text(".errorcard")


def test_runs_open_rename_tag_delete_undo_compare_export(page):
    page.click("#run")
    status_says(page, "Done.")
    tab(page, "Runs")
    page.wait_for_function("document.querySelectorAll('table.runs tbody tr').length >= 2")
    total = page.locator("table.runs tbody tr").count()
    first = page.locator("table.runs tbody tr").first
    first.get_by_role("button", name="Rename").click()
    page.wait_for_selector(".editing")
    page.evaluate("() => document.querySelector('#runs input[type=search]').dispatchEvent(new Event('input'))")  # a redraw while typing
    page.fill(".editing", 'my <i>run</i> "1"')
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#runs').innerText.includes('my <i>run</i>')")
    page.locator("table.runs tbody tr", has_text="my <i>run</i>").get_by_role("button", name="Delete").click()
    page.wait_for_function("n => document.querySelectorAll('table.runs tbody tr').length === n", arg=total - 1)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("n => document.querySelectorAll('table.runs tbody tr').length === n", arg=total)
    for box in page.locator("table.runs input[type=checkbox]").all()[:2]:
        box.check()
    page.get_by_role("button", name=re.compile("Compare 2 runs")).click()
    page.wait_for_selector("table.cmp tbody tr")
    few = page.locator("table.cmp tbody tr").count()
    page.get_by_role("button", name="all fields").click()
    page.wait_for_function("n => document.querySelectorAll('table.cmp tbody tr').length > n", arg=few)
    with page.expect_download() as got:
        page.locator("table.runs tbody tr").first.locator("select").select_option("json")
    assert json.loads(open(got.value.path(), encoding="utf-8").read())
    page.locator("#runs input[type=search]").first.fill("nothing matches this")
    assert "No run matches" in page.inner_text("#runs")
    page.locator("#runs input[type=search]").first.fill("older")
    page.locator("table.runs tbody tr").first.get_by_role("button", name="Open").click()
    page.wait_for_selector("#columns .col:visible")
    status_says(page, "Opened as it was saved.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_width_overflows_in_light_and_dark(browser, site, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(site[0])
    page.wait_for_selector("#columns .col")
    for name in ("Compare", "Attention", "Memory", "Runs"):
        if page.get_by_role("tab", name=name).is_visible():
            tab(page, name)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
    dark = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert dark == ("rgb(20, 22, 26)" if scheme == "dark" else "rgb(251, 251, 250)")
    if width == 390:
        tab(page, "Compare")
        assert not page.is_visible("#settings select")
        page.click(".sidetoggle")
        assert page.is_visible("#settings select")
    context.close()


def test_the_theme_can_be_switched_and_is_remembered(page):
    background = "getComputedStyle(document.querySelector('.gradio-container')).backgroundColor"
    light = page.evaluate(background)
    page.click("[data-theme]")
    assert page.evaluate(background) != light
    page.reload()
    page.wait_for_selector("#columns .col")
    assert page.evaluate(background) != light


def test_two_visitors_do_not_see_each_other(browser, site, page):
    page.fill("#prompt textarea", "first visitor's own words")
    other = browser.new_context().new_page()
    other.goto(site[0])
    other.wait_for_selector("#columns .col")
    assert "first visitor" not in other.input_value("#prompt textarea")
    other.context.close()


def test_a_second_visitor_waits_in_sight_and_may_give_up(browser, site, page):
    site[1].step_s = 0.2
    page.click("#run")
    page.wait_for_selector("#columns .caret")
    context = browser.new_context()
    other = context.new_page()
    other.goto(site[0])
    other.wait_for_selector("#columns .col")
    other.wait_for_timeout(500)
    other.click("#run")
    other.wait_for_function("/queue/i.test(document.querySelector('#status').innerText)")
    other.wait_for_function("!document.querySelector('#stop').disabled")
    other.click("#stop")
    other.wait_for_function("document.querySelector('#status').innerText.includes('Stopped before it began')")
    site[1].step_s = 0.02
    status_says(page, "Done.", 60_000)
    context.close()


def test_the_count_and_the_predicted_size_follow_the_chat_turn(page):
    count = "() => parseInt(document.querySelector('#promptpanel .h').innerText.replace(/[^0-9]/g, ''))"
    before, size = page.evaluate(count), page.inner_text("#setup .kv >> nth=0")
    page.get_by_label("prompt is: chat turn").click()
    page.wait_for_function(f"n => ({count})() === n + 9", arg=before)
    page.wait_for_function("t => document.querySelector('#setup .kv').innerText !== t", arg=size)
    page.get_by_label("prompt is: text").click()
    page.wait_for_function(f"n => ({count})() === n", arg=before)


INSIDE = """s => { const r = document.querySelector(s).getBoundingClientRect(), box = document.querySelector(s).closest('.tablebox')
  .getBoundingClientRect(); return r.width > 0 && r.right <= box.right + 1 && r.left >= box.left - 1; }"""


@pytest.mark.parametrize("width", [1440, 900, 768, 390])
def test_tables_hide_nothing_beside_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")
    assert page.evaluate(INSIDE, "table.runs tbody tr td.acts button[aria-label^=delete]")
    tab(page, "Memory")
    page.wait_for_selector("table.costs")
    if width in (1440, 390):
        assert page.evaluate(INSIDE, "table.costs tbody tr:last-child td:last-child")
    assert page.locator("table.costs td[data-name=agreement]").count() == 3


def test_runs_are_imported_from_a_file_and_a_wrong_file_is_told(page, site, tmp_path):
    name, _, data = site[1].library.export("20251231-230000-aaaa", "parquet")
    (tmp_path / name).write_bytes(data)
    (tmp_path / "table.csv").write_bytes(site[1].library.export("20251231-230000-aaaa", "csv")[2])
    tab(page, "Runs")
    page.wait_for_selector("table.runs tbody tr")
    for file, told in ((name, "Imported."), ("table.csv", "CSV leaves out")):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import").click()
        chooser.value.set_files(tmp_path / file)
        page.wait_for_function("t => document.body.innerText.includes(t)", arg=told)
