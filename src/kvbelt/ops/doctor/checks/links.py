"""Is what is sent there soon?"""

from collections.abc import Iterable, Iterator, Sequence

from kvbelt.ops.doctor.evidence import Evidence, PairSeen, same_host
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.wire.about import Link
from kvbelt.wire.probe import Figures

#: Below this a link is slow whatever it is: a quarter of a gigabit network.
SLOW_GB_PER_SECOND = 0.03
#: Below this it is slow if it has no pause either.
MODEST_GB_PER_SECOND = 0.3
BUSY_SHARE = 0.5
#: Between GPUs of one host: NVLink has hundreds, PCIe tens.
NVLINK_GB_PER_SECOND = 5.0

#: Less than this in flight measures nothing.
_LEAST_BUSY_SECONDS = 0.2
#: A write of any size may take so long because a process did not run, or its connection was being made.
_WRITE_SECONDS = 0.02
_LEAST_GPU_BYTES = 64 << 20
#: Of a single operation, between GPUs: with fewer bytes its latency is what is measured.
_LEAST_GPU_WRITE = 4 << 20


def measured(pair: PairSeen) -> str:
    """What has moved, in one line."""
    link = pair.link
    if link is None:
        return f"{pair.prefill} → {pair.decode}: no figures of transfers"
    rate = link.gb_per_second
    speed = f"{rate:.3g} GB/s" if rate is not None else "no rate"
    stuck = f", {link.bytes_in_flight / 1e6:.1f} MB in flight" if link.bytes_in_flight else ""
    when = "while the doctor looked" if pair.recent else "since they are connected"
    return (
        f"{pair.prefill} → {pair.decode}: {speed} ({link.num_bytes / 1e6:.1f} MB in {link.writes} writes, "
        f"{link.busy_seconds * 1e3:.0f} ms in flight{stuck}; {when})"
    )


def figures(pair: PairSeen) -> str:
    """What the prefill worker has measured just now, in one line."""
    said = pair.probed
    name = f"{pair.prefill} → {pair.decode}"
    if said is None:
        return f"{name}: not measured"
    if said.write is None:
        return f"{name}: not measured: {said.reason}" + (f" ({said.detail})" if said.detail else "")
    if said.read is not None:
        read = ""
    elif said.reason:
        read = f"; READ not measured: {said.reason} ({said.detail})"
    else:
        read = f"; READ not measured: kvbelt does not read with {said.channel}"
    both = [("WRITE", said.write)] + ([("READ", said.read)] if said.read is not None else [])
    rates = ", ".join(f"{kind} {one.gb_per_second:.3g} GB/s" for kind, one in both)
    small = ", ".join(f"{kind} {_microseconds(one)} µs" for kind, one in both)
    return f"{name}: {rates} ({said.write.num_bytes / 1e6:.2g} MB each); 4 KiB: {small}{read}"


def _microseconds(one: Figures) -> str:
    return f"{one.small_seconds * 1e6:,.0f}"


def all_figures(pairs: Iterable[PairSeen]) -> tuple[str, ...]:
    """Of those that were measured."""
    return tuple(figures(pair) for pair in pairs if pair.probed is not None and pair.probed.write is not None)


def measured_links(evidence: Evidence) -> Iterator[Finding]:
    """What each link can do, whether or not anything was sent over it."""
    asked = [pair for pair in evidence.pairs if pair.probed is not None]
    known = [(pair, pair.probed.write) for pair in asked if pair.probed is not None and pair.probed.write is not None]
    if not asked:
        return
    what = f"{len(known)} of {len(evidence.pairs)} links measured"
    if known:
        rates = sorted(write.gb_per_second for _, write in known)
        times = sorted(write.small_seconds * 1e6 for _, write in known)
        what += f": WRITE {_span(rates, '.3g')} GB/s, latency {_span(times, ',.0f')} µs"
    yield Finding(
        "links_measured",
        Severity.NOTE,
        what,
        "measured just now by the prefill workers, over the connections and in the buffers that transfers use, from "
        "posted to done, one operation at a time; within a host from the processor's cache"
        if known
        else "requests come first: prefill workers measure only while they have none",
        "",
        tuple(figures(pair) for pair in asked),
    )


def _span(values: Sequence[float], form: str) -> str:
    least, most = format(values[0], form), format(values[-1], form)
    return least if least == most else f"{least} to {most}"


