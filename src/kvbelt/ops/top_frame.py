"""One frame of ``kvbelt top --once``, as plain text. Pure."""

import time
from collections.abc import Iterator

from kvbelt.ops.bars import bytes_of, milliseconds
from kvbelt.ops.tables import aligned, wrapped
from kvbelt.ops.top_view import NONE, WORKERS, rate, uptime
from kvbelt.wire.console import ConsoleState, LastError, LiveStats


def frame(state: ConsoleState, *, url: str, width: int = 100) -> list[str]:
    """The lines of one frame.

    Args:
        state: what the proxy answered.
        url: of the proxy, for the first line.
        width: of the terminal, in characters. Sentences are wrapped, and columns for which there is no room left out.
    """
    proxy, live = state.proxy, state.live
    clock = time.strftime("%H:%M:%S UTC", time.gmtime(proxy.time))
    model = proxy.model or "no model yet"
    rates = (
        f"{rate(live.requests_per_second)} requests/s",
        f"{proxy.in_flight} under way",
        f"{rate(live.tokens_per_second)} tokens/s",
        f"{rate(live.errors_per_second)} errors/s",
    )
    columns = [column for column in WORKERS if column.least_width <= width]
    right = {index for index, column in enumerate(columns) if column.right}
    rows = [[column.shown(worker) for column in columns] for worker in state.workers]
    lines = [
        f"kvbelt {proxy.version} at {url}, {model}, up {uptime(proxy.uptime_seconds)}, {clock}",
        f"last {live.seconds:.0f} s: {', '.join(rates)}",
        f"transfers {rate(live.transfers_per_second)}/s, {bytes_of(live.bytes_per_second)}/s",
        *(f"{alarm.severity}: {alarm.what}; {alarm.change}" for alarm in state.alarms),
        "",
        *aligned([("", "P50", "P99"), *_times(live)], {1, 2}),
        "",
        *aligned([[column.title for column in columns], *rows], right),
    ]
    lines += [f"{worker.worker}: {worker.detail}" for worker in state.workers if worker.detail]
    if live.last_errors:
        lines += ["", "LAST ERRORS"]
        lines += [_error(error) for error in live.last_errors]
    return [piece[:width] for line in lines for piece in wrapped(line, width) or [""]]


def _times(live: LiveStats) -> Iterator[tuple[str, ...]]:
    for name, found in (
        ("first token", live.first_token_ms),
        ("between tokens", live.between_tokens_ms),
        ("KV exposed", live.transfer_exposed_ms),
        ("KV transfer in all", live.transfer_ms),
    ):
        yield name, _ms(found.p50), _ms(found.p99)


def _error(error: LastError) -> str:
    said = " ".join(error.error.split())
    return f"{time.strftime('%H:%M:%S', time.gmtime(error.time))}  {error.request_id}  {said}"


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{milliseconds(value)} ms"
