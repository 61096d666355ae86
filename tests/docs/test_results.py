"""The chart of the README is drawn from the published results."""

import json
import xml.etree.ElementTree as ET

import pytest
from tools.draw_results import FIGURES, RATE, chart

from tests.docs.pages import DOCS, ROOT

RESULTS = (DOCS / "results" / "vllm-0.26-2xh200.json").read_bytes()


def test_the_chart_is_what_is_drawn() -> None:
    """docs/images/results.svg is what draw_results writes, to the letter."""
    assert (DOCS / "images" / "results.svg").read_text(encoding="utf-8") == chart(RESULTS)


def test_the_figures_of_the_chart_stand_in_the_tables() -> None:
    """The chart, the README's text for it, and docs/performance.md have the same figures."""
    drawn = [text.text for text in ET.fromstring(chart(RESULTS)).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314
    figures = [text for text in drawn if text and text.isdigit()]
    assert len(figures) == 9
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("](docs/images/results.svg)")[0]
    assert [word.strip(",.:;") for word in readme.split() if word.strip(",.").isdigit()] == figures
    performance = (DOCS / "performance.md").read_text(encoding="utf-8")
    for session in json.loads(RESULTS):
        bench = next(run["bench"] for run in session["runs"] if run["rate"] == RATE)
        assert all(f"{bench[field]:.1f}" in performance for field in FIGURES.values())


def test_results_without_a_system_are_refused() -> None:
    """A file that lacks one of the three systems makes no chart."""
    with pytest.raises(LookupError):
        chart(RESULTS.replace(b'"system": "nixl"', b'"system": "another"'))
