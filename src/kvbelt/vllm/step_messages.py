"""What the scheduler's side and the worker's side tell each other: ``StepCommands`` down, ``StepReport`` back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvbelt.belt_facts import BeltView
from kvbelt.wire.handoff import DecodeHandoff, DecodeOutcome, PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.steps import StepsNow

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class ScheduledPrompt:
    request_id: str
    new_block_ids: Sequence[int]
    num_computed_tokens: int  #: before the step
    num_scheduled_tokens: int
    #: Of each other group of layers; ``new_block_ids`` are those of the first (``groups``).
    others: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    num_tokens: int
    first_block: int  #: of the prompt; those before it were not sent


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send a prompt of ``num_tokens`` tokens."""

    request_id: str
    handoff: PrefillHandoff
    num_tokens: int
    prefix_hashes: tuple[bytes, ...] = ()  #: of its whole blocks, which the receiver may hold already


@dataclass(frozen=True, slots=True)
class Written:
    """After this step these blocks, from the prompt's block ``first`` on, are final in every layer.

    With several groups of layers the last ones are followed by those of the other groups.
    """

    request_id: str
    first: int
    block_ids: tuple[int, ...]
    last: bool  #: the prompt ends with them


@dataclass(frozen=True, slots=True)
class Claim:
    request_id: str
    handoff: DecodeHandoff


@dataclass(frozen=True, slots=True)
class Load:
    """Put the KV into these blocks: the prompt's blocks from ``first`` on, up to ``num_tokens`` tokens."""

    request_id: str
    first: int
    block_ids: tuple[int, ...]
    num_tokens: int
    now: bool = False  #: before this step's forward pass, which reads the blocks; else beside the running batch
    #: Of each other group of layers, likewise; 0 where it wants none.
    others: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy of all layers between these blocks and these places of host memory."""

    request_id: str
    block_ids: tuple[int, ...]
    places: tuple[int, ...]
    to_host: bool = False  #: else from there


@dataclass(frozen=True, slots=True)
class StepCommands:
    """From the scheduler to every worker, with one step. A worker obeys them in the order of these fields."""

    held: tuple[bytes, ...] = ()  #: hashes of prompt blocks that vLLM's prefix cache holds from now on
    gone: tuple[bytes, ...] = ()  #: and of those that it holds no longer
    preempted: tuple[str, ...] = ()  #: requests that lose their blocks: stop reading them at once
    sends: tuple[Send, ...] = ()
    written: tuple[Written, ...] = ()
    claims: tuple[Claim, ...] = ()
    loads: tuple[Load, ...] = ()
    drops: tuple[str, ...] = ()  #: requests whose KV is not needed any more
    warms: tuple[ReceiverAddress, ...] = ()  #: decode servers to connect to before a request needs them
    view: bool = False  #: report a ``BeltView``
    steps: StepsNow | None = None  #: tell the proxy
    outcomes: tuple[DecodeOutcome, ...] = ()  #: likewise
    copies: tuple[HostCopy, ...] = ()  #: beside this step, begun in this order
    keeps: tuple[HostCopy, ...] = ()  #: blocks that this step completes, to places


@dataclass(frozen=True, slots=True)
class StepReport:
    """From a worker to the scheduler, with the output of one step. A reason is empty where all went well."""

    received: Mapping[str, str] = field(default_factory=dict)  #: request to reason, of loads that have ended
    sent: Mapping[str, str] = field(default_factory=dict)  #: request to reason, of sends that have ended
    spoiled: frozenset[int] = frozenset()  #: places of host memory that were not written as commanded
    peers: Mapping[EngineId, str] = field(default_factory=dict)  #: decode server to reason, of ``warms``
    views: Mapping[int, BeltView] = field(default_factory=dict)  #: by rank

    def __bool__(self) -> bool:
        return bool(self.received or self.sent or self.spoiled or self.peers or self.views)

    def plus(self, other: "StepReport") -> "StepReport":
        """The reports of two ranks in one; a failure outweighs a success."""
        return StepReport(
            _worst(self.received, other.received),
            _worst(self.sent, other.sent),
            self.spoiled | other.spoiled,
            _worst(self.peers, other.peers),
            {**self.views, **other.views},
        )


def _worst(one: Mapping[Name, str], other: Mapping[Name, str]) -> dict[Name, str]:
    return {name: one.get(name) or other.get(name) or "" for name in (*one, *other)}
