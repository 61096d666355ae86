"""The numbers of ``screens.py``: a 2p2d in trouble, and one request of it."""

import math
from typing import Any

_NOW = 1_796_000_000.0
_WORKERS = (("prefill", 7100), ("prefill", 7101), ("decode", 7200), ("decode", 7201))


def _percentiles(count: int, p50: float | None, p99: float | None) -> dict[str, Any]:
    return {"count": count, "p50": p50, "p99": p99}


def _worker(role: str, port: int, second: int, *, dead: bool) -> dict[str, Any]:
    lost, busy = dead and port == 7201, port == 7100
    waiting = min(14, second // 4) if busy else 0
    free = {7100: 310, 7101: 520, 7200: 190, 7201: 340}[port]
    receive = 1_073_741_824 if role == "decode" else 0
    buffers = {
        "receive_bytes": receive, "bytes_reserved": receive // 8, "bytes_committed": receive // 16,
        "bytes_quarantined": 0, "overflow_bytes": 0, "overflow_bytes_used": 0,
        "staging_bytes": 0 if receive else 1_073_741_824, "staging_bytes_used": 0,
    }  # fmt: skip
    return {
        "worker": f"127.0.0.1:{port}", "role": role, "state": "lost" if lost else "ready",
        "detail": "connection refused" if lost else "", "standing": "active", "warming": False,
        "engine_id": None, "model": "demo", "max_model_len": 8192,
        "load": {"running": 0 if lost else 3, "waiting": waiting, "blocks_total": 0 if lost else 600,
                 "blocks_free": 0 if lost else free, "blocks_cached": 0 if lost else free // 3},
        "buffers": None if lost else buffers, "in_flight": 0 if lost else 3 + waiting,
    }  # fmt: skip


def _request(number: int) -> dict[str, Any]:
    failed, local = number == 9, number % 5 == 3
    first = 180.0 + 61.0 * (number % 7)
    return {
        "number": number, "request_id": f"5d1e9c07ab-{number}", "time": _NOW + number, "status": 503 if failed else 200,
        "path": "" if failed else "local" if local else "first-token", "reason": "calm" if local else None,
        "prefill": None if local or failed else f"127.0.0.1:{7100 + number % 2}",
        "decode": None if failed else "127.0.0.1:7200", "attempts": 2,
        "first_token_ms": None if failed else first, "between_tokens_ms": None if failed else 21.0 + number % 3,
        "total_ms": 14.0 if failed else first + 900.0, "transfer_ms": None if local or failed else 140.0,
        "transfer_bytes": None if local or failed else 46_080_000, "error": "no_worker" if failed else None,
        "transfer_exposed_ms": None if local or failed else 4.0 + number % 4,
    }  # fmt: skip


def _link(prefill: int, rate: int) -> dict[str, Any]:
    return {
        "prefill": f"127.0.0.1:{prefill}", "decode": "127.0.0.1:7200", "transfers_per_second": 1.5,
        "failures_per_second": 0.0, "bytes_per_second": rate,
    }  # fmt: skip


def state(second: int, *, dead: bool = True) -> dict[str, Any]:
    """What ``/kvbelt/console.json`` answers, with more and more load."""
    wave = 1 + 0.5 * math.sin(second / 6)
    first = 190.0 + 11.0 * second
    live = {
        "seconds": 10.0, "requests_per_second": round(4.2 * wave, 1), "errors_per_second": 0.1,
        "tokens_per_second": round(96 * wave, 1), "transfers_per_second": 3.1, "bytes_per_second": 142_000_000,
        "first_token_ms": _percentiles(42, round(first * 0.6, 1), round(first, 1)),
        "between_tokens_ms": _percentiles(40, 21.4, 38.0), "transfer_ms": _percentiles(31, 140.0, 210.0),
        "transfer_gb_per_second": _percentiles(31, 0.33, 0.5),
        "legs": {"prefill": {"127.0.0.1:7100": 1.6, "127.0.0.1:7101": 1.5}, "decode": {"127.0.0.1:7200": 3.1}},
        "links": [_link(7100, 82_000_000), _link(7101, 60_000_000)], "last_errors": [],
        "transfer_exposed_ms": _percentiles(31, 4.1, round(9.0 * wave, 1)),
    }  # fmt: skip
    pairs = [
        {"prefill": f"127.0.0.1:{p}", "decode": f"127.0.0.1:{d}", "state": "warm", "reason": None, "detail": ""}
        for p in (7100, 7101)
        for d in (7200, 7201)
    ]
    return {
        "proxy": {
            "version": "0.2.0", "life": "one", "time": _NOW + 24, "uptime_seconds": 1440.0, "model": "demo",
            "records": {"kept": 214, "most": 1000}, "prompts": False, "admin": True, "in_flight": 20, "requests": 214,
        },
        "workers": [_worker(role, port, second, dead=dead) for role, port in _WORKERS],
        "pairs": pairs, "live": live, "requests": [_request(number) for number in range(24, 0, -1)], "after": 24,
    }  # fmt: skip


def record() -> dict[str, Any]:
    """What ``/kvbelt/requests/ID`` answers."""
    transfer = {
        "state": "done", "bytes": 46_080_000, "seconds": 0.14, "milliseconds": 140.0, "gb_per_second": 0.329,
        "transport": "cma/memory", "channel": "nixl", "tokens": 1000, "writes": 30, "exposed_ms": 4.1,
    }  # fmt: skip
    prefill, decode = "127.0.0.1:7101", "127.0.0.1:7200"
    spans = (
        ("proxy", 0.0, 1.2, None), ("queue", 1.6, 22.0, prefill), ("prefill", 23.6, 151.0, prefill),
        ("transfer", 40.0, 140.0, prefill), ("KV wait", 176.5, 3.4, decode), ("KV load", 180.2, 1.9, decode),
        ("first decode step", 182.3, 20.8, decode), ("answer", 203.4, 870.0, None),
    )  # fmt: skip
    attempt = {"transfer_id": None, "answered_ms": 175.0, "ended_ms": 176.0, "reason": None, "detail": ""}
    return {
        "request_id": "5d1e9c07ab-24", "route": "/v1/chat/completions", "time": _NOW, "stream": True, "status": 200,
        "ended": True, "decision": {"path": "first-token", "reason": None, "meaning": None}, "after": [],
        "workers": {"prefill": prefill, "decode": decode},
        "transfer_id": "t", "kv": "received",
        "timings_ms": {
            "proxy": 1.2, "queue": 22.0, "prefill": 151.0, "prefill_leg": 174.6, "kv_wait": 3.4, "load": 1.9,
            "decode_queue": 0.0, "decode_headers": 26.0, "first_decode_step": 20.8, "first_token": 176.2,
            "between_tokens": 21.2, "total": 1073.4,
        },
        "tokens": 42, "transfer": transfer,
        "spans": [{"name": name, "start_ms": start, "duration_ms": took, "worker": worker, "failed": None}
                  for name, start, took, worker in spans],
        "attempts": [attempt | {"leg": "prefill", "worker": prefill, "began_ms": 1.4, "transfer": transfer},
                     attempt | {"leg": "decode", "worker": decode, "began_ms": 176.2, "transfer": None}],
        "errors": [], "prompt": None,
        "placing": {"action": "split", "reason": None, "meaning": None, "waited_ms": 0.0,
                    "predicted_first_token_ms": 181.0, "ttft_level_ms": 500.0, "between_tokens_level_ms": None},
    }  # fmt: skip
