"""What ``kvbelt top`` shows of a deployment: figures, and the columns of its tables. Pure."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kvbelt.ops.bars import bytes_of, milliseconds
from kvbelt.wire.console import Alarm, ConsoleState, LiveStats, Percentiles, RequestRow
from kvbelt.wire.load import Buffers
from kvbelt.wire.workers import WorkerRow

NONE = "-"
_SPARKS = "▁▂▃▄▅▆▇█"
_KEPT_REQUESTS = 200
_KEPT_VALUES = 300

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    title: str
    shown: Callable[[Row], str]
    order: Callable[[Row], Any]  #: what rows are sorted by; None sorts last
    right: bool = True
    least_width: int = 0  #: of a terminal that shows this column
    subject: str = ""  #: of the alarms that colour its cells


def _load(
    part: Callable[[WorkerRow], float | None], title: str, subject: str = "", least: int = 0
) -> Column[WorkerRow]:
    """A share, in percent."""
    return Column(title, lambda row: _percent(part(row)), part, least_width=least, subject=subject)


def _count(part: Callable[[WorkerRow], int], title: str, subject: str = "", least: int = 0) -> Column[WorkerRow]:
    return Column(title, lambda row: str(part(row)), part, least_width=least, subject=subject)


WORKERS: tuple[Column[WorkerRow], ...] = (
    Column("WORKER", lambda row: row.worker, lambda row: row.worker, right=False),
    Column("ROLE", lambda row: row.role, lambda row: row.role, right=False),
    Column("STATE", lambda row: row.shown_state, lambda row: row.shown_state, right=False, subject="state"),
    _count(lambda row: row.load.running, "RUN"),
    _count(lambda row: row.load.waiting, "WAIT", "waiting"),
    _count(lambda row: row.in_flight, "REQS", least=70),
    _load(lambda row: _part(row.load.blocks_total - row.load.blocks_free, row.load.blocks_total), "KV USED", "kv"),
    _load(lambda row: _part(row.load.blocks_cached, row.load.blocks_total), "CACHED", least=80),
    Column(
        "BUFFER",
        lambda row: _buffer(row.buffers),
        lambda row: _held(row.buffers),
        least_width=96,
        subject="buffer",
    ),
)


def _milliseconds(name: str, title: str, least: int = 0) -> Column[RequestRow]:
    return Column(title, lambda row: _ms(getattr(row, name)), lambda row: getattr(row, name), least_width=least)


def _workers_of(row: RequestRow) -> str:
    return " to ".join(dict.fromkeys(name for name in (row.prefill, row.decode) if name)) or NONE


REQUESTS: tuple[Column[RequestRow], ...] = (
    Column("UTC", lambda row: time.strftime("%H:%M:%S", time.gmtime(row.time)), lambda row: row.time, right=False),
    Column("REQUEST", lambda row: row.request_id, lambda row: row.request_id, right=False),
    Column("STATUS", lambda row: str(row.status or "open"), lambda row: row.status, subject="status"),
    Column("PATH", lambda row: row.path or NONE, lambda row: row.path, right=False, least_width=70),
    _milliseconds("first_token_ms", "TTFT ms"),
    _milliseconds("between_tokens_ms", "NEXT ms", 100),
    _milliseconds("transfer_exposed_ms", "KV ms", 90),
    _milliseconds("total_ms", "ALL ms", 50),
    Column("WORKERS", _workers_of, _workers_of, right=False, least_width=110),
)


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    shown: str
    of: Callable[[LiveStats], float | None]
    subject: str = ""


def figures(live: LiveStats) -> list[Figure]:
    return [
        Figure("requests/s", rate(live.requests_per_second), lambda it: it.requests_per_second),
        Figure("tokens/s", rate(live.tokens_per_second), lambda it: it.tokens_per_second),
        Figure("first token", _both(live.first_token_ms), lambda it: it.first_token_ms.p99, "first_token_ms"),
        Figure("between tokens", _both(live.between_tokens_ms), lambda it: it.between_tokens_ms.p99),
        Figure("KV exposed", _both(live.transfer_exposed_ms), lambda it: it.transfer_exposed_ms.p99,
               "transfer_exposed_ms"),
    ]  # fmt: skip


@dataclass(slots=True)
class History:
    """What the proxy has said since the start."""

    lives: deque[LiveStats] = field(default_factory=lambda: deque(maxlen=_KEPT_VALUES))
    requests: dict[str, RequestRow] = field(default_factory=dict)  #: the newest last
    life: str = ""

    def add(self, state: ConsoleState) -> None:
        if state.proxy.life != self.life:  # another process has not seen what the last one saw
            self.requests.clear()
            self.life = state.proxy.life
        self.lives.append(state.live)
        for row in reversed(state.requests):
            self.requests[row.request_id] = row
        for name in list(self.requests)[:-_KEPT_REQUESTS]:
            del self.requests[name]

    def sparks(self, of: Callable[[LiveStats], float | None], width: int) -> str:
        return sparkline([of(live) for live in list(self.lives)[-width:]])


def sparkline(values: Iterable[float | None]) -> str:
    """One block a value, from nothing to the largest; a blank where there was none."""
    given = list(values)
    most = max((value for value in given if value is not None), default=0.0) or 1.0
    return "".join(" " if value is None else _SPARKS[min(7, int(8 * value / most))] for value in given)


def in_order(rows: Iterable[Row], column: Column[Row], *, falling: bool) -> list[Row]:
    """Rows without a value come last either way."""
    known = [(column.order(row), row) for row in rows]
    valued = sorted((pair for pair in known if pair[0] is not None), key=lambda pair: pair[0], reverse=falling)
    return [row for _, row in valued] + [row for value, row in known if value is None]


def severity(alarms: Iterable[Alarm], subject: str, row: object = None) -> str:
    """Of a cell, or of a figure: ``critical``, ``warning``, or nothing."""
    if subject == "status" and isinstance(row, RequestRow):
        return "critical" if row.status >= 500 else "warning" if row.status >= 400 else ""
    for alarm in alarms:
        of_row = isinstance(row, WorkerRow) and (alarm.worker, alarm.role) == (row.worker, row.role)
        if subject and alarm.subject == subject and (row is None or of_row):
            return alarm.severity
    return ""


def about_worker(worker: WorkerRow, state: ConsoleState) -> list[str]:
    """Everything that is known of one worker."""
    lines = [f"{worker.role} worker {worker.worker}: {worker.shown_state}"]
    lines += [f"  {worker.detail}"] if worker.detail else []
    lines += [f"  {column.title.lower():<10} {column.shown(worker)}" for column in WORKERS[3:]]
    lines.append(f"  {'model':<10} {worker.model or 'not told'}, longest {worker.max_model_len or 'not told'} tokens")
    for alarm in state.alarms:
        if (alarm.worker, alarm.role) == (worker.worker, worker.role):
            lines.append(f"  {alarm.severity}: {alarm.what}; {alarm.change}")
    lines += ["", "pairs"]
    for pair in state.pairs:
        if worker.worker in (pair.prefill, pair.decode):
            why = f": {pair.reason} {pair.detail}".rstrip() if pair.reason else ""
            lines.append(f"  {pair.prefill} to {pair.decode}: {pair.state}{why}")
    return lines


def rate(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def uptime(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _both(found: Percentiles) -> str:
    return f"p50 {_ms(found.p50)}, p99 {_ms(found.p99)} ms" if found.count else NONE


def _ms(value: float | None) -> str:
    return NONE if value is None else milliseconds(value)


def _part(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f}%"


def _held(buffers: Buffers | None) -> float | None:
    if buffers is None or not buffers.receive_bytes:
        return None
    return (buffers.bytes_reserved + buffers.bytes_committed + buffers.bytes_quarantined) / buffers.receive_bytes


def _buffer(buffers: Buffers | None) -> str:
    share = _held(buffers)
    return NONE if buffers is None or share is None else f"{_percent(share)} of {bytes_of(buffers.receive_bytes)}"
