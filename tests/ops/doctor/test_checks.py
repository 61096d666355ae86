"""What the doctor makes of evidence: the right finding, and the cause first."""

from dataclasses import replace

import msgspec
import pytest

from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.evidence import GpuSeen, ProbeSeen, RecordSeen, Sample
from kvbelt.ops.doctor.finding import Kind, Severity, status_of
from kvbelt.wire.about import Link, Machine, Road
from kvbelt.wire.probe import Figures, Probed
from tests.ops.doctor.deployments import FITS, IDLE, LAYOUT, deployment, finding, names, pair, worker

BUSY = replace(IDLE, waiting=14, running=8)


def record(number: int = 0, **changes) -> RecordSeen:
    """A request that went well."""
    given = {
        "request_id": f"r{number}",
        "status": 200,
        "decision": {"path": "first-token", "reason": None},
        "workers": {"prefill": "p:7100", "decode": "d:7200"},
        "timings_ms": {"queue": 1.0, "prefill": 50.0, "decode_queue": 1.0, "first_token": 60.0},
        "transfer": {"state": "done", "bytes": 40_000_000, "seconds": 0.05, "exposed_ms": 2.0},
    }
    return msgspec.convert(given | changes, RecordSeen)


def test_a_healthy_deployment_has_notes_only() -> None:
    """Nothing is wrong: exit status 0."""
    found = diagnose(deployment(records=tuple(record(n) for n in range(8))))
    assert {one.severity for one in found} == {Severity.NOTE}
    assert status_of(found) == 0


def test_without_a_proxy_that_is_said_and_nothing_else() -> None:
    """No second guesses where nothing could be seen."""
    found = diagnose(deployment([], [], proxy_answer="cannot connect to 127.0.0.1:9100: refused"))
    assert [one.name for one in found] == ["no_proxy"]
    assert status_of(found) == 2


def test_a_dead_worker_comes_before_the_queues_that_it_causes() -> None:
    """The others are overloaded because it is dead."""
    dead = worker(
        "d:7201", "decode", answer="cannot connect to d:7201: Connection refused", state="lost", samples=(), about={}
    )
    busy = worker("d:7200", "decode", samples=(BUSY,) * 4)
    found = names(deployment(decode=[busy, dead]))
    assert found[:2] == ["dead_worker", "decode_overloaded"]


def test_a_stopped_worker_is_told_from_one_that_nobody_listens_for() -> None:
    """What to do differs."""
    stopped = worker("p:7100", "prefill", answer="no answer to /health within 4 s", state="lost", samples=())
    said = finding(deployment([stopped]), "dead_worker")
    assert "stopped" in said.what
    assert "CONT" in said.change


def test_a_refused_pair_is_mixed_models_with_both_values() -> None:
    """The seed's first anti-pattern."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    refused = pair(
        prefill,
        decode,
        state="refused",
        reason="refused_dtype",
        detail="dtype is float32 here and bfloat16 there",
        link=None,
        recent=False,
        probe=None,
    )
    evidence = deployment([prefill], [decode], pairs=(refused,), records=(
        record(decision={"path": "local", "reason": "pairs_refused"}, transfer=None),))  # fmt: skip
    assert names(evidence) == ["mixed_models", "failures"]
    assert "bfloat16" in finding(evidence, "mixed_models").evidence[0]


def test_other_weights_are_seen_before_any_handshake() -> None:
    """From what the workers say of themselves."""
    other = msgspec.structs.replace(FITS, fingerprint="def", model="llama")
    evidence = deployment([worker("p:7100", "prefill", about={"compatibility": other}, model="llama")])
    assert names(evidence)[0] == "mixed_models"
    assert "llama" in finding(evidence, "mixed_models").evidence[0]


def test_another_layout_is_named_by_its_field() -> None:
    """Dtype first, for that is what a user has set."""
    other = msgspec.structs.replace(FITS, layout=msgspec.structs.replace(LAYOUT, dtype="bfloat16", block_bytes=12288))
    said = finding(deployment([worker("p:7100", "prefill", about={"compatibility": other})]), "mixed_models")
    assert said.evidence == ("dtype is bfloat16 on p:7100 and float32 on d:7200",)


def test_one_odd_worker_among_several_is_one_finding() -> None:
    """With each pair's words once."""
    other = msgspec.structs.replace(FITS, fingerprint="def")
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill", about={"compatibility": other})]
    receivers = [worker("d:7200", "decode"), worker("d:7201", "decode")]
    evidence = deployment(senders, receivers)
    assert names(evidence) == ["mixed_models"]
    said = finding(evidence, "mixed_models")
    assert "prefill worker p:7101 and decode workers d:7200, d:7201" in said.what
    assert len(said.evidence) == 2


