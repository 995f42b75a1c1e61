"""What strangers stumbled over on a walk through the app, in a real Chromium on the synthetic lab."""
from __future__ import annotations

import re
import threading
import time

import pytest
from playwright.sync_api import expect

from lab.errors import LabError
from lab.ui.opened import OpenRun

from . import fixture
from .conftest import visitor
from .hands import WAIT_S, arrive, drawn, named_run, point, reload, status_says, tab, tells, tip

pytestmark = pytest.mark.browser
PROMPT = "The keeper's <b>own</b> words"


@pytest.fixture
def leaver(browser, site):
    """A visitor who leaves a run: Gradio then logs that its stream was aborted, so the console is not read."""
    with visitor(browser) as page:
        arrive(page, site[0])
        yield page
    until = time.monotonic() + WAIT_S
    while site[1].busy() and time.monotonic() < until:
        time.sleep(0.02)


def prepare(page):
    """Set what a fresh page does not have: a prompt, a number of tokens, and two variants instead of three."""
    page.fill("#prompt textarea", PROMPT)
    page.get_by_label("new tokens").fill("17")
    page.keyboard.press("Tab")
    page.click('[data-key="rm-1"]')
    expect(page.locator(".card")).to_have_count(2)


def prepared(page):
    """What `prepare` set is in sight."""
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.get_by_label("new tokens")).to_have_value("17")
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator(".card").nth(1)).to_contain_text("StreamingLLM")


def test_a_reload_in_mid_run_gives_the_prompt_back_and_offers_what_was_kept(leaver, site):
    page = leaver
    arrive(page, f"{site[0]}?run=20251231-230000-aaaa")
    prepare(page)
    told = page.locator("#unfinished")
    with site[1].held(after=4):
        page.click("#run")
        status_says(page, "held")
        expect(page).not_to_have_url(re.compile("run="))
        reload(page)
        expect(told).to_contain_text("Your run was interrupted when the page was loaded again. What it had written is kept.")
    expect(told).to_contain_text("settings and variants are set again")
    prepared(page)
    reload(page)
    prepared(page)
    told.get_by_role("button", name="Open it").click()
    status_says(page, "Opened as it was saved.")
    assert named_run(page).endswith("-fake")
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.locator("#columns .col")).to_have_count(2)
    expect(told.locator(".banner")).to_have_count(0)
    reload(page)
    expect(told.locator(".banner")).to_have_count(0)


def test_a_run_that_goes_on_in_another_tab_is_offered_once_it_has_ended(page, browser, site):
    with visitor(browser) as other:
        arrive(other, site[0])
        with site[1].held(after=4):
            page.click("#run")
            status_says(page, "held")
            other.evaluate("kept => sessionStorage.setItem('attention-lab-run', kept)",
                           page.evaluate("sessionStorage.getItem('attention-lab-run')"))  # as a duplicated tab has it
            reload(other)
            told = other.locator("#unfinished")
            expect(told).to_contain_text("Your run is still going.")
            expect(told.get_by_role("button", name="Open it")).to_have_count(0)
        status_says(page, "Done.")
        expect(told).to_contain_text("Your run has ended and is kept.")
        told.get_by_role("button", name="Open it").click()
        status_says(other, "Opened as it was saved.")


def test_a_run_that_waited_for_its_turn_is_told_where_another_tab_of_the_page_is_in_sight(page, browser, site):
    with visitor(browser) as other, site[1].held(after=2):
        page.click("#run")
        status_says(page, "held")
        arrive(other, site[0])
        prepare(other)
        other.click("#run")
        expect(other.locator("#status")).to_contain_text("waits for its turn")
        tab(other, "Runs")
        reload(other)
        expect(other.locator(".al-toast")).to_contain_text("before anything of it was kept")
        tab(other, "Compare")
        prepared(other)
        other.locator("#unfinished").get_by_role("button", name="close this message").click()
        reload(other)
        expect(other.locator("#columns .col")).to_have_count(3)
        prepared(other)  # as what was set and not run
        expect(other.locator("#unfinished .banner")).to_have_count(1)
    status_says(page, "Done.")


