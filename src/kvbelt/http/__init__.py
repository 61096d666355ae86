"""HTTP/1.1 on asyncio's own protocols: a server, a client, and nothing that knows of models.

The rules both sides keep:

1. A message is parsed once, by llhttp (through httptools, strict); what it refuses is refused here.
2. Bodies of requests are read whole, up to a limit, before a handler sees them; bodies of responses are
   handed on as they come, unparsed.
3. Whoever is slower sets the pace: a full write buffer pauses the handler, an unread response pauses its peer.
4. A side that goes away is noticed by the other at once: the server cancels the handler, a cancelled client
   call closes its connection.
5. Nothing waits for ever: heads, bodies, idle connections and connects have limits in seconds.
"""

from kvbelt.http.client import Pool
from kvbelt.http.errors import (
    BadRequestError,
    ConnectError,
    HttpError,
    PeerClosedError,
    ProtocolViolationError,
    TooLargeError,
)
from kvbelt.http.exchange import Exchange
from kvbelt.http.limits import ClientLimits, ServerLimits
from kvbelt.http.message import Headers, Request
from kvbelt.http.response import Response
from kvbelt.http.server import Handler, Server

__all__ = [
    "BadRequestError",
    "ClientLimits",
    "ConnectError",
    "Exchange",
    "Handler",
    "Headers",
    "HttpError",
    "PeerClosedError",
    "Pool",
    "ProtocolViolationError",
    "Request",
    "Response",
    "Server",
    "ServerLimits",
    "TooLargeError",
]
