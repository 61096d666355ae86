"""Observes a running deployment: the proxy, each worker for some seconds, a trial prompt and a link probe per pair."""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

import msgspec

from kvbelt.ops.doctor import gpus, host, link_probe, trial, vllm_metrics
from kvbelt.ops.doctor.evidence import Evidence, PairSeen, Sample, TrialResult, WorkerSeen
from kvbelt.ops.doctor.scrape import NOTHING, Counted, scrape
from kvbelt.ops.http_client import Address, Client, NoAnswerError, Reply, UnreadableReplyError
from kvbelt.wire.about import ABOUT, About, LinkTotals
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.health import PROXY_HEALTH, WORKER_HEALTH, ServerDescription
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.probe import ProbeResult
from kvbelt.wire.request_record import REQUEST_LIST
from kvbelt.wire.workers import WORKER_LIST, PairRow, WorkerRow

T = TypeVar("T")

_REQUESTS = "/kvbelt/requests?limit=1000"

#: Between two samples of a worker's load.
PAUSE_SECONDS = 0.25

#: How far back requests count.
RECENT_SECONDS = 300.0

#: Asks a vLLM server, which has no routes of ours, to describe itself. Its belt is read at the first step, and the
#: answer comes with a later one: of four tokens the last two are a margin.
_DESCRIBE = {
    "prompt": [0], "max_tokens": 4, "ignore_eos": True, "temperature": 0, "kv_transfer_params": {"kvbelt": "describe"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GatherOptions:
    seconds: float = 3.0
    probe: bool = True
    recent_seconds: float = RECENT_SECONDS
    admin_key: str | None = None  #: the proxy may require it for its records
    worker_api_key: str | None = None  #: vLLM servers may require it


async def gather_evidence(url: str, address: Address, options: GatherOptions) -> Evidence:
    """Collect everything. Never raises."""
    began = time.monotonic()
    unreadable: list[str] = []
    with Client(address, options.admin_key) as proxy:
        try:
            health = (await proxy.get("/health")).read(PROXY_HEALTH, url)
        except (NoAnswerError, UnreadableReplyError) as error:
            return Evidence(url, proxy_answer=str(error))
        about = await _read(proxy, "/kvbelt/about", ABOUT, unreadable)
        listed = await _read(proxy, "/kvbelt/workers", WORKER_LIST, unreadable)
        requests = await _read(proxy, _REQUESTS, REQUEST_LIST, unreadable)
        observers = [_WorkerObserver(row, unreadable, options.worker_api_key) for row in health.workers]
        known = {(pair.prefill, pair.decode): pair for pair in listed.pairs} if listed is not None else {}
        try:
            before, since = await scrape(proxy), time.monotonic()
            pairs, graphics, here = await asyncio.gather(
                _observe_workers(observers, known, options),
                gpus.sample(3, options.seconds / 3),
                host.observe(options.seconds),
            )
            grown, counted_seconds = (await scrape(proxy)).since(before), time.monotonic() - since
        finally:
            for observer in observers:
                observer.client.close()
        await _see_again(proxy, observers, unreadable)
        # Failures during the observation count, too.
        later = await _read(proxy, _REQUESTS, REQUEST_LIST, unreadable) or requests
        oldest = time.time() - options.recent_seconds
        return Evidence(
            url,
            proxy_about=about,
            placement=health.placement,
            workers=tuple(observer.result() for observer in observers),
            pairs=tuple(pairs),
            records=tuple(one for one in later.requests if one.time >= oldest) if later is not None else (),
            records_shown=requests is not None,
            unreadable=tuple(dict.fromkeys(unreadable)),
            gpus=graphics,
            seconds=time.monotonic() - began,
            host=here,
            proxy_counted=grown,
            counted_seconds=counted_seconds,
        )


async def is_proxy(address: Address) -> bool:
    """Whether a kvbelt proxy answers there."""
    with Client(address) as proxy:
        try:
            (await proxy.get("/health")).read(PROXY_HEALTH, str(address))
        except (NoAnswerError, UnreadableReplyError):
            return False
    return True


async def _read(client: Client, path: str, message: JsonMessage[T], unreadable: list[str]) -> T | None:
    """The message at ``path``; None if there is no such route, no answer, or another message."""
    try:
        reply = await client.get(path)
        return reply.read(message, client.pool.name) if reply.status == 200 else None
    except NoAnswerError:
        return None
    except UnreadableReplyError as error:
        unreadable.append(str(error))
        return None


async def _see_again(proxy: Client, observers: "Sequence[_WorkerObserver]", unreadable: list[str]) -> None:
    """A worker that the proxy had lost and sees again was only late: its state is then the later one."""
    health = await _read(proxy, "/health", PROXY_HEALTH, unreadable)
    again = {row.worker: row for row in health.workers if row.state == "ready"} if health is not None else {}
    for observer in observers:
        observer.row = again.get(observer.name, observer.row)


class _Describing(msgspec.Struct, frozen=True):
    """The part of a vLLM server's completion that describes it."""

    kv_transfer_params: ServerDescription | None = None


_DESCRIBING = JsonMessage(_Describing, "the description")


@dataclass(slots=True)
class _WorkerObserver:
    """Observes one worker over some seconds."""

    row: WorkerRow
    unreadable: list[str]
    api_key: str | None = None
    client: Client = field(init=False)
    answer: str = "it was not asked"
    times: list[float] = field(default_factory=list)
    status: int | None = None
    engine_id: str | None = None
    model: str = ""
    about: About | None = None
    before: list[LinkTotals] = field(default_factory=list)
    skew: tuple[float, float] | None = None
    samples: list[Sample] = field(default_factory=list)
    receiver: ReceiverAddress | None = None
    needs_key: bool = False  #: it refused the doctor's question for its key, or for the lack of one
    counted: Counted = NOTHING  #: at the beginning; in the end, while the doctor looked
    is_vllm: bool = False  #: its /health has no body, and it describes itself in kv_transfer_params

    def __post_init__(self) -> None:
        self.client = Client(Address.of_worker(self.row.worker), self.api_key)

    @property
    def name(self) -> str:
        return self.row.worker

    async def identify(self) -> None:
        """Ask whether the worker answers, and what it is."""
        try:
            reply = await self._first_answer()
        except NoAnswerError as error:
            self.answer = str(error)
            return
        self.answer = ""
        self.is_vllm = reply.status == 200 and not reply.body
        self._take_health(reply)
        self.counted = await scrape(self.client)
        asked = time.time()
        await (self._describe() if self.is_vllm else self._ask_about())
        if self.about is not None:
            self.before = self.about.links
            self.skew = self.about.unix_time - (asked + time.time()) / 2, (time.time() - asked) / 2

    async def _first_answer(self) -> Reply:
        try:
            return await self.client.get("/health")
        except NoAnswerError:
            if self.row.state != "ready":
                raise
            return await self.client.get("/health")  # the proxy gets answers, so this one may only be late

    def _take_health(self, reply: Reply) -> None:
        self.times.append(reply.seconds)
        self.status = reply.status
        if not reply.body:
            return
        try:
            health = reply.read(WORKER_HEALTH, self.name)
        except UnreadableReplyError as error:
            self.unreadable.append(str(error))
            return
        self.engine_id, self.model, self.receiver = health.engine_id, health.model, health.receiver
        self.samples.append(Sample.of(health))

    async def _ask_about(self) -> None:
        self.about = await _read(self.client, "/kvbelt/about", ABOUT, self.unreadable) or self.about

    async def _describe(self) -> None:
        """Ask a vLLM server; what it does not answer in time stays as it was."""
        try:
            reply = await self.client.post("/v1/completions", _DESCRIBE, trial.SECONDS)
            self.needs_key = reply.status in (401, 403)
            said = reply.read(_DESCRIBING, self.name).kv_transfer_params if reply.status == 200 else None
        except NoAnswerError:
            return
        except UnreadableReplyError as error:
            self.unreadable.append(str(error))
            return
        if said is not None:
            self.receiver, self.about = said.receiver, said.about

    async def observe(self, until: float) -> None:
        """Sample the load until a moment of the monotonic clock."""
        while time.monotonic() < until:
            await asyncio.sleep(PAUSE_SECONDS)
            with contextlib.suppress(NoAnswerError):
                self._take_health(await self.client.get("/health"))
                if self.is_vllm:
                    reply = await self.client.get("/metrics")
                    self.samples.append(vllm_metrics.sample_of(reply.body.decode(errors="replace")))

    async def finish(self) -> None:
        """Ask again what has moved."""
        self.counted = (await scrape(self.client)).since(self.counted)
        await (self._describe() if self.is_vllm else self._ask_about())

    def engine_ids(self) -> list[str]:
        """The engine ids of all tensor-parallel ranks."""
        first = [self.row.engine_id] if self.row.engine_id else []
        return [*first, *(rank.engine_id for rank in (self.receiver.ranks if self.receiver is not None else ()))]

    def result(self) -> WorkerSeen:
        row = self.row
        skew, within = self.skew or (None, 0.0)
        return WorkerSeen(
            name=row.worker,
            role=row.role,
            state=row.state,
            detail=row.detail,
            standing=row.standing,
            model=row.model or self.model,
            in_flight=row.in_flight,
            answer=self.answer,
            seconds=median(self.times) if self.times else None,
            status=self.status,
            engine_id=self.engine_id or row.engine_id or "",
            about=self.about,
            samples=tuple(self.samples),
            skew_seconds=skew,
            skew_within=within,
            needs_key=self.needs_key,
            warming=row.warming,
            counted=self.counted,
        )


Pairs = Mapping[tuple[str, str], PairRow]


async def _observe_workers(
    observers: Sequence[_WorkerObserver], known: Pairs, options: GatherOptions
) -> list[PairSeen]:
    await asyncio.gather(*(observer.identify() for observer in observers))
    alive = [observer for observer in observers if not observer.answer]
    until = time.monotonic() + options.seconds
    prefill = [observer for observer in observers if observer.row.role == "prefill"]
    decode = [observer for observer in observers if observer.row.role == "decode"]
    trials: dict[tuple[str, str], TrialResult] = {}
    sending = [_run_trials(one, decode, known, trials) for one in prefill if options.probe and not one.answer]
    await asyncio.gather(*(observer.observe(until) for observer in alive), *sending)
    probed = await _measure(prefill, decode) if options.probe else {}
    await asyncio.gather(*(observer.finish() for observer in alive))
    pairs = []
    for sender in prefill:
        for receiver in decode:
            names = sender.name, receiver.name
            row = known.get(names)
            pair = PairSeen(
                *names,
                state=row.state if row is not None else "",
                reason=(row.reason or "") if row is not None else "",
                detail=row.detail if row is not None else "",
                trial=trials.get(names),
                probed=probed.get(names),
            )
            pairs.append(_with_link(pair, sender, receiver.engine_ids()))
    return pairs


async def _run_trials(
    sender: _WorkerObserver,
    receivers: Sequence[_WorkerObserver],
    known: Pairs,
    trials: dict[tuple[str, str], TrialResult],
) -> None:
    """One pair after the other; a worker without time for one has none for the next."""
    for receiver in receivers:
        row = known.get((sender.name, receiver.name))
        if receiver.answer or receiver.receiver is None or (row is not None and row.state == "refused"):
            continue
        seen = await trial.run_trial(sender.client, receiver.client, receiver.receiver)
        trials[sender.name, receiver.name] = seen
        if seen.seconds >= trial.SECONDS:
            return


async def _measure(
    senders: Sequence[_WorkerObserver], receivers: Sequence[_WorkerObserver]
) -> dict[tuple[str, str], ProbeResult]:
    """Measure every possible link one by one: in parallel each would get a share of the bandwidth."""
    found: dict[tuple[str, str], ProbeResult] = {}
    patient_until = time.monotonic() + link_probe.BUSY_SECONDS
    for sender in senders:
        for receiver in receivers:
            if sender.answer or receiver.answer or receiver.receiver is None:
                continue
            engine_id = receiver.receiver.engine_id
            found[sender.name, receiver.name] = await link_probe.measure(sender.client, engine_id, patient_until)
    return found


def _with_link(pair: PairSeen, sender: _WorkerObserver, engine_ids: Sequence[str]) -> PairSeen:
    """With what moved during the observation or, if nothing did, since the start; of several ranks the slowest."""
    for since, recent in ((sender.before, True), ([], False)):
        moved = [link for one in engine_ids if (link := _moved(one, since, sender)).busy_seconds > 0]
        if moved:
            return replace(pair, link=min(moved, key=lambda link: link.gb_per_second or 0.0), recent=recent)
    return pair


def _moved(engine_id: str, since: Sequence[LinkTotals], sender: _WorkerObserver) -> LinkTotals:
    """What moved to one receiver after ``since``; zeros if they are not connected."""
    none = LinkTotals(engine_id, 0, 0, 0.0)
    now = next((link for link in (sender.about.links if sender.about else []) if link.engine_id == engine_id), none)
    before = next((link for link in since if link.engine_id == engine_id), none)
    return LinkTotals(
        engine_id,
        now.writes - before.writes,
        now.num_bytes - before.num_bytes,
        now.busy_seconds - before.busy_seconds,
        now.bytes_in_flight,
    )
