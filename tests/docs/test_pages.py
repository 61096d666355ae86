"""The documentation can be read on a screen, and none of its links is broken."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, cells, links, prose

MAX_LINE = 100
MAX_COLUMNS = 5
MAX_CELL = 120

#: Where a link leads cannot be broken into lines, so it does not count.
TARGET = re.compile(r"\]\([^)]*\)|https?://\S+")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_lines_are_short(page: Path) -> None:
    """No line of text is longer than 100 characters."""
    found = [
        f"{number}: {line}"
        for number, line in prose(page.read_text(encoding="utf-8"))
        if len(TARGET.sub("]", line)) > MAX_LINE and not line.startswith("|")
    ]
    assert not found, "\n".join(found)


@every_page
def test_tables_are_small(page: Path) -> None:
    """No table has more than five columns, and no cell more than 120 characters."""
    rows = [(number, cells(line)) for number, line in prose(page.read_text(encoding="utf-8")) if line.startswith("|")]
    found = [f"{number}: {len(row)} columns" for number, row in rows if len(row) > MAX_COLUMNS]
    found += [f"{number}: {cell}" for number, row in rows for cell in row if len(cell) > MAX_CELL]
    assert not found, "\n".join(found)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file that exists, and each anchor one of its headings."""
    for link in links(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_reached_from_the_index() -> None:
    """docs/index.md links every page."""
    index = {(DOCS / link.partition("#")[0]).resolve() for link in links((DOCS / "index.md").read_text("utf-8"))}
    assert set(PAGES) - {DOCS / "index.md"} <= index


def test_the_checks_find_what_they_look_for() -> None:
    """Code blocks are left out, and everything else is taken apart as GitHub does."""
    page = (
        "# A `b`: c\n\n```sh\n# no heading [x](nowhere.md)\n```\n## A `b`: c\n[x](y.md#z) `[n](o.md)`\n| a \\| b | c |"
    )
    assert [number for number, _ in prose(page)] == [1, 2, 6, 7, 8]
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    assert links(page) == ["y.md#z"]
    assert cells("| a \\| b | c |") == ["a \\| b", "c"]
