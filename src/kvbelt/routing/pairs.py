"""Which prefill worker can send to which decode worker, as far as the proxy knows. Pure.

A pair is two processes, not two addresses: a restarted worker, perhaps with another model or key, is judged anew. A
pair whose handshake was refused for good is not tried again, neither ahead of requests nor by one.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from kvbelt.wire.ids import EngineId
from kvbelt.wire.reasons import of_transfer


class PairState(StrEnum):
    WARM = "warm"  #: the handshake has succeeded, and the channel is connected
    UNWARMED = "unwarmed"  #: the prefill worker connects on first use only (vLLM)
    FAILED = "failed"  #: it is tried again
    REFUSED = "refused"  #: it fails for as long as both processes live


@dataclass(frozen=True, slots=True)
class Pair:
    state: PairState
    at: float  #: when this was learned, in seconds of the caller's clock
    reason: str | None = None  #: of ``wire/reasons.py``
    detail: str = ""  #: for people; for a refusal, the two values that differ


class Pairs:
    """Every pair of living workers that was tried."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[EngineId, EngineId], Pair] = {}
        self._refused: set[tuple[EngineId, EngineId]] = set()  # exactly those in REFUSED

    def get(self, prefill: EngineId | None, decode: EngineId | None) -> Pair | None:
        """The pair; None: not tried yet, or a worker has no identity."""
        return None if prefill is None or decode is None else self._pairs.get((prefill, decode))

    def usable(self, prefill: EngineId | None, decode: EngineId | None) -> bool:
        """Whether a transfer is worth trying."""
        return (prefill, decode) not in self._refused

    @property
    def any_refused(self) -> bool:
        return bool(self._refused)

    def succeeded(self, prefill: EngineId, decode: EngineId, now: float) -> bool:
        """Record a connection. Returns whether this is new."""
        return self._note(prefill, decode, Pair(PairState.WARM, now))

    def unwarmed(self, prefill: EngineId, decode: EngineId, now: float) -> bool:
        """Record that the prefill worker cannot connect ahead. Returns whether this is new."""
        return self._note(prefill, decode, Pair(PairState.UNWARMED, now))

    def failed(self, prefill: EngineId, decode: EngineId, reason: str, detail: str, now: float) -> bool:
        """Record that they could not connect. Returns whether this is new."""
        state = PairState.REFUSED if of_transfer(reason).lasting else PairState.FAILED
        before = self._pairs.get((prefill, decode))
        if before is not None and before.reason == reason:
            detail = detail or before.detail
        return self._note(prefill, decode, Pair(state, now, reason, detail))

    def forget(self, engine: EngineId) -> None:
        """Drop the pairs of a process that has ended."""
        for pair in [pair for pair in self._pairs if engine in pair]:
            del self._pairs[pair]
            self._refused.discard(pair)

    def _note(self, prefill: EngineId, decode: EngineId, pair: Pair) -> bool:
        key = prefill, decode
        before = self._pairs.get(key)
        self._pairs[key] = pair
        (self._refused.add if pair.state is PairState.REFUSED else self._refused.discard)(key)
        return before is None or (before.state, before.reason) != (pair.state, pair.reason)

    def states(self) -> Counter[str]:
        """The number of pairs in each state, zeros included."""
        counts = Counter({str(state): 0 for state in PairState})
        counts.update(str(pair.state) for pair in self._pairs.values())
        return counts
