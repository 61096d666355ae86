"""The speed of the links between workers."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from kvbelt.ops.doctor.checks.identity import DATA_PATH, of_data_path
from kvbelt.ops.doctor.evidence import Evidence, PairSeen
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.wire.about import LinkTotals
from kvbelt.wire.probe import ENOUGH_OPERATIONS, LinkSpeed

#: A slower link is always slow: a quarter of gigabit Ethernet.
SLOW_GB_PER_SECOND = 0.03
#: A slower link is slow if it is busy as well.
MODEST_GB_PER_SECOND = 0.3
BUSY_SHARE = 0.5
#: Of the other links' rates. A link with less is slow.
BEHIND_OTHERS = 0.2
#: Between GPUs of one host: NVLink has hundreds of GB/s, PCIe tens.
NVLINK_GB_PER_SECOND = 5.0

#: A shorter busy time measures nothing.
_LEAST_BUSY_SECONDS = 0.2
#: A write may take this long because a process was not scheduled or a connection was being made.
_WRITE_SECONDS = 0.02
#: A process may have no CPU for this long while a write of it is in flight.
_STALL_SECONDS = 1.0
_LEAST_GPU_BYTES = 64 << 20
#: A smaller operation between GPUs measures latency.
_LEAST_GPU_WRITE = 4 << 20

_CHECK_NETWORK = (
    "check that link: ethtool DEVICE (speed, duplex), tc qdisc show, iperf3 -c HOST; on several networks name the fast "
    "one: export UCX_NET_DEVICES=mlx5_0:1 (or eth1), and pd_peer_host as its address"
)
_MORE_CPU = (
    "the bytes do not leave this host, so the workers lack CPU: see top, and nr_throttled in the cpu.stat of their "
    "cgroup; give them more, or each fewer --threads"
)


def measured(pair: PairSeen) -> str:
    """One line about what a link has moved."""
    link = pair.link
    if link is None:
        return f"{pair.prefill} → {pair.decode}: no figures of transfers"
    rate = link.gb_per_second
    speed = f"{rate:.3g} GB/s" if rate is not None else "no rate"
    stuck = f", {link.bytes_in_flight / 1e6:.1f} MB in flight" if link.bytes_in_flight else ""
    when = "while the doctor looked" if pair.recent else "since they connected"
    return (
        f"{pair.prefill} → {pair.decode}: {speed} ({link.num_bytes / 1e6:.1f} MB in {link.writes} writes, "
        f"{link.busy_seconds * 1e3:.0f} ms in flight{stuck}; {when})"
    )


def figures(pair: PairSeen) -> str:
    """One line about the prefill worker's measurement."""
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


def _microseconds(one: LinkSpeed) -> str:
    return f"{one.small_seconds * 1e6:,.0f}"


def all_figures(pairs: Iterable[PairSeen]) -> tuple[str, ...]:
    """Of the measured pairs."""
    return tuple(figures(pair) for pair in pairs if pair.probed is not None and pair.probed.write is not None)


def measured_links(evidence: Evidence) -> Iterator[Finding]:
    """The measured speed of each link, used or not."""
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
        "measured by the prefill workers with the connections and buffers of their transfers, one operation at a "
        "time, from posted to done; within a host from the CPU's cache"
        if known
        else "prefill workers measure only while they have no requests",
        "",
        tuple(figures(pair) for pair in asked),
    )


def _span(values: Sequence[float], form: str) -> str:
    least, most = format(values[0], form), format(values[-1], form)
    return least if least == most else f"{least} to {most}"


def slow(evidence: Evidence) -> Iterator[Finding]:
    """Links whose bytes per busy time are too few."""
    found = [
        (pair, severity)
        for pair in evidence.pairs
        if (severity := _how_slow(pair, evidence) or _behind_others(pair, evidence)) is not None
    ]
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
        f"KV transfers are slow {whom}",
        "if a prompt's KV comes later than its first token, the client waits for the second token, and other "
        "prompts wait for the receive buffer",
        _MORE_CPU if all(_carried_by_cpu(pair, evidence) for pair, _ in found) else _CHECK_NETWORK,
        seen + tuple(f"to compare: {measured(pair)}" for pair in others[:2]),
    )


def _how_slow(pair: PairSeen, evidence: Evidence) -> Severity | None:
    """An error needs what a machine that is short of CPU cannot cause."""
    sure = not _carried_by_cpu(pair, evidence)
    write = pair.probed.write if pair.probed is not None else None
    if write is not None:
        # UCX's own report would say so of GPUs, but it can be switched off.
        of_gpus = _between_gpus(pair, evidence) and write.num_bytes >= _LEAST_GPU_WRITE
        if _late(1, write.num_bytes, write.seconds) > 0 or (of_gpus and write.gb_per_second < NVLINK_GB_PER_SECOND):
            return Severity.ERROR if sure and write.operations >= ENOUGH_OPERATIONS else Severity.WARNING
        if of_gpus:
            return None
    link = pair.link
    if link is None or not pair.recent or link.busy_seconds < _LEAST_BUSY_SECONDS:
        return None
    rate = link.gb_per_second or 0.0
    if (late := _late(link.writes, link.num_bytes, link.busy_seconds)) > 0:
        # A link that was fast when it was measured has carried these bytes while a process did not run.
        return Severity.ERROR if sure and write is None and late > _STALL_SECONDS else Severity.WARNING
    if rate < MODEST_GB_PER_SECOND and link.busy_seconds > BUSY_SHARE * evidence.seconds > 0:
        return Severity.WARNING
    return Severity.WARNING if _slow_nvlink(pair, link, evidence) else None


