"""From evidence to the right findings, causes first."""

from dataclasses import replace

import msgspec
import pytest

from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.evidence import GpuSeen, Sample, TrialResult
from kvbelt.ops.doctor.finding import FindingKind, Severity, status_of
from kvbelt.wire.about import LinkTotals, Machine, TransportChoice
from kvbelt.wire.health import WORKER_HEALTH, PlacementNow
from kvbelt.wire.probe import LinkSpeed, ProbeResult
from kvbelt.wire.request_record import REQUEST_RECORD, RequestRecord, Timings
from tests.ops.doctor.deployments import FITS, IDLE, LAYOUT, deployment, finding, names, pair, worker
from tests.ops.support import request_record, worker_health

NO_ROOM = {"state": "failed", "bytes": 0, "seconds": 0.0, "milliseconds": 0.0, "gb_per_second": None,
           "reason": "receiver_full"}  # fmt: skip
BUSY = replace(IDLE, waiting=14, running=8)
#: ``about`` of a worker on another host.
FAR = {"machine": Machine("other", "boot2", "net:[1]", 1)}


def record(number: int = 0, *, path: str = "first-token", reason: str | None = None, **changes) -> RequestRecord:
    """A request that went well, unless ``changes`` say otherwise."""
    timings = dict.fromkeys(Timings.__struct_fields__) | {"queue": 1.0, "prefill": 50.0, "first_token": 60.0}
    given = request_record(
        request_id=f"r{number}",
        decision={"path": path, "reason": reason, "meaning": None},
        workers={"prefill": "p:7100", "decode": "d:7200"},
        timings_ms=timings | changes.pop("timings_ms", {"decode_queue": 1.0}),
    )
    return REQUEST_RECORD.convert(given | changes, "the proxy")


def test_a_healthy_deployment_has_notes_only() -> None:
    """A healthy deployment has exit status 0."""
    found = diagnose(deployment(records=tuple(record(n) for n in range(8))))
    assert {one.severity for one in found} == {Severity.NOTE}
    assert status_of(found) == 0


def test_a_missing_proxy_is_the_only_finding() -> None:
    found = diagnose(deployment([], [], proxy_answer="cannot connect to 127.0.0.1:9100: refused"))
    assert [one.name for one in found] == ["no_proxy"]
    assert status_of(found) == 2


def test_a_dead_worker_comes_before_the_queues_that_it_causes() -> None:
    """The dead worker overloads the others, so it comes first."""
    dead = worker(
        "d:7201", "decode", answer="cannot connect to d:7201: Connection refused", state="lost", samples=(), about={}
    )
    busy = worker("d:7200", "decode", samples=(BUSY,) * 4)
    found = names(deployment(decode=[busy, dead]))
    assert found[:2] == ["dead_worker", "decode_overloaded"]


@pytest.mark.parametrize(
    ("role", "others", "said"),
    [
        ("decode", [("d:7200", "decode")], "the other workers do its work"),
        ("decode", [("p:7100", "prefill")], "no other decode worker is left"),
        ("prefill", [("d:7200", "decode")], "decode workers compute all prompts"),
        ("decode", [], "no other worker is left"),
    ],
)
def test_what_a_loss_means_depends_on_what_is_left(role: str, others: list[tuple[str, str]], said: str) -> None:
    """The rest does not go on without the only worker of a role."""
    dead = worker("x:1", role, answer="Connection refused", state="lost", samples=(), about={})
    evidence = deployment([], [], workers=(dead, *(worker(*other) for other in others)))
    assert said in finding(evidence, "dead_worker").why


def test_a_stopped_worker_is_distinguished_from_a_dead_one() -> None:
    """A stopped worker needs another remedy than a dead one."""
    stopped = worker("p:7100", "prefill", answer="no answer to /health within 4 s", state="lost", samples=())
    said = finding(deployment([stopped]), "dead_worker")
    assert "stopped" in said.what
    assert "CONT" in said.change


