"""The facts about a belt for ``kvbelt doctor``, for both engines.

Some do not change, and come from the process that has the belt: its environment is what the channel has read. The
others are a ``BeltView``, one for each tensor-parallel rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from kvbelt.channels.factory import VendorChannel
from kvbelt.transfer.belt import Belt
from kvbelt.wire.about import About, LinkTotals, TransportChoice

#: The last warnings of each rank's channel.
_MOST_COMPLAINTS = 5


@dataclass(frozen=True, slots=True)
class BeltView:
    """The facts about one belt that change."""

    transports: tuple[TransportChoice, ...] = ()
    links: tuple[LinkTotals, ...] = ()
    complaints: tuple[str, ...] = ()


def transports_of(channel: VendorChannel) -> list[TransportChoice]:
    return [TransportChoice(one.scope, one.operation, one.memory, one.transport) for one in channel.choices()]


def view_of(belt: Belt, channel: VendorChannel) -> BeltView:
    """As of now. Waits for a turn of the belt's thread."""
    complaints = channel.complaints()[-_MOST_COMPLAINTS:]
    return BeltView(tuple(transports_of(channel)), tuple(belt.links()), tuple(complaints))


def with_belt(facts: About, belt: Belt, channel: VendorChannel, buffer_device: str, buffer_bytes: int) -> About:
    """Add the facts about a belt that do not change."""
    layout = belt.identity.layout
    return msgspec.structs.replace(
        facts,
        buffer_device=buffer_device,
        buffer_bytes=buffer_bytes,
        bytes_per_token=layout.slot_bytes(1) // layout.block_size,
        compatibility=belt.identity.compatibility(channel.name),
        backends=list(channel.backends),
        plugins=list(channel.plugins),
    )


def with_views(facts: About, views: Iterable[BeltView]) -> About:
    """Add the views of all ranks, in the order of the ranks. Equal transports and complaints are named once."""
    views = list(views)
    return msgspec.structs.replace(
        facts,
        transports=list(dict.fromkeys(choice for view in views for choice in view.transports)),
        links=[link for view in views for link in view.links],
        complaints=list(dict.fromkeys(line for view in views for line in view.complaints)),
    )
