"""The table of runs and the tabs under the keyboard, one Undo of several deletions, and a new name wherever a run is shown."""
from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from playwright.sync_api import expect

from storage import StorageError

from . import fixture
from .hands import arrive, status_says, tab

pytestmark = pytest.mark.browser
NAMES, NUMBER = ("one", "two", "three"), itertools.count()


@pytest.fixture
def table(page, site):
    """The Runs tab with three more runs: their rows by name, and the ids as `table.ids`."""
    ids = {name: f"20260401-000000-{name}{next(NUMBER)}" for name in NAMES}
    for name, run_id in ids.items():
        record, arrays = fixture.record_and_arrays(run_id)
        site[1].library.save({**record, "name": name}, arrays)
    tab(page, "Runs")

    def row(name):
        box = page.get_by_role("checkbox", name=f"choose {name} for comparison", exact=True)
        return page.locator("table.runs tbody tr").filter(has=box)
    row.ids = ids
    expect(row("three")).to_be_visible()
    yield row
    for run_id in ids.values():
        with suppress(StorageError):  # a test deleted it
            site[1].library.delete(run_id)


def press(button, key="Enter"):
    """Press a button as a keyboard does."""
    button.focus()
    button.press(key)


def test_the_focus_stays_in_the_table(page, table):
    row = table("two")
    rename = row.get_by_role("button", name="Rename")
    press(rename)
    page.keyboard.press("Escape")
    expect(rename).to_be_focused()
    press(rename)
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    expect(table("second").get_by_role("button", name="Rename")).to_be_focused()
    tags = table("second").get_by_role("button", name="edit tags of second")
    press(tags)
    page.keyboard.type("#fine, slow")
    page.keyboard.press("Enter")
    expect(tags).to_be_focused()
    page.get_by_label("search runs").fill("#fine")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)
    page.get_by_label("search runs").fill("")
    press(table("second").get_by_role("button", name="delete"))
    undo = page.get_by_role("button", name="Undo", exact=True)
    expect(undo).to_be_focused()
    page.keyboard.press("Enter")
    expect(table("second").get_by_role("button", name="delete")).to_be_focused()
    press(table("second").get_by_role("button", name="delete"))
    expect(undo).to_be_focused()
    page.keyboard.press("Escape")
    expect(undo).to_have_count(0)
    assert page.evaluate("document.activeElement.dataset.key").startswith("delete-")


def test_the_focus_finds_a_place_where_the_last_run_was_deleted(page, site, table, monkeypatch):
    found = site[1].library.rows
    monkeypatch.setattr(site[1].library, "rows", lambda owner: [r for r in found(owner) if r["run_id"] == table.ids["three"]])
    tab(page, "Runs")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)
    press(table("three").get_by_role("button", name="delete"))
    expect(page.get_by_role("button", name="Undo", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("search runs")).to_be_focused()


def test_a_new_name_that_is_left_by_tab_does_not_take_the_focus(page, site, table):
    arrive(page, f"{site[0]}?run={table.ids['three']}")
    expect(page.locator("#al-runname")).to_have_value("three")
    page.evaluate("document.querySelector('#al-runname').old = true")
    page.fill("#al-runname", "fourth")
    page.keyboard.press("Tab")
    page.wait_for_function("!document.querySelector('#al-runname').old")  # the line was drawn with the new name
    expect(page.get_by_role("button", name="Copy link")).to_be_focused()


def test_one_undo_brings_back_all_that_was_deleted(page, table):
    for name in ("one", "two"):
        table(name).get_by_role("button", name="delete").click()
        expect(table(name)).to_have_count(0)
    table("three").get_by_role("button", name="share").click()  # its word stands beside the Undo
    expect(page.locator(".al-toast")).to_have_count(2)
    expect(page.locator(".al-toast.offers")).to_contain_text("Deleted 2 runs.")
    page.get_by_role("button", name="Undo", exact=True).click()
    for name in ("one", "two"):
        expect(table(name)).to_have_count(1)


@pytest.mark.parametrize("where", ["Compare", "Runs"])
def test_a_new_name_stands_wherever_the_run_is_shown(page, site, table, where):
    arrive(page, f"{site[0]}?run={table.ids['three']}")
    expect(page.locator("#header")).to_contain_text("three")
    if where == "Compare":
        page.fill("#al-runname", "fourth")
        page.keyboard.press("Tab")
    else:
        tab(page, "Runs")
        press(table("three").get_by_role("button", name="Rename"))
        page.keyboard.type("fourth")
        page.keyboard.press("Enter")
    expect(page.locator("#header")).to_contain_text("fourth")
    tab(page, "Compare")
    expect(page.locator("#al-runname")).to_have_value("fourth")
    status_says(page, "Opened as it was saved.")


def test_arrows_go_along_the_tabs(page):
    page.get_by_role("tab", name="Compare").focus()
    for key, name in (("ArrowRight", "Attention"), ("End", "Runs"), ("ArrowRight", "Compare"), ("ArrowLeft", "Runs")):
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")


def test_a_choice_in_decoding_keeps_the_focus(page):
    sampled = page.get_by_role("button", name="sampled")
    press(sampled)
    expect(sampled).to_have_attribute("aria-pressed", "true")
    expect(sampled).to_be_focused()
