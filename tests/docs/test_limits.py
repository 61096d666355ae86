"""docs/limits.md has every limit, with its setting and its test."""

import re
from dataclasses import asdict

from kvbelt.limits import DEFAULTS
from tests.docs.pages import DOCS, ROOT, cells

PAGE = (DOCS / "limits.md").read_text(encoding="utf-8")
TESTS = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))


def test_every_limit_is_listed_with_its_default() -> None:
    rows = [cells(line) for line in PAGE.splitlines() if re.match(r"\| `[a-z_]+` \| \d+ \|.*worker", line)]
    assert {row[0].strip("`"): int(row[1]) for row in rows} == asdict(DEFAULTS)


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in TESTS] == []


def test_every_row_names_its_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row for row in rows if "`test_" not in row and not row.endswith("| test |")] == []
