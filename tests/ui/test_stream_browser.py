"""No press is lost where the stream of answers is slower than the requests, as behind a proxy, or while something ends."""
from __future__ import annotations

import time

import pytest

from lab.errors import LabError

from . import fixture
from .conftest import free_port

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
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.add_init_script(SLOW)
    page = context.new_page()
    page.goto(changing[0])
    page.wait_for_selector("#columns .col")
    page.get_by_role("button", name="Change model").click()
    page.wait_for_selector("#modelload")
    yield page
    context.close()


def load(page, source: str) -> None:
    page.fill("#modelsource textarea, #modelsource input", source)
    page.click("#modelload")


def test_a_press_while_the_stream_before_it_is_closing(slow, changing):
    slow.click("#run")
    slow.wait_for_selector("#columns .caret")
    deadline = time.monotonic() + 60
    while changing[1].busy() and time.monotonic() < deadline:  # the server is done, and the page does not know it yet
        slow.wait_for_timeout(20)
    load(slow, "/no/such/folder")
    slow.wait_for_selector("#modelstatus .errorcard", timeout=20_000)
    assert "no folder" in slow.inner_text("#modelstatus")
    for source in ("some/model", "/no/such/file", "another/model"):  # each as soon as the button can be pressed again
        load(slow, source)
        slow.wait_for_function("s => document.querySelector('#modelstatus').innerText.includes(s)",
                               arg="no folder or file /no/such/file" if source.startswith("/no") else "Loaded", timeout=20_000)
    assert changing[1].source == "another/model"


def test_load_while_a_run_is_going_waits_in_sight(slow, changing):
    before, changing[1].step_s = changing[1].runs_made, 0.05
    slow.click("#run")
    slow.wait_for_selector("#columns .caret")
    load(slow, "third/model")
    slow.wait_for_function("document.querySelector('#modelstatus').innerText.includes('A run is under way')")
    assert slow.is_disabled("#modelload") and changing[1].source != "third/model"
    changing[1].step_s = 0.01
    slow.wait_for_function("document.querySelector('#modelstatus').innerText.includes('Loaded')", timeout=60_000)
    assert changing[1].source == "third/model" and slow.is_enabled("#modelload")
    assert changing[1].runs_made == before + 1 and "Done." in slow.inner_text("#status")


def test_a_full_queue_is_said_and_run_can_be_pressed_again(slow):
    full = {"status": 503, "content_type": "application/json", "body": '{"detail": "Queue is full. Max size is 32"}'}
    slow.route("**/queue/join*", lambda route: route.fulfill(**full))
    slow.click("#run")
    slow.wait_for_selector("#status .errorcard")
    assert "could not be queued" in slow.inner_text("#status") and slow.is_enabled("#run") and slow.is_disabled("#stop")
    load(slow, "fourth/model")
    slow.wait_for_selector("#modelstatus .errorcard")
    assert slow.is_enabled("#modelload")
    slow.unroute("**/queue/join*")
    slow.click("#run")
    slow.wait_for_function("document.querySelector('#status').innerText.includes('Done.')", timeout=60_000)