def test_a_worker_that_the_proxy_cannot_ask_is_not_cut_off() -> None:
    """The finding says what the proxy says is to be done."""
    detail = "/v1/completions answered 401 to the proxy's own question, which carried no key; use the key"
    said = finding(deployment([worker("p:7100", "prefill", state="unready", detail=detail)]), "worker_unusable")
    assert (said.change, said.evidence) == ("use the key", (detail,))


def test_a_worker_that_the_doctor_cannot_ask_is_named() -> None:
    assert "p:7100" in finding(deployment([worker("p:7100", "prefill", needs_key=True)]), "key_needed").what


def test_a_refused_pair_is_mixed_models_with_both_values() -> None:
    """The finding of the seed's first anti-pattern has both values."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    refused = pair(
        prefill,
        decode,
        state="refused",
        reason="refused_dtype",
        detail="dtype is float32 here and bfloat16 there",
        link=None,
        recent=False,
        trial=None,
    )
    evidence = deployment([prefill], [decode], pairs=(refused,), records=(
        record(path="local", reason="pairs_refused", transfer=None),))  # fmt: skip
    assert names(evidence) == ["mixed_models", "failures"]
    assert "bfloat16" in finding(evidence, "mixed_models").evidence[0]


def test_other_weights_are_seen_before_any_handshake() -> None:
    """The workers' own descriptions show it."""
    other = msgspec.structs.replace(FITS, fingerprint="def", model="llama")
    evidence = deployment([worker("p:7100", "prefill", about={"compatibility": other}, model="llama")])
    assert names(evidence)[0] == "mixed_models"
    assert "llama" in finding(evidence, "mixed_models").evidence[0]


def test_another_layout_is_named_by_its_field() -> None:
    """The dtype is named first, because users set it."""
    other = msgspec.structs.replace(FITS, layout=msgspec.structs.replace(LAYOUT, dtype="bfloat16", block_bytes=12288))
    said = finding(deployment([worker("p:7100", "prefill", about={"compatibility": other})]), "mixed_models")
    assert said.evidence == ("dtype is bfloat16 on p:7100 and float32 on d:7200",)


def test_one_odd_worker_among_several_is_one_finding() -> None:
    """It has each pair's reason once."""
    other = msgspec.structs.replace(FITS, fingerprint="def")
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill", about={"compatibility": other})]
    receivers = [worker("d:7200", "decode"), worker("d:7201", "decode")]
    evidence = deployment(senders, receivers)
    assert names(evidence) == ["mixed_models"]
    said = finding(evidence, "mixed_models")
    assert "prefill worker p:7101 and decode workers d:7200, d:7201" in said.what
    assert len(said.evidence) == 2


