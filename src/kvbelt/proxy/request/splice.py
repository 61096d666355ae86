"""JSON objects taken apart and put together by bytes, so that a long prompt is never decoded or re-encoded.

An object is parsed into its top-level members with their values left raw (msgspec), and written again from
them. So a name that was sent twice counts once, the last time, as in every JSON parser that a worker uses.

A long list of numbers, a prompt as token ids, is the one value that is expensive even to skip: about 30 µs for
7,500 ids against 2 µs for finding its end. ``cut_numbers`` takes it out before parsing. Why that is safe:

* ``"name"`` followed by a colon is a key wherever it stands in valid JSON, unless the quote before ``name`` is
  escaped; the caller checks that the key it meant now has the placeholder, and that there is no second one.
* What is cut contains no quote and no second opening bracket or brace, so the first ``]`` is its end, and
  nothing in it can close anything else when it is written into another object.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvbelt.wire.json_body import JsonDecoder

Value = bytes | msgspec.Raw

#: Stands where numbers were cut. A string that no sane client sends; if one does, it only fools itself.
PLACEHOLDER = b'"\\u0000kvbelt cut\\u0000"'

_members: JsonDecoder[dict[str, msgspec.Raw]] = JsonDecoder(dict[str, msgspec.Raw])
_keys: dict[str, bytes] = {}
_KEYS_KEPT = 256
_SPACE = b" \t\r\n"


def members_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level members of an object, values raw.

    Raises:
        msgspec.DecodeError: not JSON, or not an object (ValidationError).
    """
    return _members.decode(body)


def key(name: str) -> bytes:
    """``"name":``, escaped as needed."""
    known = _keys.get(name)
    if known is None:
        known = msgspec.json.encode(name) + b":"
        if len(_keys) < _KEYS_KEPT:  # names come from clients
            _keys[name] = known
    return known


def object_of(members: Mapping[str, Value]) -> bytes:
    """The object with these members."""
    parts: list[Any] = []
    before = b"{"
    for name, value in members.items():
        parts += (before, key(name), value)
        before = b","
    return b"".join(parts) + b"}" if parts else b"{}"


def cut_numbers(body: bytes, name: bytes) -> tuple[bytes, bytes] | None:
    """Cut a flat list of numbers that follows ``"name":``.

    Returns:
        The body with a placeholder in its place, and the list with its brackets; None if the first ``name``
        is followed by anything else, or there is a second one behind it.
    """
    quoted = b'"%b"' % name
    at = body.find(quoted)
    if at < 0:
        return None
    start = _skip_space(body, at + len(quoted))
    if body[start : start + 1] != b":":
        return None
    start = _skip_space(body, start + 1)
    if body[start : start + 1] != b"[":
        return None
    end = body.find(b"]", start) + 1
    if end == 0:
        return None
    numbers = body[start:end]
    if b'"' in numbers or b"{" in numbers or numbers.rfind(b"[") != 0 or body.find(quoted, end) >= 0:
        return None
    return b"".join((body[:start], PLACEHOLDER, body[end:])), numbers


def _skip_space(body: bytes, at: int) -> int:
    while body[at : at + 1] and body[at] in _SPACE:
        at += 1
    return at
