"""The whole way on the real engine and the default model: run, look inside, save, reload, open again."""
from __future__ import annotations

import re
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from lab.ui.attention import fed
from lab.ui.compare import PERIOD_S

from .conftest import free_port, visitor
from .hands import TELLS_WEIGHT, WAIT_S, arrive, canvas, named_run, point, status_says, tab, tells

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(url, lab) of a served app on the default model."""
    from lab.ui.app import default_lab, serve

    lab = default_lab(tmp_path_factory.mktemp("runs") / "runs.duckdb")
    lab.ensure_model()
    port = free_port()
    demo = serve(port, lab=lab, block=False, preload=False)
    yield f"http://127.0.0.1:{port}/", lab
    demo.close()


@contextmanager
def one_card(browser, url):
    """A fresh visitor's page with the reference variant only."""
    with visitor(browser) as page:
        arrive(page, url)
        cards = page.locator("#setup .card")
        expect(cards).to_have_count(3)
        for left in (2, 1):
            page.locator('[data-key^="rm-"]').last.click()
            expect(cards).to_have_count(left)
        yield page


def test_run_look_save_reload_open(browser, real):
    url, lab = real
    with one_card(browser, url) as page:
        page.click('[data-key="more"]')
        page.fill('[data-key="find-1"]', "integer")
        page.click('[data-key="sw-1-int_codes"]')
        page.wait_for_selector('[data-key="chip-1-int_codes"]')
        page.fill("#prompt textarea", "The sea was calm, the lamp was lit, and the keeper wrote that")
        page.get_by_label("new tokens").fill("12")
        page.keyboard.press("Tab")
        page.click("#run")
        status_says(page, "Done.")
        expect(page.locator("#columns .col")).to_have_count(2)
        expect(page.locator("#columns .vB .t").nth(9)).to_be_attached()
        expect(page.locator("#columns .vB .strip")).to_contain_text("nats")
        expect(page.locator("#columns .vB .key")).to_contain_text("8 bit")
        text = page.inner_text("#columns .vB .text")
        run = lab.shelf.get(lab.open(named_run(page), ""))

        canvas(page, tokens=fed(run, "A"))
        point(page, ".mapcanvas", (0.05, 0.5), tells(page, TELLS_WEIGHT))
        tab(page, "Memory")
        page.wait_for_selector("#kvplot .js-plotly-plot")
        expect(page.locator("#tabs")).to_contain_text("predicted")

        arrive(page, url + "?tab=runs")
        page.locator("table.runs tbody tr").first.get_by_role("button", name="Open").click()
        status_says(page, "Opened")
        expect(page.locator("#columns .vB .text")).to_have_text(text, use_inner_text=True)
        expect(page.locator("#prompt textarea")).to_have_value(re.compile("^The sea was calm"))


def test_several_continuations(browser, real):
    with one_card(browser, real[0]) as page:
        page.fill("#prompt textarea", "Three colours of the sea are")
        page.get_by_role("button", name="sampled").click()
        page.get_by_label("continuations").fill("3")
        page.get_by_label("new tokens").fill("6")
        page.keyboard.press("Tab")
        page.click("#run")
        status_says(page, "Done.")
        expect(page.locator("#columns .samples summary")).to_contain_text("2 more continuations")
        page.click("#columns .samples summary")
        expect(page.locator("#columns .samples li:visible")).to_have_count(2)


def written_until_stopped(lab, tokens):
    """`lab.run` whose runs rest once so many tokens are written and shown, until they are stopped: they do not end by themselves,
    however fast the machine writes and whatever the model says."""
    real = lab.run

    def run(prompt, variants, settings, job, owner=""):
        seen, until = 0, time.monotonic() + WAIT_S
        for event in real(prompt, variants, settings, job, owner):
            seen += type(event).__name__ == "Token"
            if seen == tokens:
                time.sleep(PERIOD_S)  # what comes later than that is sent to the page
            yield event
            while seen == tokens and not job.stopped and time.monotonic() < until:
                time.sleep(0.02)
    return run


def test_another_model_is_loaded_after_a_run_and_while_one_is_going(browser, real, monkeypatch):
    whole = real[1].run
    monkeypatch.setattr(real[1], "run", written_until_stopped(real[1], 3))
    with one_card(browser, real[0]) as page:
        told = page.locator("#modelstatus")
        page.fill("#prompt textarea", "The lamp was lit, and")
        page.get_by_role("button", name="Change model").click()
        page.fill("#modelsource textarea, #modelsource input", "/no/such/folder")
        page.click("#run")
        status_says(page, "writing token")
        page.click("#modelload")
        expect(told).to_contain_text("A run is under way")
        page.click("#stop")
        status_says(page, "Stopped")
        expect(told.locator(".errorcard")).to_contain_text("still loaded")
        page.fill("#modelsource textarea, #modelsource input", "default")
        page.click("#modelload")
        expect(told).to_contain_text("Loaded", timeout=300_000)
        monkeypatch.setattr(real[1], "run", whole)
        page.get_by_label("new tokens").fill("4")
        page.keyboard.press("Tab")
        page.click("#run")
        status_says(page, "Done.")
