"""The shadow account: whether the same requests would have been better off without splits.

From time to time the requests since then are replayed as placement splits them and all whole, by another process at low
priority (``simulate/replay.py``), because this one must not pause. Where splitting loses twice in succession it is
switched off until it wins again.
"""

import asyncio
import contextlib
import logging
import sys
from itertools import islice, takewhile
from statistics import median

import msgspec

from kvbelt.proxy.observe.records import Records
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.routing.placement import Mode, Placement
from kvbelt.routing.regret import SplitSwitch
from kvbelt.wire.health import PlacementNow, Role
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.replay import REPLAY_ANSWER, EndedRequest, ReplayAnswer, ReplayQuestion, ReplayWorker

log = logging.getLogger("kvbelt.proxy")

PERIOD = 60.0  #: seconds between two windows

#: While splitting is off, so many seconds of each period have splits: else nobody would see that a link has recovered.
TRIAL = 3.0

#: A window has at least so many streamed requests, and so many splits.
LEAST, LEAST_SPLITS = 64, 8

#: Fewer pauses say nothing of the link.
LEAST_PAUSES = 3

#: A window is the last requests, at most so many, or so many a worker: a replay takes about a millisecond for each.
MOST, MOST_OF_A_WORKER = 512, 32

LIMIT = 30.0  #: seconds that a replay may take

#: A share that differs so much from the replay's shows that the replay misses something.
DIFFERENCE = 0.1

_REPLAY = ("-m", "kvbelt.simulate.replay")


class ShadowAccount:
    def __init__(self, placement: Placement, fleet: Fleet, records: Records, settings: ProxySettings) -> None:
        self._placement, self._fleet, self._records = placement, fleet, records
        self._settings = settings
        self._switch = SplitSwitch()
        self._judged = 0  # the number of the last request that was in a window
        self._pause: float | None = None  # of splits, as last seen
        self._regret: float | None = None
        self._actual: float | None = None
        self._expected: float | None = None
        self._failed = self._differs = False  # the last time, and so it has been logged
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._settings.placement is Mode.ELASTIC:
            self._task = asyncio.create_task(self._keep(), name="shadow account")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def now(self) -> PlacementNow:
        return PlacementNow(
            setting=self._settings.placement,
            mode=self._mode,
            regret=self._regret,
            actual=self._actual,
            expected=self._expected,
        )

    @property
    def _mode(self) -> Mode:
        return Mode.WHOLE if self._switch.off else self._settings.placement

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(PERIOD - TRIAL)
            self._placement.mode = Mode.ELASTIC
            await asyncio.sleep(TRIAL)
            self._placement.mode = self._mode
            try:
                await self.judge()
            except Exception:
                log.exception("the shadow account of placement has failed, so splitting stays as it is")

    async def judge(self) -> None:
        """Replay the requests since the last window, if they are enough, and act by the outcome."""
        question = self._question()
        if question is None:
            return
        try:
            answer = await _ask(question)
        except (OSError, TimeoutError, MessageError) as error:
            if not self._failed:
                why = str(error) or f"it took longer than {LIMIT:g} s"
                log.warning("the shadow account of placement cannot be kept, so splitting stays as it is: %s", why)
            self._failed = True
            return
        self._failed = False
        self.take(question.requests, answer)

    def _question(self) -> ReplayQuestion | None:
        ready = [worker for worker in self._fleet if worker.ready]
        workers = [ReplayWorker(one.role, one.steps) for one in ready if one.steps and one.steps.costs.samples]
        if len(workers) < len(ready) or {one.role for one in workers} != {Role.PREFILL, Role.DECODE}:
            return None
        since = takewhile(lambda record: record.number > self._judged, self._records.newest_ended())
        answered = (one for one in since if one.action and one.status == 200)
        latest = islice(answered, max(MOST, MOST_OF_A_WORKER * len(workers)))
        window = sorted((one.for_replay() for one in latest), key=lambda one: one.at)
        splits = sum(one.split for one in window)
        if sum(one.within is not None for one in window) < LEAST or (splits < LEAST_SPLITS and not self._switch.off):
            return None
        self._judged = self._records.ended_count
        pauses = [one.pause for one in window if one.pause is not None]
        if len(pauses) >= LEAST_PAUSES:
            self._pause = median(pauses)
        return ReplayQuestion(workers, window, self._settings.levels.itl, self._pause)

    def take(self, window: list[EndedRequest], answer: ReplayAnswer) -> None:
        """Act by the outcome of one replay."""
        self._regret = answer.regret
        known = [one.within for one in window if one.within is not None]
        self._actual = sum(known) / len(known)
        self._expected = answer.whole if self._switch.off else answer.elastic
        differs = abs(self._actual - self._expected) > DIFFERENCE
        if differs and not self._differs:
            log.warning(
                "%.0f %% of %d requests were within their levels, where a replay of them expects %.0f %%: "
                "something is slower or faster than the workers' step costs say",
                100 * self._actual, len(known), 100 * self._expected,
            )  # fmt: skip
        self._differs = differs
        if not self._switch.judge(answer.regret):
            return
        self._placement.mode = self._mode
        log.warning(
            "splitting is switched %s: of the last %d requests, %.0f %% would have been within their levels with it "
            "and %.0f %% without",
            "off" if self._switch.off else "on again", len(known), 100 * answer.elastic, 100 * answer.whole,
        )  # fmt: skip


async def _ask(question: ReplayQuestion) -> ReplayAnswer:
    """Raises OSError, TimeoutError, MessageError."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *_REPLAY, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(LIMIT):
            assert process.stdin is not None
            with contextlib.suppress(RuntimeError):  # uvloop's: it has ended before it was asked, and says why
                process.stdin.write(msgspec.json.encode(question))
            process.stdin.close()
            answer, errors = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise MessageError(errors.decode(errors="replace").strip().rpartition("\n")[2] or f"exit {process.returncode}")
    return REPLAY_ANSWER.parse(answer, "the replay")