def test_keys_that_are_not_trusted_are_no_mixed_models() -> None:
    """Keys have their own remedy."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    refused = pair(prefill, decode, state="refused", reason="untrusted_key", detail="…")
    assert names(deployment([prefill], [decode], pairs=(refused,)))[0] == "keys"


TCP = {"env": {"UCX_TLS": "tcp"}, "transports": [TransportChoice("intra-node", "write", "host", "tcp/lo")]}


def test_tcp_only_on_one_host_is_a_warning_that_names_the_setting() -> None:
    """Within a host faster transports exist."""
    evidence = deployment(
        [worker("p:7100", "prefill", about=TCP)], [worker("d:7200", "decode", about={"env": TCP["env"]})]
    )
    assert names(evidence) == ["ucx_tls"]
    said = finding(evidence, "ucx_tls")
    assert said.severity is Severity.WARNING
    assert "unset UCX_TLS" in said.change
    assert "UCX_TLS=tcp" in said.evidence[0]


def test_gpus_of_one_host_without_cuda_ipc_are_an_error() -> None:
    """A transfer takes 2.9 s instead of 2.7 ms."""
    gpu = {"env": {"UCX_TLS": "tcp,cuda_copy"}, "device": "cuda:0", "buffer_device": "cuda"}
    evidence = deployment([worker("p:7100", "prefill", about=gpu)], [worker("d:7200", "decode", about=gpu)])
    said = finding(evidence, "ucx_tls")
    assert names(evidence)[0] == "ucx_tls"
    assert said.severity is Severity.ERROR
    assert "UCX_TLS=cuda_ipc,cuda_copy,tcp" in said.change


def test_tcp_between_two_hosts_is_nothing_wrong() -> None:
    """Between hosts there may be nothing faster."""
    there = {"machine": Machine("other", "boot2", "net:[1]", 1), "env": {"UCX_TLS": "tcp"}}
    assert names(deployment([worker("p:7100", "prefill", about=TCP)], [worker("d:7200", "decode", about=there)])) == []


def test_a_silent_fallback_is_found_in_the_report_of_ucx() -> None:
    """No setting is wrong, but UCX uses TCP between two GPUs of one host."""
    gpu = {"device": "cuda:0", "buffer_device": "cuda"}
    roads = [TransportChoice("intra-node", "write", "cuda", "tcp/eth0")]
    evidence = deployment(
        [worker("p:7100", "prefill", about=gpu | {"transports": roads})], [worker("d:7200", "decode", about=gpu)]
    )
    assert names(evidence) == ["tcp_fallback"]
    assert finding(evidence, "tcp_fallback").severity is Severity.ERROR


def probed(
    write: float, read: float | None = None, num_bytes: int = 1 << 19, small: float = 12e-6, operations: int = 5
) -> ProbeResult:
    """The result for a link with these GB/s."""

    def figures(rate: float) -> LinkSpeed:
        return LinkSpeed(num_bytes, num_bytes / rate / 1e9, small, operations)

    return ProbeResult(channel="nixl", write=figures(write), read=figures(read) if read is not None else None)


def test_each_links_figures_are_shown() -> None:
    """The note has both directions and the range of all links; unmeasured links have the reason."""
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill")]
    decode = worker("d:7200", "decode")
    busy = ProbeResult(channel="nixl", reason="busy", detail="transfers are under way")
    pairs = (
        pair(senders[0], decode, probed=probed(5.5, 4.25)),
        pair(senders[1], decode, probed=busy),
    )
    said = finding(deployment(senders, [decode], pairs=pairs), "links_measured")
    assert said.severity is Severity.NOTE
    assert said.what == "1 of 2 links measured: WRITE 5.5 GB/s, latency 12 µs"
    assert said.evidence == (
        "p:7100 → d:7200: WRITE 5.5 GB/s, READ 4.25 GB/s (0.52 MB each); 4 KiB: WRITE 12 µs, READ 12 µs",
        "p:7101 → d:7200: not measured: busy (transfers are under way)",
    )


def test_links_of_busy_workers_are_no_fault() -> None:
    """The note says why they are not measured."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    busy = ProbeResult(channel="nixl", reason="busy", detail="this worker has requests")
    evidence = deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=busy),))
    assert names(evidence) == []
    said = finding(evidence, "links_measured")
    assert said.what == "0 of 1 links measured"
    assert "only while they have no requests" in said.why


def test_a_channel_without_reads_is_noted() -> None:
    """Kvbelt does not read with Mooncake, and the note says so."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    one_way = msgspec.structs.replace(probed(1.5), channel="mooncake")
    said = finding(deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=one_way),)), "links_measured")
    assert said.evidence[0].endswith("; READ not measured: kvbelt does not read with mooncake")


def test_a_link_that_is_slow_when_measured_is_slow_though_nothing_was_sent() -> None:
    """A link of 2 Mbit/s is slow even if nothing was sent over it."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    slow = pair(prefill, decode, link=None, recent=False, probed=probed(0.00025, 0.00025, 1 << 16))
    evidence = deployment([prefill], [decode], pairs=(slow,))
    assert names(evidence) == ["slow_link"]
    assert finding(evidence, "slow_link").severity is Severity.ERROR
    assert "0.00025 GB/s" in finding(evidence, "slow_link").evidence[0]


def test_a_process_that_did_not_run_for_a_moment_is_no_slow_link() -> None:
    """64 KiB in 20 ms do not make a link slow."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    late = pair(prefill, decode, probed=probed(0.0033, 0.0033, 1 << 16))
    assert names(deployment([prefill], [decode], pairs=(late,))) == []


def test_one_slow_operation_is_no_proof() -> None:
    """A measurement that ended after one operation gives a warning: that one may have waited for a CPU."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    short = pair(prefill, decode, link=None, recent=False, probed=probed(0.002, operations=1))
    said = finding(deployment([prefill], [decode], pairs=(short,)), "slow_link")
    assert said.severity is Severity.WARNING


