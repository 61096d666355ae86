"""The phases of a run.

1. Load alone. 2. Load with one decode worker stopped. 3. Load under faults. 4. Load until every worker serves again.
5. No load, until nothing is held any more.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from kvbelt.ops.chaos.config import ChaosConfig
from kvbelt.ops.chaos.effect import Effect, seconds_to_first_token
from kvbelt.ops.chaos.endpoints import Endpoints
from kvbelt.ops.chaos.faults import Requirement
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.inject import Injector
from kvbelt.ops.chaos.ledger import Ledger
from kvbelt.ops.chaos.load import LoadGenerator
from kvbelt.ops.chaos.memory import growths
from kvbelt.ops.chaos.monitor import Monitor
from kvbelt.ops.chaos.recovery import Injected, RightAnswer, Skipped, recoveries
from kvbelt.ops.chaos.reference import Reference
from kvbelt.ops.chaos.result import HOLD_SECONDS, Result
from kvbelt.ops.chaos.rubbish_sender import RubbishSender
from kvbelt.ops.chaos.schedule import Injection, schedule
from kvbelt.ops.chaos.verdict import FAILURES, Observation, Outcome
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.network import Network

#: Share of the requests/s that one undisturbed server answers; restarting workers need cores, too.
_RATE_SHARE = 0.35
_RATES = (0.3, 12.0)

#: Length of phases 1 and 2 each: as a share of the whole, and limits in seconds.
_EFFECT_SHARE = 0.05
_EFFECT_SECONDS = (3.0, 45.0)

#: Before phase 1, because the first requests fill caches.
_WARM_UP_SECONDS = 3.0

#: Every worker must have taken part in a right answer this long after the last fault.
_AGAIN_SECONDS = 30.0

_PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 0.25


class Experiment:
    """One deployment under load and faults. Call ``run`` once."""

    def __init__(
        self,
        config: ChaosConfig,
        endpoints: Endpoints,
        reference: Reference,
        *,
        log: Callable[[str], None],
        stop: asyncio.Event,
        deployment: Deployment | None = None,
        network: Network | None = None,
        rubbish: RubbishSender | None = None,
        no_network: str = "",
    ) -> None:
        self._config = config
        self._endpoints = endpoints
        self._reference = reference
        self._log = log
        self._stop = stop
        self._deployment = deployment
        self._no_network = no_network
        self._start = time.monotonic()
        self._rate = config.rate or min(max(_RATE_SHARE * reference.per_second, _RATES[0]), _RATES[1])
        self._ledger = Ledger(reference.answers, self._was_away, self._failure_context, self._start)
        self._load = LoadGenerator(
            endpoints.proxy,
            reference.questions,
            self._rate,
            config.seed,
            mix=config.mix,
            on_observation=self._ledger.on_observation,
        )
        self._injector = Injector(endpoints, self._load, deployment=deployment, network=network, rubbish=rubbish)
        self._monitor = Monitor(endpoints, deployment, self._injector)
        self._under_way: dict[int, Injection] = {}
        self._injected: list[Injected] = []
        self._skipped: list[Skipped] = []

    async def run(self) -> Result:
        self._log(f"{self._rate:.1f} requests a second, {len(self._reference.questions)} different ones")
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(self._monitor.run()), group.create_task(self._progress())]
            load = group.create_task(self._load.run())
            windows = await self._stop_one()
            await self._faults()
            idle = await self._until_all_serve()
            self._load.stop()
            self._log("the load has ended; waiting for what is under way")
            await load
            ended = time.monotonic()
            holdings, held_seconds = await self._until_nothing_is_held(ended)
            await self._monitor.read_records()
            for task in watching:
                task.cancel()
        return self._result(windows, idle, ended, holdings, held_seconds)

    # Phases

    async def _stop_one(self) -> tuple[str, float, float, float] | None:
        """Phases 1 and 2. Returns the stopped worker's name, when the two began, and when they ended."""
        decode = [name for name in self._endpoints.workers if not name.startswith("prefill")]
        if self._deployment is None or len(decode) < 2:
            return None
        half = min(max(self._config.seconds * _EFFECT_SHARE, _EFFECT_SECONDS[0]), _EFFECT_SECONDS[1])
        self._log(f"{half:.0f} s without faults, then {half:.0f} s with {decode[-1]} stopped")
        await self._pause(_WARM_UP_SECONDS)
        before = time.monotonic()
        await self._pause(half)
        stopped = time.monotonic()
        async with self._injector.stopped(decode[-1]):
            await self._pause(half)
        return decode[-1], before, stopped, time.monotonic()

    async def _faults(self) -> None:
        """Phase 3: every fault of the schedule as a task; returns when all are healed."""
        config = self._config
        begin = time.monotonic()
        kinds = [kind for kind in config.kinds if self._injector.why_not(kind) is None]
        faults = schedule(config.seed, config.seconds - (begin - self._start), kinds, config.every)
        self._log(f"{len(faults)} faults of {len(kinds)} kinds, one every {config.every:g} s")
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                if await self._pause(begin + fault.at - time.monotonic()):
                    break
                group.create_task(self._one(fault), name=fault.kind.name)
            else:
                await self._pause(self._start + config.seconds - time.monotonic())

    async def _one(self, fault: Injection) -> None:
        self._under_way[fault.number] = fault
        try:
            outcome = await self._injector.inject(fault)
        finally:
            del self._under_way[fault.number]
        if isinstance(outcome, Injected):
            self._injected.append(outcome)
        else:
            self._skipped.append(outcome)

    async def _until_all_serve(self) -> tuple[str, ...]:
        """Phase 4. Returns the workers that did not take part in a right answer in time."""
        healed = time.monotonic()
        idle = set(self._endpoints.workers)
        while idle and time.monotonic() < healed + _AGAIN_SECONDS and not self._stop.is_set():
            await self._pause(_POLL_SECONDS)
            used = {address for good in self._good() if good.ended >= healed for address in good.used}
            idle = {name for name in idle if str(self._endpoints.workers[name]) not in used}
        return () if self._stop.is_set() else tuple(sorted(idle))

    async def _until_nothing_is_held(self, ended: float) -> tuple[Mapping[str, Holdings], float]:
        while True:
            holdings = await self._monitor.holdings()
            seconds = time.monotonic() - ended
            if seconds > HOLD_SECONDS or all(held.nothing for held in holdings.values()):
                return holdings, seconds
            await asyncio.sleep(_POLL_SECONDS)

    async def _pause(self, seconds: float) -> bool:
        """Sleep. Returns True at once if the run is to end."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    # Results

    def _good(self) -> list[RightAnswer]:
        participants = self._monitor.participants
        return [
            RightAnswer(one.ended, participants[one.request_id].used)
            for one in self._ledger.judged
            if one.outcome is Outcome.RIGHT and one.request_id in participants
        ]

    def _was_away(self, begin: float, end: float) -> bool:
        return self._injector.was_away(begin, end)

    async def _failure_context(self, seen: Observation) -> tuple[str, tuple[str, ...], Mapping[str, str]]:
        self._log(f"request {seen.request_id} broke an invariant; the report has the details")
        faults = [f"{fault.kind.name} (under way)" for fault in self._under_way.values()]
        faults += [
            f"{fault.injection.kind.name} of {fault.target or 'clients'}"
            for fault in self._injected
            if fault.overlaps(seen.began, seen.ended)
        ]
        logs: dict[str, str] = {}
        if self._deployment is not None:
            logs = {process.name: "\n".join(self._deployment.log_tail(process.name)) for process in
                    self._deployment.processes}  # fmt: skip
        return await self._monitor.record(seen.request_id), tuple(faults), logs

    def _effect(self, windows: tuple[str, float, float, float] | None) -> Effect | None:
        if windows is None:
            return None
        name, before, stopped, end = windows
        judged, participants, address = (
            self._ledger.judged,
            self._monitor.participants,
            str(self._endpoints.workers[name]),
        )
        return Effect(
            name,
            seconds_to_first_token(judged, participants, before, stopped, without=address),
            seconds_to_first_token(judged, participants, stopped, end, without=address),
        )

    def _result(
        self,
        windows: tuple[str, float, float, float] | None,
        idle: tuple[str, ...],
        ended: float,
        holdings: Mapping[str, Holdings],
        held_seconds: float,
    ) -> Result:
        config, ledger, monitor = self._config, self._ledger, self._monitor
        impossible = {kind.name: why for kind in config.kinds if (why := self._injector.why_not(kind)) is not None}
        if self._no_network:
            impossible |= {
                kind.name: self._no_network
                for kind in config.kinds
                if kind.needs is Requirement.NETWORK and kind.name in impossible
            }
        return Result(
            deployment=config.name,
            model=config.model.name if config.topology is not None else "of the deployment",
            seed=config.seed,
            seconds=ended - self._start,
            rate=self._rate,
            reference=self._reference.by,
            questions=len(self._reference.questions),
            ambiguous=self._reference.ambiguous,
            impossible=impossible,
            injected=tuple(self._injected),
            skipped=tuple(self._skipped),
            recovered=recoveries(self._injected, self._good(), self._endpoints.workers),
            outcomes=ledger.outcomes,
            errors=ledger.errors,
            paths=ledger.paths,
            not_sent=self._load.not_sent,
            failures=tuple(ledger.failures),
            holdings=holdings,
            held_seconds=held_seconds,
            quarantined_most=monitor.quarantined_most,
            queued=monitor.queued,
            growths=tuple(growths(monitor.lives)),
            deaths=tuple(monitor.deaths),
            idle=idle,
            not_back=dict(self._injector.not_back),
            effect=self._effect(windows),
            lag=monitor.lag,
            interrupted=self._stop.is_set(),
        )

    async def _progress(self) -> None:
        """Print a line every few seconds."""
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            outcomes = self._ledger.outcomes
            failed = sum(outcomes[outcome] for outcome in FAILURES)
            now = ", ".join(sorted(fault.kind.name for fault in self._under_way.values()))
            self._log(
                f"{time.monotonic() - self._start:5.0f} s  {outcomes[Outcome.RIGHT]:,} right, "
                f"{outcomes[Outcome.ERROR]} errors, {failed} failures, "
                f"{self._load.under_way} under way; {len(self._injected)} faults" + (f", now {now}" if now else "")
            )
