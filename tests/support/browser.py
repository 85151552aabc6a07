"""A browser for tests of pages: headless Chromium without a network."""

import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = os.environ.get("REFINELENS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def skip_without_browser():
    """Where pages must be tested, `REFINELENS_NEEDS_BROWSER` makes a missing browser an error."""
    reason = None
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        reason = "needs the package playwright"
    if CHROMIUM is None:
        reason = "needs Chromium (Debian's package chromium, or its path in REFINELENS_CHROMIUM)"
    if reason and os.environ.get("REFINELENS_NEEDS_BROWSER"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@contextmanager
def browser():
    """Chromium, for several pages."""
    skip_without_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that containers do not give; the pages are our own.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium, path, width=1280, height=800, **options):
    """A page from disk, with the network off; fails on any request but its own, and on any error or message."""
    context = chromium.new_context(offline=True, viewport={"width": width, "height": height}, **options)
    try:
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or said.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        yield page
        assert said == []
    finally:
        context.close()
