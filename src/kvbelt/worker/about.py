"""What a worker says of itself in ``GET /kvbelt/about``: the process, its model, its belt."""

import msgspec

from kvbelt import about
from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel
from kvbelt.engine.engine import Engine
from kvbelt.settings import BeltFile
from kvbelt.transfer.belt import Belt
from kvbelt.wire.about import About, Road
from kvbelt.worker.belt_setup import wire_layout

Channel = NixlChannel | MooncakeChannel


class WorkerFacts:
    """What is known once the worker is ready; ``about`` puts it together with what changes."""

    def __init__(self, engine: Engine, belt: Belt | None, channel: Channel | None, file: BeltFile | None) -> None:
        self._engine = engine
        self._belt = belt
        self._channel = channel
        self._file = file

    def about(self, role: str) -> About:
        """As of now. Waits a turn of the belt."""
        engine, belt, channel, file = self._engine, self._belt, self._channel, self._file
        layout = wire_layout(engine)
        device = engine.pool.storage.device
        said = msgspec.structs.replace(
            about.of_this_process(role, "embedded"),
            device=str(device),
            bytes_per_token=layout.slot_bytes(1) // layout.block_size,
            max_model_len=engine.max_model_len,
        )
        if belt is None or channel is None or file is None:
            return said
        return msgspec.structs.replace(
            said,
            buffer_device=file.pd_buffer_device if device.type == "cuda" else "cpu",
            buffer_bytes=file.pd_buffer_size or 0,
            compatibility=belt.identity.compatibility(channel.name),
            backends=list(channel.backends),
            plugins=list(channel.plugins),
            roads=[Road(road.scope, road.operation, road.memory, road.transport) for road in channel.choices()],
            links=belt.links(),
            complaints=channel.complaints()[-5:],
        )
