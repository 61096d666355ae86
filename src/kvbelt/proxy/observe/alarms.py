"""What is wrong at this moment, by the alerts' thresholds. Pure.

An alert waits for minutes before it fires. An alarm is for somebody who looks at a screen, and comes at once.
"""

from collections.abc import Iterator, Sequence

from kvbelt.metrics.thresholds import KV_FREE_RATIO, QUEUE, TRANSFER_EXPOSED_MS, TTFT_P99_MS
from kvbelt.wire.console import Alarm, LiveStats
from kvbelt.wire.workers import PairRow, WorkerRow

_CRITICAL = "critical"


def alarms(workers: Sequence[WorkerRow], pairs: Sequence[PairRow], live: LiveStats) -> list[Alarm]:
    """The worst first, and causes before what follows from them."""
    found = [*_absent(workers), *_worker_states(workers), *_pairs(pairs), *_queues(workers), *_times(live)]
    return sorted(found, key=lambda alarm: alarm.severity != _CRITICAL)


def _absent(workers: Sequence[WorkerRow]) -> Iterator[Alarm]:
    ready = {worker.role for worker in workers if worker.shown_state == "ready"}
    if "decode" not in ready and "prefill" not in ready:
        what, change = "no worker is ready: every request is answered with 503", "start workers; kvbelt workers list"
        yield Alarm(_CRITICAL, "workers", "KVBeltNoDecodeWorker", what, change)


def _worker_states(workers: Sequence[WorkerRow]) -> Iterator[Alarm]:
    for one in workers:
        if one.state == "lost":
            what = f"{one.role} worker {one.worker} does not answer"
            change = f"start it again (of kvbelt up: kvbelt workers restart {one.worker}), or kvbelt workers remove it"
            yield Alarm(_CRITICAL, "state", "KVBeltWorkerLost", what, change, one.worker, one.role)
        elif one.state != "ready" or one.shown_state == "warming":
            what, change = f"{one.role} worker {one.worker} is not ready", "kvbelt workers list says why"
            yield Alarm("warning", "state", "KVBeltWorkerNotReady", what, change, one.worker, one.role)


def _pairs(pairs: Sequence[PairRow]) -> Iterator[Alarm]:
    for pair in pairs:
        what = f"{pair.prefill} cannot send KV to {pair.decode}: {pair.reason}"
        if pair.state == "refused":
            change = "start all workers with the same model, dtype, block size and keys"
            yield Alarm(_CRITICAL, "pair", "KVBeltPairsRefused", what, change)
        elif pair.state == "failed":
            yield Alarm("warning", "pair", "KVBeltPairsFailed", what, "kvbelt doctor says why")


def _queues(workers: Sequence[WorkerRow]) -> Iterator[Alarm]:
    for one in workers:
        load, decode = one.load, one.role == "decode"
        if load.waiting > QUEUE:
            alert = "KVBeltDecodeOverload" if decode else "PrefillerOverload"
            what = f"{load.waiting} requests wait in {one.role} worker {one.worker}"
            change = f"add {one.role} workers, or take in less"
            yield Alarm("warning", "waiting", alert, what, change, one.worker, one.role)
        if decode and load.blocks_total and load.blocks_free < KV_FREE_RATIO * load.blocks_total:
            what = f"decode worker {one.worker} has almost no KV memory left"
            change = "more KV memory (--kv-gb, or vLLM's --gpu-memory-utilization), or more decode workers"
            yield Alarm("warning", "kv", "KVBeltDecodeKVFull", what, change, one.worker, one.role)
        if one.buffers is not None and one.buffers.bytes_quarantined:
            what = f"a part of the receive buffer of {one.worker} is in quarantine"
            change = "find the prefill worker that is stopped or cut off, and end it"
            yield Alarm("warning", "buffer", "KVBeltQuarantine", what, change, one.worker, one.role)


def _times(live: LiveStats) -> Iterator[Alarm]:
    first, exposed = live.first_token_ms.p99, live.transfer_exposed_ms.p90
    if first is not None and first > TTFT_P99_MS:
        what = f"the slowest first tokens take {first:,.0f} ms, more than {TTFT_P99_MS:.0f}"
        yield Alarm("warning", "first_token_ms", "DisaggHighTTFT", what, "kvbelt why of a slow request; kvbelt doctor")
    if exposed is not None and exposed > TRANSFER_EXPOSED_MS:
        what = (
            f"a tenth of the KV arrives {exposed:,.0f} ms after its prompt's computation, more than "
            f"{TRANSFER_EXPOSED_MS:.0f}"
        )
        yield Alarm("warning", "transfer_exposed_ms", "KVBeltTransferSlow", what, "kvbelt doctor measures each pair")
