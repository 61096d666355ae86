"""The published results of the placement benchmark, as its chart and its tables compare them.

Systems that are named as a level, ``A`` or ``B``, are kvbelt with this level set. The best plain setting is chosen for
each load and level.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
from benchmarks.gpu._figures import Figures, Results
from benchmarks.gpu._load import Load, parse_load
from benchmarks.gpu._rows import LEVELS

LEVEL_NAMES = tuple(level.name for level in LEVELS)
ARRIVALS = {"even": "even", "poisson": "Poisson"}
#: Tokens of a prompt and of an answer, where nothing else is said.
LENGTHS = (7500, 200)


@dataclass(frozen=True, slots=True)
class Measured:
    """Every system under one load."""

    load: Load
    systems: dict[str, Figures]

    def best_plain(self, level: str) -> Figures | None:
        """Of the plain settings the one with the most requests within the level, then with the shortest TTFT p99."""
        plain = [figures for name, figures in self.systems.items() if is_plain(name)]
        return max(plain, key=lambda one: (one.within[level], -(one.ttft_p99 or 0.0)), default=None)

    @property
    def seeds(self) -> list[int]:
        """Of the system that was measured most often."""
        return max((figures.seeds for figures in self.systems.values()), key=len)

    @property
    def usual_lengths(self) -> bool:
        return (self.load.input_len, self.load.output_len, self.load.spread) == (*LENGTHS, 0.0)


def is_plain(system: str) -> bool:
    return system.partition("@")[0] in ("plain", "plain-least")


def read_results(file: Path) -> Results:
    return msgspec.json.decode(file.read_bytes(), type=Results)


def by_load(results: Results) -> list[Measured]:
    """The usual lengths first, even arrivals before Poisson, by rate."""
    loads: dict[str, dict[str, Figures]] = {}
    for figures in results.figures:
        loads.setdefault(figures.load, {})[figures.system] = figures
    measured = [Measured(parse_load(name), systems) for name, systems in loads.items()]
    return sorted(measured, key=lambda one: (not one.usual_lengths, _rank(one.load)))


def _rank(load: Load) -> tuple[object, ...]:
    return load.input_len, load.output_len, load.spread, load.arrivals, load.rate, load.seconds
