"""What runs out, and how many workers a load needs."""

from dataclasses import replace

import pytest

from kvbelt.ops.doctor import host
from kvbelt.ops.doctor.checks.sizing import prefill_workers
from kvbelt.ops.doctor.evidence import TrialResult
from kvbelt.ops.doctor.finding import Severity
from kvbelt.ops.doctor.host import HostSeen
from kvbelt.ops.doctor.scrape import Counted, counted
from tests.ops.doctor.deployments import HERE, deployment, finding, names, pair, worker
from tests.ops.doctor.test_checks import FAR, record

CALM = HostSeen(cores=2, cpu_used=0.2, load=0.3, memory_bytes=23 << 30, memory_free=18 << 30, boot_id=HERE.boot_id)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"cpu_used": 0.97, "load": 7.0}, ["cpu_full"]),
        ({"memory_free": 500 << 20}, ["memory_full"]),
        ({"cpu_used": 1.0, "boot_id": "another"}, []),
    ],
)
def test_a_full_host_of_workers_is_named(changes: dict[str, float | str], found: list[str]) -> None:
    """A doctor on another host than the workers says nothing of its own."""
    assert names(deployment(host=replace(CALM, **changes))) == found


def test_the_hosts_use_is_seen() -> None:
    """A look at this machine has its cores, and shares between 0 and 1."""
    total, free = host.memory()
    assert 0 < free <= total
    idle, whole = host._cpu_times()
    assert 0 < idle <= whole


def test_counters_are_read_from_a_scrape() -> None:
    """Series of one counter are summed; a process that was restarted has counted anew."""
    text = 'kvbelt_refused_messages_total{socket="a"} 2.0\nkvbelt_refused_messages_total{socket="b"} 3.0\n'
    assert counted(text) == Counted(refused=5.0)
    assert counted("no metrics") == Counted()
    assert Counted(refused=5.0, cpu_seconds=1.0).since(Counted(refused=7.0)) == Counted(cpu_seconds=1.0)


@pytest.mark.parametrize(
    ("milliseconds", "wanted", "severity"), [(100.0, 1, Severity.NOTE), (800.0, 3, Severity.WARNING)]
)
def test_the_number_of_prefill_workers_follows_from_the_prompts(
    milliseconds: float, wanted: int, severity: Severity
) -> None:
    """By arrivals and by the time that each takes, at 70 % of a worker's time."""
    records = tuple(record(n, time=n * 0.5, timings_ms={"prefill": milliseconds}) for n in range(40))
    evidence = deployment(records=records)
    said = finding(evidence, "prefill_workers")
    assert (prefill_workers(evidence) or (0, ""))[0] == wanted
    assert said.severity is severity
    assert ("add 2" in said.change) is (wanted == 3)


def test_a_failed_data_path_is_no_matter_of_the_control_ports() -> None:
    """UCX chooses its own addresses and ports."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    lost = pair(prefill, decode, state="failed", reason="channel", detail="NIXL_ERR_BACKEND", trial=None)
    said = finding(deployment([prefill], [decode], pairs=(lost,)), "data_path")
    assert "pair_failed" not in names(deployment([prefill], [decode], pairs=(lost,)))
    for word in ("UCX_NET_DEVICES", "UCX_TCP_PORT_RANGE", "/sys"):
        assert word in said.change


def test_a_transfer_that_nixl_failed_is_answered_with_its_remedy() -> None:
    """Both where a request's transfer failed so and where the doctor's own prompt did."""
    attempt = {"leg": "prefill", "worker": "p:7100", "transfer_id": "t", "began_ms": 0.0, "answered_ms": 1.0,
               "ended_ms": 2.0, "reason": "transfer_channel", "detail": "NIXL_ERR_BACKEND",
               "transfer": None}  # fmt: skip
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    failed = pair(prefill, decode, trial=TrialResult(ok=False, detail="the transfer failed: channel"))
    evidence = deployment([prefill], [decode], pairs=(failed,), records=(record(attempts=[attempt]),))
    for name in ("failures", "probe_failed"):
        assert "UCX_NET_DEVICES" in finding(evidence, name).change


def test_pairs_that_round_robin_does_not_need_are_no_fault() -> None:
    """The note says that the others were not needed."""
    senders = [worker(f"p:710{n}", "prefill") for n in range(2)]
    receivers = [worker(f"d:720{n}", "decode") for n in range(2)]
    pairs = tuple(
        pair(p, d) if n == m else pair(p, d, link=None, trial=None, recent=False)
        for n, p in enumerate(senders)
        for m, d in enumerate(receivers)
    )
    said = finding(deployment(senders, receivers, pairs=pairs), "links")
    assert said.what == "KV has gone over 2 of 4 pairs; the others were not needed"
