"""Time in which this process did not run does not count against a peer."""

import asyncio
import heapq
import time

import pytest

from kvbelt import stall_aware_clock
from kvbelt.stall_aware_clock import STEPS, Alarm
from tests.proxy.support import Deployment, async_test, eventually

BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0}


class Loop:
    """An event loop's timers. The test moves its time."""

    def __init__(self):
        self.now = 100.0
        self._due = []

    def time(self):
        return self.now

    def call_at(self, when, callback):
        handle = asyncio.TimerHandle(when, callback, (), self)
        heapq.heappush(self._due, handle)
        return handle

    def get_debug(self):
        return False

    def _timer_handle_cancelled(self, handle):
        """``TimerHandle`` calls this."""

    def run(self, seconds):
        """Run for some seconds, and call each timer when it is due."""
        end = self.now + seconds
        while self._due and self._due[0].when() <= end:
            handle = heapq.heappop(self._due)
            self.now = max(self.now, handle.when())
            if not handle.cancelled():
                handle._run()
        self.now = end

    def stand(self, seconds):
        """Stall for some seconds, then call each due timer once."""
        self.now += seconds
        due, self._due = self._due, []
        for handle in due:
            if not handle.cancelled():
                handle._run()


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def alarm(loop):
    """An alarm of three seconds, and the times at which it has rung."""
    rung = []
    return Alarm(3.0, lambda: rung.append(loop.now), loop), rung


def test_it_rings_once_after_its_time(loop, alarm):
    _, rung = alarm
    loop.run(2.9)
    assert not rung
    loop.run(10.0)
    assert rung == [pytest.approx(103.0)]


def test_a_standstill_does_not_count(loop, alarm):
    """After a stall of any length the remaining time still passes."""
    _, rung = alarm
    loop.run(2.8)
    loop.stand(60.0)
    assert not rung
    loop.run(0.1)
    assert not rung
    loop.run(0.3)
    assert len(rung) == 1


def test_it_does_not_ring_when_it_was_cancelled(loop, alarm):
    one, rung = alarm
    loop.run(1.0)
    one.cancel()
    loop.run(10.0)
    assert not rung


def test_a_thread_that_is_always_a_little_late_hears_it_all_the_same(loop, alarm):
    """Delays below STALL_SECONDS count as time."""
    _, rung = alarm
    for _ in range(STEPS):
        loop.stand(0.3 + stall_aware_clock.STALL_SECONDS / 2)
    assert len(rung) == 1


@async_test
async def test_a_body_that_takes_too_long_is_ended():
    """The error is asyncio's TimeoutError."""
    with pytest.raises(TimeoutError):
        async with stall_aware_clock.timeout(0.05):
            await asyncio.Event().wait()
    async with stall_aware_clock.timeout(60.0):
        await asyncio.sleep(0)


@async_test
async def test_a_proxy_that_stood_still_while_it_asked_loses_no_worker():
    """Its answers have arrived meanwhile. An ordinary timer would expire before they are read."""
    async with Deployment(health_interval_seconds=0.01, health_timeout_seconds=0.1) as deployment:
        decode = deployment.decode[0]
        worker, health = deployment.worker(decode), decode.health
        lost, stood = [], []
        worker._lose = lambda why, *, answering: lost.append((why, answering))

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


@async_test
async def test_a_proxy_that_stood_still_while_a_server_described_itself_has_its_description():
    """Without it a vLLM server would be one that takes and sends no KV."""
    deployment = Deployment(health_timeout_seconds=0.1)
    decode = deployment.decode[0]
    health, decode.script.vllm_metrics = decode.health, ""

    def stand_still():
        time.sleep(0.3)  # the loop of both
        return health()

    decode.health = stand_still
    async with deployment:
        assert deployment.worker(decode).engine_id == "d0"
        assert len(decode.described) == 1
