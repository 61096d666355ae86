"""What was measured: the times of every request of a load."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec


class Answer(msgspec.Struct, omit_defaults=True):
    """One request; times in milliseconds."""

    at: float  #: when it was due, in seconds since the load began
    prompt: int  #: tokens
    server: int = 0  #: that the client chose
    lag: float = 0.0  #: by which the client was late
    ttft: float = 0.0
    gaps: list[float] = msgspec.field(default_factory=list)  #: between tokens, as they came
    tokens: int = 0
    cached: int = 0  #: tokens of the prompt
    headers: dict[str, str] = msgspec.field(default_factory=dict)  #: ``x-kvbelt-…``
    error: str = ""
    request_id: str = ""
    workers: str = ""  #: ports of the servers that kvbelt's proxy chose: ``7210>7211``, or one of them
    record: dict[str, Any] = msgspec.field(default_factory=dict)  #: of the proxy: its timings, the transfer

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first."""
        return sum(self.gaps) / max(1, self.tokens - 1)

    @property
    def itl99(self) -> float:
        """The 99th percentile of its own gaps."""
        return percentile(self.gaps, 0.99)

    @property
    def action(self) -> str:
        """What the proxy did with it, or which server the client chose."""
        told = [self.headers[name].partition(";")[0] for name in ACTION_HEADERS if name in self.headers]
        return " ".join([*told, self.workers]).strip() or f"server {self.server}"


#: Of the answers of kvbelt's proxy: those that say what was done with a request.
ACTION_HEADERS = ("x-kvbelt-placement", "x-kvbelt-path")


class Row(msgspec.Struct):
    """One load of one system, with one seed."""

    system: str
    load: str
    seed: int
    rate: float
    seconds: float  #: until the last answer
    answers: list[Answer]
    gpus: dict[str, Any] = msgspec.field(default_factory=dict)
    about: dict[str, Any] = msgspec.field(default_factory=dict)  #: arguments, versions, what the proxy counted


@dataclass(frozen=True, slots=True)
class Level:
    """A service level, in milliseconds. A request is within it if each of its times is."""

    name: str
    ttft: float = 500.0
    tpot: float = float("inf")
    itl99: float = float("inf")

    def holds(self, answer: Answer) -> bool:
        if answer.error or answer.ttft > self.ttft:
            return False
        return answer.tpot <= self.tpot and answer.itl99 <= self.itl99


LEVELS = (Level("A", tpot=25.0), Level("B", itl99=50.0))


def add_records(answers: Iterable[Answer], records: Iterable[dict[str, Any]]) -> None:
    """Add to each answer what kvbelt's proxy tells about it."""
    known = {record["request_id"]: record for record in records}
    for answer in answers:
        if record := known.get(answer.request_id):
            sides = (record["workers"]["prefill"], record["workers"]["decode"])
            answer.workers = ">".join(side.rpartition(":")[2] for side in sides if side)
            timings = {name: value for name, value in record["timings_ms"].items() if value is not None}
            answer.record = {"timings_ms": timings, "transfer": record["transfer"], "after": record["after"]}


def percentile(values: Iterable[float], share: float) -> float:
    """The value at ``int(share * n)`` of the sorted ones; nan if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def share_within(answers: Sequence[Answer], level: Level) -> float:
    """The share of all requests, those without an answer included."""
    return sum(level.holds(answer) for answer in answers) / len(answers)


def write_row(file: Path, row: Row) -> None:
    """Add a line of JSON."""
    with file.open("ab") as lines:
        lines.write(msgspec.json.encode(row) + b"\n")


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Read the lines of several files.

    Raises:
        ValueError: a line is not such a row.
    """
    rows = []
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                rows.append(msgspec.json.decode(line, type=Row))
            except msgspec.DecodeError as error:
                raise ValueError(f"{file}, line {number} is no row: {error}") from error
    return rows
