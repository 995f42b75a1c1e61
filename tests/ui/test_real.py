"""The whole way on the real engine and the default model: run, look inside, save, reload, open again."""
from __future__ import annotations

import pytest

from .conftest import free_port

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    from lab.ui.app import default_lab, serve

    lab = default_lab(tmp_path_factory.mktemp("runs") / "runs.duckdb")
    lab.ensure_model()
    port = free_port()
    demo = serve(port, lab=lab, block=False, preload=False)
    yield f"http://127.0.0.1:{port}/"
    demo.close()


def one_card(browser, url):
    """A fresh visitor's page with the reference variant only."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto(url)
    page.wait_for_selector("#setup .card")
    page.wait_for_timeout(800)
    while page.locator(".card").count() > 1:
        page.locator('[data-key^="rm-"]').last.click()
        page.wait_for_timeout(150)
    return page


def test_run_look_save_reload_open(browser, real):
    page = one_card(browser, real)
    page.click('[data-key="more"]')
    page.fill('[data-key="find-1"]', "integer")
    page.click('[data-key="sw-1-int_codes"]')
    page.wait_for_selector('[data-key="chip-1-int_codes"]')
    page.fill("#prompt textarea", "The sea was calm, the lamp was lit, and the keeper wrote that")
    page.get_by_label("new tokens").fill("12")
    page.keyboard.press("Tab")
    page.click("#run")
    page.wait_for_function("document.querySelector('#status').innerText.includes('Done.')", timeout=300_000)
    assert page.locator("#columns .col").count() == 2
    assert page.locator("#columns .vB .t").count() >= 10
    assert "nats" in page.inner_text("#columns .vB .strip") and "8 bit" in page.inner_text("#columns .vB .key")
    text = page.inner_text("#columns .vB .text")

    page.get_by_role("tab", name="Attention").click()
    page.wait_for_selector(".bars tr", timeout=120_000)
    box = page.locator(".mapcanvas").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + box["height"] * 0.5)
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden && /weight .* rank/.test(t.innerText))",
                           timeout=60_000)
    page.get_by_role("tab", name="Memory").click()
    page.wait_for_selector("#kvplot .js-plotly-plot")
    assert "predicted" in page.inner_text("#tabs")

    page.goto(real + "?tab=runs")
    page.wait_for_selector("table.runs tbody tr")
    page.locator("table.runs tbody tr").first.get_by_role("button", name="Open").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('Opened')", timeout=60_000)
    assert page.inner_text("#columns .vB .text") == text
    assert page.input_value("#prompt textarea").startswith("The sea was calm")
    page.context.close()


def test_several_continuations(browser, real):
    page = one_card(browser, real)
    page.fill("#prompt textarea", "Three colours of the sea are")
    page.get_by_role("button", name="sampled").click()
    page.get_by_label("continuations").fill("3")
    page.get_by_label("new tokens").fill("6")
    page.keyboard.press("Tab")
    page.click("#run")
    page.wait_for_function("document.querySelector('#status').innerText.includes('Done.')", timeout=300_000)
    assert "2 more continuations" in page.inner_text("#columns .samples summary")
    page.click("#columns .samples summary")
    assert page.locator("#columns .samples li").count() == 2
    page.context.close()


def test_another_model_is_loaded_after_a_run_and_while_one_is_going(browser, real):
    page = one_card(browser, real)
    page.fill("#prompt textarea", "The lamp was lit, and")
    page.get_by_label("new tokens").fill("400")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Change model").click()
    page.fill("#modelsource textarea, #modelsource input", "/no/such/folder")
    page.click("#run")
    page.wait_for_function("document.querySelector('#status').innerText.includes('writing token')", timeout=120_000)
    page.click("#modelload")
    page.wait_for_function("document.querySelector('#modelstatus').innerText.includes('A run is under way')", timeout=30_000)
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText.includes('Stopped')", timeout=60_000)
    page.wait_for_selector("#modelstatus .errorcard", timeout=120_000)
    assert "still loaded" in page.inner_text("#modelstatus")
    page.fill("#modelsource textarea, #modelsource input", "default")
    page.click("#modelload")
    page.wait_for_function("document.querySelector('#modelstatus').innerText.includes('Loaded')", timeout=240_000)
    page.get_by_label("new tokens").fill("4")
    page.click("#run")
    page.wait_for_function("document.querySelector('#status').innerText.includes('Done.')", timeout=120_000)
    page.context.close()
