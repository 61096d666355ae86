"""Takes JSON objects apart and puts them together as bytes, so that a long prompt is never decoded or re-encoded.

An object is parsed into its top-level members with raw values (msgspec), and written again from them. So of a name
that was sent twice the last value counts, as in every JSON parser that a worker uses.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from kvbelt.wire.json_body import JsonDecoder

Value = bytes | msgspec.Raw

NULL = b"null"

#: The top-level members of an object, values raw. Raises msgspec.DecodeError: not JSON, or no object.
members_of = JsonDecoder[dict[str, Value]](dict[str, msgspec.Raw]).decode

_keys: dict[str, bytes] = {}
_KEYS_KEPT = 256


def key(name: str) -> bytes:
    """``,"name":``, escaped as needed."""
    known = _keys.get(name)
    if known is None:
        known = b"," + msgspec.json.encode(name) + b":"
        if len(_keys) < _KEYS_KEPT:  # names come from clients
            _keys[name] = known
    return known


def more_of(members: Mapping[str, Value]) -> bytes:
    """These members, each with a comma before it."""
    parts: list[Any] = []
    for name, value in members.items():
        parts += (key(name), value)
    return b"".join(parts)


def object_of(members: Mapping[str, Value]) -> bytes:
    """The object with these members."""
    return b"{" + more_of(members)[1:] + b"}"
