"""One frame of ``kvbelt top``. Pure."""

import time
from collections.abc import Iterator

from kvbelt.ops.bars import bytes_of, milliseconds
from kvbelt.ops.tables import aligned
from kvbelt.wire.console import ConsoleState, LastError, LiveStats
from kvbelt.wire.load import Buffers
from kvbelt.wire.workers import WorkerRow

_NONE = "-"
_HEAD = ("WORKER", "ROLE", "STATE", "RUN", "WAIT", "REQS", "KV USED", "CACHED", "BUFFER")
_RIGHT = frozenset({3, 4, 5, 6, 7, 8})


def frame(state: ConsoleState, *, url: str, width: int = 100, height: int = 0, gone: str = "") -> list[str]:
    """The lines of one frame.

    Args:
        state: what the proxy answered.
        url: of the proxy, for the first line.
        width: of the terminal, in characters; longer lines are cut.
        height: of the terminal, in lines; 0: no limit.
        gone: why ``state`` is out of date; empty: it is not.
    """
    proxy, live = state.proxy, state.live
    clock = time.strftime("%H:%M:%S UTC", time.gmtime(proxy.time))
    model = proxy.model or "no model yet"
    lines = [
        f"kvbelt {proxy.version} at {url}, {model}, up {_long(proxy.uptime_seconds)}, {clock}",
        gone
        or f"last {live.seconds:.0f} s: {_rate(live.requests_per_second)} requests/s, "
        f"{proxy.in_flight} under way, {_rate(live.tokens_per_second)} tokens/s, "
        f"{_rate(live.errors_per_second)} errors/s",
        f"transfers {_rate(live.transfers_per_second)}/s, {bytes_of(live.bytes_per_second)}/s",
        "",
        *aligned([("", "P50", "P99"), *_times(live)], {1, 2}),
        "",
        *aligned([_HEAD, *map(_row, state.workers)], _RIGHT),
    ]
    lines += [f"{worker.worker}: {worker.detail}" for worker in state.workers if worker.detail]
    lines += [f"{pair.prefill} cannot send to {pair.decode}: {pair.reason}" for pair in state.pairs if pair.reason]
    if live.last_errors:
        lines += ["", "LAST ERRORS"]
        lines += [_error(error) for error in live.last_errors]
    return [line[:width] for line in (lines[:height] if height else lines)]


def _times(live: LiveStats) -> Iterator[tuple[str, ...]]:
    for name, found in (
        ("first token", live.first_token_ms),
        ("between tokens", live.between_tokens_ms),
        ("KV exposed", live.transfer_exposed_ms),
        ("KV transfer in all", live.transfer_ms),
    ):
        yield name, _ms(found.p50), _ms(found.p99)


def _row(worker: WorkerRow) -> tuple[str, ...]:
    load = worker.load
    total = load.blocks_total
    return (
        worker.worker,
        worker.role,
        worker.shown_state,
        str(load.running),
        str(load.waiting),
        str(worker.in_flight),
        _share(total - load.blocks_free, total),
        _share(load.blocks_cached, total),
        _buffer(worker.buffers),
    )


def _buffer(buffers: Buffers | None) -> str:
    if buffers is None or not buffers.receive_bytes:
        return _NONE
    held = buffers.bytes_reserved + buffers.bytes_committed + buffers.bytes_quarantined
    return f"{_share(held, buffers.receive_bytes)} of {bytes_of(buffers.receive_bytes)}"


def _error(error: LastError) -> str:
    said = " ".join(error.error.split())
    return f"{time.strftime('%H:%M:%S', time.gmtime(error.time))}  {error.request_id}  {said}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else _NONE


def _ms(value: float | None) -> str:
    return _NONE if value is None else f"{milliseconds(value)} ms"


def _rate(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
