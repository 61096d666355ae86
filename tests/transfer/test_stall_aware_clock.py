"""The clock of a thread that is sometimes kept from running."""

import pytest

from kvbelt.stall_aware_clock import StallAwareClock


class Time:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def turn(clock, time, sleep, slept, worked):
    """One turn: the time it wanted to sleep, slept and worked."""
    woke = clock.asleep(sleep)
    time.now += slept
    woke()
    time.now += worked


def test_ordinary_turns_count_in_full():
    """A sleep as long as intended and a little work count as time."""
    time = Time()
    clock = StallAwareClock(time)
    start = clock()
    for _ in range(100):
        turn(clock, time, 0.25, 0.26, 0.01)
    clock.asleep(0.0)
    assert clock() - start == pytest.approx(27.0)


def test_waking_before_time_is_not_late():
    """A message may wake the thread early."""
    time = Time()
    clock = StallAwareClock(time)
    start = clock()
    turn(clock, time, float("inf"), 50.0, 0.0)
    turn(clock, time, 10.0, 1.0, 0.0)
    assert clock() - start == pytest.approx(51.0)


@pytest.mark.parametrize(("slept", "worked"), [(5.25, 0.0), (0.25, 5.0)])
def test_time_without_attention_does_not_count(slept, worked):
    """The process may oversleep, or be stopped while it works."""
    time = Time()
    clock = StallAwareClock(time)
    start = clock()
    turn(clock, time, 0.25, slept, worked)
    clock.asleep(0.0)
    assert clock() - start == pytest.approx(0.25)


def test_a_stall_at_work_does_not_count_for_what_is_due_in_the_same_turn():
    time = Time()
    clock = StallAwareClock(time)
    start = clock()
    turn(clock, time, 0.25, 0.25, 5.0)
    assert clock.worked() - start == pytest.approx(0.25)
    time.now += 0.01
    assert clock.worked() - start == pytest.approx(0.26)
