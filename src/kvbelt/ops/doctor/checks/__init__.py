"""The checks of a running deployment, in the order of causes: earlier findings explain later ones.

A dead worker overloads the others, a slow link fills buffers, a full buffer holds prompts back. So the first finding
is the one to look at first, whatever its severity. Symptoms and notes come last (``finding.in_order``).
"""

from collections.abc import Callable, Iterator

from kvbelt.ops.doctor.checks import (
    capacity,
    failures,
    graphics,
    identity,
    levels,
    links,
    presence,
    pressure,
    sizing,
    transport,
    versions,
)
from kvbelt.ops.doctor.evidence import Evidence
from kvbelt.ops.doctor.finding import Finding, in_order

Check = Callable[[Evidence], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    presence.proxy_answers,
    presence.prefill_there,
    presence.workers_alive,
    identity.models_equal,
    versions.kvbelt_equal,
    versions.messages_readable,
    versions.carriers_equal,
    transport.ucx_tls,
    transport.choices,
    links.slow,
    identity.pairs_connected,
    capacity.decode_overloaded,
    capacity.buffer_full,
    capacity.decode_slow,
    capacity.prefill_overloaded,
    pressure.kv_memory,
    pressure.proxy,
    pressure.memory,
    pressure.cpu,
    sizing.prefill,
    links.probed,
    links.measured_links,
    capacity.ratio,
    capacity.buffer_small,
    capacity.quarantine,
    graphics.utilisation,
    presence.workers_slow,
    versions.clocks,
    versions.hash_seeds,
    transport.between_hosts,
    transport.complaints,
    pressure.refused,
    failures.damaged,
    failures.recent,
    levels.splitting_off,
    failures.local,
    failures.late_transfers,
    levels.missed,
    levels.late_first_tokens,
    failures.where_time_goes,
)


def diagnose(evidence: Evidence) -> list[Finding]:
    """All findings, causes first."""
    return in_order([finding for check in CHECKS for finding in check(evidence)])
