"""The page about the belt and its picture agree with the tables."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import get_args

import pytest
from tools import state_picture
from tools.draw_states import page_part, page_with_drawings
from tools.state_picture import picture

from kvbelt.transfer.receive import states as r
from kvbelt.transfer.send import states as s
from kvbelt.wire.reservation import FromReceiver, FromSender

DOCS = Path(__file__).parents[2] / "docs"
SVG = {"": "http://www.w3.org/2000/svg"}

SIDES = {
    "The sending side": (s.SENDER_TABLE, s.FINAL, {"peer": FromReceiver, "own": s.Local, "time": s.Timed}),
    "The receiving side": (r.RECEIVER_TABLE, r.FINAL, {"peer": FromSender, "own": r.Local, "time": r.Timed}),
}


def test_the_page_has_the_tables_drawings():
    """docs/transfer.md contains what draw_states writes, to the letter."""
    page = (DOCS / "transfer.md").read_text(encoding="utf-8")
    assert page_part() in page
    assert page_with_drawings(page) == page


def test_the_picture_is_the_tables():
    """docs/transfer-states.svg is what draw_states writes, to the letter."""
    assert (DOCS / "transfer-states.svg").read_text(encoding="utf-8") == picture()


@pytest.mark.parametrize("title", SIDES)
def test_every_arrow_is_in_the_picture(title):
    """The picture shows states, final states, events and their causes."""
    table, final, unions = SIDES[title]
    side = ET.fromstring(picture()).find(f".//g[@data-side='{title}']", SVG)  # noqa: S314 -- our own
    states = side.findall("g[@class='state']", SVG)
    assert {state.find("text", SVG).text for state in states} == {state.value for state in table}
    assert {state.get("data-state") for state in states if state.get("data-final") == "true"} == set(final)
    drawn = {
        (edge.get("data-from"), edge.get("data-to"), text.text, text.get("class").removeprefix("event "))
        for edge in side.findall("g[@class='edge']", SVG)
        for text in edge.findall("text", SVG)
    }
    known = {
        (state.value, after.value, event.__name__, cause)
        for state, events in table.items()
        for event, cell in events.items()
        for after in cell.to
        for cause, union in unions.items()
        if after is not state and event in get_args(union)
    }
    assert drawn == known


def test_boxes_and_events_do_not_lie_upon_each_other():
    """No box or list of events covers another one of its side."""
    for side in ET.fromstring(picture()).findall("g[@class='side']", SVG):  # noqa: S314 -- our own
        rects = [
            tuple(float(rect.get(name)) for name in ("x", "y", "width", "height"))
            for rect in side.findall(".//rect", SVG)
        ]
        for number, (x, y, width, height) in enumerate(rects):
            for other_x, other_y, other_width, other_height in rects[:number]:
                apart = x + width <= other_x or other_x + other_width <= x
                above = y + height <= other_y or other_y + other_height <= y
                assert apart or above, (x, y, other_x, other_y)


def test_a_state_without_a_place_is_named(monkeypatch):
    """The error says where to give a new state its place."""
    places = {state: place for state, place in state_picture.SENDER_PLACES.items() if state != "leaving"}
    monkeypatch.setattr(state_picture, "SENDER_PLACES", places)
    with pytest.raises(ValueError, match=r"no place in the picture for \['leaving'\]; add them to"):
        picture()
