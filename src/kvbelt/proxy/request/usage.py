"""A worker's token counts: found in its answer without parsing the rest."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

#: At the end of an answer, or of a stream's last events: the usage stands there.
_TAIL_BYTES = 1024
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
DETAILS = "prompt_tokens_details"
_usage = msgspec.json.Decoder(dict[str, Any])


class Counts(NamedTuple):
    """What is to be learnt from a usage; None: the worker does not say."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None  #: of the prompt


def counts_of(usage: Mapping[str, Any]) -> Counts:
    details = usage.get(DETAILS)
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Counts(_natural(usage.get("prompt_tokens")), _natural(usage.get("completion_tokens")), _natural(cached))


def counts_in(body: bytes) -> Counts | None:
    """Of the usage near the end of an answer or of events; None: there is none."""
    found = _find(body)
    return None if found is None else counts_of(found[0])


def with_details_of(usage: Mapping[str, Any], body: bytes) -> bytes:
    """An answer or events, with the cached tokens of another answer's ``usage``, where they tell their own."""
    found = _find(body)
    if found is None:
        return body
    counts, start, end = found
    details = usage.get(DETAILS)
    # The running counts of a stream tell none.
    if DETAILS not in counts or counts[DETAILS] == details:
        return body
    return b"".join((body[:start], msgspec.json.encode({**counts, DETAILS: details}), body[end:]))


def count_of(usage: Mapping[str, Any], name: str) -> int:
    """A count of a worker's usage; 0 if it is missing. Raises ValueError: it is not a whole number."""
    count = usage.get(name, 0)
    if not isinstance(count, int):
        raise ValueError(f"usage.{name} is {str(count)[:64]}; it must be a whole number")  # noqa: TRY004 - of a message
    return count


def _natural(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _find(body: bytes) -> tuple[dict[str, Any], int, int] | None:
    at = body.rfind(b'"usage"', max(0, len(body) - _TAIL_BYTES))
    found = _USAGE.match(body, at) if at >= 0 else None
    if found is None:
        return None
    try:
        return _usage.decode(found[1]), found.start(1), found.end(1)
    except msgspec.DecodeError:
        return None