def test_a_run_that_ended_is_not_told_of_again_and_a_link_shows_its_own_prompt(leaver, site):
    page = leaver
    prepare(page)
    with site[1].held(after=4):
        page.click("#run")
        status_says(page, "held")
        arrive(page, f"{site[0]}?run=20251231-230000-aaaa")
        expect(page.locator("#unfinished")).to_contain_text("What it had written is kept.")
        expect(page.locator("#prompt textarea")).not_to_have_value(PROMPT)
        expect(page.locator("#unfinished")).not_to_contain_text("set again")
    page.click("#run")
    status_says(page, "Done.")
    reload(page)
    expect(page.locator("#unfinished .banner")).to_have_count(0)


def test_a_token_is_told_once_before_the_first_difference_and_by_name_from_there_on(page, site):
    fork = page.locator("#columns .vB .t.fork")
    first = int(fork.get_attribute("data-i"))
    near = lambda i: f'#columns .vB .t[data-i="{i}"]'  # noqa: E731
    point(page, near(first - 1), (0.5, 0.5), tells(page, "B and A wrote this token after the same text."))
    expect(tip(page).locator(".tipline")).to_contain_text(["B’s probability", "A’s probability", "B’s entropy", "KL(A ‖ B)"])
    expect(tip(page).locator(".tipalt")).to_have_count(1)
    point(page, "#columns .vB .t.fork", (0.5, 0.5), tells(page, "The first difference: after the same text B wrote"))
    theirs = page.locator(f'#columns .vA .t[data-i="{first}"]').inner_text()
    for n, (who, token) in enumerate((("B", fork.inner_text()), ("B", theirs), ("A", theirs))):
        expect(tip(page).locator(".tipline").nth(n)).to_contain_text(re.compile(f"{who}’s probability of {re.escape(token)}"))
    expect(tip(page).locator(".tipalt")).to_have_count(1)
    point(page, near(first + 1), (0.5, 0.5), tells(page, "B’s own text, which A has not read"))
    expect(tip(page).locator(".tipline").nth(0)).to_have_text(re.compile("^B’s probability[0-9.]+$"))
    page.get_by_role("button", name="Reference text").click()
    point(page, near(3), (0.5, 0.5), tells(page, "A’s token, as B sees it after A’s text."))
    expect(tip(page)).to_contain_text("token 4 of A")
    expect(tip(page).locator(".tipalt")).to_contain_text("B’s choices after the reference’s text")


def test_a_row_without_a_difference_says_so_and_the_heads_say_whose_they_are(page, site):
    record, arrays = fixture.record_and_arrays("20260109-000000-same")
    same = record["variants"][0]
    record["variants"][1].update({name: same[name] for name in ("tokens", "token_ids", "text", "first_divergence")})
    arrays |= {name.replace("/A/", "/B/"): a for name, a in arrays.items() if "/A/" in name}
    site[1].keep(fixture.Outcome(record, arrays), "")
    arrive(page, f"{site[0]}?tab=attention&run={record['run_id']}&variant=B&layer=3&head=1")
    drawn(page)
    expect(page.locator(".heads .h")).to_have_text("Heads of layer 3 · B")
    page.get_by_role("button", name="B − A", exact=True).click()
    expect(page.locator(".heads .h")).to_have_text("Heads of layer 3 · B alone")
    page.locator('.tokstrip [data-i="9"]').click()
    expect(page.locator(".bars")).to_contain_text(
        "Nothing differs on this row: B and A give every token the same weight. It is a row of the prompt.")


def test_the_figures_of_a_variant_that_could_not_run_stand_where_the_others_do(page, site):
    record, arrays = fixture.record_and_arrays("20260110-000000-fail")
    record["variants"][1].update(tokens=[], fidelity=[], finish=None, error="The budget is too small for this prompt.")
    site[1].keep(fixture.Outcome(record, arrays), "")
    arrive(page, f"{site[0]}?run={record['run_id']}")
    expect(page.locator("#columns .vB .error")).to_be_visible()
    feet = page.evaluate("""[...document.querySelectorAll('#columns .col')].map(col =>
      col.getBoundingClientRect().bottom - col.querySelector('.strip').getBoundingClientRect().bottom)""")
    assert max(feet) - min(feet) < 1.5


