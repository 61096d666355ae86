"""What the next step computes. Pure: no tensors, no clock, no threads.

Rules:

1. Running requests come first: those that decode (one token each), then prompts under way, oldest first. New requests
   follow in the order of their arrival, as long as tokens, places and blocks last. None overtakes the queue's head,
   but for requests with ``incoming`` KV, where only tokens are missing: they need none, and their answers have begun.
   A later turn of a client's request counts as if ``LATER`` others had arrived before it, so that one client's thousand
   sequences do not go before everybody.
2. A new request gets all blocks of its prompt at once, so a prompt under way never waits for memory. It shares those of
   its first blocks that the prefix cache has. Its last token is always computed, because its logits are needed.
3. A request whose KV leaves (``outgoing``) also gets the blocks of its longest possible answer at once: it is never
   preempted, so it must never need a block that only a preemption could free.
4. When a decoding request needs a block and none is free, the youngest request without ``outgoing`` is preempted: its
   blocks are given back, it queues again by its arrival, and it is computed anew, except for what the prefix cache
   still has of it. So the oldest request always makes progress.
5. A request whose longest form does not fit into the whole pool is not accepted (the engine's ``max_model_len``), so
   the oldest request always fits alone.
6. A new request with ``incoming`` KV loads it before it runs. It has all its blocks by then. It is neither scheduled
   nor preempted until the load has ended, well or not. Each ``incoming`` has one load at a time: the other choices of a
   request stand aside, let other requests pass, and find in the cache what the first has loaded.
7. A block is published once everything in it is computed or loaded, and not before.
8. Beside decodes, the prompts of a step are cut so that it ends within the decodes' tightest level between tokens, as
   far as its costs are known; but not below ``LEAST_PROMPT_TOKENS``, so that prompts always advance.
9. A prompt whose log probabilities are asked for takes ``MOST_REPORTED`` tokens in a step, because each needs logits of
   the whole vocabulary.

So there is no circle of waiting. A request that has blocks and does not run is loading; a load ends by itself within
its transfer's deadline, because the sender waits for no block of this pool (transfer/). A running request gets on by
rules 2 to 5, whether others load or not. A waiting request has no blocks, and waits for requests that have some.
(``tests/engine/test_deadlock.py`` visits every state of small pools.)
"""

import bisect
from dataclasses import dataclass

from kvbelt.engine.api import IncomingKV
from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.sequence import Sequence, SequenceState
from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts

S = SequenceState

#: Rule 1.
LATER = 64
_TURNS = 1 << 20  # more than there are; so no two sequences have the same place

#: Rule 9.
MOST_REPORTED = 256

#: The reason why incoming KV is not used: the blocks before it were not sent, and have been evicted here.
PREFIX_EVICTED = "prefix_evicted"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start .. start+length`` of a sequence, which this step computes."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether it has the sequence's last token, after which the next one is drawn."""
        return self.start + self.length == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Load:
    """The KV of a new request that is to be put into its blocks."""

    sequence: Sequence
    incoming: IncomingKV
    first: int  #: block of the prompt that goes into the first of ``block_ids``
    block_ids: tuple[int, ...]
    num_tokens: int  #: with KV in the sequence's blocks afterwards


@dataclass(frozen=True, slots=True)
class StepPlan:
    chunks: tuple[Chunk, ...]  #: those of one token first
    admitted: tuple[Sequence, ...]
    loads: tuple[Load, ...]  #: of some admitted requests; ``Scheduler.loaded`` ends them
    preempted: tuple[Sequence, ...]