def test_keys_that_are_not_trusted_are_no_mixed_models() -> None:
    """They have a remedy of their own."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    refused = pair(prefill, decode, state="refused", reason="untrusted_key", detail="…")
    assert names(deployment([prefill], [decode], pairs=(refused,)))[0] == "keys"


TCP = {"env": {"UCX_TLS": "tcp"}, "roads": [Road("intra-node", "write", "host", "tcp/lo")]}


def test_tcp_only_on_one_host_is_a_warning_that_names_the_setting() -> None:
    """Within a host there is something faster."""
    evidence = deployment(
        [worker("p:7100", "prefill", about=TCP)], [worker("d:7200", "decode", about={"env": TCP["env"]})]
    )
    assert names(evidence) == ["ucx_tls"]
    said = finding(evidence, "ucx_tls")
    assert said.severity is Severity.WARNING
    assert "unset UCX_TLS" in said.change
    assert "UCX_TLS=tcp" in said.evidence[0]


def test_gpus_of_one_host_without_cuda_ipc_are_an_error() -> None:
    """2.9 s instead of 2.7 ms."""
    gpu = {"env": {"UCX_TLS": "tcp,cuda_copy"}, "device": "cuda:0", "buffer_device": "cuda"}
    evidence = deployment([worker("p:7100", "prefill", about=gpu)], [worker("d:7200", "decode", about=gpu)])
    said = finding(evidence, "ucx_tls")
    assert names(evidence)[0] == "ucx_tls"
    assert said.severity is Severity.ERROR
    assert "UCX_TLS=cuda_ipc,cuda_copy,tcp" in said.change


def test_tcp_between_two_hosts_is_nothing_wrong() -> None:
    """There may be nothing better."""
    there = {"machine": Machine("other", "boot2", "net:[1]", 1), "env": {"UCX_TLS": "tcp"}}
    assert names(deployment([worker("p:7100", "prefill", about=TCP)], [worker("d:7200", "decode", about=there)])) == []


def test_a_fallback_that_nobody_asked_for_is_found_from_what_ucx_says() -> None:
    """No setting is wrong, and yet UCX takes TCP between two GPUs of one host."""
    gpu = {"device": "cuda:0", "buffer_device": "cuda"}
    roads = [Road("intra-node", "write", "cuda", "tcp/eth0")]
    evidence = deployment(
        [worker("p:7100", "prefill", about=gpu | {"roads": roads})], [worker("d:7200", "decode", about=gpu)]
    )
    assert names(evidence) == ["tcp_fallback"]
    assert finding(evidence, "tcp_fallback").severity is Severity.ERROR


def probed(write: float, read: float | None = None, num_bytes: int = 1 << 19, small: float = 12e-6) -> Probed:
    """A link with these GB/s."""

    def figures(rate: float) -> Figures:
        return Figures(num_bytes, num_bytes / rate / 1e9, small)

    return Probed(channel="nixl", write=figures(write), read=figures(read) if read is not None else None)


def test_each_links_figures_are_shown() -> None:
    """Both ways, and the range of all; those that could not be measured say why."""
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill")]
    decode = worker("d:7200", "decode")
    busy = Probed(channel="nixl", reason="busy", detail="transfers are under way")
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
    """That they are not measured is a note, which says why."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    busy = Probed(channel="nixl", reason="busy", detail="this worker has requests")
    evidence = deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=busy),))
    assert names(evidence) == []
    said = finding(evidence, "links_measured")
    assert said.what == "0 of 1 links measured"
    assert "requests come first" in said.why


