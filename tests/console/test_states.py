"""Pictures of the console in each state of a deployment, from the example that the pictures of terminals have.

KVBELT_UPDATE_SCREENSHOTS=1 writes them to docs/images; otherwise they are made and looked at by the test alone.
"""

import os

import msgspec
import pytest
from tools.screens import console

from tests.console.browser import Visit, chromium
from tests.docs.pages import DOCS
from tests.ops.served import serving

IMAGES = DOCS / "images"
UPDATE = bool(os.environ.get("KVBELT_UPDATE_SCREENSHOTS"))
STATES = console()
#: What a person must see in each.
SEEN = {
    "calm": "5d1e9c07ab-24",
    "overloaded": "14 requests wait in prefill worker 127.0.0.1:7100",
    "dead-worker": "The doctor says: decode worker 127.0.0.1:7201 does not answer",
    "empty": "No request yet",
}


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def served():
    """A proxy that has the page's files."""
    with serving() as made:
        yield made


@pytest.mark.parametrize("name", STATES)
def test_each_state_is_told_apart(browser, served, tmp_path, name):
    """The page has the example's data, whatever the proxy says."""
    visit = Visit(browser, served.url)
    said = msgspec.json.encode(STATES[name]).decode()
    visit.page.route("**/kvbelt/console.json*", lambda route: route.fulfill(body=said, content_type="application/json"))
    with visit:
        visit.live()
        visit.page.get_by_text(SEEN[name]).first.wait_for()
        assert visit.page.locator("#trouble").is_visible() == (name in {"overloaded", "dead-worker"})
        assert visit.complaints == []
        picture = (IMAGES if UPDATE else tmp_path) / f"console-{name}.png"
        visit.shot(picture, height=1000)
        assert 20_000 < picture.stat().st_size < 200_000


@pytest.mark.parametrize("name", STATES)
def test_the_documentation_shows_each_state(name):
    assert (IMAGES / f"console-{name}.png").exists()
    assert f"images/console-{name}.png" in (DOCS / "console.md").read_text("utf-8")
