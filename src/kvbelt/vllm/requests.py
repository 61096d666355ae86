"""The requests that send or load KV: their records, their states, and the two tables that move them.

A table answers every event in every state: the next state, and what the scheduler's side does about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

import msgspec

from kvbelt.wire.handoff import DecodeHandoff, DecodeOutcome, Handoff, PrefillHandoff

HandoffT = TypeVar("HandoffT", bound=Handoff)


class Effect(Enum):
    NOTHING = auto()
    SEND = auto()  #: the worker begins to send the prompt
    STOP = auto()  #: the worker stops reading the prompt's blocks before this step overwrites them
    HOLD = auto()  #: vLLM keeps the blocks until the worker has read them
    LOAD = auto()  #: the worker fills the blocks
    DROP = auto()  #: the worker gives up the KV


class SendState(Enum):
    WAITING = auto()  #: not scheduled yet; the worker does not know it
    SENDING = auto()
    ABANDONED = auto()  #: preempted; the worker does not know it any more
    FINISHED = auto()


class SendEvent(Enum):
    SCHEDULED = auto()  #: a step computes a part of the prompt
    PREEMPTED = auto()
    FINISHED = auto()  #: or aborted


class LoadState(Enum):
    AWAITED = auto()  #: claimed from the belt
    LOADING = auto()
    FOLLOWING = auto()  #: another request of this server loads the same transfer (n > 1)
    OVER = auto()  #: nothing more is expected of the belt
    FINISHED = auto()


class LoadEvent(Enum):
    LOAD = auto()  #: the blocks are allocated and must be filled
    NO_LOAD = auto()  #: the blocks are allocated, and nothing is to be loaded: cached here, or too late
    ENDED = auto()  #: the load has ended, well or not
    FINISHED = auto()  #: or aborted


_S, _SE, _L, _LE, _NOTHING = SendState, SendEvent, LoadState, LoadEvent, Effect.NOTHING

SENDING: Mapping[tuple[SendState, SendEvent], tuple[SendState, Effect]] = {
    (_S.WAITING, _SE.SCHEDULED): (_S.SENDING, Effect.SEND),
    (_S.WAITING, _SE.PREEMPTED): (_S.WAITING, _NOTHING),
    (_S.WAITING, _SE.FINISHED): (_S.FINISHED, _NOTHING),
    (_S.SENDING, _SE.SCHEDULED): (_S.SENDING, _NOTHING),
    (_S.SENDING, _SE.PREEMPTED): (_S.ABANDONED, Effect.STOP),
    # An aborted request, too: the worker cancels the transfer, and reports when it reads no more.
    (_S.SENDING, _SE.FINISHED): (_S.FINISHED, Effect.HOLD),
    (_S.ABANDONED, _SE.SCHEDULED): (_S.ABANDONED, _NOTHING),
    (_S.ABANDONED, _SE.PREEMPTED): (_S.ABANDONED, _NOTHING),
    (_S.ABANDONED, _SE.FINISHED): (_S.FINISHED, _NOTHING),
}

LOADING: Mapping[tuple[LoadState, LoadEvent], tuple[LoadState, Effect]] = {
    (_L.AWAITED, _LE.LOAD): (_L.LOADING, Effect.LOAD),
    (_L.AWAITED, _LE.NO_LOAD): (_L.OVER, Effect.DROP),
    (_L.AWAITED, _LE.ENDED): (_L.OVER, _NOTHING),
    (_L.AWAITED, _LE.FINISHED): (_L.FINISHED, Effect.DROP),
    (_L.LOADING, _LE.LOAD): (_L.LOADING, _NOTHING),
    (_L.LOADING, _LE.NO_LOAD): (_L.LOADING, _NOTHING),
    (_L.LOADING, _LE.ENDED): (_L.OVER, _NOTHING),
    (_L.LOADING, _LE.FINISHED): (_L.FINISHED, Effect.DROP),
    (_L.FOLLOWING, _LE.LOAD): (_L.FOLLOWING, _NOTHING),
    (_L.FOLLOWING, _LE.NO_LOAD): (_L.FOLLOWING, _NOTHING),
    (_L.FOLLOWING, _LE.ENDED): (_L.OVER, _NOTHING),
    (_L.FOLLOWING, _LE.FINISHED): (_L.FINISHED, _NOTHING),
    (_L.OVER, _LE.LOAD): (_L.OVER, _NOTHING),
    (_L.OVER, _LE.NO_LOAD): (_L.OVER, _NOTHING),
    (_L.OVER, _LE.ENDED): (_L.OVER, _NOTHING),
    (_L.OVER, _LE.FINISHED): (_L.FINISHED, _NOTHING),
}


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt whose KV depends on its tokens and the salt alone, so that its blocks may be shared."""

    token_ids: Sequence[int]
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Loadable:
    """The answer to vLLM's question how much of a prompt can be loaded."""

    tokens: int | None  #: None: ask again later
    now: bool = False  #: before the step's forward pass; else beside the running batch


def with_remaining_time(handoff: HandoffT, deadline: float, now: float) -> HandoffT:
    """The handoff as it is sent on: times travel as remaining seconds."""
    return msgspec.structs.replace(handoff, deadline_seconds=max(deadline - now, 0.001))


@dataclass(slots=True, eq=False)
class Outgoing:
    handoff: PrefillHandoff
    num_tokens: int
    deadline: float
    hashes: tuple[bytes, ...] = ()  #: of its whole blocks, if its KV may be shared
    state: SendState = SendState.WAITING
    block_ids: list[int] = field(default_factory=list)
    others: tuple[list[int], ...] = ()  #: of each other group of layers
    announced: int = 0  #: blocks of ``block_ids`` that the worker was told of
    failure: str = ""

    def on(self, event: SendEvent) -> Effect:
        self.state, effect = SENDING[self.state, event]
        return effect


@dataclass(slots=True, eq=False)
class Incoming:
    handoff: DecodeHandoff
    num_tokens: int  #: of the prompt as this server has it
    deadline: float
    hashes: tuple[bytes, ...] = ()  #: of its whole blocks, until the ledger has been told of them
    state: LoadState = LoadState.AWAITED
    outcome: str | None = None  #: None: not known yet; empty: received; else the reason why not
    was_waited_for: bool = False  #: the belt was given time to say whether the KV has arrived
    now: bool = False  #: what vLLM was promised last has arrived
    useless: str = ""  #: why the KV is not read even if it comes

    def on(self, event: LoadEvent) -> Effect:
        self.state, effect = LOADING[self.state, event]
        return effect

    @property
    def told(self) -> DecodeOutcome:
        """The outcome as the proxy is told of it."""
        transfer_id, outcome = self.handoff.transfer_id, self.outcome
        if outcome is None:
            return DecodeOutcome(transfer_id)
        return DecodeOutcome(transfer_id, "received" if outcome in ("", "cached") else "recomputed", outcome or None)
