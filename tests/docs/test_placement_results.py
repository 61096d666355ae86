"""The chart and the tables of the placement benchmark are made of its published results."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from benchmarks.gpu._figures import Results, results_of
from benchmarks.gpu._rows import Answer, Row
from tools.draw_placement import PANEL_HEIGHT, TOPS, chart
from tools.placement import by_load, read_results
from tools.write_placement import BEGIN, END, redrawn, tables

from kvbelt.errors import SettingsError
from tests.docs.pages import DOCS, cells
from tests.docs.test_pages import MAX_CELL, MAX_COLUMNS, MAX_LINE

SVG = "{http://www.w3.org/2000/svg}"
PUBLISHED = sorted((DOCS / "results").glob("placement-*.json"))
MACHINE = {"versions": {"vllm": "0", "nixl": "0", "gpus": ["Made up, 1", "Made up, 1"]}}
SYSTEMS = ("plain", "plain-least@1024", "A", "B", "nixl")


def row(system: str, load: str, late: int, seed: int = 1, lengths: str = "7500/200") -> Row:
    """Ten made-up requests, of which some are too late for either level."""
    answers = [Answer(at=0, prompt=7500, ttft=900 if i < late else 100, gaps=[5.0], tokens=2) for i in range(10)]
    busy = {"0": {"utilisation": 100.0}, "1": {"utilisation": 99.0}}
    return Row(system, f"{load}:{lengths}", seed, 1.0, 10.0, answers, busy, MACHINE)


def made_up() -> Results:
    """Each system has one more late request than the one before it; the last load has other lengths."""
    loads = [("even:6x30", "7500/200"), ("even:4x30", "7500/200"), ("poisson:4x120", "7500/200")]
    loads.append(("even:2x30", "2000/1000~0.8"))
    rows = [row(name, load, late, 1, lengths) for load, lengths in loads for late, name in enumerate(SYSTEMS)]
    return results_of([*rows, *(row(name, "poisson:4x120", 10, 2) for name in SYSTEMS)])


def paths(svg: str, kind: str) -> list[list[str]]:
    """What is drawn of a kind of line, panel by panel."""
    groups = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("class") == f"line {kind}"]  # noqa: S314
    return [[path.get("d", "") for path in group.iter(f"{SVG}path")] for group in groups]


def test_each_panel_shows_the_shares_within_its_level() -> None:
    """The line of kvbelt with the panel's level set goes over all rates of the usual lengths; one rate is a dot."""
    even_a, poisson_a, even_b, poisson_b = (lines[0] for lines in paths(chart(made_up()), "kvbelt"))
    for line, level, share in ((even_a, "A", 0.8), (even_b, "B", 0.7)):
        y = TOPS[level] + PANEL_HEIGHT * (1 - share)
        assert [point.split()[1] for point in line.removesuffix("h0").split("L")] == [f"{y:.1f}"] * 2
    assert "L" not in poisson_a + poisson_b


def test_the_range_of_the_runs_is_drawn() -> None:
    """From the lowest to the highest of the two seeds."""
    _, poisson_a, _, _ = paths(chart(made_up()), "kvbelt")
    assert poisson_a[1].endswith(f" {TOPS['A'] + PANEL_HEIGHT:.1f}V{TOPS['A'] + PANEL_HEIGHT * 0.2:.1f}")


def test_the_best_plain_setting_is_chosen_for_each_load() -> None:
    """By the share within the level; among equals by the shortest TTFT."""
    rows = [row("plain", "even:1x30", 3), row("plain-least@512", "even:1x30", 1), row("A", "even:1x30", 0)]
    rows += [row("plain", "even:2x30", 0), row("plain-least@512", "even:2x30", 1)]
    rows += [row("plain", "even:3x30", 10), row("plain-least", "even:3x30", 10)]
    for answer in rows[-1].answers:
        answer.ttft = 800
    chosen = [one.best_plain("A") for one in by_load(results_of(rows))]
    assert [best.system for best in chosen if best] == ["plain-least@512", "plain", "plain-least"]


def test_a_load_has_a_row_in_each_table() -> None:
    """With the best plain setting, the range of several runs and other lengths. Systems without a column are last."""
    lines = tables(made_up()).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| even, 4/s")] == ["| even, 4/s for 30 s"] * 5
    shares = next(line for line in lines if line.startswith("| Poisson, 4/s"))
    assert cells(shares)[1:3] == ["50.0 % (0.0 to 100.0), plain", "40.0 % (0.0 to 80.0)"]
    assert cells(shares)[4] == "35.0 % (0.0 to 70.0); A 35.0 %"
    load, *figures = cells(lines[-1])
    assert load == "even, 2/s for 30 s, 2,000 / 1,000, lengths ± 80%"
    assert figures == ["nixl", "60.0 % / 60.0 %", "100 / 900 / 900", "5.0 / 5.0; 7,502"]


def test_seeds_that_only_some_systems_have_are_named() -> None:
    """Columns of other arrivals are not compared in silence."""
    rows = [row("plain", "poisson:4x120", 0, 1), row("plain", "poisson:4x120", 0, 2), row("A", "poisson:4x120", 0, 2)]
    assert "| 100.0 %, seeds 2 only |" in tables(results_of(rows))


def test_the_tables_fit_the_page() -> None:
    """In columns, cells and lines."""
    for line in tables(made_up()).splitlines():
        if line.startswith("|"):
            assert len(cells(line)) <= MAX_COLUMNS
            assert max(map(len, cells(line))) <= MAX_CELL
        else:
            assert len(line) <= MAX_LINE


def test_a_page_without_marks_is_refused() -> None:
    """Text around the marks stays, and what stood between them goes."""
    assert redrawn(f"a\n{BEGIN}\nold\n{END}\nb", made_up()) == f"a\n{BEGIN}\n\n{tables(made_up())}\n{END}\nb"
    with pytest.raises(SettingsError, match="write both where the tables belong"):
        redrawn("a", made_up())


def test_results_of_other_lengths_make_no_chart() -> None:
    """The chart has one axis for all rates."""
    with pytest.raises(LookupError, match="no load has 7500 tokens in and 200 out"):
        chart(results_of([row("A", "even:1x30", 0, 1, "10/10")]))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_what_is_published_is_what_was_measured(file: Path) -> None:
    """docs/images/placement.svg and the tables of docs/performance.md, to the letter."""
    results = read_results(file)
    assert (DOCS / "images" / "placement.svg").read_text(encoding="utf-8") == chart(results)
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert redrawn(page, results) == page
