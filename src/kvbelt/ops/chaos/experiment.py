"""The phases of a run.

Load alone; load with one decode worker stopped; load under faults; load until every worker serves again; no load, until
nothing is held any more.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from kvbelt.ops.chaos.effect import Effect, seconds_to_first_token
from kvbelt.ops.chaos.faults import Need
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.inject import Injector
from kvbelt.ops.chaos.ledger import Ledger
from kvbelt.ops.chaos.load import Load
from kvbelt.ops.chaos.memory import growths
from kvbelt.ops.chaos.plan import Plan
from kvbelt.ops.chaos.recovery import Good, Injected, Skipped, recoveries
from kvbelt.ops.chaos.reference import Reference
from kvbelt.ops.chaos.result import HOLD_SECONDS, Result
from kvbelt.ops.chaos.rubbish_io import Thrower
from kvbelt.ops.chaos.schedule import Injection, schedule
from kvbelt.ops.chaos.site import Site
from kvbelt.ops.chaos.verdict import FAILURES, Seen, Word
from kvbelt.ops.chaos.watch import Watch
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.network import Network

#: Share of what one undisturbed server answers in a second: workers that start again need cores, too.
_RATE_SHARE = 0.35
_RATES = (0.3, 12.0)

#: Of each half of the phase before the faults, as a share of the whole, and in seconds.
_EFFECT_SHARE = 0.05
_EFFECT_SECONDS = (3.0, 45.0)

#: Before that: first requests fill caches.
_WARM_UP_SECONDS = 3.0

#: After the last fault, every worker must have had a part in a right answer by then.
_AGAIN_SECONDS = 30.0

_PROGRESS_SECONDS = 5.0
_LOOK_SECONDS = 0.25


class Attack:
    """One deployment under load and faults. ``run`` once."""

    def __init__(
        self,
        plan: Plan,
        site: Site,
        reference: Reference,
        *,
        say: Callable[[str], None],
        stop: asyncio.Event,
        deployment: Deployment | None = None,
        network: Network | None = None,
        thrower: Thrower | None = None,
        no_network: str = "",
    ) -> None:
        self._plan = plan
        self._site = site
        self._reference = reference
        self._say = say
        self._stop = stop
        self._deployment = deployment
        self._no_network = no_network
        self._start = time.monotonic()
        self._rate = plan.rate or min(max(_RATE_SHARE * reference.per_second, _RATES[0]), _RATES[1])
        self._ledger = Ledger(reference.answers, self._was_away, self._evidence, self._start)
        self._load = Load(
            site.proxy, reference.questions, self._rate, plan.seed, manners=plan.manners, on_seen=self._ledger.take
        )
        self._injector = Injector(site, self._load, deployment=deployment, network=network, thrower=thrower)
        self._watch = Watch(site, deployment, self._injector)
        self._under_way: dict[int, Injection] = {}
        self._injected: list[Injected] = []
        self._skipped: list[Skipped] = []

    async def run(self) -> Result:
        """All phases."""
        self._say(f"{self._rate:.1f} requests a second, {len(self._reference.questions)} different ones")
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(self._watch.run()), group.create_task(self._progress())]
            load = group.create_task(self._load.run())
            windows = await self._stop_one()
            await self._faults()
            idle = await self._until_all_serve()
            self._load.stop()
            self._say("the load has ended; waiting for what is under way")
            await load
            ended = time.monotonic()
            holdings, held_seconds = await self._until_nothing_is_held(ended)
            await self._watch.look_at_records()
            for task in watching:
                task.cancel()
        return self._result(windows, idle, ended, holdings, held_seconds)

    # Phases

    async def _stop_one(self) -> tuple[str, float, float, float] | None:
        """Load alone, then with the last decode worker stopped. Returns its name and when the two began and ended."""
        decode = [name for name in self._site.workers if not name.startswith("prefill")]
        if self._deployment is None or len(decode) < 2:
            return None
        half = min(max(self._plan.seconds * _EFFECT_SHARE, _EFFECT_SECONDS[0]), _EFFECT_SECONDS[1])
        self._say(f"{half:.0f} s without faults, then {half:.0f} s with {decode[-1]} stopped")
        await self._pause(_WARM_UP_SECONDS)
        before = time.monotonic()
        await self._pause(half)
        stopped = time.monotonic()
        async with self._injector.stopped(decode[-1]):
            await self._pause(half)
        return decode[-1], before, stopped, time.monotonic()

    async def _faults(self) -> None:
        """Every fault of the schedule, each as a task of its own; returns when all are healed."""
        plan = self._plan
        begin = time.monotonic()
        kinds = [kind for kind in plan.kinds if self._injector.why_not(kind) is None]
        faults = schedule(plan.seed, plan.seconds - (begin - self._start), kinds, plan.every)
        self._say(f"{len(faults)} faults of {len(kinds)} kinds, one every {plan.every:g} s")
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                if await self._pause(begin + fault.at - time.monotonic()):
                    break
                group.create_task(self._one(fault), name=fault.kind.name)
            else:
                await self._pause(self._start + plan.seconds - time.monotonic())

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
        """Load goes on until each worker has had a part in a right answer. Returns those that have not in time."""
        healed = time.monotonic()
        idle = set(self._site.workers)
        while idle and time.monotonic() < healed + _AGAIN_SECONDS and not self._stop.is_set():
            await self._pause(_LOOK_SECONDS)
            used = {address for good in self._good() if good.ended >= healed for address in good.used}
            idle = {name for name in idle if str(self._site.workers[name]) not in used}
        return () if self._stop.is_set() else tuple(sorted(idle))

    async def _until_nothing_is_held(self, ended: float) -> tuple[Mapping[str, Holdings], float]:
        while True:
            holdings = await self._watch.holdings()
            seconds = time.monotonic() - ended
            if seconds > HOLD_SECONDS or all(held.nothing for held in holdings.values()):
                return holdings, seconds
            await asyncio.sleep(_LOOK_SECONDS)

    async def _pause(self, seconds: float) -> bool:
        """Wait; True at once if the run is to end."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    # What was found

    def _good(self) -> list[Good]:
        traces = self._watch.traces
        return [
            Good(one.ended, traces[one.request_id].used)
            for one in self._ledger.judged
            if one.word is Word.RIGHT and one.request_id in traces
        ]

    def _was_away(self, begin: float, end: float) -> bool:
        return self._injector.was_away(begin, end)

    async def _evidence(self, seen: Seen) -> tuple[str, tuple[str, ...], Mapping[str, str]]:
        self._say(f"request {seen.request_id} got what it must not get; the report will tell")
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
        return await self._watch.record(seen.request_id), tuple(faults), logs

    def _effect(self, windows: tuple[str, float, float, float] | None) -> Effect | None:
        if windows is None:
            return None
        name, before, stopped, end = windows
        judged, traces, address = self._ledger.judged, self._watch.traces, str(self._site.workers[name])
        return Effect(
            name,
            seconds_to_first_token(judged, traces, before, stopped, without=address),
            seconds_to_first_token(judged, traces, stopped, end, without=address),
        )

    def _result(
        self,
        windows: tuple[str, float, float, float] | None,
        idle: tuple[str, ...],
        ended: float,
        holdings: Mapping[str, Holdings],
        held_seconds: float,
    ) -> Result:
        plan, ledger, watch = self._plan, self._ledger, self._watch
        impossible = {kind.name: why for kind in plan.kinds if (why := self._injector.why_not(kind)) is not None}
        if self._no_network:
            impossible |= {
                kind.name: self._no_network
                for kind in plan.kinds
                if kind.needs is Need.NETWORK and kind.name in impossible
            }
        return Result(
            deployment=plan.name,
            model=plan.model.name if plan.topology is not None else "of the deployment",
            seed=plan.seed,
            seconds=ended - self._start,
            rate=self._rate,
            reference=self._reference.by,
            questions=len(self._reference.questions),
            ambiguous=self._reference.ambiguous,
            impossible=impossible,
            injected=tuple(self._injected),
            skipped=tuple(self._skipped),
            recovered=recoveries(self._injected, self._good(), self._site.workers),
            words=ledger.words,
            errors=ledger.errors,
            paths=ledger.paths,
            not_sent=self._load.not_sent,
            failures=tuple(ledger.failures),
            holdings=holdings,
            held_seconds=held_seconds,
            quarantined_most=watch.quarantined_most,
            queued=watch.queued,
            growths=tuple(growths(watch.lives)),
            deaths=tuple(watch.deaths),
            idle=idle,
            not_back=dict(self._injector.not_back),
            effect=self._effect(windows),
            lag=watch.lag,
            interrupted=self._stop.is_set(),
        )

    async def _progress(self) -> None:
        """A line every few seconds, for people."""
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            words = self._ledger.words
            failed = sum(words[word] for word in FAILURES)
            now = ", ".join(sorted(fault.kind.name for fault in self._under_way.values()))
            self._say(
                f"{time.monotonic() - self._start:5.0f} s  {words[Word.RIGHT]:,} right, {words[Word.ERROR]} errors, "
                f"{failed} failures, {self._load.under_way} under way; {len(self._injected)} faults"
                + (f", now {now}" if now else "")
            )
