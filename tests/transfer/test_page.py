"""The page about the belt shows the tables as they are."""

from pathlib import Path

from kvbelt.ops.draw_states import page_part


def test_the_page_has_the_tables_drawings():
    """docs/transfer.md contains what draw_states prints, to the letter."""
    page = Path(__file__).parents[2] / "docs" / "transfer.md"
    assert page_part() in page.read_text(encoding="utf-8")