def test_slow_transfers_over_a_link_that_is_fast_when_measured_are_no_proof() -> None:
    """The measurement shows that not the link was slow."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    link = LinkTotals(decode.engine_id, 2, 1_000_000, 2.5)
    severities = [
        finding(deployment([prefill], [decode], pairs=(pair(prefill, decode, link=link, probed=one),)), "slow_link")
        for one in (None, probed(1.2))
    ]
    assert [one.severity for one in severities] == [Severity.ERROR, Severity.WARNING]


def test_slow_transfers_within_a_host_are_a_lack_of_cpu() -> None:
    """No network is between the two, so the warning names the CPU and no cable."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    for seen in ({"probed": probed(0.002)}, {"link": LinkTotals(decode.engine_id, 2, 1_000_000, 2.5)}):
        said = finding(deployment([prefill], [decode], pairs=(pair(prefill, decode, **seen),)), "slow_link")
        assert said.severity is Severity.WARNING
        assert "lack CPU" in said.change
        assert "ethtool" not in said.change


@pytest.mark.parametrize(("rate", "found"), [(0.3, ["slow_link"]), (200.0, [])])
def test_gpus_of_one_host_that_are_slow_when_measured_are_an_error(rate: float, found: list[str]) -> None:
    """This also holds with UCX's report switched off."""
    gpu = {"device": "cuda:0", "buffer_device": "cuda", "transports": []}
    prefill, decode = worker("p:7100", "prefill", about=gpu), worker("d:7200", "decode", about=gpu)
    evidence = deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=probed(rate, rate, 8 << 20)),))
    assert names(evidence) == found
    if found:
        assert finding(evidence, "slow_link").severity is Severity.ERROR


def test_a_fallback_to_tcp_is_shown_with_what_it_costs() -> None:
    """The evidence has the links within the host, and no others."""
    prefill = worker("p:7100", "prefill", about=TCP)
    near = worker("d:7200", "decode", about={"env": TCP["env"]})
    far = worker("o:7200", "decode", about=FAR | {"env": TCP["env"]})
    pairs = tuple(pair(prefill, one, probed=probed(1.5, 1.25)) for one in (near, far))
    for sender, name in ((prefill, "ucx_tls"), (worker("p:7100", "prefill", about=TCP | {"env": {}}), "tcp_fallback")):
        said = finding(deployment([sender], [near, far], pairs=pairs), name)
        assert [line for line in said.evidence if "GB/s" in line] == [
            "p:7100 → d:7200: WRITE 1.5 GB/s, READ 1.25 GB/s (0.52 MB each); 4 KiB: WRITE 12 µs, READ 12 µs"
        ], name


def test_a_slow_link_comes_before_the_buffer_that_it_fills() -> None:
    """Slow writes reserve slots for longer."""
    prefill = worker("p:7100", "prefill")
    full = worker("d:7200", "decode", samples=(replace(IDLE, queued=3, bytes_held=1 << 29),) * 4)
    slow = pair(prefill, full, link=LinkTotals(full.engine_id, 2, 1_000_000, 2.5, 500_000))
    evidence = deployment([prefill], [full], pairs=(slow,))
    assert names(evidence) == ["slow_link", "buffer_full"]
    assert "0.0004 GB/s" in finding(evidence, "slow_link").evidence[0]


def test_a_link_on_which_nothing_lands_is_slow() -> None:
    """A link on which no byte lands in seconds is slow."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode", about=FAR)
    stuck = pair(
        prefill,
        decode,
        link=LinkTotals(decode.engine_id, 0, 0, 2.0, 524288),
        trial=TrialResult(False, "no answer …", 6.0),
    )
    evidence = deployment([prefill], [decode], pairs=(stuck,))
    assert names(evidence) == ["slow_link"]
    assert finding(evidence, "slow_link").severity is Severity.ERROR


def test_a_few_slow_writes_of_a_busy_machine_are_no_slow_link() -> None:
    """A process that was not scheduled, or a new connection, explains them."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    for link in (LinkTotals(decode.engine_id, 1, 131_072, 0.03), LinkTotals(decode.engine_id, 40, 20_000_000, 1.2)):
        assert names(deployment([prefill], [decode], pairs=(pair(prefill, decode, link=link),))) == []


