"""Leaving the queue and running again, and the browser's Back button, in a real Chromium on the synthetic lab."""
from __future__ import annotations

import pytest
from playwright.sync_api import expect

from .conftest import visitor
from .hands import arrive, tab

pytestmark = pytest.mark.browser


def test_who_leaves_the_queue_can_run_again_and_runs_once(page, browser, site):
    url, lab = site
    before = lab.runs_made
    with visitor(browser) as other:
        arrive(other, url)
        status, run = other.locator("#status"), other.locator("#run")
        with lab.held(2):
            page.click("#run")
            expect(page.locator("#status")).to_contain_text("held")
            run.click()
            expect(status).to_contain_text("waits for its turn")
            other.click("#stop")
            expect(status).to_contain_text("Taken out of the queue")
            expect(run).to_be_enabled()
            expect(other.locator("#stop")).to_be_disabled()
            run.click()
            expect(status).to_contain_text("waits for its turn")
        expect(status).to_contain_text("Done.")
        expect(page.locator("#status")).to_contain_text("Done.")
    assert lab.runs_made == before + 2


def test_back_and_forward_choose_tabs(page):
    for name in ("Runs", "Attention"):
        tab(page, name)
        page.wait_for_url(f"**/*tab={name.lower()}*")
    page.go_back()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    page.go_back()
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    page.go_forward()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    page.wait_for_url("**/*tab=runs*")
