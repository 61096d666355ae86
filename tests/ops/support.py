"""What tests of other rooms need of this one, too."""

import contextlib
from collections.abc import Iterator

import pytest

from kvbelt.ops.network import Network, NetworkRefusedError

#: Before a command: it ends with the tests, also when they are killed.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
#: Before a command: it has a process table of its own, as in a container.
OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@contextlib.contextmanager
def network_of(*names: str) -> Iterator[Network]:
    """A network with a host for each name; the test is skipped where this machine forbids it."""
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(names))
        except NetworkRefusedError as refused:
            pytest.skip(f"no hosts in namespaces here: {refused}")
        yield network


def request_record(**changes):
    """The proxy's record of a request that went over the belt."""
    prefill, decode = "127.0.0.1:7100", "127.0.0.1:7200"
    spans = [
        ("proxy", 0.0, 1.0, None),
        ("queue", 1.0, 2.0, prefill),
        ("prefill", 3.0, 80.0, prefill),
        ("transfer", 67.0, 20.0, prefill),
        ("KV wait", 85.0, 3.0, decode),
        ("KV load", 88.5, 1.5, decode),
        ("first decode step", 90.0, 40.0, decode),
        ("answer", 85.2, 814.8, None),
    ]
    return {
        "request_id": "r1",
        "route": "/v1/chat/completions",
        "time": 0.0,
        "stream": True,
        "status": 200,
        "ended": True,
        "decision": {"path": "first-token", "reason": None, "meaning": None},
        "after": [],
        "workers": {"prefill": prefill, "decode": decode},
        "transfer_id": "t1",
        "kv": "received",
        "timings_ms": {
            "proxy": 1.0,
            "queue": 2.0,
            "prefill": 80.0,
            "prefill_leg": 84.0,
            "kv_wait": 3.0,
            "load": 1.5,
            "decode_queue": 0.5,
            "decode_headers": 45.0,
            "first_decode_step": 40.0,
            "first_token": 85.2,
            "between_tokens": None,
            "total": 900.0,
        },
        "tokens": None,
        "transfer": {
            "state": "done",
            "bytes": 46_080_000,
            "seconds": 0.02,
            "milliseconds": 20.0,
            "gb_per_second": 2.304,
            "channel": "nixl",
            "tokens": 1000,
            "writes": 30,
            "exposed_ms": 4.0,
        },
        "spans": [
            {"name": name, "start_ms": start, "duration_ms": duration, "worker": worker, "failed": None}
            for name, start, duration, worker in spans
        ],
        "attempts": [],
        "errors": [],
        "prompt": None,
    } | changes


def worker_health(state="ready"):
    """``/health`` of an embedded worker."""
    load = {"running": 0, "waiting": 0, "blocks_total": 10, "blocks_free": 10, "blocks_cached": 0}
    return {"status": "ok", "state": state, "role": "decode", "model": "m", "engine_id": "d0", "engine": "embedded",
            "hash_seed": "", "receiver": None, "max_model_len": 100, "load": load}  # fmt: skip


def proxy_health(*states):
    """``/health`` of a proxy whose workers are in these states."""
    load = worker_health()["load"]
    rows = [
        {"worker": f"h:{number}", "role": "decode", "state": state, "detail": "", "standing": "active",
         "warming": False, "engine_id": None, "model": "m", "max_model_len": None, "load": load, "buffers": None,
         "in_flight": 0}
        for number, state in enumerate(states)
    ]  # fmt: skip
    return {"status": "ok", "state": "ready", "notifications": {"port": 7500, "mechanism": "NULL"}, "workers": rows}
