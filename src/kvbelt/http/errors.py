"""What can go wrong between two HTTP peers.

::

    HttpError
    ├── BadRequestError         a client sent something that is not an acceptable request: a status
    ├── ConnectError            no connection within the limit: nothing was sent
    ├── PeerClosedError         the connection ended before the message did
    ├── ProtocolViolationError  the server's answer is not HTTP/1.1
    └── TooLargeError           the answer is larger than the caller is ready to hold
"""


class HttpError(Exception):
    """Anything that this room raises on purpose."""


class BadRequestError(HttpError):
    """A request that the server refuses before any handler sees it.

    Attributes:
        status: the HTTP status, one of 400, 408, 413, 417, 431.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ConnectError(HttpError):
    """No connection to the peer; nothing was sent. The message names the address and the cause."""


class PeerClosedError(HttpError):
    """The connection ended before the message did.

    Attributes:
        started: whether any byte of the answer had arrived.
        reused: whether the connection had served a request before.
        reset: whether it ended in a reset, which a peer sends for bytes that it never read.
    """

    def __init__(self, message: str, *, started: bool = False, reused: bool = False, reset: bool = False) -> None:
        super().__init__(message)
        self.started = started
        self.reused = reused
        self.reset = reset


class ProtocolViolationError(HttpError):
    """The server's answer is not HTTP/1.1."""


class TooLargeError(HttpError):
    """The answer is larger than the caller is ready to hold."""