def _behind_others(pair: PairSeen, evidence: Evidence) -> Severity | None:
    """Whether it has moved much less than the other links between hosts, as KVBeltLinkSlow compares them."""
    rates = {
        one: one.link.gb_per_second
        for one in evidence.pairs
        if one.link is not None
        and one.link.gb_per_second is not None
        and one.link.busy_seconds >= _LEAST_BUSY_SECONDS
        and not _carried_by_cpu(one, evidence)
    }
    behind = len(rates) > 1 and pair in rates and rates[pair] < BEHIND_OTHERS * median(rates.values())
    return Severity.WARNING if behind else None


def _late(writes: int, num_bytes: int, seconds: float) -> float:
    """Seconds beyond those that these writes may take."""
    return seconds - max(1, writes) * _WRITE_SECONDS - num_bytes / 1e9 / SLOW_GB_PER_SECOND


def _slow_nvlink(pair: PairSeen, link: LinkTotals, evidence: Evidence) -> bool:
    enough = link.num_bytes >= _LEAST_GPU_BYTES
    return enough and _between_gpus(pair, evidence) and (link.gb_per_second or 0.0) < NVLINK_GB_PER_SECOND


def _between_gpus(pair: PairSeen, evidence: Evidence) -> bool:
    """Whether both buffers are in GPU memory of one host."""
    both = [evidence.worker(pair.prefill), evidence.worker(pair.decode)]
    on_gpus = all(one is not None and one.about and one.about.buffer_device.startswith("cuda") for one in both)
    return on_gpus and evidence.within_host(pair)


def _carried_by_cpu(pair: PairSeen, evidence: Evidence) -> bool:
    """Whether the bytes cross no network and no GPU link, so that only a lack of CPU can make them slow."""
    return evidence.within_host(pair) and not _between_gpus(pair, evidence)


def _shared(slow_pairs: list[PairSeen], evidence: Evidence) -> str:
    """The worker that all slow pairs have in common, or the pairs."""
    for role in ("prefill", "decode"):
        names = {getattr(pair, role) for pair in slow_pairs}
        if len(names) == 1 and len(list(evidence.of(role))) > 1:
            verb = "from" if role == "prefill" else "to"
            return (
                f"{verb} {role} worker {names.pop()}to all others"
                if len(slow_pairs) > 1
                else (f"from {slow_pairs[0].prefill} to {slow_pairs[0].decode}")
            )
    return "between " + ", ".join(f"{pair.prefill} and {pair.decode}" for pair in slow_pairs)


def _data_path(detail: str) -> bool:
    """Whether NIXL could not move the trial's bytes, as its transfer's reason says."""
    return of_data_path(detail) or detail.endswith((": channel", ": write_failed"))


def probed(evidence: Evidence) -> Iterator[Finding]:
    """The doctor's own prompts."""
    failed = [pair for pair in evidence.pairs if pair.trial is not None and not pair.trial.ok]
    for pair in failed:
        assert pair.trial is not None
        # A late one depends on the other load, which has its own findings.
        late = "no answer" in pair.trial.detail or "more than" in pair.trial.detail
        yield Finding(
            "probe_failed",
            Severity.NOTE if late else Severity.WARNING,
            f"a trial prompt from {pair.prefill} to {pair.decode} failed",
            "it waited behind other requests, or in the transfer"
            if late
            else "the decode worker computes prompts of this pair itself, as it did this one",
            "" if late else DATA_PATH if _data_path(pair.trial.detail) else "look for the reason in docs/failures.md",
            (pair.trial.detail,),
        )
    rest = [pair for pair in evidence.pairs if pair not in failed and (pair.link is not None or pair.trial is not None)]
    whole = len(rest) + len(failed) == len(evidence.pairs)
    if rest:
        yield Finding(
            "links",
            Severity.NOTE,
            f"{len(rest)} of {len(evidence.pairs)} pairs carry KV"
            if whole
            else (f"KV has gone over {len(rest)} of {len(evidence.pairs)} pairs; the others were not needed"),
            "computed from what the prefill workers have sent"
            if whole
            else "round robin joins each prefill worker to one decode worker where their numbers have a common divisor",
            "",
            tuple(
                measured(pair) + (f"; trial prompt {pair.trial.seconds * 1e3:.0f} ms" if pair.trial else "")
                for pair in rest
            ),
        )
