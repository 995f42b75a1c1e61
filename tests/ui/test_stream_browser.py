"""No press is lost where the stream of answers is slower than the requests, as behind a proxy, or while something ends."""
from __future__ import annotations

import time

import pytest
from playwright.sync_api import expect

from lab.errors import LabError

from . import fixture
from .conftest import free_port, visitor
from .hands import WAIT_S, arrive, status_says

pytestmark = pytest.mark.browser

SLOW = """const plain = window.fetch; window.fetch = async (what, more) => {
  const reply = await plain(what, more), url = what.url || String(what);
  if (!url.includes('/queue/data')) return reply;
  const reader = reply.body.getReader();
  const body = new ReadableStream({start(out) { (async () => {
    for (;;) { const {done, value} = await reader.read();
      setTimeout(() => { try { done ? out.close() : out.enqueue(value); } catch {} }, 700); if (done) break; }
  })().catch(() => {}); }});
  return new Response(body, {status: reply.status, headers: reply.headers}); };"""


class Changing(fixture.FakeLab):
    """A lab whose models are names."""

    def change_model(self, source, weights="auto", report=None):
        report(0.4, "Loading weights")
        time.sleep(0.1)
        if source.startswith("/no"):
            raise LabError(f"There is no folder or file {source}")
        self.source = source


@pytest.fixture(scope="module")
def changing():
    from lab.ui.app import serve

    lab = Changing(step_s=0.01)
    port = free_port()
    demo = serve(port, lab=lab, block=False, preload=False)
    yield f"http://127.0.0.1:{port}/", lab
    demo.close()


@pytest.fixture
def slow(browser, changing):
    """A visitor whose stream comes 0.7 s late."""
    with visitor(browser) as page:
        page.context.add_init_script(SLOW)
        arrive(page, changing[0])
        page.get_by_role("button", name="Change model").click()
        page.wait_for_selector("#modelload")
        yield page


def load(page, source: str) -> None:
    page.fill("#modelsource textarea, #modelsource input", source)
    page.click("#modelload")


def told(page, words: str) -> None:
    expect(page.locator("#modelstatus")).to_contain_text(words)


def test_a_press_while_the_stream_before_it_is_closing(slow, changing):
    slow.click("#run")
    slow.wait_for_selector("#columns .caret")
    deadline = time.monotonic() + WAIT_S
    while changing[1].busy() and time.monotonic() < deadline:  # the server is done, and the page does not know it yet
        slow.wait_for_timeout(20)
    load(slow, "/no/such/folder")
    told(slow, "no folder or file /no/such/folder")
    for source in ("some/model", "/no/such/file", "another/model"):  # each as soon as the button can be pressed again
        load(slow, source)
        told(slow, "no folder or file /no/such/file" if source.startswith("/no") else "Loaded")
    assert changing[1].source == "another/model"


def test_load_while_a_run_is_going_waits_in_sight(slow, changing):
    before = changing[1].runs_made
    with changing[1].held(after=3):
        slow.click("#run")
        slow.wait_for_selector("#columns .caret")
        load(slow, "third/model")
        told(slow, "A run is under way")
        expect(slow.locator("#modelload")).to_be_disabled()
        assert changing[1].source != "third/model"
    told(slow, "Loaded")
    expect(slow.locator("#modelload")).to_be_enabled()
    status_says(slow, "Done.")
    assert changing[1].source == "third/model" and changing[1].runs_made == before + 1


def test_a_full_queue_is_said_and_run_can_be_pressed_again(slow):
    full = {"status": 503, "content_type": "application/json", "body": '{"detail": "Queue is full. Max size is 32"}'}
    slow.route("**/queue/join*", lambda route: route.fulfill(**full))
    slow.click("#run")
    status_says(slow, "could not be queued")
    expect(slow.locator("#run")).to_be_enabled()
    expect(slow.locator("#stop")).to_be_disabled()
    load(slow, "fourth/model")
    slow.wait_for_selector("#modelstatus .errorcard")
    expect(slow.locator("#modelload")).to_be_enabled()
    slow.unroute("**/queue/join*")
    slow.click("#run")
    status_says(slow, "Done.")