def test_what_a_carrier_cannot_do_is_said() -> None:
    """Mooncake's engine is not asked to read."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    one_way = msgspec.structs.replace(probed(1.5), channel="mooncake")
    said = finding(deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=one_way),)), "links_measured")
    assert said.evidence[0].endswith("; READ not measured: kvbelt does not read with mooncake")


def test_a_link_that_is_slow_when_measured_is_slow_though_nothing_was_sent() -> None:
    """2 Mbit/s."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    slow = pair(prefill, decode, link=None, recent=False, probed=probed(0.00025, 0.00025, 1 << 16))
    evidence = deployment([prefill], [decode], pairs=(slow,))
    assert names(evidence) == ["slow_link"]
    assert finding(evidence, "slow_link").severity is Severity.ERROR
    assert "0.00025 GB/s" in finding(evidence, "slow_link").evidence[0]


def test_a_process_that_did_not_run_for_a_moment_is_no_slow_link() -> None:
    """64 KiB in 20 ms."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    late = pair(prefill, decode, probed=probed(0.0033, 0.0033, 1 << 16))
    assert names(deployment([prefill], [decode], pairs=(late,))) == []


@pytest.mark.parametrize(("rate", "found"), [(0.3, ["slow_link"]), (200.0, [])])
def test_gpus_of_one_host_that_are_slow_when_measured_are_an_error(rate: float, found: list[str]) -> None:
    """Though UCX's report is switched off."""
    gpu = {"device": "cuda:0", "buffer_device": "cuda", "roads": []}
    prefill, decode = worker("p:7100", "prefill", about=gpu), worker("d:7200", "decode", about=gpu)
    evidence = deployment([prefill], [decode], pairs=(pair(prefill, decode, probed=probed(rate, rate, 8 << 20)),))
    assert names(evidence) == found
    if found:
        assert finding(evidence, "slow_link").severity is Severity.ERROR


def test_a_fallback_to_tcp_is_shown_with_what_it_costs() -> None:
    """The links within the host, not those to others."""
    prefill = worker("p:7100", "prefill", about=TCP)
    near = worker("d:7200", "decode", about={"env": TCP["env"]})
    far = worker("o:7200", "decode", about={"machine": Machine("other", "boot2", "net:[1]", 1), "env": TCP["env"]})
    pairs = tuple(pair(prefill, one, probed=probed(1.5, 1.25)) for one in (near, far))
    for sender, name in ((prefill, "ucx_tls"), (worker("p:7100", "prefill", about=TCP | {"env": {}}), "tcp_fallback")):
        said = finding(deployment([sender], [near, far], pairs=pairs), name)
        assert [line for line in said.evidence if "GB/s" in line] == [
            "p:7100 → d:7200: WRITE 1.5 GB/s, READ 1.25 GB/s (0.52 MB each); 4 KiB: WRITE 12 µs, READ 12 µs"
        ], name


def test_a_slow_link_comes_before_the_buffer_that_it_fills() -> None:
    """Slots are reserved for as long as they are written."""
    prefill = worker("p:7100", "prefill")
    full = worker("d:7200", "decode", samples=(replace(IDLE, queued=3, bytes_held=1 << 29),) * 4)
    slow = pair(prefill, full, link=Link(full.engine_id, 2, 1_000_000, 2.5, 500_000))
    evidence = deployment([prefill], [full], pairs=(slow,))
    assert names(evidence) == ["slow_link", "buffer_full"]
    assert "0.0004 GB/s" in finding(evidence, "slow_link").evidence[0]


def test_a_link_on_which_nothing_lands_is_slow() -> None:
    """No byte in seconds is no rate that can be left out."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    stuck = pair(
        prefill, decode, link=Link(decode.engine_id, 0, 0, 2.0, 524288), probe=ProbeSeen(False, "no answer …", 6.0)
    )
    assert names(deployment([prefill], [decode], pairs=(stuck,))) == ["slow_link"]


def test_a_few_slow_writes_of_a_busy_machine_are_no_slow_link() -> None:
    """A process that did not run for a moment, or a connection that was being made."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    for link in (Link(decode.engine_id, 1, 131_072, 0.03), Link(decode.engine_id, 40, 20_000_000, 1.2)):
        assert names(deployment([prefill], [decode], pairs=(pair(prefill, decode, link=link),))) == []


