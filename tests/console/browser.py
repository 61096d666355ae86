"""Debian's chromium, without a window, and what a page in it did."""

import contextlib
import os

from tests.programs import need_program


@contextlib.contextmanager
def chromium():
    """A browser inside a ``with`` block. For a whole session it would hold this thread's event loop."""
    program = need_program("chromium")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 -- tests without a browser need none of it

    # Chromium's sandbox needs a user other than root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page at ``/console``, with its errors and its requests."""

    def __init__(self, browser, url, *, width=1280, height=900, scheme="light", scale=1):
        self.url = url
        self.complaints = []
        self.asked = []
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale,
            reduced_motion="reduce",
        )  # fmt: skip
        self._context.set_default_timeout(60_000)
        self.page = self._context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def __enter__(self):
        """Open it, and wait for the first answer."""
        self.page.goto(self.url + "/console")
        return self

    def __exit__(self, *exc):
        """Close it."""
        self._context.close()

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def live(self):
        """Wait until the page shows the proxy's state."""
        self.page.locator("html[data-status=live]").wait_for(state="attached")
        return self

    def shot(self, path, *, height):
        """A picture of the whole page."""
        whole = self.page.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.page.viewport_size["width"], "height": min(height, whole)}
        self.page.screenshot(path=path, full_page=True, clip=clip, animations="allow", caret="initial")
