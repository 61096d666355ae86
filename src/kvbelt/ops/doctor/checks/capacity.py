"""Overloaded workers and full buffers."""

from collections.abc import Iterator, Sequence
from statistics import median

from kvbelt.metrics.thresholds import QUEUE
from kvbelt.ops.doctor.evidence import Evidence, WorkerSeen
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.routing.ratio import MOST_PREFILL_PER_DECODE, even
from kvbelt.wire.request_record import FailedTransfer, RequestRecord

#: With a longer median wait before admission, there are too few workers, too.
WAIT_MS = 1000.0

#: How many prompts of full length a receive buffer should hold.
PROMPTS_IN_BUFFER = 2.0

#: A condition must hold in this share of the samples to be more than chance.
OFTEN = 0.2


def _waited(records: Sequence[RequestRecord], timing: str, role: str, worker: str) -> float | None:
    """Median time in ms that a worker's requests waited in its queue; None: too few requests."""
    found = [
        value
        for record in records
        if getattr(record.workers, role) == worker and (value := getattr(record.timings_ms, timing)) is not None
    ]
    return median(found) if len(found) >= 5 else None


def _many(worker: WorkerSeen) -> bool:
    return worker.waiting > QUEUE


def _crowded(evidence: Evidence, role: str) -> list[WorkerSeen]:
    """Those with many waiting requests; if there are many only in all workers together, as the alerts count, these."""
    workers = list(evidence.of(role))
    found = [worker for worker in workers if _many(worker)]
    if not found and sum(worker.waiting for worker in workers) > QUEUE:
        found = [worker for worker in workers if worker.waiting >= 1]
    return found


def _long(worker: WorkerSeen, waited: float | None) -> bool:
    # Earlier waits only matter while requests still wait.
    return waited is not None and waited > WAIT_MS and worker.waiting >= 1


def _queue(worker: WorkerSeen, waited: float | None) -> str:
    free = f", {_free(worker):.0%} of its KV blocks free" if worker.samples and worker.samples[-1].blocks_total else ""
    times = f"; requests have waited {waited:,.0f} ms (median)" if waited is not None else ""
    return f"{worker.name}: {worker.waiting:g} requests wait, {worker.running:g} run{free}{times}"


def _free(worker: WorkerSeen) -> float:
    return median(sample.blocks_free / max(1, sample.blocks_total) for sample in worker.samples)


def _others(evidence: Evidence, role: str, records_timing: str) -> tuple[str, ...]:
    return tuple(
        f"{role} worker {_queue(worker, _waited(evidence.records, records_timing, role, worker.name))}"
        for worker in evidence.of(role)
        if worker.samples
    )


def decode_overloaded(evidence: Evidence) -> Iterator[Finding]:
    """Many requests wait in the decode workers."""
    found = _crowded(evidence, "decode")
    if found:
        yield _decode(evidence, found)


def decode_slow(evidence: Evidence) -> Iterator[Finding]:
    """Few requests wait, but for long. A full receive buffer comes first, because it limits how many can wait."""
    if _crowded(evidence, "decode"):
        return
    records = evidence.records
    found = [w for w in evidence.of("decode") if _long(w, _waited(records, "decode_queue", "decode", w.name))]
    if found:
        yield _decode(evidence, found)


def _decode(evidence: Evidence, found: Sequence[WorkerSeen]) -> Finding:
    waited = {w.name: _waited(evidence.records, "decode_queue", "decode", w.name) for w in found}
    prefill, decode = len(list(evidence.of("prefill"))), len(list(evidence.of("decode")))
    full = [worker for worker in found if _free(worker) < 0.05]
    instead = (
        f"or start one of the {prefill} prefill workers, whose queues are short, as a decode worker instead; "
        if prefill > 1 and all(worker.waiting < 1 for worker in evidence.of("prefill"))
        else ""
    )
    return Finding(
        "decode_overloaded",
        Severity.WARNING,
        f"{len(found)} of {decode} decode workers have more requests than they can run",
        "requests wait before their second token, and their KV fills the receive buffers until prefill stops, too",
        f"add a decode worker: kvbelt up {prefill}p{decode + 1}d, or kvbelt workers add decode HOST:7200; {instead}"
        + (
            "give them more KV memory: --kv-gb (vLLM: --gpu-memory-utilization)"
            if full
            else "or let each run more at once: --max-running (vLLM: --max-num-seqs)"
        ),
        tuple(f"decode worker {_queue(worker, waited[worker.name])}" for worker in found)
        + _others(evidence, "prefill", "queue"),
    )


