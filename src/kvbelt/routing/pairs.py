"""Which prefill worker can send to which decode worker, as far as is known. Pure.

A pair is two lives, not two addresses: a worker that was started again, perhaps with another model or another key, is
judged anew. What the handshake of a pair has refused for good is not tried again, neither ahead nor by a request.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from kvbelt.wire.ids import EngineId
from kvbelt.wire.reasons import is_lasting


class PairState(StrEnum):
    """How far two workers have come with each other."""

    WARM = "warm"  #: the handshake has succeeded, and the channel is connected
    UNWARMED = "unwarmed"  #: the prefill worker connects on first use only (vLLM)
    FAILED = "failed"  #: it will be tried again
    REFUSED = "refused"  #: it would fail for as long as both live


@dataclass(frozen=True, slots=True)
class Pair:
    """What is known of one pair."""

    state: PairState
    at: float  #: when it was learnt, in seconds of the caller's clock
    reason: str | None = None  #: of ``wire/reasons.py``
    detail: str = ""  #: for people; of a refusal, the two values that differ


class Pairs:
    """All pairs of living workers that have been tried."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[EngineId, EngineId], Pair] = {}
        self._refused: set[tuple[EngineId, EngineId]] = set()  # exactly those in REFUSED

    def get(self, prefill: EngineId | None, decode: EngineId | None) -> Pair | None:
        """None: not tried yet, or not to be told apart."""
        return None if prefill is None or decode is None else self._pairs.get((prefill, decode))

    def usable(self, prefill: EngineId | None, decode: EngineId | None) -> bool:
        """Whether a transfer is worth trying."""
        return (prefill, decode) not in self._refused

    @property
    def any_refused(self) -> bool:
        """Whether there is a pair that is not usable."""
        return bool(self._refused)

    def succeeded(self, prefill: EngineId, decode: EngineId, now: float) -> bool:
        """They are connected. Returns whether that is news."""
        return self._note(prefill, decode, Pair(PairState.WARM, now))

    def unwarmed(self, prefill: EngineId, decode: EngineId, now: float) -> bool:
        """The prefill worker cannot be told ahead. Returns whether that is news."""
        return self._note(prefill, decode, Pair(PairState.UNWARMED, now))

    def failed(self, prefill: EngineId, decode: EngineId, reason: str, detail: str, now: float) -> bool:
        """They could not be connected. Returns whether that is news."""
        state = PairState.REFUSED if is_lasting(reason) else PairState.FAILED
        before = self._pairs.get((prefill, decode))
        if before is not None and before.reason == reason:
            detail = detail or before.detail
        return self._note(prefill, decode, Pair(state, now, reason, detail))

    def forget(self, engine: EngineId) -> None:
        """This life is over."""
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
        """How many are in each state; all states are there."""
        counts = Counter({str(state): 0 for state in PairState})
        counts.update(str(pair.state) for pair in self._pairs.values())
        return counts

    def __len__(self) -> int:
        """How many are known."""
        return len(self._pairs)
