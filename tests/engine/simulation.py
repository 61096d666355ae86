"""The scheduler and the pool's blocks without any model: what is in a block is written down instead of computed.

Every token's keys and values stand for the tokens before it. So the simulation sees when a request would read what is
not its own, or not there yet, and when it would write into what others read.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from kvbelt.engine.api import GenerationRequest, SamplingParams
from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.scheduler import Load, Scheduler, StepPlan
from kvbelt.engine.sequence import Sequence, SequenceState
from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from tests.engine.support import prefix_of

BLOCK = 4

ANYONE = object()


@dataclass(eq=False)
class Arrived:
    """KV from another process."""

    num_tokens: int
    first_block: int = 0


class Simulation:
    """Runs plans: computes chunks, draws a token where one is due, ends what is full."""

    def __init__(
        self,
        num_blocks: int,
        max_batch_tokens: int = 8,
        max_running: int = 4,
        *,
        block: int = BLOCK,
        scheduler: type[Scheduler] = Scheduler,
        naming=prefix_of,
        costs: StepCosts = DEFAULT_COSTS,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.scheduler = scheduler(
            self.allocator, block_size=block, max_batch_tokens=max_batch_tokens, max_running=max_running
        )
        self.num_blocks = num_blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.block = block
        self.naming = naming
        self.costs = costs
        self.arrivals = 0
        self.finished: list[Sequence] = []
        self.first_steps: list[int] = []  # of requests without incoming KV
        self.loads: list[Load] = []
        self.holds: list[list[int]] = []
        #: By block and place in it: the tokens that this token's keys and values were computed from.
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}

    def add(
        self,
        prompt: int | SequenceOf[int],
        answer: int,
        *,
        outgoing: bool = False,
        incoming: Arrived | None = None,
        caches: bool = False,
        itl_seconds: float | None = None,
    ) -> Sequence:
        """A request of so many tokens in and out."""
        self.arrivals += 1
        tokens = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
        request = GenerationRequest(
            str(self.arrivals),
            tokens,
            SamplingParams(),
            print,
            incoming=incoming,
            outgoing=ANYONE if outgoing else None,
            prefix=self.naming(tokens, self.block) if caches else None,
            itl_seconds=itl_seconds,
        )
        sequence = Sequence(request, self.arrivals, answer)
        self.scheduler.add(sequence)
        return sequence

    @property
    def alive(self) -> list[Sequence]:
        """Requests that have not ended."""
        return self.scheduler.running + self.scheduler.loading + self.scheduler.waiting

    def step(self) -> StepPlan:
        """Plan, check the plan, and perform it."""
        plan = self.scheduler.schedule(self.costs)
        assert sum(chunk.length for chunk in plan.chunks) <= self.max_batch_tokens
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        assert len(self.scheduler.running) + len(self.scheduler.loading) <= self.max_running
        assert all(sequence.preemptible for sequence in plan.preempted)
        lengths = [chunk.length == 1 for chunk in plan.chunks]
        assert lengths == sorted(lengths, reverse=True), "single tokens come first"
        self.first_steps.extend(s.arrival for s in plan.admitted if not s.preemptions and s.request.incoming is None)
        for load in plan.loads:
            self.allocator.share(load.block_ids)
            self.loads.append(load)
        self.validate()
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.length > 0
            self._read(chunk.sequence, chunk.start)
        for chunk in plan.chunks:
            self._write(chunk.sequence, chunk.start, chunk.start + chunk.length)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            samples = chunk.samples
            self.scheduler.computed(chunk)
            if samples:
                sequence.token_ids.append(sum(sequence.token_ids) % 3)
                if len(sequence.token_ids) - sequence.prompt_len == sequence.max_tokens:
                    self.end(sequence)
        self.validate()
        return plan

    def end(self, sequence: Sequence) -> None:
        """End a request."""
        outgoing = sequence.request.outgoing is not None
        self.scheduler.remove(sequence)
        prompt_blocks = -(-sequence.prompt_len // self.block) if outgoing else 0
        held = sequence.block_ids[:prompt_blocks]
        self.allocator.release(sequence.block_ids[prompt_blocks:])
        if held:
            self.holds.append(held)
        sequence.block_ids = []
        self.finished.append(sequence)

    def end_load(self, load: Load, *, lost: bool = False) -> None:
        """End a load, which writes its blocks at its very end."""
        self.loads.remove(load)
        if not lost:
            tokens = load.sequence.request.prompt_token_ids
            for place in range(load.first * self.block, load.num_tokens):
                self.contents[load.block_ids[place // self.block - load.first], place % self.block] = tokens[
                    : place + 1
                ]
        self.allocator.release(load.block_ids)
        self.scheduler.loaded(load, "lost" if lost else None)
        self.validate()

    def release(self, hold: list[int]) -> None:
        """A carrier has read the blocks."""
        self.holds.remove(hold)
        self.allocator.release(hold)
        self.validate()

    def validate(self) -> None:
        """Check every invariant."""
        self.scheduler.validate()
        tables = [sequence.block_ids for sequence in self.scheduler.running + self.scheduler.loading]
        self.allocator.validate([*tables, *self.holds, *(load.block_ids for load in self.loads)])

    def _read(self, sequence: Sequence, end: int) -> None:
        for place in range(end):
            block = sequence.block_ids[place // self.block]
            own = tuple(sequence.token_ids[: place + 1])
            assert self.contents.get((block, place % self.block)) == own, "it reads what is not its own"

    def _write(self, sequence: Sequence, start: int, end: int) -> None:
        for place in range(start, end):
            block = sequence.block_ids[place // self.block]
            assert self.allocator.cache.used_at[block] == 0, "it writes into what others may read"
            self.contents[block, place % self.block] = tuple(sequence.token_ids[: place + 1])


def states(simulation: Simulation) -> list[SequenceState]:
    """The states of all requests that have not ended, by arrival."""
    return [sequence.state for sequence in sorted(simulation.alive, key=lambda s: s.arrival)]
