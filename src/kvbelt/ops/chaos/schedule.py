"""The schedule of faults, determined by a seed. Pure.

Every kind occurs once before any occurs again, in a shuffled order, so that a short run has every kind. Faults
overlap as their lengths and the gaps allow.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.faults import FaultKind


@dataclass(frozen=True, slots=True)
class Injection:
    """One scheduled fault."""

    number: int
    kind: FaultKind
    at: float  #: seconds after the start of the faults
    seconds: float  #: from injection to healing; a restart takes as long as it takes
    choice: float  #: 0 <= choice < 1: selects the target
    seed: int  #: for the fault's other random choices


def schedule(seed: int, seconds: float, kinds: Sequence[FaultKind], every: float) -> list[Injection]:
    """Faults for ``seconds``, with gaps of half to one and a half of ``every``; none is healed much later."""
    chance = random.Random(seed)
    cards = _deal(kinds, chance)
    injections: list[Injection] = []
    at = 0.0
    while kinds:
        at += every * chance.uniform(0.5, 1.5)
        kind = next(cards)
        fault = Injection(
            number=len(injections) + 1,
            kind=kind,
            at=at,
            seconds=chance.uniform(*kind.seconds),
            choice=chance.random(),
            seed=chance.getrandbits(32),
        )
        if at > seconds:
            break
        injections.append(fault)
    return injections


def _deal(kinds: Sequence[FaultKind], chance: random.Random) -> Iterator[FaultKind]:
    while True:
        deck = list(kinds)
        chance.shuffle(deck)
        yield from deck


def pick(choice: float, candidates: Sequence[str]) -> str | None:
    """The candidate that ``choice`` selects; None without candidates."""
    return candidates[int(choice * len(candidates))] if candidates else None
