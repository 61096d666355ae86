"""Whatever alerts, the doctor names: each rule has a deployment in which it fires, and the finding for it."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.checks.failures import ON_PURPOSE
from kvbelt.ops.doctor.evidence import Evidence
from kvbelt.ops.doctor.finding import Severity
from kvbelt.ops.doctor.scrape import Counted
from kvbelt.wire.about import LinkTotals, TransportChoice
from tests.metrics.scrape import rules_of
from tests.ops.doctor.deployments import IDLE, deployment, pair, worker
from tests.ops.doctor.test_checks import FAR, record

ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yml")}


def crowded(role: str) -> Evidence:
    """12 requests wait in two workers, 6 in each."""
    sample = replace(IDLE, waiting=6)
    one, other = ("p", "prefill") if role == "prefill" else ("d", "decode"), 2
    workers = [worker(f"{one[0]}:{number}", role, samples=(sample,) * 4) for number in range(other)]
    return deployment(workers, None) if role == "prefill" else deployment(None, workers)


def failing(reason: str) -> Evidence:
    """Transfers failed for a reason, and another worker was asked."""
    attempt = {"leg": "prefill", "worker": "p:7100", "transfer_id": "t", "began_ms": 0.0, "answered_ms": 1.0,
               "ended_ms": 2.0, "reason": f"transfer_{reason}", "detail": "", "transfer": None}  # fmt: skip
    return deployment(records=tuple(record(number, attempts=[attempt]) for number in range(20)))


def slow(**timings: float) -> Evidence:
    """Requests whose first token comes after 2 s."""
    times = {"first_token": 2000.0, "queue": 1.0, "prefill": 50.0} | timings
    return deployment(records=tuple(record(number, timings_ms=times) for number in range(20)))


def lost() -> Evidence:
    """A decode worker that is gone, beside another one."""
    gone = worker("d:7201", "decode", answer="cannot connect: Connection refused", state="lost", samples=(), about={})
    return deployment(None, [worker("d:7200", "decode"), gone])


def exposed() -> Evidence:
    """Transfers that end 800 ms after the prefill."""
    moved = {"state": "done", "bytes": 1000, "seconds": 0.9, "milliseconds": 900.0, "gb_per_second": 0.1,
             "channel": "nixl", "tokens": 9, "writes": 3, "exposed_ms": 800.0}  # fmt: skip
    return deployment(records=tuple(record(number, transfer=moved) for number in range(20)))


def one_slow_link() -> Evidence:
    """Of three links between hosts one moves a tenth of the others' bytes."""
    prefill = worker("p:7100", "prefill")
    decode = [worker(f"d:{number}", "decode", about=FAR) for number in range(3)]
    links = [LinkTotals(one.engine_id, 100, size, 1.0) for one, size in zip(decode, (10**9, 10**9, 10**8), strict=True)]
    pairs = tuple(pair(prefill, one, link=link) for one, link in zip(decode, links, strict=True))
    return deployment([prefill], decode, pairs=pairs)


def unready(role: str) -> Evidence:
    """All workers of a role are drained."""
    drained = [worker("x:1", role, standing="draining")]
    return deployment(drained, None) if role == "prefill" else deployment(None, drained)


