"""Who computes what in the next step. Pure: no tensors, no clock, no threads.

Rules:

1. Running requests first: those that decode (one token each), then prompts under way, oldest first; then newcomers
   in the order of their arrival, as long as tokens, places and blocks last. Nobody overtakes the head of the queue.
2. A newcomer gets all blocks of its prompt at once, so a prompt under way never waits for memory.
3. A request that carries its KV away (``outgoing``) gets the blocks of its longest possible answer at once too: it is
   never preempted, so it must never need what only preemption could give.
4. When a decoding request needs a block and none is free, the youngest request without ``outgoing`` is preempted: its
   blocks are freed and it queues again by its arrival, to be computed anew. The oldest therefore always gets on.
5. A request whose longest form does not fit into the whole pool is not accepted (the engine's ``max_model_len``),
   so the oldest, alone, always fits.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from kvbelt.engine.api import GenerationRequest
from kvbelt.engine.pool import BlockAllocator


class SequenceState(Enum):
    """Where a request is."""

    WAITING = auto()  #: has no blocks
    RUNNING = auto()  #: has blocks for everything computed and for the next step
    FINISHED = auto()  #: its blocks are free, or held for a reader


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as the engine knows it: the only record of it."""

    request: GenerationRequest
    arrival: int
    max_tokens: int  #: of the answer, the model's context included
    token_ids: list[int] = field(init=False)  #: prompt, then answer
    state: SequenceState = SequenceState.WAITING
    block_ids: list[int] = field(default_factory=list)
    #: Tokens whose KV is in the blocks; 0 <= computed <= len(token_ids), less than it while running.
    computed: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        """The answer is empty."""
        self.token_ids = list(self.request.prompt_token_ids)

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
        """Rule 3."""
        return self.request.outgoing is None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start .. start+length`` of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's last token, after which the next one is drawn."""
        return self.start + self.length == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step does."""

    chunks: tuple[Chunk, ...]  #: those of one token first
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]


class Scheduler:
    """The queue and the running set."""

    def __init__(self, allocator: BlockAllocator, *, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self.waiting: list[Sequence] = []  #: by arrival
        self.running: list[Sequence] = []  #: by arrival
        self.preemptions_total = 0

    def add(self, sequence: Sequence) -> None:
        """A newcomer, or one that was preempted, queues by its arrival."""
        bisect.insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """It ends, at whatever point. Its blocks stay with the caller."""
        (self.running if sequence.state is SequenceState.RUNNING else self.waiting).remove(sequence)
        sequence.state = SequenceState.FINISHED

    def schedule(self, on_admit: Callable[[Sequence], None] = lambda _: None) -> StepPlan:
        """Plan the next step and allocate its blocks.

        Args:
            on_admit: called for each newcomer once it has blocks and before its chunk is cut; may raise ``computed``
                to what it has put into them.
        """
        preempted = self._make_room_for_decodes()
        budget = self._max_batch_tokens
        chunks: list[Chunk] = []
        # Decodes first: a long prompt must not make them wait.
        for decoding in (True, False):
            for sequence in self.running:
                missing = len(sequence.token_ids) - sequence.computed
                if (missing == 1) is decoding and budget > 0:
                    chunks.append(Chunk(sequence, sequence.computed, min(missing, budget)))
                    budget -= chunks[-1].length
        admitted: list[Sequence] = []
        # Who was just preempted would only be preempted again.
        while not preempted and self.waiting and budget > 0 and self._can_admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            self._admit(sequence)
            on_admit(sequence)
            admitted.append(sequence)
            chunks.append(Chunk(sequence, sequence.computed, min(len(sequence.token_ids) - sequence.computed, budget)))
            budget -= chunks[-1].length
        chunks.sort(key=lambda chunk: chunk.length != 1)
        return StepPlan(tuple(chunks), tuple(admitted), tuple(preempted))

    def validate(self) -> None:
        """Check what the comments above promise.

        Raises:
            AssertionError: one of them does not hold.
        """
        for queue, state in ((self.waiting, SequenceState.WAITING), (self.running, SequenceState.RUNNING)):
            arrivals = [sequence.arrival for sequence in queue]
            assert arrivals == sorted(set(arrivals)), "a queue is out of order"
            for sequence in queue:
                assert sequence.state is state
                if state is SequenceState.WAITING:
                    assert not sequence.block_ids
                    assert sequence.computed == 0
                else:
                    assert sequence.computed < len(sequence.token_ids)
                    assert len(sequence.block_ids) * self._block_size >= sequence.computed

    def _make_room_for_decodes(self) -> list[Sequence]:
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted by an older one, just now
            short = self._blocks(len(sequence.token_ids)) - len(sequence.block_ids)
            while short > self._allocator.num_free:
                victim = next(s for s in reversed(self.running) if s.preemptible)
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                if short > 0:
                    self._allocator.grow(sequence.block_ids, short)
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._allocator.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.computed = 0
        sequence.state = SequenceState.WAITING
        sequence.preemptions += 1
        self.preemptions_total += 1
        self.add(sequence)

    def _can_admit(self, sequence: Sequence) -> bool:
        if len(self.running) >= self._max_running:
            return False
        # One block to spare for each that runs: admitting somebody only to preempt him at once is wasted work.
        spare = len(self.running)
        return self._needs(sequence) + spare <= self._allocator.num_free

    def _admit(self, sequence: Sequence) -> None:
        longest = self._blocks(sequence.prompt_len + sequence.max_tokens)
        sequence.block_ids = self._allocator.allocate(self._needs(sequence), longest)
        sequence.state = SequenceState.RUNNING
        bisect.insort(self.running, sequence, key=_arrival)

    def _needs(self, sequence: Sequence) -> int:
        if not sequence.preemptible:
            return self._blocks(sequence.prompt_len + sequence.max_tokens)
        return self._blocks(len(sequence.token_ids))

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