def test_a_pair_that_was_lost_on_a_slow_link_comes_after_the_link() -> None:
    """Heartbeats wait behind KV until the lease lapses."""
    prefill, decode = worker("p:7100", "prefill"), worker("d:7200", "decode")
    lost = pair(prefill, decode, link=Link(decode.engine_id, 2, 1_000_000, 2.5), state="failed", reason="peer_lost")
    assert names(deployment([prefill], [decode], pairs=(lost,))) == ["slow_link", "pair_failed"]


def test_one_slow_worker_is_named_among_several() -> None:
    """Its cable, not the others'."""
    senders = [worker("p:7100", "prefill"), worker("p:7101", "prefill")]
    receivers = [worker("d:7200", "decode"), worker("d:7201", "decode")]
    pairs = tuple(
        pair(p, d, link=Link(d.engine_id, 4, 1_000_000, 1.0 if d.name == "d:7201" else 0.001))
        for p in senders
        for d in receivers
    )
    assert "to decode worker d:7201" in finding(deployment(senders, receivers, pairs=pairs), "slow_link").what


def test_a_long_decode_queue_comes_before_the_full_buffer() -> None:
    """KV lies in the buffer until somebody decodes it."""
    sample = replace(BUSY, queued=2, bytes_held=1 << 29)
    evidence = deployment(decode=[worker("d:7200", "decode", samples=(sample,) * 4)])
    assert names(evidence) == ["decode_overloaded", "buffer_full"]


def test_a_full_buffer_comes_before_a_short_decode_queue() -> None:
    """Fewer than ten that wait are what a buffer should hold."""
    sample = replace(IDLE, waiting=4, running=8, queued=2, bytes_held=1 << 29)
    records = tuple(record(n, timings_ms={"decode_queue": 2000.0, "first_token": 60.0}) for n in range(6))
    waits = worker("d:7200", "decode", samples=(sample,) * 4)
    assert names(deployment(decode=[waits], records=records)) == ["buffer_full", "decode_overloaded"]
    room = worker("d:7200", "decode", samples=(replace(sample, queued=0),) * 4)
    assert names(deployment(decode=[room], records=records)) == ["decode_overloaded"]


def test_a_full_buffer_comes_before_the_prefill_queue() -> None:
    """Prompts keep their blocks until their KV has room."""
    full = worker("d:7200", "decode", samples=(replace(IDLE, queued=3, bytes_held=1 << 28, receive_bytes=1 << 28),) * 4)
    blocked = worker("p:7100", "prefill", samples=(replace(BUSY, sends_waiting=5, blocks_free=0),) * 4)
    evidence = deployment([blocked], [full], records=(record(transfer={"state": "failed", "reason": "receiver_full"}),))
    assert names(evidence)[:2] == ["buffer_full", "prefill_overloaded"]
    said = finding(evidence, "buffer_full")
    assert said.severity is Severity.ERROR
    assert "pd_buffer_size: 1073741824" in said.change


def test_a_long_prefill_queue() -> None:
    """The seed's threshold."""
    evidence = deployment([worker("p:7100", "prefill", samples=(BUSY,) * 4)])
    assert names(evidence) == ["prefill_overloaded"]
    assert "kvbelt up 2p1d" in finding(evidence, "prefill_overloaded").change


def test_a_queue_of_the_seeds_threshold_is_none_yet() -> None:
    """More than ten, it says."""
    assert names(deployment([worker("p:7100", "prefill", samples=(replace(IDLE, waiting=10),) * 4)])) == []


def test_prompts_that_waited_long_count_while_others_still_wait() -> None:
    """A short queue of long prompts is a queue as well."""
    records = tuple(record(n, timings_ms={"queue": 4000.0, "first_token": 5000.0}) for n in range(6))
    waits = worker("p:7100", "prefill", samples=(replace(IDLE, waiting=3),) * 4)
    assert names(deployment([waits], records=records)) == ["prefill_overloaded"]
    assert names(deployment(records=records)) == []


