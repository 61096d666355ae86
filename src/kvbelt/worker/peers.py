"""``POST /kvbelt/peers``: a proxy tells a prefill worker which decode workers there are, before the first request does.

The body is a list of ``ReceiverAddress``; the answer says of each whether it is connected, and if not, why. It comes
when every handshake has ended, a matter of milliseconds, or of ``handshake_seconds`` where nobody answers; but
``GRACE_SECONDS`` after the first that succeeded, so that one slow link holds no other pair up. What goes on then is
``not_yet``, to be asked about again. Asking again is also how a connection is kept that no request uses.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from kvbelt.errors import RequestError
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import PeerOutcome
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.json_body import JsonDecoder
from kvbelt.worker.belt_answers import answer_of

#: After the first connection, the others are waited for so long.
GRACE_SECONDS = 0.2

#: Told of at once.
MAX_PEERS = 256
MAX_BODY_BYTES = 256 * 1024

_NOT_YET = PeerOutcome(ok=False, reason="not_yet", detail="the handshake goes on")

_decoder: JsonDecoder[list[ReceiverAddress]] = JsonDecoder(list[ReceiverAddress])


def parse_peers(body: bytes) -> list[ReceiverAddress]:
    """The body of a request.

    Raises:
        RequestError: 400, with what is wrong.
    """
    try:
        addresses = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not a list of receivers: {error}") from None
    if len(addresses) > MAX_PEERS:
        raise RequestError(f"{len(addresses)} receivers; send at most {MAX_PEERS} at once")
    return addresses


async def connect_peers(belt: Belt | None, addresses: Sequence[ReceiverAddress]) -> dict[str, Any]:
    """Connect to every receiver. Returns the answer's body."""
    outcomes = await _outcomes([asyncio.ensure_future(_connect(belt, address)) for address in addresses])
    peers = [
        {
            "engine_id": address.engine_id,
            "state": "ready" if outcome.ok else "failed",
            "reason": outcome.reason,
            "detail": outcome.detail,
        }
        for address, outcome in zip(addresses, outcomes, strict=True)
    ]
    return {"peers": peers}


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


async def _connect(belt: Belt | None, address: ReceiverAddress) -> PeerOutcome:
    if belt is None:
        return PeerOutcome(ok=False, reason="no_belt", detail="this worker has no belt")
    return await answer_of(partial(belt.warm, address))
