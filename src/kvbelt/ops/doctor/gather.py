"""Looks at a running deployment: the proxy, each worker for some seconds, a probe through each pair, its link."""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import msgspec

from kvbelt.ops.doctor import gpus, measuring, probing, vllm_metrics
from kvbelt.ops.doctor.asking import Asker, NoAnswerError, Reply
from kvbelt.ops.doctor.evidence import Evidence, PairSeen, ProbeSeen, RecordSeen, Sample, WorkerSeen
from kvbelt.proxy import description
from kvbelt.wire import about as wire
from kvbelt.wire.about import About, Link
from kvbelt.wire.probe import Probed

#: Between two looks at a worker's load.
PAUSE_SECONDS = 0.25

#: Requests of the last minutes count.
RECENT_SECONDS = 300.0

#: What a vLLM server is asked, which has no route of ours. Its belt is looked at with the first step, and what is seen
#: comes with the output of a later one: of four tokens the last two are to spare.
_DESCRIBE = {
    "prompt": [0], "max_tokens": 4, "ignore_eos": True, "temperature": 0, "kv_transfer_params": {"kvbelt": "describe"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Looking:
    """How it is looked."""

    seconds: float = 3.0
    probe: bool = True
    recent_seconds: float = RECENT_SECONDS
    admin_key: str | None = None  #: of the proxy, which may show its records to nobody else


async def look(url: str, host: str, port: int, how: Looking) -> Evidence:
    """Everything that can be seen of the deployment behind a proxy. Never raises."""
    began = time.monotonic()
    proxy = Asker(host, port, how.admin_key)
    try:
        try:
            health = await proxy.get("/health")
        except NoAnswerError as error:
            return Evidence(url, proxy_answer=str(error))
        if "workers" not in health.json:
            return Evidence(url, proxy_answer=f"/health answered {health.status} and says nothing of workers")
        about, listed, requests = await asyncio.gather(
            _ask(proxy, "/kvbelt/about"), _ask(proxy, "/kvbelt/workers"), _ask(proxy, "/kvbelt/requests")
        )
        watches = [_Watch(entry) for entry in health.json["workers"] if _is_worker(entry)]
        try:
            pairs, graphics = await asyncio.gather(
                _look_at_workers(watches, _pairs(listed), how), gpus.look(3, how.seconds / 3)
            )
        finally:
            for watch in watches:
                watch.asker.close()
        # What went wrong while it was looked is of interest, too.
        later = await _ask(proxy, "/kvbelt/requests")
        return Evidence(
            url,
            proxy_about=_about(about),
            proxy_state=str(health.json.get("state", "")),
            workers=tuple(watch.seen() for watch in watches),
            pairs=tuple(pairs),
            records=tuple(_records(later or requests, how.recent_seconds)),
            records_shown=requests is not None,
            gpus=graphics,
            seconds=time.monotonic() - began,
        )
    finally:
        proxy.close()


async def _ask(asker: Asker, path: str) -> Reply | None:
    try:
        reply = await asker.get(path)
    except NoAnswerError:
        return None
    return reply if reply.status == 200 else None


def _about(reply: Reply | None) -> About | None:
    if reply is None:
        return None
    try:
        return wire.parse(reply.body)
    except ValueError:
        return None


def _is_worker(entry: object) -> bool:
    """Whether a proxy's entry names a worker that can be asked."""
    name = entry.get("worker") if isinstance(entry, dict) else None
    return isinstance(name, str) and name.rpartition(":")[2].isdecimal()


def _pairs(reply: Reply | None) -> dict[tuple[str, str], dict[str, Any]]:
    listed = reply.json.get("pairs", []) if reply is not None else []
    return {(str(pair.get("prefill")), str(pair.get("decode"))): pair for pair in listed if isinstance(pair, dict)}


def _records(reply: Reply | None, recent_seconds: float) -> Iterable[RecordSeen]:
    if reply is None:
        return
    since = time.time() - recent_seconds
    for raw in reply.json.get("requests", []):
        with contextlib.suppress(msgspec.ValidationError):  # of another version
            record = msgspec.convert(raw, RecordSeen)
            if record.time >= since:
                yield record


@dataclass(slots=True)
class _Watch:
    """One worker while it is looked at."""

    entry: dict[str, Any]
    asker: Asker = field(init=False)
    answer: str = "it was not asked"
    times: list[float] = field(default_factory=list)
    status: int | None = None
    health: dict[str, Any] = field(default_factory=dict)
    about: About | None = None
    before: list[Link] = field(default_factory=list)
    skew: tuple[float, float] | None = None
    samples: list[Sample] = field(default_factory=list)
    receiver: dict[str, Any] | None = None
    is_vllm: bool = False  #: its health has no body, and it answers questions in kv_transfer_params

    def __post_init__(self) -> None:
        self.asker = Asker.at(self.name)

    @property
    def name(self) -> str:
        return str(self.entry.get("worker", ""))

    @property
    def role(self) -> str:
        return str(self.entry.get("role", ""))

    async def begin(self) -> None:
        """Whether it answers, who it is."""
        try:
            reply = await self.asker.get("/health")
        except NoAnswerError as error:
            self.answer = str(error)
            return
        self.answer = ""
        self._take(reply)
        said = await _ask(self.asker, "/kvbelt/about")
        self.is_vllm = said is None and self.status == 200 and not self.health
        self.receiver = self.health.get("receiver")
        if self.is_vllm:
            said = await self._describe()
        else:
            self.about = _about(said)
            self.samples.append(Sample.of(self.health))
        if self.about is not None and said is not None:
            self.before = self.about.links
            self.skew = self.about.unix_time - (said.began + said.ended) / 2, said.seconds / 2

    async def _describe(self) -> Reply | None:
        """What a vLLM server says of itself; what it does not say in time stays as it was."""
        try:
            reply = await self.asker.post(description.PATH, _DESCRIBE, probing.SECONDS)
        except NoAnswerError:
            return None
        told = reply.json.get("kv_transfer_params")
        if isinstance(told, dict):
            self.receiver = told.get("receiver")
            with contextlib.suppress(msgspec.ValidationError):  # of another version
                self.about = msgspec.convert(told["about"], About) if told.get("about") else None
        return reply

    async def watch(self, until: float) -> None:
        """Its load, again and again."""
        while time.monotonic() < until:
            await asyncio.sleep(PAUSE_SECONDS)
            with contextlib.suppress(NoAnswerError):
                self._take(await self.asker.get("/health"))
                if self.is_vllm:
                    reply = await self.asker.get("/metrics")
                    self.samples.append(vllm_metrics.sample_of(reply.body.decode(errors="replace")))
                else:
                    self.samples.append(Sample.of(self.health))

    async def end(self) -> None:
        """What has moved meanwhile."""
        if self.is_vllm:
            await self._describe()
            return
        again = _about(await _ask(self.asker, "/kvbelt/about"))
        if again is not None:
            self.about = again

    def _take(self, reply: Reply) -> None:
        self.times.append(reply.seconds)
        self.status, self.health = reply.status, reply.json

    def engine_ids(self) -> list[str]:
        """Of its ranks; all others than a vLLM server have one."""
        ranks = (self.receiver or {}).get("ranks") or ()
        first = self.entry.get("engine_id")
        return [str(first)] * bool(first) + [str(rank.get("engine_id")) for rank in ranks if isinstance(rank, dict)]

    def seen(self) -> WorkerSeen:
        entry = self.entry
        skew, within = self.skew or (None, 0.0)
        return WorkerSeen(
            name=self.name,
            role=self.role,
            state=str(entry.get("state", "")),
            detail=str(entry.get("detail", "")),
            standing=str(entry.get("standing", "active")),
            model=str(entry.get("model") or self.health.get("model") or ""),
            in_flight=int(entry.get("in_flight", 0)),
            answer=self.answer,
            seconds=median(self.times) if self.times else None,
            status=self.status,
            engine_id=str(self.health.get("engine_id") or entry.get("engine_id") or ""),
            about=self.about,
            samples=tuple(self.samples),
            skew_seconds=skew,
            skew_within=within,
        )


async def _look_at_workers(
    watches: Sequence[_Watch], known: dict[tuple[str, str], dict[str, Any]], how: Looking
) -> list[PairSeen]:
    await asyncio.gather(*(watch.begin() for watch in watches))
    alive = [watch for watch in watches if not watch.answer]
    until = time.monotonic() + how.seconds
    prefill = [watch for watch in watches if watch.role == "prefill"]
    decode = [watch for watch in watches if watch.role == "decode"]
    probes: dict[tuple[str, str], ProbeSeen] = {}
    sending = [_probe_from(one, decode, known, probes) for one in prefill if how.probe and not one.answer]
    await asyncio.gather(*(watch.watch(until) for watch in alive), *sending)
    probed = await _measure(prefill, decode) if how.probe else {}
    await asyncio.gather(*(watch.end() for watch in alive))
    pairs = []
    for sender in prefill:
        for receiver in decode:
            said = known.get((sender.name, receiver.name), {})
            pair = PairSeen(
                sender.name,
                receiver.name,
                state=str(said.get("state", "")),
                reason=str(said.get("reason") or ""),
                detail=str(said.get("detail") or ""),
                probe=probes.get((sender.name, receiver.name)),
                probed=probed.get((sender.name, receiver.name)),
            )
            pairs.append(_with_link(pair, sender, receiver.engine_ids()))
    return pairs


async def _probe_from(
    sender: _Watch,
    receivers: Sequence[_Watch],
    known: dict[tuple[str, str], dict[str, Any]],
    probes: dict[tuple[str, str], ProbeSeen],
) -> None:
    """One pair after the other; a worker that has no time for one has none for the next."""
    for receiver in receivers:
        refused = known.get((sender.name, receiver.name), {}).get("state") == "refused"
        if receiver.answer or receiver.receiver is None or refused:
            continue
        seen = await probing.probe(sender.asker, receiver.asker, receiver.receiver)
        probes[sender.name, receiver.name] = seen
        if seen.seconds >= probing.SECONDS:
            return


async def _measure(senders: Sequence[_Watch], receivers: Sequence[_Watch]) -> dict[tuple[str, str], Probed]:
    """Every link that can be measured, one after the other: side by side each would be measured at a share."""
    found: dict[tuple[str, str], Probed] = {}
    patient_until = time.monotonic() + measuring.BUSY_SECONDS
    for sender in senders:
        for receiver in receivers:
            engine_id = str((receiver.receiver or {}).get("engine_id", ""))
            if not (sender.answer or receiver.answer) and engine_id:
                found[sender.name, receiver.name] = await measuring.measure(sender.asker, engine_id, patient_until)
    return found


def _with_link(pair: PairSeen, sender: _Watch, engine_ids: Sequence[str]) -> PairSeen:
    """What has moved since the doctor began to look, or, if nothing has, ever; of several ranks the slowest."""
    for since, recent in ((sender.before, True), ([], False)):
        moved = [link for one in engine_ids if (link := _moved(one, since, sender)).busy_seconds > 0]
        if moved:
            return replace(pair, link=min(moved, key=lambda link: link.gb_per_second or 0.0), recent=recent)
    return pair


def _moved(engine_id: str, since: Sequence[Link], sender: _Watch) -> Link:
    """To this receiver. Nothing, if they are not connected."""
    none = Link(engine_id, 0, 0, 0.0)
    now = next((link for link in (sender.about.links if sender.about else []) if link.engine_id == engine_id), none)
    before = next((link for link in since if link.engine_id == engine_id), none)
    return Link(
        engine_id,
        now.writes - before.writes,
        now.num_bytes - before.num_bytes,
        now.busy_seconds - before.busy_seconds,
        now.bytes_in_flight,
    )
