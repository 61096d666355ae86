"""The documentation's pages, taken apart as a reader on GitHub sees them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *DOCS.glob("zh/*.md"),
        *(
            ROOT / name
            for name in ("README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/gpu/README.md")
        ),
    ]
)

_FENCE = re.compile(r"^ *(```|~~~)")
_LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} (.*)$")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside code blocks, with their numbers from 1."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def cells(row: str) -> list[str]:
    """The cells of a table's row."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def links(text: str) -> list[str]:
    """Where the page's links and images lead."""
    plain = re.sub(r"`[^`]*`", "", "\n".join(line for _, line in prose(text)))
    return [inline or reference for inline, reference in _LINK.findall(plain)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the page's headings."""
    found: set[str] = set()
    for _, line in prose(text):
        if heading := _HEADING.match(line):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            name = re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-")
            twins = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
            found.add(f"{name}-{twins}" if twins else name)
    return found
