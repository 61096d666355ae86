"""The pictures of terminals are of what the commands show today."""

import xml.etree.ElementTree as ET

import pytest
from rich.text import Text
from tools.draw_screens import FILES, PRINTED, SIZES, STATES, drawn

from tests.docs.pages import DOCS

FOLDER = DOCS / "images" / "terminal"


@pytest.fixture(scope="module")
def today() -> dict[str, str]:
    """Every picture, drawn now."""
    return dict(drawn())


def said(picture: str) -> list[str]:
    """Its lines. Colours and places of letters may differ between releases of rich."""
    lines: dict[float, str] = {}
    for text in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"):  # noqa: S314 -- our own file
        lines[float(text.get("y", 0))] = lines.get(float(text.get("y", 0)), "") + (text.text or "")
    return list(lines.values())


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_picture_says_what_the_command_says(name: str, today: dict[str, str]) -> None:
    """If not: python -m tools.draw_screens docs/images/terminal."""
    kept = (FOLDER / name).read_text(encoding="utf-8")
    assert said(kept) == said(today[name])
    assert len(kept) < 70_000


@pytest.mark.parametrize("size", SIZES)
def test_no_line_of_a_start_breaks_inside_a_word(size: str) -> None:
    """Every line fits its terminal."""
    width = SIZES[size][0]
    assert [line for line in PRINTED["up"](width) if len(Text.from_ansi(line)) > width] == []


def test_the_page_leads_to_every_picture() -> None:
    page = (DOCS / "screens.md").read_text(encoding="utf-8")
    assert {file.name for file in FOLDER.iterdir()} == set(FILES)
    assert [name for name in FILES if f"(images/terminal/{name})" not in page] == []


@pytest.mark.parametrize("name", ["up", "why", "doctor", "top"])
def test_light_and_dark_terminals_show_the_same(name: str, today: dict[str, str]) -> None:
    """In colours of their own."""
    light, dark = today[f"{name}-80-light.svg"], today[f"{name}-80-dark.svg"]
    assert said(light) == said(dark)
    assert light != dark


def test_each_state_of_a_deployment_is_told_apart(today: dict[str, str]) -> None:
    """As in the console's pictures."""
    shown = {state: "\n".join(said(today[f"top-{state}.svg"])) for state in STATES}
    assert [state for state in STATES if "no\xa0threshold" in shown[state].replace(" ", "\xa0")] == ["calm", "empty"]
    assert "lost" in shown["dead-worker"]
    assert len(set(shown.values())) == len(STATES)
