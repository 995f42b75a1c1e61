"""A kept overview, and a long drawing that is cancelled, in a real Chromium on the synthetic lab."""
from __future__ import annotations

import time

import pytest

from lab.inspect import pooled
from lab.ui import grid, maps
from lab.ui.opened import OpenRun

from . import fixture

pytestmark = pytest.mark.browser
NOTE = "document.querySelector('.mapnote') && document.querySelector('.mapnote').innerText"


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
    page.goto(f"{url}?tab=attention&run={record['run_id']}&variant=B&layer=3&head=2")
    page.wait_for_function(f"{NOTE} && {NOTE}.includes('kept with the run')")
    assert "max of 2 × 2 a cell" in page.inner_text(".mapnote") and page.locator(".thumb").count() == 18
    assert page.locator('[data-key="zoomreplay"]').inner_text() == "Replay to zoom to single tokens"
    page.wait_for_function("document.querySelector('.bars').innerText.includes('replay it to zoom to single tokens')")
    assert page.locator(".heads tbody tr").count() == 6 and page.locator(".cachecanvas").is_visible()
    page.locator(".mapcanvas").scroll_into_view_if_needed()
    box = page.locator(".mapcanvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.7)
    page.wait_for_function("[...document.querySelectorAll('.al-tip')].some(t => !t.hidden "
                           "&& /of 2 × 2 tokens ≈/.test(t.innerText))")
    page.mouse.wheel(0, -600)
    page.wait_for_function(f"{NOTE}.includes('in sight') && {NOTE}.includes('2 × 2 a cell')")
    page.locator(".thumb").nth(13).click()
    page.wait_for_function("location.search.includes('layer=7')")
    page.wait_for_function(f"{NOTE}.includes('kept with the run')")
    page.get_by_label("head", exact=True).select_option("rollout")
    page.wait_for_function("document.querySelector('.mapscale').innerText.includes('Rollout through')")
    page.wait_for_function(f"{NOTE}.includes('kept with the run')")


def test_a_long_drawing_shows_how_far_it_is_and_can_be_cancelled(page, site, monkeypatch):
    url, lab = site
    page.goto(f"{url}?tab=attention&variant=A&layer=3&head=1")
    page.wait_for_function(f"{NOTE} && {NOTE}.includes('a cell')")
    real = OpenRun.lens

    class Slow:
        def __init__(self, lens):
            self.tokens, self._lens = lens.tokens, lens

        def view(self, rows, cols, width, height, pool, progress=None, cancel=None):
            for n in range(600):
                time.sleep(0.02)
                if progress:
                    progress(n / 600)
                if cancel and cancel():
                    raise pooled.Cancelled()
            return self._lens.view(rows, cols, width, height, pool)

        def row(self, i):
            return self._lens.row(i)

    monkeypatch.setattr(OpenRun, "lens", lambda self, letter, layer, head, minus=None, exact=False:
                        (Slow if head == "max" else lambda x: x)(real(self, letter, layer, head, minus, exact)))
    page.get_by_label("head", exact=True).select_option("max")
    page.wait_for_function("/Computing the map · [1-9]/.test(document.querySelector('.mapcover').innerText)")
    page.click('[data-key="map-stop"]')
    page.wait_for_function("location.search.includes('head=1') && document.querySelector('.mapcover').hidden")
    page.wait_for_function(f"{NOTE}.includes('a cell')")
    run = lab.shelf.get("recorded")
    until = time.time() + 10
    while any(key[0] == "tile" for key in list(run.tasks) if isinstance(key, tuple)) and time.time() < until:
        time.sleep(0.1)
    assert not any(key[0] == "tile" for key in list(run.tasks) if isinstance(key, tuple)), "the server gave it up as well"