@pytest.mark.parametrize(("prefill", "decode", "found"), [(2, 1, []), (3, 1, ["ratio"]), (4, 2, []), (5, 2, ["ratio"])])
def test_many_more_prefill_than_decode_workers(prefill: int, decode: int, found: list[str]) -> None:
    """The seed's third anti-pattern."""
    senders = [worker(f"p:{n}", "prefill") for n in range(prefill)]
    receivers = [worker(f"d:{n}", "decode") for n in range(decode)]
    assert names(deployment(senders, receivers)) == found


def test_idle_prefill_workers_are_offered_to_an_overloaded_decode() -> None:
    """The ratio from queues."""
    senders = [worker(f"p:{n}", "prefill") for n in range(2)]
    said = finding(deployment(senders, [worker("d:7200", "decode", samples=(BUSY,) * 4)]), "decode_overloaded")
    assert "as a decode worker instead" in said.change


@pytest.mark.parametrize(("engine", "severity"), [("embedded", Severity.NOTE), ("vllm", Severity.WARNING)])
def test_hash_seeds_that_differ(engine: str, severity: Severity) -> None:
    """The seed's second anti-pattern, which loses no KV here; with vLLM others may suffer."""
    seed = {"env": {"PYTHONHASHSEED": "0"}, "engine": engine}
    evidence = deployment(
        [worker("p:7100", "prefill", about=seed)], [worker("d:7200", "decode", about={"engine": engine})]
    )
    said = finding(evidence, "hash_seeds")
    assert said.severity is severity
    assert "PYTHONHASHSEED=0" in said.change
    assert said.evidence == ("unset: decode d:7200", "0: prefill p:7100")


def test_versions_and_clocks_that_differ() -> None:
    """Each with who has which."""
    other = {"kvbelt": "0.2.0", "packages": {"nixl": "1.6.0", "torch": "2.13.0"}}
    evidence = deployment([worker("p:7100", "prefill", about=other, skew_seconds=-42.0)])
    assert names(evidence) == ["kvbelt_versions", "carrier_versions", "clock_skew"]
    assert "42.0 s behind" in finding(evidence, "clock_skew").what


def test_a_slow_answer_does_not_pass_for_a_wrong_clock() -> None:
    """The clock is known no better than half of the time that the answer took."""
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
    """The seed's tree: under 50 %, and over 90 %."""
    gpus = (GpuSeen(0, "u", "H100", used, 0.5),)
    evidence = deployment([worker("p:7100", "prefill", samples=(BUSY,) * 4)], gpus=gpus)
    assert names(evidence) == ["prefill_overloaded", name]


def test_failures_are_symptoms_with_reason_count_and_an_example() -> None:
    """They come after every cause, whatever their severity."""
    failed = record(3, status=503, decision={"path": None, "reason": None}, attempts=[
        {"leg": "decode", "worker": "d:7200", "reason": "decode_lost", "detail": ""}])  # fmt: skip
    evidence = deployment([worker(f"p:{n}", "prefill") for n in range(3)], records=(record(1), record(2), failed))
    found = diagnose(evidence)
    assert [one.name for one in found if one.severity is not Severity.NOTE] == ["ratio", "failures"]
    said = finding(evidence, "failures")
    assert said.kind is Kind.SYMPTOM
    assert said.severity is Severity.ERROR
    assert said.evidence[0].startswith("1 times decode_lost")
    assert "d:7200" in said.evidence[0]
    assert "r3" in said.evidence[0]


def test_a_chosen_way_is_no_failure() -> None:
    """Short prompts stay on one worker by choice."""
    assert names(deployment(records=(record(decision={"path": "local", "reason": "short_prompt"}),))) == []


def test_samples_of_health_that_says_little() -> None:
    """A vLLM server, a proxy of an older version, nonsense: zeros."""
    assert Sample.of({"load": None, "belt": "x"}) == Sample()
    assert Sample.of({"load": {"waiting": 3}, "belt": {"arrivals": {"queued": 2}}}) == Sample(waiting=3, queued=2)
