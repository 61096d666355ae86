"""The errors that cross rooms.

A tree, so that a caller can catch as widely as it means to::

    KVBeltError
    ├── SettingsError        a setting, a flag or a file is wrong: one line, exit status 2
    ├── RequestError         a client's request is wrong or cannot be served: an HTTP status
    ├── ChannelError         bytes could not be moved: the peer is gone, the vendor refused
    └── StartError           a process could not start (port taken, model unreadable): exit status 2

Rooms that stand alone (http, wire, engine, channels) raise errors of their own; the room that
calls them translates.
"""


class KVBeltError(Exception):
    """Anything that kvbelt raises on purpose."""


class SettingsError(KVBeltError):
    """A setting is wrong. The message names it, its value, and what to do."""


class StartError(KVBeltError):
    """A process cannot start. The message says why and what to do."""


class RequestError(KVBeltError):
    """A request that gets an HTTP error in OpenAI's shape.

    Attributes:
        status: the HTTP status.
        message: what was wrong, with which value, and what to do.
        kind: OpenAI's ``error.type``.
        param: the request field at fault, if one is.
        reason: in one word of ``wire/reasons.py``, where the fault is not the request's.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.reason = reason


class ChannelError(KVBeltError):
    """Memory could not be registered or bytes could not be moved. The message carries the vendor's text."""
