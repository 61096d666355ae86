"""Examples of what commands show, for the pictures in the documentation: one deployment under load, always the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvbelt.ops.banner import banner
from kvbelt.ops.doctor import report
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.ops.start_board import StartBoard
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.why import describe
from kvbelt.proxy.observe.alarms import alarms
from kvbelt.wire.console import CONSOLE_STATE, ConsoleState, DoctorFinding, LegRates, Percentiles, RecordCounts
from kvbelt.wire.request_record import REQUEST_RECORD
from kvbelt.wire.workers import WorkerRow
from tools.screens_data import record, state

URL = "http://127.0.0.1:9100"


class _Memory(Terminal):
    """Keeps what a terminal would show."""

    def __init__(self) -> None:
        super().__init__(colour=True)
        self.redraws = True
        self.unicode = True
        self.shown: list[str] = []

    def redraw(self, lines: Sequence[str]) -> None:
        self.shown = list(lines)


def up(width: int) -> list[str]:
    """A start, from the first process to the next steps."""
    terminal = _Memory()
    board = StartBoard(["prefill-0", "decode-0", "proxy"], terminal)
    board.show(["ready", "loading", "waiting"], 2.9)
    board.show(["ready", "ready", "waiting"], 3.2)
    board.show(["ready", "ready", "ready"], 3.4)
    key, logs = Path("/run/kvbelt/admin.key"), Path("/run/kvbelt/logs")
    return [
        *terminal.shown,
        *banner(url=URL, model="demo", topology="1p1d", key=key, logs=logs, drain_seconds=30, seconds=3.4, width=width),
    ]


def why(width: int) -> list[str]:
    return describe(REQUEST_RECORD.convert(record(), "the example"), width=width)


def doctor(width: int) -> list[str]:
    findings = [
        Finding(
            "dead_worker",
            Severity.ERROR,
            "decode worker 127.0.0.1:7201 does not answer",
            "the other decode workers have its requests, too",
            "kvbelt worker --role decode --config decode-1.yaml --model demo --port 7201, or kvbelt workers remove it",
            ("connection refused for 41 s",),
        ),
        Finding(
            "prefill_overloaded",
            Severity.WARNING,
            "14 requests wait in prefill worker 127.0.0.1:7100",
            "each first token waits for all prompts before it",
            "kvbelt workers add prefill HOST:PORT, or send less",
            ("queue 14, prompts of 7,500 tokens",),
        ),
    ]
    return list(report.lines(findings, f"{URL}: 2p2d, 214 requests in the last minutes", colour=True, width=width))


def top() -> list[ConsoleState]:
    """What the proxy answers, one second after another; the last one is shown."""
    return [_judged(state(second)) for second in range(60)]


def console() -> dict[str, ConsoleState]:
    """What the proxy answers to the console's page in each state of a deployment."""
    idle = Percentiles(0, None, None)
    calm, dead = _judged(state(0, dead=False)), _judged(state(0))
    quiet = msgspec.structs.replace(
        calm.live, requests_per_second=0.0, errors_per_second=0.0, tokens_per_second=0.0, transfers_per_second=0.0,
        bytes_per_second=0, first_token_ms=idle, between_tokens_ms=idle, transfer_ms=idle, transfer_gb_per_second=idle,
        transfer_exposed_ms=idle, links=[], legs=LegRates({}, {}),
    )  # fmt: skip
    restart = "kvbelt worker --role decode --config decode-1.yaml --model demo --port 7201"
    return {
        "calm": calm,
        "overloaded": _judged(state(59, dead=False)),
        "dead-worker": msgspec.structs.replace(
            dead, doctor=DoctorFinding("critical", "decode worker 127.0.0.1:7201 does not answer", restart)
        ),
        "empty": msgspec.structs.replace(
            calm,
            live=quiet,
            requests=[],
            workers=[_idle(one) for one in calm.workers],
            proxy=msgspec.structs.replace(calm.proxy, in_flight=0, requests=0, records=RecordCounts(0, 1000)),
        ),
    }


def _idle(one: WorkerRow) -> WorkerRow:
    load = one.load
    return msgspec.structs.replace(
        one, in_flight=0,
        load=msgspec.structs.replace(load, running=0, waiting=0, blocks_free=load.blocks_total, blocks_cached=0),
        buffers=None if one.buffers is None else msgspec.structs.replace(
            one.buffers, bytes_reserved=0, bytes_committed=0,
        ),
    )  # fmt: skip


def _judged(said: dict[str, Any]) -> ConsoleState:
    one = CONSOLE_STATE.convert(said, "the example")
    return msgspec.structs.replace(one, alarms=alarms(one.workers, one.pairs, one.live))