@pytest.mark.parametrize("asked, status", [
    ("?tab=nonsense", 'There is no tab "nonsense". The tabs are compare, attention, memory, runs.'),
    ("?tab=runs&run=unknown", "unknown"),
])
def test_an_address_that_names_what_is_not_there_is_told_and_follows(page, site, asked, status):
    arrive(page, site[0] + asked)
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#status .errorcard")).to_be_visible()
    status_says(page, status)
    assert page.evaluate("new URL(location.href).searchParams.get('tab')") == "compare"


def test_replays_go_one_after_another_and_only_our_words_tell_of_them(page, site, monkeypatch):
    go, begun = {letter: threading.Event() for letter in "AC"}, []

    def replay(run, letter, layer, report, cancelled):
        begun.append(letter)
        report(0.25, "Replaying")
        go[letter].wait(WAIT_S)

    monkeypatch.setattr(site[1], "replay", replay)
    monkeypatch.setattr(site[1], "replays_by_itself", lambda run: True)
    arrive(page, f"{site[0]}?tab=attention&layer=5&variant=A")
    cover = page.locator(".mapcover")
    expect(cover).to_contain_text("Replaying variant A to capture its attention… 25%")
    shown = page.locator("#attstatus > *").evaluate_all("all => all.filter(x => x.checkVisibility()).map(x => x.className)")
    assert len(shown) == 1 and "html-container" in shown[0]
    page.get_by_role("group", name="variant", exact=True).get_by_role("button", name="C", exact=True).click()
    expect(cover).to_contain_text("Variant C waits for the replay of variant A.")
    assert begun == ["A"]
    go["A"].set()
    expect(cover).to_contain_text("Replaying variant C to capture its attention… 25%")
    go["C"].set()


def test_a_failed_replay_keeps_its_sentence_and_no_loaded_model_is_asked_for(page, site, monkeypatch):
    go = {letter: threading.Event() for letter in "AC"}

    def replay(run, letter, layer, report, cancelled):
        go[letter].wait(WAIT_S)
        if letter == "C":
            raise LabError("The cache of C does not fit")
        run.add({name.replace("/3/", "/5/"): array for name, array in run.arrays.items() if name.startswith("qk/A/3/")})

    record, arrays = fixture.record_and_arrays()
    key = site[1].shelf.put(OpenRun(record, {name: a for name, a in arrays.items() if not name.startswith("qk/C/")}))
    monkeypatch.setattr(site[1], "replay", replay)
    monkeypatch.setattr(site[1], "replays_by_itself", lambda run: True)
    monkeypatch.setattr(site[1], "open", lambda run_id, owner: key)
    arrive(page, f"{site[0]}?tab=attention&run=any&layer=5&variant=C")
    cover, variants = page.locator(".mapcover"), page.get_by_role("group", name="variant", exact=True)
    expect(cover).to_contain_text("Replaying variant C")
    go["C"].set()
    expect(cover).to_contain_text("Variant C could not be replayed. The cache of C does not fit.")
    expect(page.locator("#attstatus")).to_contain_text("The cache of C does not fit.")
    variants.get_by_role("button", name="A", exact=True).click()
    go["A"].set()
    drawn(page)
    expect(page.locator("#attstatus")).not_to_contain_text("does not fit")
    variants.get_by_role("button", name="C", exact=True).click()
    expect(cover).to_contain_text("Variant C could not be replayed. The cache of C does not fit.")
    expect(page.locator(".bars")).to_contain_text("Replay it to capture attention")
    expect(page.locator("#attention")).not_to_contain_text("Load the run's model")
    cover.get_by_role("button", name="Replay to capture layer 5").click()
    expect(cover).to_contain_text("Variant C could not be replayed.")
