"""Searches that are too long for every day: about half an hour together.

python -m tests.transfer.search
"""

import sys
import time

from tests.transfer.search.explore import Graph
from tests.transfer.search.runs import DEEP


def main() -> int:
    """All of them; the first violation ends it."""
    for name, run in DEEP.items():
        began = time.monotonic()
        graph: Graph = run()
        what = "all" if graph.complete else "the first"
        line = f"{what} {graph.num_states} states, {graph.num_steps} steps, {time.monotonic() - began:.0f} s: {name}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
