"""A clock that stands still while its own thread does not run.

Whoever could not run for two seconds (a machine under load, a paused virtual machine, SIGSTOP) has not listened
for two seconds, and must not conclude that its peers were silent. So the belt's thread tells this clock how long
it meant to sleep and how long it worked, and what is beyond that is not counted.
"""

from collections.abc import Callable

#: A thread that comes this much late was kept from running; less is ordinary scheduling.
STALL_SECONDS = 0.1


class PatientClock:
    """Monotonic seconds of one thread's attention."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stalled = 0.0
        self._woke = clock()

    def __call__(self) -> float:
        """Now. May be called from any thread."""
        return self._clock() - self._stalled

    def asleep(self, seconds: float) -> "Callable[[], None]":
        """Before sleeping for at most so long; call what is returned on waking."""
        before = self._clock()
        self._forgive(before - self._woke)

        def woke() -> None:
            now = self._clock()
            self._forgive(now - before - seconds)
            self._woke = now

        return woke

    def _forgive(self, late: float) -> None:
        if late > STALL_SECONDS:
            self._stalled += late
