"""Limits, in bytes and seconds, of both sides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    #: Request line and headers. nginx takes 32 KiB, Node 16 KiB.
    head_bytes: int = 32 * 1024
    #: A body; larger ones get 413.
    body_bytes: int = 32 * 1024 * 1024
    #: From the first byte of a head to its last.
    head_seconds: float = 10.0
    #: From the end of the head to the end of the body.
    body_seconds: float = 120.0
    #: Between two requests. Load balancers in front hold idle connections for 60 s by default.
    idle_seconds: float = 75.0
    #: Unsent response bytes at which a handler is paused.
    write_high_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class ClientLimits:
    connect_seconds: float = 5.0
    #: A connection idle for longer is not used again. Shorter than uvicorn's keep-alive of 5 s, the shortest in common
    #: use, so that requests rarely meet a connection that the peer is closing.
    idle_seconds: float = 4.0
    max_idle_connections: int = 512
    head_bytes: int = 64 * 1024
    #: Unread body bytes at which the peer is paused.
    read_high_bytes: int = 256 * 1024
