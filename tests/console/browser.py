"""Debian's chromium, without a window, and what a page in it did."""

import contextlib
import os

from tests.programs import need_program


@contextlib.contextmanager
def chromium():
    """A browser, for the length of a ``with``. Not for a whole session: its library holds this thread's event loop."""
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
    """One visitor's page at ``/console``, and all that it complained of or asked for."""

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
        """Wait until the page shows what the proxy says."""
        self.page.locator("html[data-status=live]").wait_for(state="attached")
        return self

    def shot(self, path, *, height):
        """A picture of the page as it is, from its top: nothing is added to it for the picture."""
        whole = self.page.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.page.viewport_size["width"], "height": min(height, whole)}
        self.page.screenshot(path=path, full_page=True, clip=clip, animations="allow", caret="initial")
