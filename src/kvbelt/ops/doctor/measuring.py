"""Has a prefill worker measure its link to a decode worker (``POST /kvbelt/probe``)."""

import asyncio
import time

from kvbelt.ops.doctor.asking import Asker, NoAnswerError
from kvbelt.wire import probe as wire
from kvbelt.wire.probe import Probed

#: A worker gives a measurement up after 4 s.
SECONDS = 6.0

#: Workers that are busy are asked again for so long, all together.
BUSY_SECONDS = 2.0
PAUSE_SECONDS = 0.1

_ROUTE = "/kvbelt/probe"

#: What a server says that has no such route.
_NO_SUCH_ROUTE = frozenset({404, 405, 501})


async def measure(prefill: Asker, engine_id: str, patient_until: float) -> Probed:
    """One link. Never raises."""
    while True:
        probed = await _ask(prefill, engine_id)
        if probed.reason != "busy" or time.monotonic() >= patient_until:
            return probed
        await asyncio.sleep(PAUSE_SECONDS)


async def _ask(prefill: Asker, engine_id: str) -> Probed:
    try:
        reply = await prefill.post(_ROUTE, {"engine_id": engine_id}, SECONDS)
    except NoAnswerError as error:
        return Probed(reason="no_answer", detail=str(error))
    if reply.status in _NO_SUCH_ROUTE:
        return Probed(reason="no_route", detail="only the embedded engine's workers measure their links")
    if reply.status == 200:
        try:
            return wire.parse_answer(reply.body)
        except ValueError as error:
            return Probed(reason="no_answer", detail=f"it answered something else: {error}")
    return Probed(reason="no_answer", detail=f"it answered {reply.status} to {_ROUTE}")
