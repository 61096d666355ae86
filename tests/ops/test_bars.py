"""Bars on a time axis."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.ops.bars import Bar, axis_line, chart, drawn, milliseconds


def test_bar_covers_its_share_of_the_axis():
    """A span over the second quarter fills the second quarter."""
    assert drawn(Bar("x", 25, 25), 100, 20) == "     █████          "


def test_bar_ends_on_an_eighth():
    """The end is drawn to an eighth of a character."""
    assert drawn(Bar("x", 0, 12), 16, 2) == "█▌"


def test_short_span_is_visible():
    """What took next to no time still has a mark, at its place, even at the very end."""
    assert drawn(Bar("x", 50, 0.0001), 100, 10) == "     ▏    "
    assert drawn(Bar("x", 100, 0), 100, 10).strip()


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 60), st.booleans())
def test_bar_always_has_its_width_and_a_mark(start, duration, rest, width, plain):
    """Whatever the span, the text has the asked width and is not blank, unless the axis is empty."""
    total = start + duration + rest
    text = drawn(Bar("x", start, duration), total, width, plain=plain)
    assert len(text) == width
    assert text.strip() or total == 0
    assert text.isascii() or not plain


def test_lines_are_aligned_and_carry_notes():
    """Labels and times stand in columns; a note stands behind its bar."""
    lines = chart([Bar("prefill", 0, 80), Bar("KV", 80, 20, "4.6 MB")], width=62, plain=True)
    assert lines == [
        "                    0                 50.0            100 ms",
        "  prefill  80.0 ms  ################################",
        "  KV       20.0 ms                                  ########",
        "                    4.6 MB",
    ]
    wide = chart([Bar("KV", 0, 20, "4.6 MB")], width=100, plain=True)
    assert wide[1:] == ["  KV  20.0 ms  " + "#" * 40 + "  4.6 MB"]


def test_a_bar_that_goes_on_has_a_sign_at_the_end_of_the_axis():
    """Its time is that of all of it."""
    assert chart([Bar("a", 0, 10), Bar("b", 5, 90)], width=40, plain=True, end=10)[1:] == [
        "  a  10.0 ms  ########################",
        "  b  90.0 ms              ###########>",
    ]


@given(st.floats(0.01, 1e6), st.integers(10, 60))
def test_the_axis_has_its_width_and_its_ends(total, width):
    """The first number is 0 and the last one the end."""
    line = axis_line(total, width)
    assert len(line) == max(width, len(f"0{milliseconds(total)} ms"))
    assert line.startswith("0")
    assert line.endswith(f"{milliseconds(total)} ms")


def test_nothing_to_show_is_no_line():
    assert chart([]) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.0412, "0.041"), (4.126, "4.13"), (41.26, "41.3"), (412.6, "413"), (4126.0, "4,126")]
)
def test_milliseconds_have_about_three_digits(value, text):
    """Times are as precise as they are useful."""
    assert milliseconds(value) == text
