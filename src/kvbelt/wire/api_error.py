"""OpenAI's error object: what the proxy and the workers answer when they cannot serve a request."""

import msgspec

from kvbelt.wire.json_body import JsonMessage


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    message: str
    type: str
    param: str | None
    code: int | str | None
    reason: str | None = None  #: of ``wire/reasons.py``; an addition of ours, where there is one


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


API_ERROR = JsonMessage(ErrorBody, "the error")

_encode = msgspec.json.Encoder().encode


def error_body(
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: int | str | None = None,
    reason: str | None = None,
) -> bytes:
    return _encode(ErrorBody(ErrorDetail(message=message, type=kind, param=param, code=code, reason=reason)))
