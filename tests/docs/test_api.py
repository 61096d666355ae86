"""docs/api.md shows what the published runs of ``kvbelt verify`` found."""

from tools.draw_api import page_with_tables, read

from kvbelt.ops.verify.cases import CASES
from kvbelt.ops.verify.report import EQUAL, status
from tests.docs.pages import DOCS


def test_the_tables_are_what_is_drawn() -> None:
    """``python -m tools.draw_api docs/api.md`` changes nothing."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert page == page_with_tables(page, read(DOCS / "results"))


def test_the_runs_are_equal_and_know_today_s_cases() -> None:
    """Every case of the table, and no difference."""
    results = read(DOCS / "results")
    assert "embedded" in results
    for result in results.values():
        assert status(result) == EQUAL
        assert {(one.endpoint, one.field, one.what) for one in result.judged.cases} == {
            (case.endpoint, case.field, case.what) for case in CASES
        }
