"""Which web pages may read the proxy's answers (the Fetch standard's CORS protocol). Pure."""

from collections.abc import Sequence

from kvbelt.errors import RequestError
from kvbelt.http import Headers

Header = tuple[bytes, bytes]

_METHODS = b"GET, HEAD, POST, OPTIONS"
_MAX_AGE = b"600"  #: seconds for which a browser remembers the answer to a preflight request


def is_preflight(asked: Headers) -> bool:
    return b"origin" in asked and b"access-control-request-method" in asked


class Cors:
    """``origins`` as ``https://host:port``; ``*``: every one. Never with credentials: clients send a key themselves."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, asked: Headers) -> tuple[Header, ...]:
        """What an answer to a request with these headers has."""
        origin = asked.get(b"origin")
        if origin is None:
            return ()
        if self._any:
            return ((b"access-control-allow-origin", b"*"),)
        if origin in self._origins:
            return ((b"access-control-allow-origin", origin), (b"vary", b"Origin"))
        return ((b"vary", b"Origin"),) if self._origins else ()

    def preflight(self, asked: Headers) -> tuple[Header, ...]:
        """What else the answer to a preflight request has. Raises RequestError 400: the origin is not allowed."""
        if not self._any and asked[b"origin"] not in self._origins:
            shown = asked[b"origin"][:200].decode("latin-1")
            raise RequestError(f"origin {shown!r} is not allowed here; the operator allows it with --allowed-origins")
        wanted = asked.get(b"access-control-request-headers")
        return (
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _MAX_AGE),
            *(((b"access-control-allow-headers", wanted),) if wanted else ()),
        )
