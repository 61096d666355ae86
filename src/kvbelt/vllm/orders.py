"""What the scheduler's side tells the worker's side with a step, and what comes back with its output. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to send a prompt of ``num_tokens`` tokens."""

    request_id: str
    handoff: PrefillHandoff
    num_tokens: int


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


@dataclass(frozen=True, slots=True)
class News:
    """From the worker's side: how transfers have ended, request by request; empty means well."""

    received: Mapping[str, str] = field(default_factory=dict)
    sent: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.received or self.sent)

    def plus(self, other: "News") -> "News":
        """Of two ranks; a failure outweighs a success."""
        return News(_worst(self.received, other.received), _worst(self.sent, other.sent))


def _worst(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    return {name: one.get(name) or other.get(name) or "" for name in (*one, *other)}
