"""When which fault comes, from a seed: the same seed, the same schedule. Pure.

Kinds are dealt like cards: each occurs once before any occurs again, in an order that the seed shuffles anew for
every deck. So even a short run has every kind, and faults overlap as their lengths and the gaps have it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.faults import Kind


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault that is to come."""

    number: int
    kind: Kind
    at: float  #: seconds after the start of the faults
    seconds: float  #: from injection to healing; a restart takes what it takes
    choice: float  #: 0 <= choice < 1: which of those whom it can befall
    seed: int  #: of what else is random in it


def schedule(seed: int, seconds: float, kinds: Sequence[Kind], every: float) -> list[Injection]:
    """Faults for ``seconds`` seconds, one every ``every`` seconds on average, none of them healed much later.

    Gaps are between half and one and a half of ``every``.
    """
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


def _deal(kinds: Sequence[Kind], chance: random.Random) -> Iterator[Kind]:
    while True:
        deck = list(kinds)
        chance.shuffle(deck)
        yield from deck


def pick(choice: float, candidates: Sequence[str]) -> str | None:
    """The candidate that ``choice`` means; None: there is none."""
    return candidates[int(choice * len(candidates))] if candidates else None