def slow(evidence: Evidence) -> Iterator[Finding]:
    """Each pair's own figures: bytes over the time in which any were in flight."""
    found = [(pair, severity) for pair in evidence.pairs if (severity := _how_slow(pair, evidence)) is not None]
    if not found:
        return
    worst = max(found, key=lambda one: one[1].status)[1]
    found.sort(key=lambda one: (one[0].link.gb_per_second or 0.0) if one[0].link is not None else 0.0)
    others = [pair for pair in evidence.pairs if pair.link is not None and pair not in [one for one, _ in found]]
    seen = tuple(measured(pair) for pair, _ in found if pair.link is not None)
    seen += all_figures(pair for pair, _ in found)
    whom = _shared([pair for pair, _ in found], evidence)
    yield Finding(
        "slow_link",
        worst,
        f"KV crosses slowly {whom}",
        "a prompt's KV that is not there when its first token is makes the client wait for the second one, and fills "
        "the receive buffer for the others",
        "look at that link: ethtool DEVICE (speed, duplex), tc qdisc show, iperf3 -c HOST; on several networks name "
        "the fast one: "
        "export UCX_NET_DEVICES=mlx5_0:1 (or eth1), and pd_peer_host as its address",
        seen + tuple(f"to compare: {measured(pair)}" for pair in others[:2]),
    )


def _how_slow(pair: PairSeen, evidence: Evidence) -> Severity | None:
    if pair.probed is not None and pair.probed.write is not None:
        write = pair.probed.write
        if write.seconds > _WRITE_SECONDS + write.num_bytes / 1e9 / SLOW_GB_PER_SECOND:
            return Severity.ERROR
        if _between_gpus(pair, evidence) and write.num_bytes >= _LEAST_GPU_WRITE:
            # What UCX's own report would say; but it can be switched off.
            return Severity.ERROR if write.gb_per_second < NVLINK_GB_PER_SECOND else None
    link = pair.link
    if link is None or not pair.recent or link.busy_seconds < _LEAST_BUSY_SECONDS:
        return None
    rate = link.gb_per_second or 0.0
    if link.busy_seconds > max(1, link.writes) * _WRITE_SECONDS + link.num_bytes / 1e9 / SLOW_GB_PER_SECOND:
        return Severity.ERROR
    if rate < MODEST_GB_PER_SECOND and link.busy_seconds > BUSY_SHARE * evidence.seconds > 0:
        return Severity.WARNING
    return Severity.WARNING if _slow_nvlink(pair, link, evidence) else None


def _slow_nvlink(pair: PairSeen, link: Link, evidence: Evidence) -> bool:
    enough = link.num_bytes >= _LEAST_GPU_BYTES
    return enough and _between_gpus(pair, evidence) and (link.gb_per_second or 0.0) < NVLINK_GB_PER_SECOND


def _between_gpus(pair: PairSeen, evidence: Evidence) -> bool:
    """Whether both buffers are in GPU memory, of one host."""
    prefill, decode = evidence.worker(pair.prefill), evidence.worker(pair.decode)
    if prefill is None or decode is None or not same_host(prefill.about, decode.about):
        return False
    return all(one.about is not None and one.about.buffer_device.startswith("cuda") for one in (prefill, decode))


def _shared(slow_pairs: list[PairSeen], evidence: Evidence) -> str:
    """Whose link it is, if the slow pairs have one worker in common that the others do not."""
    for role in ("prefill", "decode"):
        names = {getattr(pair, role) for pair in slow_pairs}
        if len(names) == 1 and len(list(evidence.of(role))) > 1:
            verb = "from" if role == "prefill" else "to"
            return (
                f"{verb} {role} worker {names.pop()}, whoever is at the other end"
                if len(slow_pairs) > 1
                else (f"from {slow_pairs[0].prefill} to {slow_pairs[0].decode}")
            )
    return "between " + ", ".join(f"{pair.prefill} and {pair.decode}" for pair in slow_pairs)


def probed(evidence: Evidence) -> Iterator[Finding]:
    """A prompt of the doctor's own came through."""
    failed = [pair for pair in evidence.pairs if pair.probe is not None and not pair.probe.ok]
    for pair in failed:
        assert pair.probe is not None
        # In time or not is a matter of how much others ask for, which has findings of its own.
        late = "no answer" in pair.probe.detail or "more than" in pair.probe.detail
        yield Finding(
            "probe_failed",
            Severity.NOTE if late else Severity.WARNING,
            f"a probe from {pair.prefill} to {pair.decode} did not come through",
            "it waited behind the others' requests, or on the way"
            if late
            else "as this one, prompts of this pair are computed by the decode worker",
            "" if late else "look for the reason in docs/failures.md",
            (pair.probe.detail,),
        )
    rest = [pair for pair in evidence.pairs if pair not in failed and (pair.link is not None or pair.probe is not None)]
    if rest:
        yield Finding(
            "links",
            Severity.NOTE,
            f"{len(rest)} of {len(evidence.pairs)} pairs carry KV",
            "measured from what the prefill workers have sent",
            "",
            tuple(
                measured(pair) + (f"; probe {pair.probe.seconds * 1e3:.0f} ms" if pair.probe else "") for pair in rest
            ),
        )
