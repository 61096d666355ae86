"""Asks a prefill worker to measure its link to a decode worker (``POST /kvbelt/probe``)."""

import asyncio
import time

from kvbelt.ops.http_client import Client, NoAnswerError
from kvbelt.wire.probe import PROBE_RESULT, ProbeResult

#: A worker gives up a measurement after 4 s.
SECONDS = 6.0

#: Busy workers are asked again until this has passed, for all of them together.
BUSY_SECONDS = 2.0
PAUSE_SECONDS = 0.1

_ROUTE = "/kvbelt/probe"

#: Statuses of a server without this route.
_NO_SUCH_ROUTE = frozenset({404, 405, 501})


async def measure(prefill: Client, engine_id: str, patient_until: float) -> ProbeResult:
    """Measure one link. Never raises."""
    while True:
        probed = await _ask(prefill, engine_id)
        if probed.reason != "busy" or time.monotonic() >= patient_until:
            return probed
        await asyncio.sleep(PAUSE_SECONDS)


async def _ask(prefill: Client, engine_id: str) -> ProbeResult:
    try:
        reply = await prefill.post(_ROUTE, {"engine_id": engine_id}, SECONDS)
    except NoAnswerError as error:
        return ProbeResult(reason="no_answer", detail=str(error))
    if reply.status in _NO_SUCH_ROUTE:
        return ProbeResult(reason="no_route", detail="only the embedded engine's workers measure their links")
    if reply.status == 200:
        try:
            return PROBE_RESULT.parse(reply.body, "the prefill worker")
        except ValueError as error:
            return ProbeResult(reason="no_answer", detail=f"it answered something else: {error}")
    return ProbeResult(reason="no_answer", detail=f"it answered {reply.status} to {_ROUTE}")
