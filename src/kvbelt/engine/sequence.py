"""One request as the engine knows it, and where it may be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from kvbelt.engine.api import GenerationRequest, IncomingKV


class SequenceState(Enum):
    """Where a request is."""

    WAITING = auto()  #: has no blocks
    LOADING = auto()  #: has blocks for everything it knows; their KV is being loaded
    RUNNING = auto()  #: has blocks for everything computed and for the next step
    FINISHED = auto()  #: uses no blocks; a reader, or a load that has not ended yet, may


S = SequenceState

#: From where to where a request may go.
TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    S.WAITING: frozenset({S.LOADING, S.RUNNING, S.FINISHED}),
    S.LOADING: frozenset({S.RUNNING, S.FINISHED}),
    S.RUNNING: frozenset({S.WAITING, S.FINISHED}),  # WAITING: preempted
    S.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as the engine knows it: the only record of it."""

    request: GenerationRequest
    arrival: int
    max_tokens: int  #: of the answer, the model's context included
    token_ids: list[int] = field(init=False)  #: prompt, then answer
    state: SequenceState = S.WAITING
    block_ids: list[int] = field(default_factory=list)
    #: Tokens whose KV is in the blocks; 0 <= computed <= len(token_ids), less than it while running.
    computed: int = 0
    #: Of its full blocks, as many as were needed yet: the prompt's, then the answer's. Empty: it shares nothing.
    block_hashes: list[bytes] = field(init=False)
    #: The first blocks that it will not write to any more: published, or twins of published ones.
    published: int = 0
    #: KV to load at its admission. None: there is none, or not any more.
    incoming: IncomingKV | None = field(init=False)
    lost: str | None = None  #: why ``incoming`` is not used; low cardinality
    cached_tokens: int = 0  #: that the prefix cache had at its first admission
    loaded_tokens: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        """The answer is empty."""
        self.token_ids = list(self.request.prompt_token_ids)
        self.block_hashes = list(self.request.prefix.hashes) if self.request.prefix is not None else []
        self.incoming = self.request.incoming

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def output_len(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def preemptible(self) -> bool:
        """Whether its blocks may be taken away: nobody carries their contents elsewhere."""
        return self.request.outgoing is None

    def enter(self, state: SequenceState) -> None:
        """Go there.

        Raises:
            AssertionError: there is no such way.
        """
        assert state in TRANSITIONS[self.state], f"a {self.state.name} request cannot be {state.name}"
        self.state = state
