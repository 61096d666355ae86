class HttpError(Exception):
    """The base of every error here."""


class BadRequestError(HttpError):
    """A request that the server refuses before the handler is called.

    Its status is 400, 408, 413, 415, 417, 431 or 501.
    """

    def __init__(self, status: int, message: str, *more: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.more = more  #: headers that belong into the answer
        self.asked: dict[bytes, bytes] = {}  #: the request's own headers, as far as they came


class ConnectError(HttpError):
    """No connection to the peer; nothing was sent. The message names the address and the cause."""


class PeerClosedError(HttpError):
    """The connection ended before the message did."""

    def __init__(self, message: str, *, started: bool = False, reused: bool = False, reset: bool = False) -> None:
        super().__init__(message)
        self.started = started  #: a byte of the answer had arrived
        self.reused = reused  #: the connection had served a request before
        self.reset = reset  #: it ended in a reset, as a peer resets what it never read


class ProtocolViolationError(HttpError):
    """The server's answer is not HTTP/1.1."""


class TooLargeError(HttpError):
    """The answer is larger than the caller allows."""
