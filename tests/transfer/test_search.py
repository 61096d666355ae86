"""Every reachable state of small belts, over all interleavings: the invariants hold, and everything ends.

The network forgets nothing and owes nothing, timers go off whenever they may (``search/protocol.py``). Longer searches:
``python -m tests.transfer.search``. That each of them can find something is shown in ``test_mechanisms.py``.
"""

import pytest

from tests.transfer.search.runs import SHORT


@pytest.mark.parametrize("name", SHORT)
def test_every_state_is_sound_and_ends(name):
    """The search is complete."""
    graph = SHORT[name]()
    assert graph.complete
    assert graph.num_states > 50
