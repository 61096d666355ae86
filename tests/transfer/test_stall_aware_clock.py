"""The clock of a thread that is sometimes kept from running."""

import pytest

from kvbelt.transfer.patience import PatientClock


class Time:
    """A clock that goes when told to."""

    now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def turn(clock, time, sleep, slept, worked):
    """One turn: meant to sleep, slept, worked."""
    woke = clock.asleep(sleep)
    time.now += slept
    woke()
    time.now += worked


def test_ordinary_turns_count_in_full():
    """Sleeping as long as meant, and a little work, is time."""
    time = Time()
    clock = PatientClock(time)
    start = clock()
    for _ in range(100):
        turn(clock, time, 0.25, 0.26, 0.01)
    clock.asleep(0.0)
    assert clock() - start == pytest.approx(27.0)


def test_waking_before_time_is_not_late():
    """A message came: nothing to forgive, nothing to take back."""
    time = Time()
    clock = PatientClock(time)
    start = clock()
    turn(clock, time, float("inf"), 50.0, 0.0)
    turn(clock, time, 10.0, 1.0, 0.0)
    assert clock() - start == pytest.approx(51.0)


@pytest.mark.parametrize(("slept", "worked"), [(5.25, 0.0), (0.25, 5.0)])
def test_time_without_attention_does_not_count(slept, worked):
    """Neither sleeping longer than meant, nor being stopped while at work."""
    time = Time()
    clock = PatientClock(time)
    start = clock()
    turn(clock, time, 0.25, slept, worked)
    clock.asleep(0.0)
    assert clock() - start == pytest.approx(0.25)
