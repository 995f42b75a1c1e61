"""Leaving the queue, typing numbers out of range, Ctrl+Enter and the browser's Back button, in a real Chromium on the
synthetic lab."""
from __future__ import annotations

import pytest
from playwright.sync_api import expect

from .conftest import visitor
from .hands import arrive, tab, toasted

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


def test_numbers_out_of_range_are_told_and_nothing_is_emptied(page):
    box = page.get_by_label("new tokens")
    box.fill("99999")
    page.keyboard.press("Tab")
    toasted(page, "new tokens goes from 1 to 1,024: 1,024 is set")
    expect(box).to_have_value("1024")
    box.fill("")
    page.keyboard.press("Tab")
    toasted(page, "1,024 stays")
    expect(box).to_have_value("1024")


def test_control_and_enter_run_what_is_written(page, site):
    before = site[1].runs_made
    page.fill("#prompt textarea", "The lamp was lit")
    page.locator("#prompt textarea").press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done.")
    assert site[1].runs_made == before + 1
    expect(page.locator("#prompt textarea")).to_have_value("The lamp was lit")
    assert "common." not in page.evaluate("document.body.textContent")  # Gradio's untranslated words


def test_on_a_phone_the_editor_opens_under_its_card(browser, site):
    with visitor(browser, viewport={"width": 390, "height": 800}) as phone:
        arrive(phone, site[0])
        phone.click('[data-key="edit-1"]')
        expect(phone.locator(".card.open + .editor")).to_have_count(1)
        expect(phone.locator("#header .chip:visible")).to_have_text(["recorded example"])  # the run, on every tab
        phone.set_viewport_size({"width": 1200, "height": 800})
        expect(phone.locator(".cards + .editor")).to_have_count(1)