def test_a_pair_that_was_lost_on_a_slow_link_comes_after_the_link() -> None:
    """Heartbeats wait behind KV until the lease lapses."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    lost = pair(
        prefill,
        decode,
        link=LinkTotals(decode.engine_id, 2, 1_000_000, 2.5),
        state="failed",
        reason="peer_lost",
        trial=TrialResult(False, "no answer …", 6.0),
    )
    assert names(deployment([prefill], [decode], pairs=(lost,))) == ["slow_link", "pair_failed"]


def test_a_pair_that_carried_the_doctors_prompt_has_not_failed() -> None:
    """A failed handshake may be repeated with success before the doctor looks."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    lost = pair(prefill, decode, state="failed", reason="peer_lost")
    assert names(deployment([prefill], [decode], pairs=(replace(lost, trial=None),))) == ["pair_failed"]
    assert names(deployment([prefill], [decode], pairs=(lost,))) == []


def test_one_slow_worker_is_named_among_several() -> None:
    """The finding names the worker that all slow links share."""
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill")]
    receivers = [worker("d:7200", "decode"), worker("d:7201", "decode")]
    pairs = tuple(
        pair(p, d, link=LinkTotals(d.engine_id, 4, 1_000_000, 1.0 if d.name == "d:7201" else 0.001))
        for p in senders
        for d in receivers
    )
    assert "to decode worker d:7201" in finding(deployment(senders, receivers, pairs=pairs), "slow_link").what


def test_a_long_decode_queue_comes_before_the_full_buffer() -> None:
    """KV stays in the buffer until it is decoded."""
    sample = replace(BUSY, queued=2, bytes_held=1 << 29)
    evidence = deployment(decode=[worker("d:7200", "decode", samples=(sample,) * 4)])
    assert names(evidence) == ["decode_overloaded", "buffer_full"]


def test_a_full_buffer_comes_before_a_short_decode_queue() -> None:
    """With fewer than ten waiting requests, the buffer is the cause."""
    sample = replace(IDLE, waiting=4, running=8, queued=2, bytes_held=1 << 29)
    records = tuple(record(n, timings_ms={"decode_queue": 2000.0, "first_token": 60.0}) for n in range(6))
    waits = worker("d:7200", "decode", samples=(sample,) * 4)
    assert names(deployment(decode=[waits], records=records)) == ["buffer_full", "decode_overloaded"]
    room = worker("d:7200", "decode", samples=(replace(sample, queued=0),) * 4)
    assert names(deployment(decode=[room], records=records)) == ["decode_overloaded"]


def test_a_full_buffer_comes_before_the_prefill_queue() -> None:
    """Prompts keep their blocks until their KV has space."""
    full = worker("d:7200", "decode", samples=(replace(IDLE, queued=3, bytes_held=1 << 28, receive_bytes=1 << 28),) * 4)
    blocked = worker("p:7100", "prefill", samples=(replace(BUSY, sends_waiting=5, blocks_free=0),) * 4)
    evidence = deployment([blocked], [full], records=(record(transfer=NO_ROOM),))
    assert names(evidence)[:2] == ["buffer_full", "prefill_overloaded"]
    said = finding(evidence, "buffer_full")
    assert said.severity is Severity.ERROR
    assert "pd_buffer_size: 1073741824" in said.change


def test_a_long_prefill_queue() -> None:
    """The seed's threshold gives a finding."""
    evidence = deployment([worker("p:7100", "prefill", samples=(BUSY,) * 4)])
    assert names(evidence) == ["prefill_overloaded"]
    assert "kvbelt up 2p1d" in finding(evidence, "prefill_overloaded").change


