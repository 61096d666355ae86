"""Draws the belt's two transition tables as Mermaid, for ``docs/transfer.md``; a test holds page and tables together.

python -m kvbelt.ops.draw_states
"""

from enum import StrEnum
from typing import TypeVar

from kvbelt.transfer.machine import Table
from kvbelt.transfer.receiver_states import RECEIVER_TABLE
from kvbelt.transfer.sender_states import SENDER_TABLE

StateT = TypeVar("StateT", bound=StrEnum)


def drawing(table: Table[StateT]) -> str:
    """One edge a pair of states, with the events that lead from the one to the other; staying is not drawn."""
    lines = ["stateDiagram-v2"]
    for state, events in table.items():
        for target in dict.fromkeys(after for afters in events.values() for after in sorted(afters)):
            if target is not state:
                names = ", ".join(event.__name__ for event, afters in events.items() if target in afters)
                lines.append(f"    {state} --> {target}: {names}")
    return "\n".join(lines)


def page_part() -> str:
    """The two drawings, as they stand in the page."""
    sides = {"The sending side": drawing(SENDER_TABLE), "The receiving side": drawing(RECEIVER_TABLE)}
    return "\n".join(f"### {title}\n\n```mermaid\n{drawn}\n```\n" for title, drawn in sides.items())


if __name__ == "__main__":
    print(page_part())
