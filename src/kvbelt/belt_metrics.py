"""A belt's metrics from its snapshot. A worker and a vLLM server export the same names."""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from kvbelt.metrics import counter, gauge, summary
from kvbelt.transfer.receive import states as receiver_states
from kvbelt.transfer.receive.states import ReceiverState
from kvbelt.transfer.send import states as sender_states
from kvbelt.transfer.send.states import SenderState
from kvbelt.wire.about import LinkTotals, TransportChoice
from kvbelt.wire.load import BeltSnapshot

#: In the order of the enumerations, without the final states.
_SENDING = [state.value for state in SenderState if state not in sender_states.FINAL]
_RECEIVING = [state.value for state in ReceiverState if state not in receiver_states.FINAL]


def belt_families(belt: BeltSnapshot) -> Iterator[Metric]:
    """All metrics of a belt, on either side."""
    yield gauge("kvbelt_receive_buffer_bytes", belt.receive_bytes)
    yield gauge("kvbelt_overflow_buffer_bytes", belt.overflow_bytes)
    yield gauge("kvbelt_overflow_bytes", belt.overflow_bytes_used)
    held = {
        "reserved": belt.bytes_reserved,
        "committed": belt.bytes_committed,
        "quarantined": belt.bytes_quarantined,
    }
    yield gauge("kvbelt_receive_bytes", held)
    yield gauge("kvbelt_staging_buffer_bytes", belt.staging_bytes)
    yield gauge("kvbelt_staging_bytes", belt.staging_bytes_used)
    # Zeros are exported, too: a series that comes and goes has no average over time.
    now = {("send", state): belt.sends.get(state, 0) for state in _SENDING if belt.staging_bytes}
    now |= {("receive", state): belt.arrivals.get(state, 0) for state in _RECEIVING if belt.receive_bytes}
    yield gauge("kvbelt_transfers", now)
    ends = (("send", belt.sent_total), ("receive", belt.received_total))
    ended = {(side, reason): n for side, reasons in ends for reason, n in reasons.items()}
    yield counter("kvbelt_transfers_ended_total", ended)
    yield counter("kvbelt_sent_bytes_total", belt.sent_bytes_total)
    yield counter("kvbelt_received_bytes_total", belt.received_bytes_total)
    yield counter("kvbelt_reused_bytes_total", belt.reused_bytes_total)
    yield counter("kvbelt_writes_total", belt.writes_total)
    yield summary("kvbelt_write_seconds", belt.write_seconds.count, belt.write_seconds.total)
    yield summary("kvbelt_transfer_exposed_seconds", belt.exposed_seconds.count, belt.exposed_seconds.total)
    yield gauge("kvbelt_connected_receivers", belt.peers)
    refused = {(socket, reason): n for socket, reasons in belt.refused_total.items() for reason, n in reasons.items()}
    yield counter("kvbelt_refused_messages_total", refused)


def link_families(links: Iterable[LinkTotals]) -> Iterator[Metric]:
    known = list(links)
    yield counter("kvbelt_link_bytes_total", {link.engine_id: link.num_bytes for link in known})
    yield counter("kvbelt_link_busy_seconds_total", {link.engine_id: link.busy_seconds for link in known})


def transport_families(choices: Iterable[TransportChoice]) -> Iterator[Metric]:
    chosen: dict[tuple[str, ...], float] = {
        (one.scope, one.operation, one.memory, one.transport): float(one.over_tcp) for one in choices
    }
    yield gauge("kvbelt_transport_over_tcp", chosen)
