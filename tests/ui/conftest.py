"""A served app on the synthetic lab, and a real Chromium to look at it."""
from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import contextmanager

import pytest

REQUIRED = os.environ.get("LAB_REQUIRE_BROWSER") == "1"


def chromium() -> str | None:
    """Path of an installed Chromium."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def browser():
    """Chromium through Playwright; skipped with a reason where there is none, unless LAB_REQUIRE_BROWSER=1."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        (pytest.fail if REQUIRED else pytest.skip)("playwright is not installed")
    path = chromium()
    if path is None:
        (pytest.fail if REQUIRED else pytest.skip)("no Chromium found; install one or set CHROMIUM")
    from .hands import WAIT_S

    expect.set_options(timeout=WAIT_S * 1000)
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, timeout=WAIT_S * 1000,
                                  args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def site():
    """(url, lab) of a served app on the synthetic lab."""
    from lab.ui.app import serve

    from . import fixture

    lab = fixture.FakeLab(step_s=0.02)
    port = free_port()
    demo = serve(port, lab=lab, block=False, preload=False)
    yield f"http://127.0.0.1:{port}/", lab
    demo.close()


@contextmanager
def visitor(browser, **options):
    """An empty page of a fresh visitor, patient enough for a slow machine."""
    from .hands import TOASTS, WAIT_S

    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    context.set_default_timeout(WAIT_S * 1000)
    context.add_init_script(TOASTS)
    try:
        yield context.new_page()
    finally:
        context.close()


@pytest.fixture
def page(browser, site):
    """A fresh visitor. The test fails on any console error, page error or request that leaves the machine."""
    from .hands import WAIT_S, arrive

    url, lab = site
    with visitor(browser, accept_downloads=True) as page:
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        arrive(page, url)
        page.wait_for_selector("#columns .col")
        yield page
    until = time.monotonic() + WAIT_S
    while lab.busy() and time.monotonic() < until:  # a run that the visitor left is given up, and the next one need not queue
        time.sleep(0.02)
    assert wrong == []
