"""What the proxy's own routes share: query parameters and refusals."""

from urllib.parse import parse_qs

from kvbelt.errors import RequestError
from kvbelt.http import JSON, Exchange
from kvbelt.wire.api_error import error_body


class MethodError(RequestError):
    """405. ``allowed`` is the header ``Allow``."""

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message, status=405)
        self.allowed = allowed


def allow(*methods: str) -> str:
    """The header ``Allow`` of a path with these methods."""
    return ", ".join([*methods, "HEAD", "OPTIONS"] if "GET" in methods else [*methods, "OPTIONS"])


def refuse(exchange: Exchange, error: RequestError) -> None:
    headers = [JSON]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 503:
        headers.append((b"retry-after", b"1"))
    if isinstance(error, MethodError):
        headers.append((b"allow", error.allowed.encode()))
    body = error_body(error.message, kind=error.kind, param=error.param, code=error.code)
    exchange.respond(error.status, headers, body)


def parameter(target: str, name: str) -> str | None:
    """The last value of a parameter in a target's query; None: it is missing."""
    values = parse_qs(target.partition("?")[2], keep_blank_values=True).get(name)
    return values[-1] if values else None


def number_of(target: str, name: str, *, otherwise: int, least: int = 0, most: int) -> int:
    """A whole number of a target's query. Raises RequestError 400: it is not one, or out of its range."""
    text = parameter(target, name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise RequestError(f"{name} is {text[:40]!r}; it is a whole number from {least} to {most}", param=name)
    return int(text)
