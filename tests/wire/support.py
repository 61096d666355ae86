"""Messages that fit each other."""

from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

T, P, D = TransferId("t"), EngineId("p"), EngineId("d")


NAME = SlotName(D, 3, 14)


LAYOUT = KVLayout(
    num_layers=2, num_kv_heads=3, head_dim=4, block_size=16, dtype="float32", order="T2HD", block_bytes=1536
)


FIT = h.Compatibility(
    protocol=1,
    model="m",
    fingerprint="f",
    layout=LAYOUT,
    tp_size=1,
    tp_rank=0,
    hash_scheme="xxh3",
    channel="nixl",
    kv_heads=3,
)


FROM_SENDER = [
    w.Reserve(transfer_id=T, sender=P, receiver=D, num_tokens=1, num_blocks=1, num_bytes=1 << 40, deadline_seconds=1.5),
    w.Heartbeat(transfer_id=T, sender=P, slot=NAME),
    w.PartLanded(transfer_id=T, sender=P, slot=NAME, part=3, digest=(1 << 64) - 1),
    w.Commit(transfer_id=T, sender=P, slot=NAME, num_tokens=1, num_bytes=2, digest=None),
    w.Cancel(transfer_id=T, sender=P, slot=None, reason="x"),
    w.Cancelled(transfer_id=T, sender=P, slot=NAME),
]