def test_a_queue_of_the_seeds_threshold_is_none_yet() -> None:
    """Ten waiting requests are allowed."""
    assert names(deployment([worker("p:7100", "prefill", samples=(replace(IDLE, waiting=10),) * 4)])) == []


def test_prompts_that_waited_long_count_while_others_still_wait() -> None:
    """A short queue of long prompts counts if requests still wait."""
    records = tuple(record(n, timings_ms={"queue": 4000.0, "first_token": 5000.0}) for n in range(6))
    waits = worker("p:7100", "prefill", samples=(replace(IDLE, waiting=3),) * 4)
    assert names(deployment([waits], records=records)) == ["prefill_overloaded", "ttft_high"]
    assert names(deployment(records=records)) == ["ttft_high"]


@pytest.mark.parametrize(("prefill", "decode", "found"), [(2, 1, []), (3, 1, ["ratio"]), (4, 2, []), (5, 2, ["ratio"])])
def test_many_more_prefill_than_decode_workers(prefill: int, decode: int, found: list[str]) -> None:
    """The seed's third anti-pattern is a warning."""
    senders = [worker(f"p:{n}", "prefill") for n in range(prefill)]
    receivers = [worker(f"d:{n}", "decode") for n in range(decode)]
    assert names(deployment(senders, receivers)) == found


def test_idle_prefill_workers_are_offered_to_an_overloaded_decode() -> None:
    """The remedy suggests to use a prefill worker for decode."""
    senders = [worker(f"p:{n}", "prefill") for n in range(2)]
    said = finding(deployment(senders, [worker("d:7200", "decode", samples=(BUSY,) * 4)]), "decode_overloaded")
    assert "as a decode worker instead" in said.change


@pytest.mark.parametrize(("engine", "severity"), [("embedded", Severity.NOTE), ("vllm", Severity.WARNING)])
def test_hash_seeds_that_differ(engine: str, severity: Severity) -> None:
    """The seed's second anti-pattern loses no KV here; with vLLM it is a warning."""
    seed = {"env": {"PYTHONHASHSEED": "0"}, "engine": engine}
    evidence = deployment(
        [worker("p:7100", "prefill", about=seed)], [worker("d:7200", "decode", about={"engine": engine})]
    )
    said = finding(evidence, "hash_seeds")
    assert said.severity is severity
    assert "PYTHONHASHSEED=0" in said.change
    assert said.evidence == ("unset: decode d:7200", "0: prefill p:7100")


def test_versions_and_clocks_that_differ() -> None:
    """Each finding lists the processes by value."""
    other = {"kvbelt": "0.3.0", "packages": {"nixl": "1.6.0", "torch": "2.13.0"}}
    evidence = deployment([worker("p:7100", "prefill", about=other, skew_seconds=-42.0)])
    assert names(evidence) == ["kvbelt_versions", "carrier_versions", "clock_skew"]
    assert "42.0 s behind" in finding(evidence, "clock_skew").what


def test_a_slow_answer_does_not_pass_for_a_wrong_clock() -> None:
    """The clock's uncertainty is half of the answer's time."""
    assert "clock_skew" not in names(deployment([worker("p:7100", "prefill", skew_seconds=2.0, skew_within=1.9)]))


def test_a_buffer_is_reckoned_in_prompts() -> None:
    """Less than one prompt of full length is a warning."""
    small = finding(deployment(decode=[worker("d:7200", "decode", about={"buffer_bytes": 1 << 26})]), "buffer_small")
    assert small.severity is Severity.WARNING
    assert "in the decode worker's file: pd_buffer_size: 268435456" in small.change
    vllm = worker("d:7200", "decode", about={"buffer_bytes": 1 << 26, "engine": "vllm"})
    small = finding(deployment(decode=[vllm]), "buffer_small")
    assert """kv_connector_extra_config: "pd_buffer_size": 268435456""" in small.change


