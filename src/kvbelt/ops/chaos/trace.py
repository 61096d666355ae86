"""What the proxy's record tells of one request: who took part in it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Trace:
    """Workers by their addresses, ``host:port``, as the proxy names them."""

    prefill: str | None  #: who read the prompt; None: the decode worker itself
    decode: str | None
    troubled: frozenset[str]  #: workers that failed it on the way

    @property
    def used(self) -> frozenset[str]:
        """Who had a part in the answer."""
        return frozenset(filter(None, (self.prefill, self.decode)))


def trace_of(record: Mapping[str, Any], workers: frozenset[str]) -> Trace:
    """From an entry of ``/kvbelt/requests``. ``workers``: every worker that there is.

    A worker is troubled if an attempt with it failed, or an error names it.
    """
    said = record.get("workers") or {}
    path = (record.get("decision") or {}).get("path") or ""
    troubles = [str(error) for error in record.get("errors") or ()]
    troubles += [str(attempt.get("worker")) for attempt in record.get("attempts") or () if attempt.get("reason")]
    return Trace(
        prefill=None if path == "local" else said.get("prefill"),
        decode=None if path == "prefill-only" else said.get("decode"),
        troubled=frozenset(worker for worker in workers if any(worker in trouble for trouble in troubles)),
    )
