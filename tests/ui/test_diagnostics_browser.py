"""A diagnostic that runs, in a real Chromium: only its own panel shows it, what stands below keeps its title, Cancel is
answered."""
from __future__ import annotations

import threading

import pytest
from playwright.sync_api import expect

import lab.inspect.diagnostics as computing

from .test_look_browser import canvas

pytestmark = pytest.mark.browser


def test_a_running_diagnostic_is_its_own_and_cancel_is_answered_at_once(page, monkeypatch):
    canvas(page)
    panel, run = page.locator("#diagnostics"), page.locator('[data-key="d-run"]')
    page.click('[data-key="p-long_heads"]')
    run.click()
    expect(panel).to_contain_text("Below: Local and long-context heads of A")
    let, real = threading.Event(), computing.run

    def held(name, session, progress=None):
        progress(0.25)
        let.wait()
        return real(name, session, progress)  # its first look at Cancel ends it
    monkeypatch.setattr(computing, "run", held)
    try:
        page.click('[data-key="p-limits"]')
        page.click('[data-key="p-rollout"]')
        expect(panel).to_contain_text("48 tokens up to the chosen one")
        run.click()
        expect(page.get_by_label("progress")).to_be_visible()
        expect(panel).to_contain_text("25%")
        expect(panel).to_contain_text("Below: Local and long-context heads of A")
        page.click('[data-key="p-shapes"]')
        expect(panel).to_contain_text("Attention rollout and flow of A is running, 25%")
        assert not page.get_by_label("progress").count() and not page.locator('[data-key="d-stop"]').count()
        assert not run.count()
        page.get_by_role("button", name="Go to it").click()
        stop = page.locator('[data-key="d-stop"]')
        expect(stop).to_have_text("Cancel")
        stop.click()
        expect(stop).to_have_text("Stopping")
        expect(stop).to_be_disabled()
    finally:
        let.set()
    expect(panel.locator(".why")).to_contain_text("Cancelled")
    expect(run).to_be_visible()
    expect(panel).to_contain_text("Below: Local and long-context heads of A")
    expect(page.locator(".figbox h4:visible").first).to_have_text("Share of queries that look far")
