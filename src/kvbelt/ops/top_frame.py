"""One frame of ``kvbelt top``: what a proxy says of itself, in lines of a terminal. Pure."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvbelt.ops.bars import milliseconds

_NONE = "-"
_HEAD = ("WORKER", "ROLE", "STATE", "RUN", "WAIT", "REQS", "KV USED", "CACHED", "BUFFER")
_TIMES_HEAD = ("", "P50", "P99")
_TIMES = (
    ("first token", "first_token_ms"),
    ("between tokens", "between_tokens_ms"),
    ("transfer", "transfer_ms"),
)
_RIGHT = frozenset({3, 4, 5, 6, 7, 8})


def frame(state: Mapping[str, Any], *, url: str, width: int = 100, height: int = 0, gone: str = "") -> list[str]:
    """The lines, none wider than ``width``; at most ``height`` of them, unless that is 0.

    Args:
        state: the body of ``/kvbelt/console.json``.
        url: the proxy's, for the first line.
        width: of the terminal, in characters.
        height: of the terminal, in lines.
        gone: why the state is an old one; empty: it is not.
    """
    proxy, live = state["proxy"], state["live"]
    clock = time.strftime("%H:%M:%S UTC", time.gmtime(proxy["time"]))
    model = proxy["model"] or "no model yet"
    lines = [
        f"kvbelt {proxy['version']} at {url}, {model}, up {_long(proxy['uptime_seconds'])}, {clock}",
        gone
        or f"last {live['seconds']:.0f} s: {_rate(live['requests_per_second'])} requests/s, "
        f"{proxy['in_flight']} under way, {_rate(live['tokens_per_second'])} tokens/s, "
        f"{_rate(live['errors_per_second'])} errors/s",
        f"transfers {_rate(live['transfers_per_second'])}/s, {_bytes(live['bytes_per_second'])}/s"
        + ("" if (speed := live["transfer_gb_per_second"]["p50"]) is None else f", each at {_rate(speed)} GB/s (p50)"),
        "",
        *_table(_TIMES_HEAD, [_times(name, live[field]) for name, field in _TIMES], {1, 2}),
        "",
        *_table(_HEAD, [_row(worker) for worker in state["workers"]], _RIGHT),
    ]
    lines += [
        f"{pair['prefill']} cannot send to {pair['decode']}: {pair['reason']}"
        for pair in state["pairs"]
        if pair["reason"]
    ]
    if live["last_errors"]:
        lines += ["", "LAST ERRORS"]
        lines += [_error(error) for error in live["last_errors"]]
    return [line[:width] for line in (lines[:height] if height else lines)]


def _table(head: tuple[str, ...], body: Sequence[tuple[str, ...]], right: Collection[int]) -> list[str]:
    """Aligned columns, those in ``right`` to the right."""
    rows = [head, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(wide) if column in right else cell.ljust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _times(name: str, found: Mapping[str, float | None]) -> tuple[str, ...]:
    return name, _ms(found["p50"]), _ms(found["p99"])


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    load, buffers = worker["load"], worker["buffers"]
    total = load["blocks_total"]
    return (
        worker["worker"],
        worker["role"],
        state_of(worker),
        str(load["running"]),
        str(load["waiting"]),
        str(worker["in_flight"]),
        _share(total - load["blocks_free"], total),
        _share(load["blocks_cached"], total),
        _buffer(buffers),
    )


def state_of(worker: Mapping[str, Any]) -> str:
    """A worker's state in one word, as the proxy uses it."""
    if worker["standing"] != "active":
        return str(worker["standing"])
    return "warming" if worker["warming"] and worker["state"] == "ready" else str(worker["state"])


def _buffer(buffers: Mapping[str, int] | None) -> str:
    if not buffers or not buffers["receive_bytes"]:
        return _NONE
    held = buffers["bytes_reserved"] + buffers["bytes_committed"] + buffers["bytes_quarantined"]
    return f"{_share(held, buffers['receive_bytes'])} of {_bytes(buffers['receive_bytes'])}"


def _error(error: Mapping[str, Any]) -> str:
    said = " ".join(str(error["error"]).split())
    return f"{time.strftime('%H:%M:%S', time.gmtime(error['time']))}  {error['request_id']}  {said}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else _NONE


def _ms(value: float | None) -> str:
    return _NONE if value is None else f"{milliseconds(value)} ms"


def _rate(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
