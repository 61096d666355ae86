"""The console in front of real workers, and the pictures of it in the documentation.

KVBELT_UPDATE_SCREENSHOTS=1 loads the deployment for a minute first, so that the plots are full, and writes the
pictures to docs/images; otherwise they are made and looked at by the test alone.
"""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbelt.ops.deployment import SyncDeployment
from tests.console.browser import Visit, chromium
from tests.e2e.asking import ask, get, until
from tests.e2e.prompts import long_text

IMAGES = Path(__file__).parents[2] / "docs" / "images"
UPDATE = bool(os.environ.get("KVBELT_UPDATE_SCREENSHOTS"))
SECONDS = 70
SCREENS: dict[str, dict[str, Any]] = {
    "console-light": {"scheme": "light"},
    "console-dark": {"scheme": "dark"},
    "console-narrow": {"scheme": "light", "width": 390},
}
#: Of a picture: what is below is more of the list.
HEIGHT = {"console-light": 1760, "console-dark": 1760, "console-narrow": 2700}


def bodies() -> list[dict[str, Any]]:
    """Short and long prompts, some that need another way."""
    chance = random.Random(5)
    made = []
    for number in range(400 if UPDATE else 6):
        prompt = long_text(chance.choice((20, 60, 150, 300)), start=1000 + number)
        made.append({"prompt": prompt, "temperature": 0, "max_tokens": chance.randint(6, 24)})
        if number % 11 == 5:
            made[-1] |= {"seed": number, "temperature": 0.7}
    return made


def told_of_transfers(url: str) -> bool:
    """Whether the last answers over the belt are listed with their transfers."""
    recent = get(f"{url}/kvbelt/requests?limit=6").json()["requests"]
    return all(one["transfer"] for one in recent if one["decision"]["path"] == "first-token")


@contextlib.contextmanager
def loaded(url: str) -> Iterator[None]:
    """A deployment that has answered some requests. For pictures, two clients go on asking."""
    work, stop = bodies(), threading.Event()

    def client() -> None:
        while work and not stop.is_set():
            ask(url, work.pop(), stream=True)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for one in clients:
        one.start()
    try:
        if UPDATE:
            stop.wait(SECONDS)
        else:
            for one in clients:
                one.join()
            until(lambda: told_of_transfers(url), what="what the prefill workers tell of their transfers")
        yield
    finally:
        stop.set()
        for one in clients:
            one.join()


def test_real_workers_are_shown(two_p_two_d: SyncDeployment, tmp_path: Path) -> None:
    """Memory, transfers and waterfalls are shown in light, dark and narrow pages, without an error."""
    folder = IMAGES if UPDATE else tmp_path
    folder.mkdir(exist_ok=True)
    with loaded(two_p_two_d.url), chromium() as browser:
        for name, how in SCREENS.items():
            with Visit(browser, two_p_two_d.url, **how) as visit:
                page = visit.live().page
                row = page.locator("tr.request[data-state=ended]", has_text="first-token").nth(1)
                row.get_by_role("button").click()
                fall = page.locator("ol.waterfall")
                fall.wait_for()
                parts = fall.locator(".wf-name").all_text_contents()
                assert any(part.startswith("transfer") for part in parts)
                assert "nixl" in fall.inner_text()
                assert "cached" in page.locator("#workers").text_content()
                visit.shot(folder / f"{name}.png", height=HEIGHT[name])
                assert visit.complaints == []
                assert page.evaluate("document.documentElement.scrollWidth") <= how.get("width", 1280)
    sizes = {name: (folder / f"{name}.png").stat().st_size for name in SCREENS}
    assert all(size > 30_000 for size in sizes.values()), sizes


@pytest.mark.parametrize("name", SCREENS)
def test_the_documentation_shows_the_pictures(name: str) -> None:
    """Each picture exists, and docs/console.md shows it."""
    assert (IMAGES / f"{name}.png").exists()
    assert f"images/{name}.png" in (IMAGES.parent / "console.md").read_text(encoding="utf-8")