def in_state(state: str, **changes: str) -> Evidence:
    """A pair in this state."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    return deployment([prefill], [decode], pairs=(pair(prefill, decode, state=state, trial=None, **changes),))


def decode_with(**sample: int) -> Evidence:
    """A decode worker whose samples have these values."""
    return deployment(None, [worker("d:7200", "decode", samples=(replace(IDLE, **sample),) * 4)])


def over_tcp(scope: str) -> Evidence:
    """UCX has chosen TCP."""
    choice = TransportChoice(scope, "write", "host", "tcp/eth0")
    return deployment([worker("p:7100", "prefill", about={"transports": [choice]})])


def broken() -> Evidence:
    """A stream ended with an error, because its decode worker was lost."""
    attempt = {"leg": "decode", "worker": "d:7200", "transfer_id": None, "began_ms": 0.0, "answered_ms": 1.0,
               "ended_ms": 2.0, "reason": "decode_lost", "detail": "", "transfer": None}  # fmt: skip
    return deployment(records=(record(1, attempts=[attempt], errors=["lost"]),))


#: The deployment in which the alert fires, and the doctor's finding.
NAMED: dict[str, tuple[Callable[[], Evidence], str]] = {
    "DisaggHighTTFT": (slow, "ttft_high"),
    "NIXLTransferFailure": (lambda: failing("write_failed"), "failures"),
    "PrefillerOverload": (lambda: crowded("prefill"), "prefill_overloaded"),
    "KVBeltTargetDown": (lost, "dead_worker"),
    "KVBeltWorkerLost": (lost, "dead_worker"),
    "KVBeltWorkerNotReady": (
        lambda: deployment([worker("p:7100", "prefill", status=503, state="unready")]), "worker_not_ready",
    ),
    "KVBeltNoDecodeWorker": (lambda: unready("decode"), "no_decode_worker"),
    "KVBeltNoPrefillWorker": (lambda: unready("prefill"), "no_prefill_worker"),
    "KVBeltPairsRefused": (lambda: in_state("refused", reason="refused_dtype"), "mixed_models"),
    "KVBeltPairsFailed": (lambda: in_state("failed", reason="peer_unreachable"), "pair_failed"),
    "KVBeltVersionsDiffer": (
        lambda: deployment([worker("p:7100", "prefill", about={"kvbelt": "0.1.0"})]), "kvbelt_versions",
    ),
    "KVBeltDecodeOverload": (lambda: crowded("decode"), "decode_overloaded"),
    "KVBeltDecodeKVFull": (lambda: decode_with(blocks_free=10), "kv_full"),
    "KVBeltPreemptions": (
        lambda: deployment(None, [worker("d:7200", "decode", counted=Counted(preemptions=2))], counted_seconds=3.0),
        "preemptions",
    ),
    "KVBeltProxyBusy": (
        lambda: deployment(proxy_counted=Counted(cpu_seconds=2.9), counted_seconds=3.0), "proxy_busy",
    ),
    "KVBeltIdleAndSlow": (lambda: slow(prefill=1900.0), "ttft_high"),
    "KVBeltTransferSlow": (exposed, "late_transfers"),
    "KVBeltLinkSlow": (one_slow_link, "slow_link"),
    "KVBeltTCPFallback": (lambda: over_tcp("intra-node"), "tcp_fallback"),
    "KVBeltTCPBetweenHosts": (lambda: over_tcp("inter-node"), "tcp_between_hosts"),
    "KVBeltBufferFull": (lambda: decode_with(queued=2), "buffer_full"),
    "KVBeltQuarantine": (lambda: decode_with(bytes_quarantined=1000), "quarantine"),
    "KVBeltDigestMismatch": (lambda: failing("digest"), "damaged_kv"),
    "KVBeltLocalFallback": (
        lambda: deployment(records=tuple(record(n, path="local", reason="no_room") for n in range(20))),
        "local_fallback",
    ),
    "KVBeltErrors": (lambda: deployment(records=(record(1, status=503, path=""),)), "failures"),
    "KVBeltBrokenStreams": (broken, "failures"),
    "KVBeltRefusedMessages": (
        lambda: deployment(proxy_counted=Counted(refused=30), counted_seconds=3.0), "refused_messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("alert", ALERTS)
def test_whatever_alerts_is_named(alert: str) -> None:
    """A warning or worse for each alert; a note may be enough where the alert is for information."""
    make, name = NAMED[alert]
    found = {one.name: one for one in diagnose(make())}
    assert name in found
    assert found[name].why
    assert found[name].severity is not Severity.NOTE or ALERTS[alert]["labels"]["severity"] == "info"


def test_no_finding_is_for_an_alert_that_is_gone() -> None:
    assert NAMED.keys() == ALERTS.keys()


@pytest.mark.parametrize("alert", [name for name in ALERTS if name != "KVBeltVersionsDiffer"])
def test_a_healthy_deployment_has_none_of_them(alert: str) -> None:
    """So the findings above follow from what is wrong."""
    well = diagnose(deployment(records=tuple(record(number) for number in range(30))))
    assert NAMED[alert][1] not in {one.name for one in well}


def test_the_rule_and_the_doctor_leave_out_the_same_reasons() -> None:
    """What one worker answers on purpose is no fallback for either."""
    (rule,) = [rule for rule in rules_of("recording.yml") if rule["record"] == "kvbelt:local:ratio"]
    (left_out,) = re.findall(r'reason!~"([a-z_|]+)"', rule["expr"])
    assert set(left_out.split("|")) == ON_PURPOSE
