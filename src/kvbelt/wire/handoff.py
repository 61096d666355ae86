"""``kv_transfer_params``: what the proxy and a worker tell each other about the transfer of a request's KV.

The proxy writes them into a request's body, and the worker parses them once. Times travel as remaining seconds,
because clocks of different hosts differ.
"""

from collections.abc import Mapping
from math import inf
from typing import Any, Literal

import msgspec

from kvbelt.wire.hosts import is_host, is_port
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.reasons import as_word
from kvbelt.wire.shards import ONE_STAGE


class RankAddress(msgspec.Struct, frozen=True):
    """Another parallel rank of a decode worker, on the same host and with the same key as its first."""

    engine_id: EngineId
    init_port: int
    alloc_port: int

    def __post_init__(self) -> None:
        _require_ports(self)


class ReceiverAddress(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a decode worker takes handshakes (init port) and reservations (alloc port)."""

    engine_id: EngineId
    host: str
    init_port: int
    alloc_port: int
    #: Its CURVE key in Z85, which a sender believes only if it trusts that key already. None: it asks for no keys.
    public_key: str | None = None
    #: Ranks 1, 2, … where the worker has several, stage by stage; the fields above are rank 0's.
    ranks: tuple[RankAddress, ...] = ()
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each pipeline stage

    def __post_init__(self) -> None:
        if not is_host(self.host):
            raise ValueError(f"host is {self.host[:64]!r}; it must be a host's name or address")
        _require_ports(self)

    def of_rank(self, rank: int) -> "ReceiverAddress":
        """The address of one rank."""
        if rank == 0:
            return msgspec.structs.replace(self, ranks=(), stages=ONE_STAGE)
        other = self.ranks[rank - 1]
        return ReceiverAddress(other.engine_id, self.host, other.init_port, other.alloc_port, self.public_key)


def _require_ports(address: RankAddress | ReceiverAddress) -> None:
    for name in ("init_port", "alloc_port"):
        if not is_port(getattr(address, name)):
            raise ValueError(f"{name} is {getattr(address, name)}; it must be a port of 1 to 65535")


class PrefillHandoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """To a prefill worker: compute this prompt and send its KV to ``receiver``."""

    transfer_id: TransferId
    receiver: ReceiverAddress
    deadline_seconds: float
    #: What the whole answer may have: the embedded engine refuses what does not fit before it computes the prompt.
    answer_tokens: int | None = None


class DecodeHandoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """To a decode worker: wait for the KV of this prompt under this name."""

    transfer_id: TransferId
    deadline_seconds: float
    adapter: str = ""  #: with which the prefill worker has computed it (``HandoffState``)
    tp_size: int | None = None  #: of the prefill worker (``HandoffState``); None: its ranks are as the reader's
    stages: tuple[int, ...] = ONE_STAGE  #: likewise, where ``tp_size`` is known


Handoff = PrefillHandoff | DecodeHandoff


def handoff_of(params: Mapping[str, Any]) -> Handoff:
    """The handoff in a request's parameters. Raises msgspec.ValidationError: they are not one."""
    shape: type[Handoff] = PrefillHandoff if "receiver" in params else DecodeHandoff
    return msgspec.convert(dict(params), shape)


class HandoffState(msgspec.Struct, frozen=True):
    """In a prefill worker's answer: the transfer so far.

    ``open``: it is under way or done, and the decode worker will learn its end. ``failed``: it has ended with this
    reason, and the decode worker need not wait.
    """

    transfer_id: TransferId
    state: Literal["open", "failed"]
    reason: str | None = None
    loaded_tokens: int = 0  #: tokens whose KV came from the prefill worker's host memory instead of being computed
    #: Of a chat's answer, on a server with a reasoning parser: it may have reasoning, or that has ended in the prompt.
    reasoning: Literal["none", "open", "ended"] = "none"
    adapter: str = ""  #: which LoRA adapter the prompt was computed with: equal for equal weights; empty: none
    special_tokens: bool = False  #: the server keeps them in this answer's text
    tp_size: int | None = None  #: tensor-parallel ranks that send; None: the worker does not say
    media: bool = False  #: the prompt has images, audio, video or embeddings, which its token ids do not tell
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each of its pipeline stages


class DecodeOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """In a vLLM decode server's whole answer: what became of the KV. Our own worker sends ``x-kvbelt-kv``."""

    transfer_id: TransferId
    kv: Literal["received", "recomputed"] | None = None  #: None: not known
    reason: str | None = None  #: why it was recomputed, or not needed

    @property
    def text(self) -> str | None:
        """As our own worker's header says it; None: not known."""
        return f"recomputed; reason={as_word(self.reason, 'kv_lost')}" if self.kv == "recomputed" else self.kv


class Describe(msgspec.Struct, frozen=True, tag_field="kvbelt", tag="describe", omit_defaults=True):
    """To a vLLM server: describe yourself. The answer is a ``health.ServerDescription``."""

    #: Seconds between tokens that steps beside running requests are to keep from now on, as far as prompts can be cut;
    #: 0: any; None: as before.
    itl_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.itl_seconds is not None and not 0 <= self.itl_seconds < inf:
            raise ValueError(f"itl_seconds is {self.itl_seconds}; it must be a number of seconds, or 0 for any")


class Warm(msgspec.Struct, frozen=True, tag_field="kvbelt", tag="warm"):
    """To a vLLM server: connect to these decode servers. The answer is a ``peers.PeerStates``."""

    receivers: tuple[ReceiverAddress, ...]


def prompt_transfer_id(base: TransferId, prompt_index: int) -> TransferId:
    """The transfer of one prompt of a request with several; the first keeps the request's own."""
    return base if prompt_index == 0 else TransferId(f"{base}.{prompt_index}")
