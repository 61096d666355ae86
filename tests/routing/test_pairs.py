"""Which pairs of workers are known to fit."""

import pytest

from kvbelt.routing.pairs import Pairs, PairState


def test_an_unknown_pair_is_usable():
    """A pair is usable unless it was refused."""
    pairs = Pairs()
    assert pairs.usable("p", "d")
    assert pairs.usable(None, "d")
    assert pairs.get("p", "d") is None


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("refused_dtype", PairState.REFUSED),
        ("untrusted_key", PairState.REFUSED),
        ("no_belt", PairState.REFUSED),
        ("peer_unreachable", PairState.FAILED),
        ("a_word_of_a_newer_worker", PairState.FAILED),
    ],
)
def test_lasting_failures_are_told_from_others(reason, state):
    """The registry of reasons decides which failures last."""
    pairs = Pairs()
    pairs.failed("p", "d", reason, "why", 1.0)
    assert pairs.get("p", "d").state is state
    assert pairs.usable("p", "d") is (state is PairState.FAILED)
    assert pairs.usable("p", "other")


def test_a_pair_that_works_after_all_is_usable():
    """The newest report counts."""
    pairs = Pairs()
    pairs.failed("p", "d", "refused_dtype", "", 1.0)
    pairs.succeeded("p", "d", 2.0)
    assert pairs.usable("p", "d")


def test_a_report_is_new_once():
    """A repeated report is not new, so that a log has one line for each cause."""
    pairs = Pairs()
    assert pairs.failed("p", "d", "peer_unreachable", "", 1.0)
    assert not pairs.failed("p", "d", "peer_unreachable", "", 2.0)
    assert pairs.failed("p", "d", "channel", "", 3.0)
    assert pairs.succeeded("p", "d", 4.0)
    assert not pairs.succeeded("p", "d", 5.0)


def test_a_transfers_word_does_not_take_away_the_handshakes_values():
    """A notification without detail keeps the detail of the handshake."""
    pairs = Pairs()
    pairs.failed("p", "d", "refused_dtype", "float32 here and bfloat16 there", 1.0)
    pairs.failed("p", "d", "refused_dtype", "", 2.0)
    assert "bfloat16" in pairs.get("p", "d").detail


def test_a_life_that_is_over_is_forgotten():
    """A process that ends takes its pairs along, on either side."""
    pairs = Pairs()
    for prefill, decode in (("p", "d"), ("p", "e"), ("q", "d")):
        pairs.failed(prefill, decode, "refused_dtype", "", 1.0)
    pairs.forget("d")
    assert pairs.states().total() == 1
    assert pairs.usable("p", "d")
    assert not pairs.usable("p", "e")