@dataclass(slots=True)
class _Budget:
    """The tokens that a step may still take."""

    left: int
    costs: StepCosts
    level: float | None = None  #: seconds between tokens, the tightest of the step's decodes; None: any
    decodes: int = 0
    kv_tokens: int = 0  #: that they read
    prompt_tokens: int = 0  #: taken
    context: int = 0  #: the longest before a prompt's tokens

    def for_prompt(self, context: int) -> int:
        """Rule 8: tokens that a prompt may take after ``context`` ones."""
        if self.level is None:
            return self.left
        # Tokens taken before count as if they had the longest context, too.
        self.context = max(self.context, context)
        most = self.prompt_tokens + self.left
        within = self.costs.prompt_tokens_within(self.level, self.context, self.decodes, self.kv_tokens, most)
        return max(0, within - self.prompt_tokens)

    def take(self, sequence: Sequence, *, decoding: bool = False) -> list[Chunk]:
        """The next tokens of a request, as many as there is room for."""
        missing = len(sequence.token_ids) - sequence.computed
        length = min(missing, self.left if decoding else self.for_prompt(sequence.computed))
        if sequence.request.sampling.prompt_logprobs is not None:
            length = min(length, MOST_REPORTED)
        if length == 0:
            return []
        self.left -= length
        if decoding:
            self.decodes += 1
            self.kv_tokens += len(sequence.token_ids)
            level = sequence.request.itl_seconds
            if level is not None:
                self.level = level if self.level is None else min(self.level, level)
        else:
            self.prompt_tokens += length
        return [Chunk(sequence, sequence.computed, length)]


