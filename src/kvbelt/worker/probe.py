"""``POST /kvbelt/probe``: ``kvbelt doctor`` has a prefill worker measure its link to a decode worker.

Only a decode worker that is connected is measured, so nobody can have this worker connect anywhere; one link at a time;
and not while there are requests, which may be what keeps it away. What it costs is bounded by ``transfer/probing.py``.
"""

from functools import partial

from kvbelt.errors import RequestError
from kvbelt.transfer.belt import Belt
from kvbelt.wire import probe as wire
from kvbelt.wire.ids import EngineId
from kvbelt.wire.probe import Probed
from kvbelt.worker.belt_answers import answer_of

MAX_BODY_BYTES = 4096


def parse_probe(body: bytes) -> EngineId:
    """The body of a request: the decode worker.

    Raises:
        RequestError: 400, with what is wrong.
    """
    try:
        return wire.parse_order(body).engine_id
    except ValueError as error:
        raise RequestError(f"the body does not name a decode worker: {error}") from None


async def probe_link(belt: Belt | None, engine_id: EngineId, *, busy: bool) -> Probed:
    """Measure the link to a decode worker. ``busy``: the engine has requests."""
    if belt is None:
        return Probed(reason="no_belt", detail="this worker has no belt")
    if busy:
        return Probed(reason="busy", detail="this worker has requests")
    return await answer_of(partial(belt.probe, engine_id))
