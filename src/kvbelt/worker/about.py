"""``GET /kvbelt/about`` of a worker: the process, its model and its belt."""

import msgspec

from kvbelt import about
from kvbelt.belt_facts import view_of, with_belt, with_views
from kvbelt.channels.factory import VendorChannel
from kvbelt.engine.engine import Engine
from kvbelt.settings import BeltFile
from kvbelt.transfer.belt import Belt
from kvbelt.wire.about import About
from kvbelt.wire.layout import KVLayout


def wire_layout(engine: Engine) -> KVLayout:
    """The engine's pool in the words of the handshake."""
    return msgspec.convert(engine.layout, KVLayout, from_attributes=True)


def about_worker(
    engine: Engine, belt: Belt | None, channel: VendorChannel | None, file: BeltFile | None, role: str
) -> About:
    """As of now. Waits a turn of the belt."""
    layout = wire_layout(engine)
    device = engine.pool.storage.device
    facts = msgspec.structs.replace(
        about.of_this_process(role, "embedded", device=str(device)),
        bytes_per_token=layout.slot_bytes(1) // layout.block_size,
        max_model_len=engine.max_model_len,
    )
    if belt is None or channel is None or file is None:
        return facts
    buffer_device = file.pd_buffer_device if device.type == "cuda" else "cpu"
    facts = with_belt(facts, belt, channel, buffer_device, file.pd_buffer_size or 0)
    return with_views(facts, [view_of(belt, channel)])
