"""One request, as a client of its own makes it: a connection, a question, everything that comes back, and when."""

import asyncio
import json
import re
import time
from dataclasses import dataclass

from kvbelt.http import ConnectError, HttpError, Pool, Response
from kvbelt.ops.chaos.questions import Asking
from kvbelt.ops.chaos.verdict import Ending, Seen

#: What a client waits longer than its deadline before it calls the silence a hang.
PATIENCE_SECONDS = 2.0

_MAX_BYTES = 1 << 24

#: The first event that carries a token.
_TOKEN = re.compile(rb'"token_ids": ?\[ ?\d')


@dataclass(frozen=True, slots=True)
class Address:
    """Where somebody listens."""

    host: str
    port: int

    def __str__(self) -> str:
        """As the proxy names workers."""
        return f"{self.host}:{self.port}"


class _Progress:
    """What has come so far, whatever ends it."""

    def __init__(self) -> None:
        self.status = 0
        self.path = ""
        self.body = b""
        self.first_token: float | None = None


async def ask(address: Address, asking: Asking) -> Seen:
    """Ask, and tell what was seen. Never raises for what the server does, and ends two seconds after the deadline.

    The connection is made for this request and closed with it: that is how a client leaves.
    """
    pool = Pool(address.host, address.port)
    progress = _Progress()
    began = time.monotonic()
    patience = asking.deadline + PATIENCE_SECONDS
    detail = ""
    try:
        async with asyncio.timeout(patience if asking.leave_after is None else min(asking.leave_after, patience)):
            await _converse(pool, asking, progress)
        ending = Ending.COMPLETE
    except TimeoutError:
        ending = Ending.SILENT if asking.leave_after is None else Ending.LEFT
    except ConnectError as error:
        ending, detail = Ending.REFUSED, str(error)
    except HttpError as error:
        ending, detail = Ending.CLOSED, str(error)
    finally:
        pool.close()
    return Seen(
        asking.request_id,
        asking.question.number,
        asking.stream,
        asking.deadline,
        began,
        time.monotonic(),
        ending,
        progress.status,
        progress.body,
        progress.path,
        progress.first_token,
        detail,
    )


async def _converse(pool: Pool, asking: Asking, progress: _Progress) -> None:
    headers = (
        (b"content-type", b"application/json"),
        (b"x-request-id", asking.request_id.encode()),
        (b"x-kvbelt-deadline-seconds", b"%.3f" % asking.deadline),
    )
    response = await pool.request("POST", asking.question.route, headers, json.dumps(asking.body()).encode())
    progress.status = response.status
    progress.path = response.headers.get(b"x-kvbelt-path", b"").decode("latin-1")
    if response.status == 200 and asking.stream:
        await _take_stream(response, progress)
    else:
        progress.body = await response.read(_MAX_BYTES)


async def _take_stream(response: Response, progress: _Progress) -> None:
    while chunk := await response.chunk():
        progress.body += chunk
        if progress.first_token is None and _TOKEN.search(progress.body):
            progress.first_token = time.monotonic()


async def get(address: Address, path: str, seconds: float = 3.0, *, key: str | None = None) -> bytes | None:
    """The body of a GET that was answered with 200 or 503; None: it was not, or not in time."""
    headers = ((b"authorization", f"Bearer {key}".encode()),) if key is not None else ()
    pool = Pool(address.host, address.port)
    try:
        async with asyncio.timeout(seconds):
            response = await pool.request("GET", path, headers)
            body = await response.read(_MAX_BYTES)
    except (HttpError, TimeoutError):
        return None
    finally:
        pool.close()
    return body if response.status in (200, 503) else None
