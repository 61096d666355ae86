"""Connects workers before the first request does: each prefill worker is told of each decode worker.

What a first transfer would otherwise wait for is the handshake and the channel's own connection. A worker that comes
up, or comes back as another life, is passed over for others until each of its pairs has been tried, for
``GRACE_SECONDS`` after one of them is warm, or for ``warm_seconds``: neither a prefill worker that does not answer nor
a slow link to one decode worker keeps it from serving with the rest. After that a pair that failed is tried again now
and then, and one that is warm is used, so that it is not closed for being idle.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from time import monotonic
from typing import Any, TypeVar

import msgspec

from kvbelt.http import HttpError
from kvbelt.proxy import description
from kvbelt.proxy.description import Peers, PeerState
from kvbelt.proxy.fleet import Fleet
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.workers import Worker
from kvbelt.routing.endpoint import Role
from kvbelt.routing.pairs import Pair, PairState
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonDecoder

log = logging.getLogger("kvbelt.proxy")

PATH = "/kvbelt/peers"

#: A prefill worker gives a handshake up after 5 s, and says so.
ANSWER_SECONDS = 8.0

#: After the first of a worker's pairs is warm, the others are waited for so long: several times a handshake's time.
GRACE_SECONDS = 0.3

#: Between two tries of a pair that has failed.
RETRY_SECONDS = 10.0

_MAX_ANSWER_BYTES = 256 * 1024

#: What a server says that has no such route. vLLM is told by a request instead (description.py).
_NO_SUCH_ROUTE = frozenset({404, 405, 501})


T = TypeVar("T")

_decoder: JsonDecoder[Peers] = JsonDecoder(Peers)
_encode = msgspec.json.Encoder().encode


class Warmer:
    """Owns the tasks that do it."""

    def __init__(self, fleet: Fleet, settings: ProxySettings) -> None:
        self._fleet = fleet
        self._pairs = fleet.pairs
        self._settings = settings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connecting: set[asyncio.Task[None]] = set()  # those of them that somebody's first requests wait for

    def start(self) -> None:
        """Begin to look after pairs."""
        self._spawn(self._look_after())

    async def settled(self) -> None:
        """Wait until nobody waits to be connected."""
        while self._connecting:
            await asyncio.wait(self._connecting)

    async def close(self) -> None:
        """End every task."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def appeared(self, worker: Worker) -> None:
        """A worker is healthy for the first time in its life: connect it."""
        life = worker.endpoint.life
        if worker.role is Role.PREFILL:
            jobs = {worker: self._receivers()}
        else:
            jobs = {one: [worker] for one in self._fleet.of(Role.PREFILL) if one.healthy}
        jobs = {prefill: self._to_warm(prefill, receivers) for prefill, receivers in jobs.items()}
        if not any(jobs.values()):
            worker.admit(life)
            return
        connecting = self._spawn(self._connect(worker, life, jobs))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def _receivers(self) -> list[Worker]:
        return [worker for worker in self._fleet.of(Role.DECODE) if worker.healthy]

    def _to_warm(self, prefill: Worker, receivers: Iterable[Worker]) -> list[Worker]:
        """Those decode workers that this prefill worker can be told of."""
        if prefill.engine_id is None:
            return []
        return [one for one in receivers if one.endpoint.report.receiver is not None and one.engine_id is not None]

    async def _connect(self, worker: Worker, life: str, jobs: dict[Worker, list[Worker]]) -> None:
        telling = {self._spawn(self._tell(prefill, receivers)) for prefill, receivers in jobs.items() if receivers}
        until = monotonic() + self._settings.warm_seconds
        warm = False
        while telling and (left := until - monotonic()) > 0:
            ended, telling = await asyncio.wait(telling, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not warm and any(not task.cancelled() and task.result() for task in ended):
                warm, until = True, min(until, monotonic() + GRACE_SECONDS)
        worker.admit(life)

    async def _look_after(self) -> None:
        """Try again what has failed, and use what is warm before it counts as idle."""
        while True:
            await asyncio.sleep(min(RETRY_SECONDS, self._settings.rewarm_seconds))
            now = monotonic()
            for prefill in self._fleet.of(Role.PREFILL):
                receivers = self._to_warm(prefill, self._receivers())
                due = [one for one in receivers if self._due(self._pairs.get(prefill.engine_id, one.engine_id), now)]
                if prefill.healthy and due:
                    self._spawn(self._tell(prefill, due))

    def _due(self, pair: Pair | None, now: float) -> bool:
        if pair is None:
            return True
        match pair.state:
            case PairState.WARM:
                return pair.at + self._settings.rewarm_seconds <= now
            case PairState.FAILED:
                return pair.at + RETRY_SECONDS <= now
        return False

    async def _tell(self, prefill: Worker, decodes: list[Worker]) -> bool:
        """Tell one prefill worker of decode workers, and note what comes of it. Returns whether it can send to one."""
        here = prefill.engine_id
        receivers = {one.engine_id: one.endpoint.report.receiver for one in decodes}
        peers = await self._ask(prefill, [receiver for receiver in receivers.values() if receiver is not None])
        now_decodes = {one.engine_id: one for one in decodes}  # who was started again has been told of anew
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
        """What a prefill worker says of these decode workers; None: it connects on first use only."""
        reason, detail = "prefill_lost", f"no answer to {PATH} within {ANSWER_SECONDS:g} s"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await prefill.tell(PATH, _encode(receivers))
                answer = await response.read(_MAX_ANSWER_BYTES)
                if response.status in _NO_SUCH_ROUTE:
                    response = await prefill.tell(description.PATH, description.telling(receivers))
                    return description.told(response.status, await response.read(_MAX_ANSWER_BYTES))
            if response.status == 200:
                return _decoder.decode(answer).peers
            reason, detail = "prefill_bad_answer", f"{PATH} answered {response.status}: {answer[:200]!r}"
        except TimeoutError:
            pass
        except HttpError as error:
            detail = str(error)
        except ValueError as error:
            reason, detail = "prefill_bad_answer", f"{PATH} answered something else than the contract's JSON: {error}"
        return [PeerState(receiver.engine_id, "failed", reason, detail) for receiver in receivers]

    def _note(self, prefill: Worker, decode: Worker, here: EngineId, peer: PeerState) -> None:
        there, now = peer.engine_id, monotonic()
        if peer.reason == "not_yet":
            return  # asked again with the pairs that are not known
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
