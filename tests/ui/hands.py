"""What a visitor's hands do in a browser test: arrive, choose a tab, and point again where the first move met nothing.

Nothing here waits for a while: each waits for what can be seen, for as long as a slow machine may need (`WAIT_S`).
"""
from __future__ import annotations

import re
import time
from typing import Any

from playwright.sync_api import Page, TimeoutError, expect

WAIT_S = 120
TELLS_WEIGHT = re.compile(r"weight .* rank", re.S)
DRAWN = """tokens => { const map = document.querySelector('#attention .mapbox[aria-busy=false]');
  const note = document.querySelector('#attention .mapnote'), cover = document.querySelector('#attention .mapcover');
  return !!map && cover.hidden && / a cell/.test(note.innerText)
    && (!tokens || note.innerText.startsWith(`${tokens} × ${tokens} `)); }"""


TOASTS = """window.alToasts = []; new MutationObserver(news => { for (const n of news) for (const node of n.addedNodes)
  if (node.classList && node.classList.contains('al-toast')) window.alToasts.push(node.innerText); })
  .observe(document, {childList: true, subtree: true});"""


def arrive(page: Page, url: str) -> None:
    """Go to `url` and wait until the page has read its address: before that, what it names may still replace what is seen."""
    page.goto(url, wait_until="load")
    page.wait_for_function("window.alArrived === true")


def reload(page: Page) -> None:
    """Load the page again, as `arrive`."""
    arrive(page, page.url)


def tab(page: Page, name: str) -> None:
    """Choose a tab, and see it chosen."""
    page.get_by_role("tab", name=name).click()
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")


def variant(page: Page, name: str) -> None:
    """Choose what the map shows, "B" or "C − A", and see it drawn."""
    button = page.get_by_role("group", name="variant", exact=True).get_by_role("button", name=name, exact=True)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    drawn(page)


def status_says(page: Page, text: str) -> None:
    """Compare's status line holds `text`."""
    expect(page.locator("#status")).to_contain_text(text)


def named_run(page: Page) -> str:
    """Id of the run that the address names."""
    expect(page).to_have_url(re.compile("[?&]run="))
    return page.evaluate("new URL(location.href).searchParams.get('run')")


def drawn(page: Page, tokens: int | None = None) -> None:
    """The map of what was chosen is in sight, of `tokens` x `tokens` where given, and what lies beside it."""
    page.wait_for_function(DRAWN, arg=tokens)
    expect(page.locator(".bars tr").first).to_be_visible()
    expect(page.locator(".heads tbody tr").first).to_be_visible()


def canvas(page: Page, tokens: int | None = None) -> None:
    """The Attention tab, once its map is drawn."""
    tab(page, "Attention")
    drawn(page, tokens)


def toasted(page: Page, pattern: str) -> None:
    """The page told something that matches `pattern` in passing, whether it is still in sight or not."""
    page.wait_for_function("pattern => window.alToasts.some(text => new RegExp(pattern).test(text))", arg=pattern)


def place(page: Page, selector: str, at: tuple[float, float]) -> dict[str, float]:
    """The point of an element at `at`, fractions of its width and height, from its corner."""
    box = page.locator(selector).bounding_box()
    return {"x": box["width"] * at[0], "y": box["height"] * at[1]}


def point(page: Page, selector: str, at: tuple[float, float], sees: Any) -> None:
    """Move the pointer over a fraction of an element until `sees` (an expect() that takes a timeout) holds.

    Each move takes the element's place anew: it may have shifted, or a cover may just have vanished, since the last one. Moves
    come ever more rarely, since each may begin the answer to the one before it again.
    """
    end, patience = time.monotonic() + WAIT_S, 1.0
    while True:
        page.locator(selector).hover(position=place(page, selector, at))
        try:
            return sees(timeout=patience * 1000)
        except (AssertionError, TimeoutError):
            if time.monotonic() > end:
                raise
        patience *= 2
        corner = place(page, selector, (0, 0))  # a pointer that does not move is not heard
        page.locator(selector).hover(position={"x": corner["x"] + 2, "y": corner["y"] + 2})


def tip(page: Page):
    """The note beside the pointer."""
    return page.locator(".al-tip:not([hidden])")


def tells(page: Page, words: re.Pattern[str] | str):
    """What `point` waits for: a note beside the pointer that holds `words`."""
    return lambda timeout: expect(tip(page).filter(has_text=words)).not_to_have_count(0, timeout=timeout)


def press(page: Page, selector: str, at: tuple[float, float]) -> None:
    """Click a fraction of an element, once nothing covers it and it stands still."""
    page.locator(selector).click(position=place(page, selector, at))
