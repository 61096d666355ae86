"""Tables and sentences for terminals; ``table`` is also valid Markdown. Pure."""

import textwrap
from collections.abc import Collection, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table. Columns with only numbers and empty cells are right-aligned."""
    cells = [[_text(cell) for cell in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) or row[column] in ("", None) for row in rows)
        for column in range(len(head))
    ]
    widths = [max([3, len(title), *(len(row[column]) for row in cells)]) for column, title in enumerate(head)]
    lines = [_line(head, widths, right)]
    lines.append(
        "|" + "|".join("-" * (width + 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)) + "|"
    )
    return lines + [_line(row, widths, right) for row in cells]


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows in aligned columns without borders; those in ``right`` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(wide) if column in right else cell.ljust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrapped(line: str, width: int) -> list[str]:
    """A line broken at words, with the later lines under the first one."""
    indent = " " * (len(line) - len(line.lstrip()))
    return [line] if len(line) <= width else textwrap.wrap(line, width, subsequent_indent=f"{indent}  ")


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(cells, widths, right, strict=True)
    )
    return "| " + " | ".join(padded) + " |"


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
