"""Connects pairs of workers before a request needs them: each prefill worker connects to each decode worker.

A first transfer would otherwise wait for the handshake and for the channel's own connection. A worker that comes up, or
comes back as another incarnation, is passed over for others until each of its pairs has been tried, at most for
``GRACE_SECONDS`` after the first of them is warm, and at most for ``warm_seconds``. So neither a prefill worker that
does not answer nor one slow link keeps it from serving with the rest. Later a failed pair is tried again from time to
time, and a warm one is used, so that it is not closed for being idle.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from time import monotonic
from typing import Any, TypeVar

import msgspec

from kvbelt.http import HttpError
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers import vllm_dialect
from kvbelt.proxy.workers.fleet import Fleet
from kvbelt.proxy.workers.watch import Worker
from kvbelt.routing.pairs import Pair, PairState
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.peers import PEER_STATES, PeerState

log = logging.getLogger("kvbelt.proxy")

PATH = "/kvbelt/peers"

ANSWER_SECONDS = 8.0  #: a prefill worker gives up a handshake after 5 s, and answers then

#: How long the other pairs of a worker are waited for after its first is warm: several times a handshake's time.
GRACE_SECONDS = 0.3

RETRY_SECONDS = 10.0  #: between two tries of a failed pair

_MAX_ANSWER_BYTES = 256 * 1024

#: Of a server without this route.
_NO_SUCH_ROUTE = frozenset({404, 405, 501})

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


class Warmer:
    def __init__(self, fleet: Fleet, settings: ProxySettings) -> None:
        self._fleet = fleet
        self._pairs = fleet.pairs
        self._settings = settings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connecting: set[asyncio.Task[None]] = set()  # those that a new worker waits for

    def start(self) -> None:
        self._spawn(self._keep_warm())

    async def settled(self) -> None:
        """Wait until no new worker waits to be connected."""
        while self._connecting:
            await asyncio.wait(self._connecting)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def appeared(self, worker: Worker) -> None:
        """An incarnation of a worker is healthy for the first time: connect it."""
        incarnation = worker.endpoint.incarnation
        if worker.role is Role.PREFILL:
            jobs = {worker: self._receivers()}
        else:
            jobs = {one: [worker] for one in self._fleet.of(Role.PREFILL) if one.healthy}
        jobs = {prefill: self._to_warm(prefill, receivers) for prefill, receivers in jobs.items()}
        if not any(jobs.values()):
            worker.admit(incarnation)
            return
        connecting = self._spawn(self._connect(worker, incarnation, jobs))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def _receivers(self) -> list[Worker]:
        return [worker for worker in self._fleet.of(Role.DECODE) if worker.healthy]

    def _to_warm(self, prefill: Worker, receivers: Iterable[Worker]) -> list[Worker]:
        if prefill.engine_id is None:
            return []
        return [one for one in receivers if one.endpoint.report.receiver is not None and one.engine_id is not None]

    async def _connect(self, worker: Worker, incarnation: str, jobs: dict[Worker, list[Worker]]) -> None:
        warming = {self._spawn(self._warm(prefill, receivers)) for prefill, receivers in jobs.items() if receivers}
        until = monotonic() + self._settings.warm_seconds
        warm = False
        while warming and (left := until - monotonic()) > 0:
            ended, warming = await asyncio.wait(warming, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not warm and any(not task.cancelled() and task.result() for task in ended):
                warm, until = True, min(until, monotonic() + GRACE_SECONDS)
        worker.admit(incarnation)

    async def _keep_warm(self) -> None:
        """Try failed pairs again, and use warm ones before they count as idle."""
        while True:
            await asyncio.sleep(min(RETRY_SECONDS, self._settings.rewarm_seconds))
            now = monotonic()
            for prefill in self._fleet.of(Role.PREFILL):
                receivers = self._to_warm(prefill, self._receivers())
                due = [one for one in receivers if self._due(self._pairs.get(prefill.engine_id, one.engine_id), now)]
                if prefill.healthy and due:
                    self._spawn(self._warm(prefill, due))

    def _due(self, pair: Pair | None, now: float) -> bool:
        if pair is None:
            return True
        match pair.state:
            case PairState.WARM:
                return pair.at + self._settings.rewarm_seconds <= now
            case PairState.FAILED:
                return pair.at + RETRY_SECONDS <= now
        return False

    async def _warm(self, prefill: Worker, decodes: list[Worker]) -> bool:
        """Tell one prefill worker of decode workers, and note the outcomes. Returns whether it can send to any."""
        here = prefill.engine_id
        receivers = {one.engine_id: one.endpoint.report.receiver for one in decodes}
        peers = await self._ask(prefill, [receiver for receiver in receivers.values() if receiver is not None])
        now_decodes = {one.engine_id: one for one in decodes}  # one that was restarted is another pair
        if here is None or here != prefill.engine_id:
            return False
        if peers is None:
            for there in now_decodes:
                if there is not None:
                    self._pairs.unwarmed(here, there, monotonic())
            return True
        for peer in peers:
            decode = now_decodes.get(peer.engine_id)
            if decode is not None:
                self._note(prefill, decode, here, peer)
        return any(peer.state != "failed" for peer in peers)

    async def _ask(self, prefill: Worker, receivers: list[ReceiverAddress]) -> list[PeerState] | None:
        """The states that a prefill worker answers with; None: it connects on first use only."""
        vllm = prefill.endpoint.report.engine == "vllm"  # it has none of our routes, and logs who asks for one
        path = vllm_dialect.PATH if vllm else PATH
        question = vllm_dialect.warm_question(receivers) if vllm else _encode(receivers)
        reason, detail = "prefill_lost", f"no answer to {path} within {ANSWER_SECONDS:g} s"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await prefill.post_own(path, question)
                answer = await response.read(_MAX_ANSWER_BYTES)
            if vllm:
                told = vllm_dialect.peer_states_of(answer, prefill.name) if response.status == 200 else None
                return None if told is None else told.peers
            if response.status in _NO_SUCH_ROUTE:
                return None
            if response.status == 200:
                return PEER_STATES.parse(answer, prefill.name).peers
            reason, detail = "prefill_bad_answer", f"{PATH} answered {response.status}: {answer[:200]!r}"
        except TimeoutError:
            pass
        except HttpError as error:
            detail = str(error)
        except MessageError as error:
            reason, detail = "prefill_bad_answer", str(error)
        return [PeerState(receiver.engine_id, "failed", reason, detail) for receiver in receivers]

    def _note(self, prefill: Worker, decode: Worker, here: EngineId, peer: PeerState) -> None:
        there, now = peer.engine_id, monotonic()
        if peer.reason == "not_yet":
            return  # it is asked again with the unknown pairs
        if peer.state == "failed":
            if self._pairs.failed(here, there, peer.reason or "failed", peer.detail, now):
                log.warning("%s cannot send to %s: %s: %s", prefill.name, decode.name, peer.reason, peer.detail)
        elif self._pairs.succeeded(here, there, now):
            log.info("%s is connected to %s", prefill.name, decode.name)

    def _spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name="warming")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