@pytest.mark.parametrize(("used", "name"), [(20.0, "gpu_idle"), (97.0, "gpu_full")])
def test_gpus_against_the_prefill_queue(used: float, name: str) -> None:
    """The seed's thresholds are 50 % and 90 %."""
    gpus = (GpuSeen(0, "u", "H100", used, 0.5),)
    evidence = deployment([worker("p:7100", "prefill", samples=(BUSY,) * 4)], gpus=gpus)
    assert names(evidence) == ["prefill_overloaded", name]


def test_failures_are_symptoms_with_reason_count_and_an_example() -> None:
    """They come after every cause, whatever their severity."""
    lost = {"leg": "decode", "worker": "d:7200", "transfer_id": None, "began_ms": 0.0, "answered_ms": None,
            "ended_ms": 9.0, "reason": "decode_lost", "detail": "", "transfer": None}  # fmt: skip
    failed = record(3, path="", status=503, attempts=[lost])
    evidence = deployment([worker(f"p:{n}", "prefill") for n in range(3)], records=(record(1), record(2), failed))
    found = diagnose(evidence)
    assert [one.name for one in found if one.severity is not Severity.NOTE] == ["ratio", "failures"]
    said = finding(evidence, "failures")
    assert said.kind is FindingKind.SYMPTOM
    assert said.severity is Severity.ERROR
    assert said.evidence[0].startswith("1 times decode_lost")
    assert "d:7200" in said.evidence[0]
    assert "r3" in said.evidence[0]


def test_a_chosen_way_is_no_failure() -> None:
    """Short prompts stay on one worker by choice."""
    assert names(deployment(records=(record(path="local", reason="short_prompt"),))) == []


def test_a_worker_that_still_loads_has_a_sample_of_zeros() -> None:
    """Its load and belt are missing from /health."""
    loading = WORKER_HEALTH.convert(worker_health("loading") | {"load": None}, "p:7100")
    assert Sample.of(loading) == Sample()


def test_messages_that_cannot_be_read_are_named() -> None:
    """The finding lists the message, its sender and the missing field."""
    evidence = deployment(unreadable=("/health of p:7100: Object missing required field `load`",))
    assert names(evidence) == ["unreadable_message"]
    assert "p:7100" in finding(evidence, "unreadable_message").evidence[0]


def judged(count: int = 20, first: float = 60.0, waited: float = 0.0, prefill: float = 50.0, between: float = 10.0):
    """Requests with levels of 500 and 50 ms."""
    placing = {"action": "whole", "reason": "calm", "meaning": None, "waited_ms": waited,
               "predicted_first_token_ms": 1.0, "ttft_level_ms": 500.0, "between_tokens_level_ms": 50.0}  # fmt: skip
    timings = {"first_token": first, "prefill": prefill, "between_tokens": between}
    return tuple(record(number, timings_ms=timings, placing=placing) for number in range(count))


@pytest.mark.parametrize(
    ("records", "change"),
    [
        (judged(first=900.0, prefill=800.0), "--slo-ttft-ms"),
        (judged(first=900.0, waited=600.0), "add workers"),
        (judged(first=900.0), "kvbelt_ttft_prediction_error_seconds"),
        (judged(between=80.0), "--slo-itl-ms"),
        ((*judged(18), *judged(3, first=900.0, waited=600.0)), "add workers"),
    ],
)
def test_levels_that_are_not_met_are_named_with_their_cause(records: tuple[RequestRecord, ...], change: str) -> None:
    said = finding(deployment(records=records), "levels_not_met")
    assert change in said.change


def test_splitting_that_is_switched_off_is_named() -> None:
    off = PlacementNow(setting="elastic", mode="whole", regret=0.12, actual=0.8, expected=0.9)
    said = finding(deployment(placement=off), "splitting_off")
    assert (said.severity, said.evidence) == (Severity.NOTE, ("kvbelt_placement_regret_ratio: 0.12",))
    assert "splitting_off" not in names(deployment(placement=msgspec.structs.replace(off, setting="whole")))


@pytest.mark.parametrize("records", [judged(), judged(19, first=900.0), (*judged(19), *judged(2, first=900.0))])
def test_levels_that_are_met_or_not_known_to_be_missed_are_not_named(records: tuple[RequestRecord, ...]) -> None:
    assert "levels_not_met" not in names(deployment(records=records))
