"""Time in which this process did not run is nobody's silence."""

import asyncio
import heapq
import time

import pytest

from kvbelt.proxy import patience
from kvbelt.proxy.patience import LOOKS, Alarm
from tests.proxy.support import Deployment, async_test, eventually

BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0}


class Loop:
    """An event loop's timers, whose time goes when told to."""

    def __init__(self):
        self.now = 100.0
        self._due = []

    def time(self):
        """Now."""
        return self.now

    def call_at(self, when, callback):
        """Due then."""
        handle = asyncio.TimerHandle(when, callback, (), self)
        heapq.heappush(self._due, handle)
        return handle

    def get_debug(self):
        """As a handle asks."""
        return False

    def _timer_handle_cancelled(self, handle):
        """As a handle tells."""

    def run(self, seconds):
        """Run on for so long: every timer in its time."""
        end = self.now + seconds
        while self._due and self._due[0].when() <= end:
            handle = heapq.heappop(self._due)
            self.now = max(self.now, handle.when())
            if not handle.cancelled():
                handle._run()
        self.now = end

    def stand(self, seconds):
        """Do not run for so long; then what is due by now, once."""
        self.now += seconds
        due, self._due = self._due, []
        for handle in due:
            if not handle.cancelled():
                handle._run()


@pytest.fixture
def loop():
    """One."""
    return Loop()


@pytest.fixture
def alarm(loop):
    """Of three seconds, and how often it has rung."""
    rung = []
    return Alarm(3.0, lambda: rung.append(loop.now), loop), rung


def test_it_rings_once_after_its_time(loop, alarm):
    """Where nothing disturbs it, as any timer."""
    _, rung = alarm
    loop.run(2.9)
    assert not rung
    loop.run(10.0)
    assert rung == [pytest.approx(103.0)]


def test_a_standstill_does_not_count(loop, alarm):
    """However long; afterwards there is time to listen."""
    _, rung = alarm
    loop.run(2.8)
    loop.stand(60.0)
    assert not rung
    loop.run(0.1)
    assert not rung
    loop.run(0.3)
    assert len(rung) == 1


def test_it_does_not_ring_when_it_was_cancelled(loop, alarm):
    """As any timer."""
    one, rung = alarm
    loop.run(1.0)
    one.cancel()
    loop.run(10.0)
    assert not rung


def test_a_thread_that_is_always_a_little_late_hears_it_all_the_same(loop, alarm):
    """What is ordinary scheduling counts."""
    _, rung = alarm
    for _ in range(LOOKS):
        loop.stand(0.3 + patience.STALL_SECONDS / 2)
    assert len(rung) == 1


@async_test
async def test_a_body_that_takes_too_long_is_ended():
    """With asyncio's own error."""
    with pytest.raises(TimeoutError):
        async with patience.timeout(0.05):
            await asyncio.Event().wait()
    async with patience.timeout(60.0):
        await asyncio.sleep(0)


@async_test
async def test_a_proxy_that_stood_still_while_it_asked_loses_no_worker():
    """The answer has come meanwhile; an ordinary timer would be looked at first."""
    async with Deployment(health_interval_seconds=0.01, health_timeout_seconds=0.1) as deployment:
        decode = deployment.decode[0]
        worker, health = deployment.worker(decode), decode.health
        lost, stood = [], []
        worker._lose = lost.append

        def stand_still():
            time.sleep(0.3)  # the loop of both
            stood.append(1)
            return health()

        decode.health = stand_still
        await eventually(lambda: len(stood) == 3)
        decode.health = health
        assert lost == []
        assert (await deployment.ask(BODY)).path == "first-token"
        decode.script.health_hangs = True
        await eventually(lambda: lost)  # silence is still noticed
