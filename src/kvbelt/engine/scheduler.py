"""Who computes what in the next step. Pure: no tensors, no clock, no threads.

Rules:

1. Running requests first: those that decode (one token each), then prompts under way, oldest first; then newcomers
   in the order of their arrival, as long as tokens, places and blocks last. Nobody overtakes the head of the queue.
2. A newcomer gets all blocks of its prompt at once, so a prompt under way never waits for memory. Those of its first
   blocks that the prefix cache has it shares; its last token is always computed, for its logits are wanted.
3. A request that carries its KV away (``outgoing``) gets the blocks of its longest possible answer at once too: it is
   never preempted, so it must never need what only preemption could give.
4. When a decoding request needs a block and none is free, the youngest request without ``outgoing`` is preempted: its
   blocks are given back and it queues again by its arrival, to be computed anew, but for what the prefix cache still
   has of it. The oldest therefore always gets on.
5. A request whose longest form does not fit into the whole pool is not accepted (the engine's ``max_model_len``),
   so the oldest, alone, always fits.
6. A newcomer whose KV comes from elsewhere (``incoming``) loads it before it runs. It has all its blocks by then and
   asks for nothing more; it is neither scheduled nor preempted until it is told that the load has ended, well or not.
   One load an ``incoming`` at a time: the other choices of a request stand aside, let others pass, and find in the
   cache what the first has loaded.
7. A block is published for others once everything in it is computed or loaded, and not before.

So nobody waits in a circle. Who has blocks, and does not run, loads; a load ends by itself, within its transfer's
deadline, because whoever sends waits for no block of this pool (transfer/). Who runs gets on by rules 2 to 5, whether
others load or not. Who waits has no blocks, and waits for those that do. (``tests/engine/test_deadlock.py`` visits
every state of small pools.)
"""

import bisect
from dataclasses import dataclass

from kvbelt.engine.api import IncomingKV
from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.sequence import Sequence, SequenceState

S = SequenceState

#: Why KV that was promised is not used: the blocks before it, which were not sent, are not here any more.
PREFIX_EVICTED = "prefix_evicted"


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
class Load:
    """KV of a newcomer that is to be put into its blocks."""

    sequence: Sequence
    incoming: IncomingKV
    first: int  #: block of the prompt that goes into the first of ``block_ids``
    block_ids: tuple[int, ...]
    num_tokens: int  #: whose KV is in the sequence's blocks afterwards


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step does."""

    chunks: tuple[Chunk, ...]  #: those of one token first
    admitted: tuple[Sequence, ...]
    loads: tuple[Load, ...]  #: of some of the admitted; to be ended with ``Scheduler.loaded``
    preempted: tuple[Sequence, ...]


class Scheduler:
    """The queue, those that load, and the running set."""

    def __init__(self, allocator: BlockAllocator, *, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self.waiting: list[Sequence] = []  #: by arrival
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []  #: by arrival
        self.preemptions_total = 0
        self.cache_queries_total = 0  #: tokens looked for in the prefix cache
        self.cache_hits_total = 0  #: tokens found there

    def add(self, sequence: Sequence) -> None:
        """A newcomer, or one that was preempted, queues by its arrival."""
        bisect.insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """It ends, at whatever point. Its blocks stay with the caller."""
        {S.WAITING: self.waiting, S.LOADING: self.loading, S.RUNNING: self.running}[sequence.state].remove(sequence)
        sequence.enter(S.FINISHED)

    def schedule(self) -> StepPlan:
        """Plan the next step and allocate its blocks."""
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
        loads: list[Load] = []
        next_up = 0
        # Who was just preempted would only be preempted again.
        while not preempted and next_up < len(self.waiting):
            sequence = self.waiting[next_up]
            if self._stands_aside(sequence):
                next_up += 1
                continue
            if (budget == 0 and sequence.incoming is None) or not self._can_admit(sequence):
                break
            self.waiting.pop(next_up)
            load = self._admit(sequence)
            admitted.append(sequence)
            if load is not None:
                loads.append(load)
            elif budget > 0:
                missing = len(sequence.token_ids) - sequence.computed
                chunks.append(Chunk(sequence, sequence.computed, min(missing, budget)))
                budget -= chunks[-1].length
        chunks.sort(key=lambda chunk: chunk.length != 1)
        return StepPlan(tuple(chunks), tuple(admitted), tuple(loads), tuple(preempted))

    def computed(self, chunk: Chunk) -> None:
        """Its keys and values are in the blocks, in every layer."""
        chunk.sequence.computed = chunk.start + chunk.length
        self._publish(chunk.sequence)

    def loaded(self, load: Load, lost: str | None) -> None:
        """A load has ended: the KV is in the blocks, or it is ``lost`` and will be computed."""
        sequence = load.sequence
        if sequence.state is not S.LOADING:
            return  # it was aborted meanwhile
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
        """Check what the comments above promise.

        Raises:
            AssertionError: one of them does not hold.
        """
        for queue, state in ((self.waiting, S.WAITING), (self.running, S.RUNNING), (self.loading, S.LOADING)):
            arrivals = [sequence.arrival for sequence in queue]
            assert len(set(arrivals)) == len(arrivals), "somebody queues twice"
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
        assert None not in loading, "it has nothing to load"
        assert len(set(map(id, loading))) == len(loading), "KV is loaded twice at a time"

    def _make_room_for_decodes(self) -> list[Sequence]:
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.state is not S.RUNNING:
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
        # One block to spare for each of them: admitting somebody only to preempt him at once is wasted work.
        short = self._needs(sequence) + others - self._allocator.num_free
        # What somebody else uses anyway need not be free.
        return short <= 0 or short <= self._allocator.num_used(self._cached(sequence))

    def _admit(self, sequence: Sequence) -> Load | None:
        """Give it its blocks. Returns what is to be loaded before it can run."""
        cached = self._cached(sequence)
        self._allocator.share(cached)
        # A table with cached blocks is no run of neighbours, so room to grow would be wasted on it.
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
        """Blocks that it need not compute. Never the last token's."""
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
        if not sequence.preemptible:
            return self._blocks(sequence.prompt_len + sequence.max_tokens)
        return self._blocks(len(sequence.token_ids))

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
