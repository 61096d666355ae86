"""What counts as ready."""

import pytest

from kvbelt.ops.probe import Answer


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (Answer(200), True),
        (Answer(503), False),
        (Answer(200, {"state": "ready"}), True),
        (Answer(200, {"state": "loading"}), False),
        (Answer(200, {"state": "ready", "workers": [{"state": "ready"}, {"state": "ready"}]}), True),
        (Answer(200, {"state": "ready", "workers": [{"state": "ready"}, {"state": "lost"}]}), False),
    ],
)
def test_ready_means_everybody(answer, ready):
    """A proxy is ready for the launcher only when each of its workers is."""
    assert answer.ready == ready
