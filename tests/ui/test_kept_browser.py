"""A kept overview, and a long drawing that is cancelled, in a real Chromium on the synthetic lab."""
from __future__ import annotations

import time

import pytest
from playwright.sync_api import expect

from lab.inspect import pooled
from lab.ui import grid, maps
from lab.ui.opened import OpenRun

from . import fixture
from .hands import WAIT_S, arrive, drawn, point, tells

pytestmark = pytest.mark.browser


def test_a_run_without_queries_and_keys_opens_at_its_overview_and_offers_the_replay(page, site):
    url, lab = site
    record, arrays = fixture.record_and_arrays("20260108-000000-kept")
    whole = {n: a for n, a in arrays.items() if n.startswith("qk/")}
    lab.keep(fixture.Outcome(record, {n: a for n, a in arrays.items() if n not in whole}), "")
    run = lab.shelf.get(lab.open(record["run_id"], ""))
    run.add(whole)
    while "fraction" in grid.grid(lab, run, {"letter": "B"}):
        time.sleep(0.02)
    maps.tile(run, {"letter": "B", "layer": 3, "head": "rollout", "rows": [0, 999], "cols": [0, 999]})
    run.let_go()
    arrive(page, f"{url}?tab=attention&run={record['run_id']}&variant=B&layer=3&head=2")
    note, ready = page.locator(".mapnote"), '#attention .mapbox[aria-busy="false"]'
    page.wait_for_selector(ready)
    expect(note).to_contain_text("kept with the run")
    expect(note).to_contain_text("max of 2 × 2 a cell")
    expect(page.locator(".thumb")).to_have_count(18)
    expect(page.locator('[data-key="zoomreplay"]')).to_have_text("Replay to zoom to single tokens")
    expect(page.locator(".bars")).to_contain_text("replay it to zoom to single tokens")
    expect(page.locator(".heads tbody tr")).to_have_count(6)
    expect(page.locator(".cachecanvas")).to_be_visible()
    point(page, ".mapcanvas", (0.2, 0.7), tells(page, "of 2 × 2 tokens ≈"))
    page.mouse.wheel(0, -600)
    expect(note).to_contain_text("in sight")
    expect(note).to_contain_text("2 × 2 a cell")
    page.locator(".thumb").nth(13).click()
    page.wait_for_function("location.search.includes('layer=7')")
    page.wait_for_selector(ready)
    expect(note).to_contain_text("kept with the run")
    page.get_by_label("head", exact=True).select_option("rollout")
    expect(page.locator("#attention .att .mapscale")).to_contain_text("Rollout through")
    page.wait_for_selector(ready)
    expect(note).to_contain_text("kept with the run")


def test_a_long_drawing_shows_how_far_it_is_and_can_be_cancelled(page, site, monkeypatch):
    url, lab = site
    arrive(page, f"{url}?tab=attention&variant=A&layer=3&head=1")
    drawn(page)
    real = OpenRun.lens

    class Slow:
        def __init__(self, lens):
            self.tokens, self._lens = lens.tokens, lens

        def view(self, rows, cols, width, height, pool, progress=None, cancel=None):
            until = time.monotonic() + WAIT_S
            while time.monotonic() < until:  # it ends by being cancelled alone
                progress(0.25)
                if cancel():
                    raise pooled.Cancelled()
                time.sleep(0.02)

        def row(self, i):
            return self._lens.row(i)

    monkeypatch.setattr(OpenRun, "lens", lambda self, letter, layer, head, minus=None, exact=False:
                        (Slow if head == "max" else lambda x: x)(real(self, letter, layer, head, minus, exact)))
    page.get_by_label("head", exact=True).select_option("max")
    expect(page.locator(".mapcover").filter(has_text="Computing the map · 25%")).to_be_visible()
    page.click('[data-key="map-stop"]')
    page.wait_for_function("location.search.includes('head=1')")
    drawn(page)
    run = lab.shelf.get("recorded")

    def drawing() -> bool:
        return any(key[0] == "tile" for key in list(run.tasks) if isinstance(key, tuple))
    until = time.monotonic() + WAIT_S / 2
    while drawing() and time.monotonic() < until:
        time.sleep(0.02)
    assert not drawing(), "the server gave it up as well"
