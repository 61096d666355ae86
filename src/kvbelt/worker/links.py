"""A worker's links to decode workers: ``POST /kvbelt/peers`` connects them, ``POST /kvbelt/probe`` measures one.

The proxy tells a prefill worker of decode workers before a request names one. The answer comes when every handshake has
ended, but at most ``GRACE_SECONDS`` after the first one succeeded, so that one slow link delays no other pair. A
handshake that still goes on then is ``not_yet``, and the proxy asks again. A repeated question also keeps an unused
connection open.

Only a connected decode worker is measured, so a caller cannot make this worker connect anywhere; one link at a time;
and not while there are requests, which the measurement would disturb. ``transfer/link_probe.py`` bounds its cost.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from kvbelt.errors import RequestError
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import PeerOutcome
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.peers import PeerState, PeerStates
from kvbelt.wire.probe import ProbeResult
from kvbelt.worker.callbacks import answer_of

GRACE_SECONDS = 0.2  #: how long the other receivers are waited for after the first one is connected
MAX_PEERS = 256  #: in one request
MAX_PEERS_BYTES = 256 * 1024
MAX_PROBE_BYTES = 4096

_NO_BELT = "this worker has no belt"
_NOT_YET = PeerOutcome(ok=False, reason="not_yet", detail="the handshake goes on")


async def connect_peers(belt: Belt | None, addresses: Sequence[ReceiverAddress]) -> PeerStates:
    """Connect to every receiver. Raises RequestError 400: there are too many."""
    if len(addresses) > MAX_PEERS:
        raise RequestError(f"{len(addresses)} receivers; send at most {MAX_PEERS} at once")
    if belt is None:
        outcomes = [PeerOutcome(ok=False, reason="no_belt", detail=_NO_BELT)] * len(addresses)
    else:
        asks = [partial(belt.warm, address) for address in addresses]
        outcomes = await _outcomes([asyncio.ensure_future(answer_of(ask)) for ask in asks])
    return PeerStates(
        [
            PeerState(address.engine_id, "ready" if outcome.ok else "failed", outcome.reason, outcome.detail)
            for address, outcome in zip(addresses, outcomes, strict=True)
        ]
    )


async def _outcomes(connecting: Sequence[asyncio.Future[PeerOutcome]]) -> list[PeerOutcome]:
    """Of all, in order. Those that are given up here go on in the belt."""
    loop = asyncio.get_running_loop()
    pending, until = set(connecting), None
    while pending:
        left = None if until is None else until - loop.time()
        ended, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not ended:
            break
        if until is None and any(one.result().ok for one in ended):
            until = loop.time() + GRACE_SECONDS
    for one in pending:
        one.cancel()
    return [_NOT_YET if one in pending else one.result() for one in connecting]


async def probe_link(belt: Belt | None, engine_id: EngineId, *, busy: bool) -> ProbeResult:
    """Measure the link to a decode worker. ``busy``: the engine has requests."""
    if belt is None:
        return ProbeResult(reason="no_belt", detail=_NO_BELT)
    if busy:
        return ProbeResult(reason="busy", detail="this worker has requests")
    return await answer_of(partial(belt.probe, engine_id))
