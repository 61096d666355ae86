"""The schedule of a seed."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvbelt.ops.chaos.faults import KINDS
from kvbelt.ops.chaos.schedule import pick, schedule


def test_a_seed_gives_one_schedule():
    """A seed always gives the same schedule; another seed gives another one."""
    assert schedule(7, 60, KINDS, 2.2) == schedule(7, 60, KINDS, 2.2)
    assert schedule(7, 60, KINDS, 2.2) != schedule(8, 60, KINDS, 2.2)


@given(seed=st.integers(0, 1 << 16), every=st.floats(0.5, 5.0))
def test_every_kind_occurs_before_any_occurs_again(seed, every):
    """The counts of two kinds never differ by more than one; times rise and end in time."""
    faults = schedule(seed, 100, KINDS, every)
    counts = Counter(fault.kind.name for fault in faults)
    occurrences = [counts[kind.name] for kind in KINDS]
    assert max(occurrences) - min(occurrences) <= 1
    moments = [fault.at for fault in faults]
    assert moments == sorted(moments)
    assert all(0 < moment <= 100 for moment in moments)
    assert all(fault.kind.seconds[0] <= fault.seconds <= fault.kind.seconds[1] for fault in faults)


def test_fifteen_minutes_hold_three_hundred_faults():
    """The usual run, without its first phases, has that many."""
    assert len(schedule(0, 15 * 60 - 90, KINDS, 2.2)) >= 300


def test_no_kind_no_fault():
    """Without kinds the schedule is empty."""
    assert schedule(0, 60, (), 1.0) == []


def test_choice_picks_among_those_that_are_left():
    """The choices are spread evenly over the candidates."""
    assert [pick(choice, ["a", "b"]) for choice in (0.0, 0.49, 0.5, 0.999)] == ["a", "a", "b", "b"]
    assert pick(0.5, []) is None
