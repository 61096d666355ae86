"""One request on a connection of its own; records everything that comes back, and when."""

import asyncio
import json
import re
import time

from kvbelt.http import ConnectError, HttpError, Pool, Response
from kvbelt.ops.chaos.questions import ClientRequest
from kvbelt.ops.chaos.verdict import Ending, Observation
from kvbelt.ops.http_client import Address

#: Silence for this long after the deadline counts as a hang.
PATIENCE_SECONDS = 2.0

_MAX_BYTES = 1 << 24

#: The first event with a token.
_TOKEN = re.compile(rb'"token_ids": ?\[ ?\d')


class _Progress:
    """What has come so far."""

    def __init__(self) -> None:
        self.status = 0
        self.path = ""
        self.body = b""
        self.first_token: float | None = None


async def send_request(address: Address, request: ClientRequest) -> Observation:
    """Send a request and return what was observed.

    It ends at most two seconds after its deadline, and never raises for what the server does. The
    connection is closed with the request, which is how a client that hangs up looks to the server.
    """
    pool = Pool(address.host, address.port)
    progress = _Progress()
    began = time.monotonic()
    patience = request.deadline + PATIENCE_SECONDS
    detail = ""
    try:
        async with asyncio.timeout(patience if request.leave_after is None else min(request.leave_after, patience)):
            await _converse(pool, request, progress)
        ending = Ending.COMPLETE
    except TimeoutError:
        ending = Ending.SILENT if request.leave_after is None else Ending.LEFT
    except ConnectError as error:
        ending, detail = Ending.REFUSED, str(error)
    except HttpError as error:
        ending, detail = Ending.CLOSED, str(error)
    finally:
        pool.close()
    return Observation(
        request.request_id,
        request.question.number,
        request.stream,
        request.deadline,
        began,
        time.monotonic(),
        ending,
        progress.status,
        progress.body,
        progress.path,
        progress.first_token,
        detail,
    )


async def _converse(pool: Pool, request: ClientRequest, progress: _Progress) -> None:
    headers = (
        (b"content-type", b"application/json"),
        (b"x-request-id", request.request_id.encode()),
        (b"x-kvbelt-deadline-seconds", b"%.3f" % request.deadline),
    )
    response = await pool.request("POST", request.question.route, headers, json.dumps(request.body()).encode())
    progress.status = response.status
    progress.path = response.headers.get(b"x-kvbelt-path", b"").decode("latin-1")
    if response.status == 200 and request.stream:
        await _take_stream(response, progress)
    else:
        progress.body = await response.read(_MAX_BYTES)


async def _take_stream(response: Response, progress: _Progress) -> None:
    while chunk := await response.chunk():
        progress.body += chunk
        if progress.first_token is None and _TOKEN.search(progress.body):
            progress.first_token = time.monotonic()
