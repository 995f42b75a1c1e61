"""What was set in Compare and not run is not lost: by a reload, a preset or an opened run, in a real Chromium."""
from __future__ import annotations

import threading

import pytest
from playwright.sync_api import expect

from lab.ui import assets

from .hands import WAIT_S, arrive, reload, status_says, tab, toasted

pytestmark = pytest.mark.browser
TYPED = "Typed, never run"


def set_own(page):
    """A prompt, a number of tokens and two variants that no run had."""
    page.fill("#prompt textarea", TYPED)
    page.get_by_label("new tokens").fill("17")
    page.keyboard.press("Tab")
    page.click('[data-key="rm-1"]')
    own(page)


def own(page):
    """What `set_own` set is in sight."""
    expect(page.locator("#prompt textarea")).to_have_value(TYPED)
    expect(page.get_by_label("new tokens")).to_have_value("17")
    expect(page.locator(".card")).to_have_count(2)


def offer(page):
    """The line about what was set, without that of a run that was left."""
    return page.locator("#unfinished .banner")


def test_what_was_typed_is_there_after_a_reload_and_can_be_discarded(page, site):
    set_own(page)
    reload(page)
    own(page)
    expect(offer(page)).to_contain_text("What you had set and not run yet is set again.")
    reload(page)
    own(page)
    page.get_by_role("button", name="Discard it").click()
    expect(page.locator("#prompt textarea")).not_to_have_value(TYPED)
    expect(page.locator(".card")).to_have_count(3)
    expect(offer(page)).to_have_count(0)
    reload(page)
    expect(page.locator(".card")).to_have_count(3)
    expect(offer(page)).to_have_count(0)


def test_another_run_in_the_address_shows_its_own_and_nothing_typed_is_nothing_to_tell(page, site):
    reload(page)
    expect(offer(page)).to_have_count(0)
    set_own(page)
    arrive(page, f"{site[0]}?run=20251231-230000-aaaa")
    expect(page.locator("#prompt textarea")).not_to_have_value(TYPED)
    expect(offer(page)).to_have_count(0)


@pytest.mark.parametrize("what", ["preset", "run"])
def test_what_took_its_place_can_be_taken_back(page, site, what, monkeypatch):
    found = assets.preset
    monkeypatch.setattr(assets, "preset", lambda name: {**found(name), "variants": ["dense", "h2o"]})
    set_own(page)
    if what == "preset":
        for name in ("zerotuning", "heads"):  # as the arrows of a keyboard go through the list
            page.get_by_label("preset").select_option(name)
            expect(page.locator("#prompt textarea")).to_have_value(found(name)["prompt"])
    else:
        tab(page, "Runs")
        page.locator(".runs tbody tr", has_text="older run").get_by_role("button", name="Open", exact=True).click()
        status_says(page, "Opened as it was saved.")
    name = {"preset": "preset", "run": "opened run"}[what]
    expect(offer(page)).to_contain_text(f"The {name} took the place of what you had set.")
    page.get_by_role("button", name="Bring it back").click()
    own(page)
    expect(offer(page)).to_have_count(0)


def test_a_run_that_was_opened_slowly_does_not_take_the_person_away(page, site, monkeypatch):
    go, opened = threading.Event(), site[1].open

    def slowly(run_id, owner):
        go.wait(WAIT_S)
        return opened(run_id, owner)
    monkeypatch.setattr(site[1], "open", slowly)
    tab(page, "Runs")
    page.locator(".runs tbody tr", has_text="older run").get_by_role("button", name="Open", exact=True).click()
    tab(page, "Memory & speed")
    go.set()
    expect(page.locator("#header")).to_contain_text("older run")
    expect(page.get_by_role("tab", name="Memory & speed")).to_have_attribute("aria-selected", "true")


def test_a_run_that_is_being_generated_is_not_opened_and_none_other_under_it(page, site):
    with site[1].held(after=3):
        page.click("#run")
        status_says(page, "held")
        tab(page, "Runs")
        page.locator(".runs tbody tr", has_text="being generated").get_by_role("button", name="Open", exact=True).click()
        toasted(page, "still being generated")
        page.locator(".runs tbody tr", has_text="older run").get_by_role("button", name="Open", exact=True).click()
        toasted(page, "Your own run is under way")
        expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    tab(page, "Compare")
    status_says(page, "Done.")


def test_undo_does_what_it_says_also_while_a_number_is_typed(page, site):
    page.locator('[data-key="chip-1-h2o"]').click()
    box = page.locator('.editor input[type="number"]').first
    page.click('[data-key="more"]')
    expect(page.locator(".card")).to_have_count(4)
    page.locator('[data-key="chip-1-h2o"]').click()
    box.fill("0.7")
    page.get_by_role("button", name="Undo variant D added").click()
    expect(page.locator(".card")).to_have_count(3)
    expect(page.locator('[data-key="chip-1-h2o"]')).to_contain_text("70%")