def buffer_full(evidence: Evidence) -> Iterator[Finding]:
    """Transfers that wait for space in a receive buffer."""
    refused = [
        record.request_id
        for record in evidence.records
        if (isinstance(record.transfer, FailedTransfer) and record.transfer.reason == "receiver_full")
        or any(attempt.reason == "transfer_receiver_full" for attempt in record.attempts)
        or any("receiver_full" in error for error in record.errors)
    ]
    found = [worker for worker in evidence.of("decode") if worker.share(lambda sample: sample.queued > 0) >= OFTEN]
    if not found:
        return
    worker = found[0]
    queued = max(sample.queued for sample in worker.samples)
    size = worker.samples[-1].receive_bytes
    held = median(sample.bytes_held for sample in worker.samples)
    one = _prompt_bytes(evidence, worker, size)
    wanted = max(2 * size, int((queued + 2) * one)) if one else 2 * size
    yield Finding(
        "buffer_full",
        Severity.ERROR if refused else Severity.WARNING,
        f"the receive buffer is full at {' and '.join(one.name for one in found)}: transfers wait for space",
        "a prefill worker keeps a prompt's blocks until its KV has space on the other side, and finally cannot take "
        "new prompts",
        f"{_where(worker)}: {_set(worker, 'pd_buffer_size', wanted)} (or {_set(worker, 'pd_overflow_size', wanted)} "
        "in host memory)",
        tuple(
            f"{one.name}: {max(sample.queued for sample in one.samples)} transfers wait for space, in "
            f"{one.share(lambda sample: sample.queued > 0):.0%} of {len(one.samples)} samples"
            for one in found
        )
        + (f"{worker.name}: {held / 1e6:,.1f} of {size / 1e6:,.1f} MB in use",)
        + ((f"{len(refused)} requests got no space before their deadline, such as {refused[0]}",) if refused else ())
        + tuple(
            f"prefill worker {p.name}: {max(sample.sends_waiting for sample in p.samples)} transfers told to wait"
            for p in evidence.of("prefill")
            if p.samples and any(sample.sends_waiting for sample in p.samples)
        ),
    )


def _is_vllm(worker: WorkerSeen) -> bool:
    return worker.about is not None and worker.about.engine == "vllm"


def _where(worker: WorkerSeen) -> str:
    """Where a decode worker's settings are."""
    return f"in the decode worker's {'kv_connector_extra_config' if _is_vllm(worker) else 'file'}"


def _set(worker: WorkerSeen, setting: str, num_bytes: float) -> str:
    """A setting in that place's syntax, JSON or YAML."""
    return f'"{setting}": {_round_up(num_bytes)}' if _is_vllm(worker) else f"{setting}: {_round_up(num_bytes)}"


def _prompt_bytes(evidence: Evidence, worker: WorkerSeen, size: int) -> float:
    """Median KV size of the last prompts for this worker; half of the buffer if unknown."""
    moved = [
        record.transfer.bytes
        for record in evidence.records
        if record.transfer is not None and record.transfer.bytes and record.workers.decode == worker.name
    ]
    return median(moved) if moved else size / 2


def _round_up(num_bytes: float) -> int:
    """Round up to a power of two, of at least 1 MiB."""
    return 1 << max(20, int(num_bytes - 1).bit_length())


def prefill_overloaded(evidence: Evidence) -> Iterator[Finding]:
    """Many prompts wait, or wait for long, in the prefill workers."""
    waited = {w.name: _waited(evidence.records, "queue", "prefill", w.name) for w in evidence.of("prefill")}
    crowded = _crowded(evidence, "prefill")
    found = [w for w in evidence.of("prefill") if w in crowded or _long(w, waited[w.name])]
    if not found:
        return
    prefill, decode = len(list(evidence.of("prefill"))), len(list(evidence.of("decode")))
    yield Finding(
        "prefill_overloaded",
        Severity.WARNING,
        f"{len(found)} of {prefill} prefill workers have more prompts than they can compute",
        "prompts wait before they are computed, and this wait is most of TTFT",
        f"add a prefill worker: kvbelt up {prefill + 1}p{decode}d, or kvbelt workers add prefill HOST:7100; where "
        "prompts begin alike, leave prefix caching on; "
        "short prompts may stay on the decode workers: --min-prompt-tokens 1000 of kvbelt up or kvbelt proxy",
        tuple(f"prefill worker {_queue(worker, waited[worker.name])}" for worker in found)
        + _others(evidence, "decode", "decode_queue"),
    )


