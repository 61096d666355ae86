"""What the scheduler's side tells the worker's side with a step, and what comes back with its output. Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvbelt.vllm.about import BeltLook
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class ScheduledPrompt:
    """What one step does with one request, as the scheduler's side hears it."""

    request_id: str
    new_block_ids: Sequence[int]
    num_computed_tokens: int  #: before the step
    num_scheduled_tokens: int


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send a prompt of ``num_tokens`` tokens."""

    request_id: str
    handoff: PrefillHandoff
    num_tokens: int
    prefix_hashes: tuple[bytes, ...] = ()  #: of its whole blocks, which the receiver may hold already


@dataclass(frozen=True, slots=True)
class Written:
    """After this step these blocks, from the prompt's block ``first`` on, are final in every layer."""

    request_id: str
    first: int
    block_ids: tuple[int, ...]
    last: bool  #: the prompt ends with them


@dataclass(frozen=True, slots=True)
class Claim:
    """The KV of this transfer will be wanted."""

    request_id: str
    handoff: DecodeHandoff


@dataclass(frozen=True, slots=True)
class Load:
    """Put the KV into these blocks: the prompt's blocks from ``first`` on, up to ``num_tokens`` tokens."""

    request_id: str
    first: int
    block_ids: tuple[int, ...]
    num_tokens: int
    now: bool = False  #: before this step's forward pass, which reads them; not beside it


@dataclass(frozen=True, slots=True)
class Restore:
    """Fill these blocks, all layers of them, from these places in host memory."""

    request_id: str
    block_ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """After this step, copy these blocks, all layers of them, to these places in host memory."""

    request_id: str
    block_ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Orders:
    """For one step. A worker takes them in the order of these fields."""

    #: Requests whose blocks are being taken away: stop reading them, now.
    preempted: tuple[str, ...] = ()
    sends: tuple[Send, ...] = ()
    written: tuple[Written, ...] = ()
    claims: tuple[Claim, ...] = ()
    loads: tuple[Load, ...] = ()
    #: Requests whose KV is not wanted any more.
    drops: tuple[str, ...] = ()
    restores: tuple[Restore, ...] = ()
    keeps: tuple[Keep, ...] = ()
    #: Blocks of prompts, by hash, that vLLM's prefix cache now holds, and that it holds no more.
    held: tuple[bytes, ...] = ()
    gone: tuple[bytes, ...] = ()
    #: Decode servers to connect to, before a request needs them.
    warms: tuple[ReceiverAddress, ...] = ()
    look: bool = False  #: somebody asks how the belt is


@dataclass(frozen=True, slots=True)
class News:
    """From the worker's side: how transfers have ended, request by request; empty means well."""

    received: Mapping[str, str] = field(default_factory=dict)
    sent: Mapping[str, str] = field(default_factory=dict)
    spoiled: frozenset[int] = frozenset()  #: places in host memory that do not hold what was to be kept there
    #: Decode servers that were to be connected to: empty, or why it failed.
    peers: Mapping[EngineId, str] = field(default_factory=dict)
    #: How the belt of each rank is, where that was asked.
    looks: Mapping[int, BeltLook] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.received or self.sent or self.spoiled or self.peers or self.looks)

    def plus(self, other: "News") -> "News":
        """Of two ranks; a failure outweighs a success."""
        return News(
            _worst(self.received, other.received),
            _worst(self.sent, other.sent),
            self.spoiled | other.spoiled,
            _worst(self.peers, other.peers),
            {**self.looks, **other.looks},
        )


def _worst(one: Mapping[Name, str], other: Mapping[Name, str]) -> dict[Name, str]:
    return {name: one.get(name) or other.get(name) or "" for name in (*one, *other)}
