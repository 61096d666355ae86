"""Draws the belt's two transition tables: as Mermaid in ``docs/transfer.md``, and as ``docs/transfer-states.svg``.

python -m tools.draw_states [docs]

A test compares both with the tables.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from kvbelt.transfer.machine import Table
from kvbelt.transfer.receive.states import RECEIVER_TABLE
from kvbelt.transfer.send.states import SENDER_TABLE
from tools.state_picture import picture

StateT = TypeVar("StateT", bound=StrEnum)

PAGE, PICTURE = "transfer.md", "transfer-states.svg"

#: The first line of the generated part of the page. The part ends with its last drawing.
_BEGIN = "### The sending side\n"


def drawing(table: Table[StateT]) -> str:
    """One arrow for each pair of states, with the events that lead from one to the other; staying is not drawn."""
    lines = ["stateDiagram-v2"]
    for state, events in table.items():
        for target in dict.fromkeys(after for cell in events.values() for after in sorted(cell.to)):
            if target is not state:
                names = ", ".join(event.__name__ for event, cell in events.items() if target in cell.to)
                lines.append(f"    {state} --> {target}: {names}")
    return "\n".join(lines)


def page_part() -> str:
    """Both drawings, as the page has them."""
    sides = {"The sending side": drawing(SENDER_TABLE), "The receiving side": drawing(RECEIVER_TABLE)}
    return "\n".join(f"### {title}\n\n```mermaid\n{drawn}\n```\n" for title, drawn in sides.items())


def page_with_drawings(page: str) -> str:
    """The page, with its drawings brought up to date.

    Raises:
        ValueError: the page has no place for them.
    """
    begin = page.find(_BEGIN)
    if begin < 0:
        raise ValueError(f"the page has no line {_BEGIN.strip()!r}")
    end = begin
    for _ in range(2 * page[begin:].count("```mermaid")):
        end = page.index("```", end) + 3
    return page[:begin] + page_part() + page[end + 1 :]


def main() -> None:
    docs = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    page = docs / PAGE
    page.write_text(page_with_drawings(page.read_text(encoding="utf-8")), encoding="utf-8")
    (docs / PICTURE).write_text(picture(), encoding="utf-8")
    print(f"wrote {page} and {docs / PICTURE}")


if __name__ == "__main__":
    main()
