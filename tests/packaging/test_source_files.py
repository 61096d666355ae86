"""Source files are short enough to be read as a whole."""

from tests.docs.pages import ROOT

MOST_LINES = 400


def test_no_source_file_is_too_long() -> None:
    """Split a longer one along a real seam: a part with a name."""
    lines = {str(file.relative_to(ROOT)): file.read_text("utf-8").count("\n") for file in (ROOT / "src").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