class Scheduler:
    def __init__(self, allocator: BlockAllocator, *, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self.waiting: list[Sequence] = []  #: by arrival
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []  #: by arrival
        self.preemptions_total = 0
        self.cache_queries_total = 0  #: tokens looked up in the prefix cache
        self.cache_hits_total = 0  #: tokens found there

    def add(self, sequence: Sequence) -> None:
        """Queue a new or preempted request by its arrival."""
        bisect.insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """The request ends, in any state. Its blocks stay with the caller."""
        {S.WAITING: self.waiting, S.LOADING: self.loading, S.RUNNING: self.running}[sequence.state].remove(sequence)
        sequence.enter(S.FINISHED)

    def schedule(self, costs: StepCosts = DEFAULT_COSTS) -> StepPlan:
        preempted = self._make_room_for_decodes()
        budget = _Budget(self._max_batch_tokens, costs)
        chunks: list[Chunk] = []
        # Decodes first, so that a long prompt does not delay them.
        for decoding in (True, False):
            for sequence in self.running:
                if (len(sequence.token_ids) - sequence.computed == 1) is decoding:
                    chunks += budget.take(sequence, decoding=decoding)
        admitted: list[Sequence] = []
        loads: list[Load] = []
        next_up = 0
        # A request that was just preempted would only be preempted again.
        while not preempted and next_up < len(self.waiting):
            sequence = self.waiting[next_up]
            if self._stands_aside(sequence):
                next_up += 1
                continue
            if not self._can_admit(sequence):
                break
            if sequence.incoming is None and budget.for_prompt(0) == 0:
                next_up += 1
                continue
            self.waiting.pop(next_up)
            load = self._admit(sequence)
            admitted.append(sequence)
            if load is not None:
                loads.append(load)
            else:
                chunks += budget.take(sequence)
        chunks.sort(key=lambda chunk: chunk.length != 1)
        return StepPlan(tuple(chunks), tuple(admitted), tuple(loads), tuple(preempted))

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the blocks, in every layer."""
        chunk.sequence.computed = chunk.start + chunk.length
        self._publish(chunk.sequence)

    def loaded(self, load: Load, lost: str | None) -> None:
        """A load has ended: the KV is in the blocks, or it is ``lost`` and will be computed."""
        sequence = load.sequence
        if sequence.state is not S.LOADING:
            return  # it was aborted
        sequence.incoming = None
        sequence.lost = lost
        if lost is None:
            sequence.loaded_tokens = load.num_tokens - sequence.computed
            sequence.computed = load.num_tokens
            self._publish(sequence)
        self.loading.remove(sequence)
        sequence.enter(S.RUNNING)
        bisect.insort(self.running, sequence, key=_arrival)

    def validate(self) -> None:
        """Assert that states, queues and blocks agree."""
        for queue, state in ((self.waiting, S.WAITING), (self.running, S.RUNNING), (self.loading, S.LOADING)):
            arrivals = [sequence.arrival for sequence in queue]
            assert len(set(arrivals)) == len(arrivals), "a request queues twice"
            assert queue is self.loading or arrivals == sorted(arrivals), "a queue is out of order"
            for sequence in queue:
                assert sequence.state is state
                assert sequence.published * self._block_size <= sequence.computed, "published before it was computed"
                if state is S.WAITING:
                    assert not sequence.block_ids
                    assert sequence.computed == 0
                else:
                    assert sequence.computed < len(sequence.token_ids)
                    assert len(sequence.block_ids) * self._block_size >= sequence.computed
        loading = [sequence.incoming for sequence in self.loading]
        assert None not in loading, "a request loads nothing"
        assert len(set(map(id, loading))) == len(loading), "one KV is loaded twice at a time"

    def _make_room_for_decodes(self) -> list[Sequence]:
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.state is not S.RUNNING:
                continue  # an older request has just preempted it
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
        self._allocator.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.computed = sequence.published = 0
        sequence.enter(S.WAITING)
        sequence.preemptions += 1
        self.preemptions_total += 1
        self.add(sequence)

    def _stands_aside(self, sequence: Sequence) -> bool:
        """Rule 6."""
        incoming = sequence.incoming
        return incoming is not None and any(other.incoming is incoming for other in self.loading)

    def _can_admit(self, sequence: Sequence) -> bool:
        others = len(self.running) + len(self.loading)
        if others >= self._max_running:
            return False
        # One block to spare for each of them: a request that is admitted must not be preempted at once.
        short = self._needs(sequence) + others - self._allocator.num_free
        # A cached block that is in use need not be free.
        return short <= 0 or short <= self._allocator.num_used(self._cached(sequence))

    def _admit(self, sequence: Sequence) -> Load | None:
        """Give the request its blocks. Returns the load that must end before it runs."""
        cached = self._cached(sequence)
        self._allocator.share(cached)
        # A table with cached blocks is no run of neighbours, so it needs no room to grow.
        longest = 0 if cached else self._blocks(sequence.prompt_len + sequence.max_tokens)
        sequence.block_ids = cached + self._allocator.allocate(self._needs(sequence) - len(cached), longest)
        sequence.published = len(cached)
        sequence.computed = len(cached) * self._block_size
        if sequence.request.prefix is not None and not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            self.cache_queries_total += len(sequence.token_ids)
            self.cache_hits_total += sequence.computed
        load = self._load_of(sequence)
        sequence.enter(S.RUNNING if load is None else S.LOADING)
        bisect.insort(self.running if load is None else self.loading, sequence, key=_arrival)
        return load

    def _load_of(self, sequence: Sequence) -> Load | None:
        incoming = sequence.incoming
        if incoming is None:
            return None
        first = sequence.published
        num_tokens = min(incoming.num_tokens, len(sequence.token_ids) - 1)
        if first >= incoming.first_block and num_tokens > sequence.computed:
            block_ids = sequence.block_ids[first : self._blocks(num_tokens)]
            return Load(sequence, incoming, first, tuple(block_ids), num_tokens)
        if first < incoming.first_block:
            sequence.lost = PREFIX_EVICTED
        sequence.incoming = None
        return None

    def _cached(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the request, never the last token's."""
        known = (len(sequence.token_ids) - 1) // self._block_size
        return self._allocator.cache.match(sequence.block_hashes[:known])

    def _publish(self, sequence: Sequence) -> None:
        """Rule 7."""
        prefix = sequence.request.prefix
        if prefix is None:
            return
        size, hashes = self._block_size, sequence.block_hashes
        for i in range(sequence.published, sequence.computed // size):
            if i == len(hashes):
                tokens = sequence.token_ids[i * size : (i + 1) * size]
                hashes.append(prefix.extend(hashes[-1] if hashes else prefix.root, tokens))
            self._allocator.cache.publish(hashes[i], sequence.block_ids[i])
            sequence.published = i + 1

    def _needs(self, sequence: Sequence) -> int:
        longest = len(sequence.token_ids) if sequence.preemptible else sequence.prompt_len + sequence.max_tokens
        return self._blocks(longest)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def place_of(arrivals: int, turn: int) -> int:
    """A sequence's ``arrival``: that of the ``arrivals``-th one of all."""
    return (arrivals + LATER * turn) * _TURNS + turn


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
