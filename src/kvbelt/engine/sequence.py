"""One request as the engine knows it, and its states."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from kvbelt.engine.api import GenerationRequest, IncomingKV


class SequenceState(Enum):
    WAITING = auto()  #: has no blocks
    LOADING = auto()  #: has blocks for all its tokens; their KV is being loaded
    RUNNING = auto()  #: has blocks for its computed tokens and for the next step
    FINISHED = auto()  #: has no blocks; a consumer, or a load that has not ended, may still use them


S = SequenceState

#: The states that may follow each state.
TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    S.WAITING: frozenset({S.LOADING, S.RUNNING, S.FINISHED}),
    S.LOADING: frozenset({S.RUNNING, S.FINISHED}),
    S.RUNNING: frozenset({S.WAITING, S.FINISHED}),  # WAITING: preempted
    S.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    request: GenerationRequest
    arrival: int  #: its place in queues, which no other sequence has
    max_tokens: int  #: of the answer, the model's context included
    token_ids: list[int] = field(init=False)  #: of the prompt and of the answer so far
    state: SequenceState = S.WAITING
    block_ids: list[int] = field(default_factory=list)
    #: Tokens with KV in the blocks; 0 <= computed <= len(token_ids), and less than that while running.
    computed: int = 0
    #: Of its full blocks, as many as were needed so far. Empty: its blocks are not shared.
    block_hashes: list[bytes] = field(init=False)
    #: Number of first blocks that are final: published, or equal to published ones.
    published: int = 0
    #: KV to load at its admission; None: there is none, or it has been loaded or lost.
    incoming: IncomingKV | None = field(init=False)
    lost: str | None = None  #: why ``incoming`` is not used; low cardinality
    cached_tokens: int = 0  #: found in the prefix cache at its first admission
    loaded_tokens: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.block_hashes = list(self.request.prefix.hashes) if self.request.prefix is not None else []
        self.incoming = self.request.incoming

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def preemptible(self) -> bool:
        """Whether its blocks may be taken away: no consumer reads them."""
        return self.request.outgoing is None

    def enter(self, state: SequenceState) -> None:
        assert state in TRANSITIONS[self.state], f"a {self.state.name} request cannot be {state.name}"
        self.state = state
