"""What was set in Compare and not run is not lost: by a reload, a preset or an opened run, in a real Chromium."""
from __future__ import annotations

import json
import threading

import pytest
from playwright.sync_api import expect

from lab.ui import assets

from .conftest import visitor
from .fixture import Outcome, record_and_arrays
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


def test_a_number_that_is_still_being_typed_is_there_after_a_reload(page, site):
    page.get_by_label("new tokens").fill("17")
    reload(page)
    expect(page.get_by_label("new tokens")).to_have_value("17")
    page.locator('[data-key="chip-1-h2o"]').click()
    page.locator('.editor input[type="number"]').first.fill("0.7")
    reload(page)
    expect(page.locator('[data-key="chip-1-h2o"]')).to_contain_text("70%")


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


def opens_slowly(lab, monkeypatch) -> threading.Event:
    """Every opening of a run waits for this event."""
    go, opened = threading.Event(), lab.open

    def slowly(run_id, owner):
        go.wait(WAIT_S)
        return opened(run_id, owner)
    monkeypatch.setattr(lab, "open", slowly)
    return go


def test_a_run_that_was_opened_slowly_does_not_take_the_person_away(page, site, monkeypatch):
    go = opens_slowly(site[1], monkeypatch)
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


def test_an_older_undo_is_still_itself_when_the_list_of_changes_is_full(page, site):
    page.locator('[data-key="chip-1-h2o"]').click()
    box = page.locator('.editor input[type="number"]').first
    for i in range(29):
        box.fill(f"0.{30 + i}")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Undo H2O budget")).to_be_visible()
    page.click('[data-key="more"]')
    expect(page.locator(".card")).to_have_count(4)
    page.locator('[data-key="chip-1-h2o"]').click()
    box.fill("0.7")
    page.get_by_role("button", name="Undo variant D added").click()
    expect(page.locator(".card")).to_have_count(3)


def test_a_field_that_goes_while_somebody_types_in_it_takes_nothing_with_it(page, site, monkeypatch):
    go = opens_slowly(site[1], monkeypatch)
    page.click('[data-key="more"]')
    page.locator('.editor [data-key="sw-3-h2o"]').click()
    box = page.locator('.editor input[type="number"]').first
    expect(box).to_be_visible()
    tab(page, "Runs")
    page.locator(".runs tbody tr", has_text="older run").get_by_role("button", name="Open", exact=True).click()
    tab(page, "Compare")
    box.press("End")
    box.press_sequentially("1")
    go.set()
    expect(page.locator(".card")).to_have_count(3)
    page.click('[data-key="more"]')
    expect(page.locator(".card")).to_have_count(4)


def test_what_was_typed_beside_a_run_that_was_left_can_be_brought_back_when_that_run_is_opened(browser, site):
    with visitor(browser) as page:
        arrive(page, site[0])
        page.fill("#prompt textarea", "The prompt of the run")
        with site[1].held(after=3):
            page.click("#run")
            status_says(page, "held")
            page.fill("#prompt textarea", TYPED)
            reload(page)
            expect(page.locator("#prompt textarea")).to_have_value(TYPED)
        page.get_by_role("button", name="Open it").click()
        status_says(page, "Opened as it was saved.")
        expect(offer(page)).to_contain_text("The opened run took the place of what you had set.")
        page.get_by_role("button", name="Bring it back").click()
        expect(page.locator("#prompt textarea")).to_have_value(TYPED)


def test_a_link_that_is_followed_and_left_again_leaves_what_was_typed(page, site):
    set_own(page)
    arrive(page, f"{site[0]}?run=20251231-230000-aaaa")
    expect(page.locator("#prompt textarea")).not_to_have_value(TYPED)
    page.go_back()
    page.wait_for_function("window.alArrived === true")
    own(page)


def test_a_run_that_cannot_be_opened_leaves_the_offer_as_it_was(page, site, monkeypatch):
    set_own(page)
    page.get_by_label("preset").select_option("zerotuning")
    expect(offer(page)).to_contain_text("The preset took the place")
    monkeypatch.setattr(site[1], "open", lambda run_id, owner: 1 / 0)
    tab(page, "Runs")
    page.locator(".runs tbody tr", has_text="older run").get_by_role("button", name="Open", exact=True).click()
    status_says(page, "Something unexpected went wrong")
    expect(offer(page)).to_contain_text("The preset took the place")
    page.get_by_role("button", name="Bring it back").click()
    own(page)


def test_lines_that_end_as_on_windows_are_nothing_typed(page, site):
    record, arrays = record_and_arrays("20260107-000000-crlf")
    record["prompt"]["text"] = "First line\r\nsecond line"
    site[1].keep(Outcome(record, arrays), "")
    arrive(page, f"{site[0]}?run=20260107-000000-crlf")
    expect(page.locator("#prompt textarea")).to_have_value("First line\nsecond line")
    reload(page)
    expect(page.locator("#prompt textarea")).to_have_value("First line\nsecond line")
    expect(offer(page)).to_have_count(0)
    assert page.evaluate("sessionStorage.getItem('attention-lab-draft')") is None


def keep_instead(page, kept):
    """The next page finds `kept` as what was set, as if another version of the lab had left it."""
    page.add_init_script("if (!window.name) { window.name = 'next'; sessionStorage.setItem('attention-lab-draft', %s); }"
                         % json.dumps(json.dumps(kept)))


def test_a_technique_that_is_gone_can_be_taken_out_and_others_put_in(page, site):
    gone = {"name": "gone_away", "params": {"share": 0.5}}
    keep_instead(page, {"prompt": TYPED, "settings": {}, "variants": [{"techniques": []}, {"techniques": [gone]}], "page": None})
    reload(page)
    expect(page.locator(".card").nth(1)).to_contain_text('There is no technique called "gone_away". Remove it from the variant.')
    page.click('[data-key="edit-1"]')
    page.locator('.editor [data-key="sw-1-h2o"]').click()
    expect(page.locator('[data-key="chip-1-h2o"]')).to_be_visible()
    page.get_by_role("button", name="remove gone_away").click()
    expect(page.locator(".card").nth(1)).to_contain_text("predicted KV")


@pytest.mark.parametrize("kept", [5, {"prompt": TYPED}, {"prompt": TYPED, "variants": [1], "page": None},
                                  {"prompt": None, "variants": [{"techniques": None}], "page": None}])
def test_what_another_version_kept_otherwise_is_left_alone(page, site, kept):
    keep_instead(page, kept)
    reload(page)
    expect(page.locator(".card")).to_have_count(3)
    expect(offer(page)).to_have_count(0)
