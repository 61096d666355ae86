"""The plan of a step, without any model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.engine.api import GenerationRequest, SamplingParams
from kvbelt.engine.pool import BlockAllocator
from kvbelt.engine.scheduler import Scheduler, Sequence, StepPlan

BLOCK = 4
ANYONE = object()


class Simulation:
    """Runs plans: computes chunks, draws a token where one is due, ends what is full."""

    def __init__(self, num_blocks: int, max_batch_tokens: int = 8, max_running: int = 4) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(
            self.allocator, block_size=BLOCK, max_batch_tokens=max_batch_tokens, max_running=max_running
        )
        self.num_blocks = num_blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.arrivals = 0
        self.finished: list[Sequence] = []
        self.first_steps: list[int] = []

    def add(self, prompt: int, answer: int, *, outgoing: bool = False) -> Sequence:
        """A request of so many tokens in and out."""
        self.arrivals += 1
        request = GenerationRequest(
            str(self.arrivals), tuple(range(prompt)), SamplingParams(), print, outgoing=ANYONE if outgoing else None
        )
        sequence = Sequence(request, self.arrivals, answer)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        """Plan, check the plan, and do it."""
        plan = self.scheduler.schedule()
        assert sum(chunk.length for chunk in plan.chunks) <= self.max_batch_tokens
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        assert len(self.scheduler.running) <= self.max_running
        assert all(sequence.preemptible for sequence in plan.preempted)
        lengths = [chunk.length == 1 for chunk in plan.chunks]
        assert lengths == sorted(lengths, reverse=True), "single tokens come first"
        self.first_steps.extend(sequence.arrival for sequence in plan.admitted if not sequence.preemptions)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.computed
            assert chunk.length > 0
            assert len(sequence.block_ids) * BLOCK >= chunk.start + chunk.length
            samples = chunk.samples
            sequence.computed += chunk.length
            if samples:
                sequence.token_ids.append(0)
                if sequence.output_len == sequence.max_tokens:
                    self.end(sequence)
        self.validate()
        return plan

    def end(self, sequence: Sequence) -> None:
        """It is over."""
        self.scheduler.remove(sequence)
        self.allocator.free(sequence.block_ids)
        sequence.block_ids = []
        self.finished.append(sequence)

    def validate(self) -> None:
        """Check every invariant."""
        self.scheduler.validate()
        self.allocator.validate([sequence.block_ids for sequence in self.scheduler.running], [])


request = st.tuples(st.integers(1, 20), st.integers(1, 16), st.booleans())


@settings(deadline=None)
@given(
    requests=st.lists(request, min_size=1, max_size=8),
    num_blocks=st.integers(9, 24),
    budget=st.integers(4, 30),
    data=st.data(),
)
def test_everybody_gets_served(requests, num_blocks, budget, data) -> None:
    """Whatever comes and whenever it is aborted, every request ends, newcomers start in order, and no block leaks."""
    simulation = Simulation(num_blocks, budget)
    to_come = list(requests)
    for _ in range(2000):
        if to_come and data.draw(st.integers(0, 2)) == 0:
            prompt, answer, outgoing = to_come.pop()
            simulation.add(prompt, answer, outgoing=outgoing)
        everybody = simulation.scheduler.running + simulation.scheduler.waiting
        if not everybody and not to_come:
            break
        if everybody and data.draw(st.integers(0, 25)) == 0:
            simulation.end(data.draw(st.sampled_from(everybody)))
        plan = simulation.step()
        assert plan.chunks or not simulation.scheduler.running + simulation.scheduler.waiting
    assert len(simulation.finished) == len(requests)
    assert simulation.first_steps == sorted(simulation.first_steps)
    assert simulation.allocator.num_free == num_blocks


def test_decodes_do_not_wait_for_a_long_prompt() -> None:
    """A step with a long prompt under way still gives every decoding request its token."""
    simulation = Simulation(40, max_batch_tokens=8)
    decoding = simulation.add(3, 20)
    simulation.step()
    simulation.add(30, 2)
    for _ in range(4):
        plan = simulation.step()
        assert plan.chunks[0].sequence is decoding
        assert [chunk.length for chunk in plan.chunks] == [1, 7]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    """Out of blocks, the oldest goes on; the preempted one is ahead of those who never ran."""
    simulation = Simulation(6, max_batch_tokens=16)
    old, young = simulation.add(7, 12), simulation.add(7, 12)
    while not young.preemptions:
        simulation.step()
    late = simulation.add(1, 1)
    assert simulation.scheduler.waiting == [young, late]
    assert old.state is not young.state
    while len(simulation.finished) < 3:
        simulation.step()
    assert old.preemptions == 0


def test_outgoing_gets_all_its_blocks_at_once() -> None:
    """A request that is never preempted never has to ask for more."""
    simulation = Simulation(10)
    sequence = simulation.add(5, 16, outgoing=True)
    simulation.step()
    assert len(sequence.block_ids) == 6


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    """A small request does not slip past a large one that waits for memory."""
    simulation = Simulation(8, max_batch_tokens=32)
    simulation.add(16, 8)
    simulation.step()
    large, small = simulation.add(20, 1), simulation.add(1, 1)
    simulation.step()
    assert simulation.scheduler.waiting == [large, small]
