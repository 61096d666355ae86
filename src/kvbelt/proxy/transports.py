"""By which transport a prefill worker's carrier writes, in its own words: asked of the worker when somebody looks."""

import asyncio

from kvbelt.http import HttpError
from kvbelt.proxy.workers import Worker
from kvbelt.wire import about

#: Whoever looks at a request should not wait long for what is of use, but not the point.
_SECONDS = 1.0
_MAX_BYTES = 256 * 1024


async def transport_of(worker: Worker) -> str | None:
    """As ``"cma/memory"``; with the reach of each where there are several. None: it does not say, as vLLM does not."""
    try:
        async with asyncio.timeout(_SECONDS):
            response = await worker.get("/kvbelt/about", ())
            body = await response.read(_MAX_BYTES)
    except (TimeoutError, HttpError):
        return None
    if response.status != 200:
        return None
    try:
        roads = about.parse(body).roads
    except ValueError:
        return None
    writes = {road.transport: road.scope for road in roads if road.operation == "write"}
    if len(writes) == 1:
        return next(iter(writes))
    return ", ".join(f"{transport} ({scope})" if scope else transport for transport, scope in writes.items()) or None
