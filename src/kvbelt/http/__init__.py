"""HTTP/1.1 on asyncio's protocols: a server and a client that know nothing about models.

Rules of both sides:

1. A message is parsed once, by llhttp (through httptools, strict). What llhttp refuses is refused here.
2. Request bodies are read whole, up to a limit, before the handler is called. Response bodies are passed on as they
   arrive, unparsed.
3. The slower side sets the pace: a full write buffer pauses the handler, an unread response pauses its peer.
4. A side that leaves is noticed at once: the server cancels the handler, a cancelled client call closes its connection.
5. Every wait is limited: heads, bodies, idle connections and connects have limits in seconds.
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
from kvbelt.http.message import JSON, Headers, Pieces, Request, encode_lines
from kvbelt.http.response import Response
from kvbelt.http.server import Handler, Server

__all__ = [
    "JSON",
    "BadRequestError",
    "ClientLimits",
    "ConnectError",
    "Exchange",
    "Handler",
    "Headers",
    "HttpError",
    "PeerClosedError",
    "Pieces",
    "Pool",
    "ProtocolViolationError",
    "Request",
    "Response",
    "Server",
    "ServerLimits",
    "TooLargeError",
    "encode_lines",
]