def ratio(evidence: Evidence) -> Iterator[Finding]:
    prefill, decode = ([w for w in evidence.of(role) if w.state == "ready"] for role in ("prefill", "decode"))
    waiting = [sum(worker.waiting for worker in workers) for workers in (prefill, decode)]
    seen = f"requests that wait: {waiting[0]:g} in prefill workers, {waiting[1]:g} in decode workers"
    yield from lopsided(len(prefill), len(decode), seen)


def lopsided(prefill: int, decode: int, *seen: str) -> Iterator[Finding]:
    """Many more prefill than decode workers (the seed's anti-pattern 3)."""
    if decode and prefill > MOST_PREFILL_PER_DECODE * decode:
        yield Finding(
            "ratio",
            Severity.WARNING,
            f"{prefill} prefill workers for {decode} decode workers",
            "first tokens come soon, then requests wait in the decode workers' queues: decode is the bottleneck",
            f"1:1 or 1:2 is usual: kvbelt up {even(prefill, decode)} has as many workers",
            (f"{prefill}:{decode}; more than {MOST_PREFILL_PER_DECODE} to 1", *seen),
        )


def buffer_small(evidence: Evidence) -> Iterator[Finding]:
    """Receive buffers that hold too few prompts of full length."""
    for worker in evidence.of("decode"):
        said = worker.about
        if said is not None and said.buffer_bytes and said.bytes_per_token and said.max_model_len:
            sizes = said.buffer_bytes, said.bytes_per_token, said.max_model_len
            longest = PROMPTS_IN_BUFFER * said.bytes_per_token * said.max_model_len
            change = f"{_where(worker)}: {_set(worker, 'pd_buffer_size', longest)}"
            yield from small_buffer(f"decode worker {worker.name}", *sizes, change)


def small_buffer(
    whose: str, num_bytes: int, bytes_per_token: int, tokens: int, change: str = "in its file: pd_buffer_size: {bytes}"
) -> Iterator[Finding]:
    """One buffer against the longest prompt. ``change`` may contain ``{bytes}`` or ``{gib}``."""
    longest = bytes_per_token * tokens
    fits = num_bytes / longest
    if fits >= PROMPTS_IN_BUFFER:
        return
    wanted = _round_up(PROMPTS_IN_BUFFER * longest)
    yield Finding(
        "buffer_small",
        Severity.WARNING if fits < 1 else Severity.NOTE,
        f"the receive buffer of {whose} holds {fits:.2g} prompts of {tokens:,} tokens",
        "a prompt larger than the buffer is sent in parts, which is slower; prompts that do not fit together wait",
        change.format(bytes=wanted, gib=f"{wanted / (1 << 30):g}") + ", or a lower --max-model-len",
        (
            f"pd_buffer_size {num_bytes:,}",
            f"{bytes_per_token:,} bytes per token, times {tokens:,} tokens = {longest:,}",
        ),
    )


def quarantine(evidence: Evidence) -> Iterator[Finding]:
    """Slots that cannot be reused, because their sender is silent but not known dead."""
    for worker in evidence.of("decode"):
        held = worker.samples[-1].bytes_quarantined if worker.samples else 0
        if held:
            yield Finding(
                "quarantine",
                Severity.WARNING,
                f"{held / 1e6:,.1f} MB of the receive buffer of {worker.name} are in quarantine",
                "a prefill worker that was stopped or cut off during a write may still write there; the memory is not "
                "reused until that worker confirms or is known to be dead",
                "continue that prefill worker (kill -CONT), restore its network, or end it; if it has ended already, "
                "open the decode worker's pd_peer_liveness_port to the prefill workers, or restart the decode worker",
                (f'kvbelt_receive_bytes{{state="quarantined"}} {held}',),
            )
