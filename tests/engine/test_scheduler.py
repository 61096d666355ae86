"""The plan of a step, without any model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.engine.api import PrefixHashes
from kvbelt.engine.scheduler import PREFIX_EVICTED, Load, Scheduler
from kvbelt.engine.sequence import Sequence, SequenceState
from kvbelt.wire.block_hash import chained, root
from tests.engine.simulation import BLOCK, Arrived, Simulation, states

#: Few tokens, so that prompts begin alike now and then.
prompts = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=20)
kinds = st.sampled_from(["plain", "plain", "outgoing", "incoming", "both"])
request = st.tuples(prompts, st.integers(1, 16), kinds, st.integers(0, 2), st.booleans())


def run_at_random(simulation: Simulation, requests, data: st.DataObject) -> None:
    """Requests come, are aborted, load and are held in any order, until all have ended."""
    to_come = list(requests)

    def let_go() -> bool:
        """Something ends for which the engine may have waited."""
        ends = [lambda load=load: simulation.end_load(load, lost=data.draw(st.booleans())) for load in simulation.loads]
        ends += [lambda hold=hold: simulation.release(hold) for hold in simulation.holds]
        if ends:
            data.draw(st.sampled_from(ends))()
        return bool(ends)

    for _ in range(2000):
        if to_come and data.draw(st.integers(0, 2)) == 0:
            tokens, answer, kind, first_block, caches = to_come.pop()
            kv = (
                Arrived(len(tokens), min(first_block, (len(tokens) - 1) // BLOCK))
                if kind in {"incoming", "both"}
                else None
            )
            simulation.add(tokens, answer, outgoing=kind in {"outgoing", "both"}, incoming=kv, caches=caches)
        if not (simulation.alive or to_come or simulation.loads or simulation.holds):
            break
        if simulation.alive and data.draw(st.integers(0, 25)) == 0:
            simulation.end(data.draw(st.sampled_from(simulation.alive)))
        if data.draw(st.integers(0, 3)) == 0:
            let_go()
        plan = simulation.step()
        if not (plan.chunks or plan.preempted or plan.admitted) and simulation.alive:
            assert let_go(), "no request makes progress, and nothing can change that"
    assert len(simulation.finished) == len(requests)
    assert simulation.allocator.num_free == simulation.num_blocks


@settings(deadline=None)
@given(
    requests=st.lists(request, min_size=1, max_size=8),
    num_blocks=st.integers(9, 24),
    budget=st.integers(4, 30),
    data=st.data(),
)
def test_every_request_is_served(requests, num_blocks, budget, data) -> None:
    """Whatever is shared, loaded, lost or aborted, every request ends, in order, and reads only its own tokens."""
    simulation = Simulation(num_blocks, budget)
    run_at_random(simulation, requests, data)
    assert simulation.first_steps == sorted(simulation.first_steps)


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
    """Without free blocks the oldest goes on; the preempted one is ahead of those that never ran."""
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


def test_shared_blocks_are_counted_once() -> None:
    """Requests fit side by side with shared blocks that would not fit with their own."""
    simulation = Simulation(12, max_batch_tokens=40)
    prompt = [1] * 6 * BLOCK
    simulation.add(prompt, 1, caches=True)
    simulation.step()
    for _ in range(3):
        simulation.add([*prompt, 2], 3, caches=True)
    simulation.step()
    assert states(simulation) == [SequenceState.RUNNING] * 3


def test_kv_from_elsewhere_is_loaded_before_a_request_runs() -> None:
    """While it loads, a request has its blocks and is not scheduled; others run."""
    simulation = Simulation(20, max_batch_tokens=16)
    other = simulation.add(4, 20)
    loading = simulation.add(10, 3, incoming=Arrived(10))
    plan = simulation.step()
    assert [load.sequence for load in plan.loads] == [loading]
    for _ in range(3):
        assert [chunk.sequence for chunk in simulation.step().chunks] == [other]
    simulation.end_load(simulation.loads[0])
    (chunk,) = (chunk for chunk in simulation.step().chunks if chunk.sequence is loading)
    assert (chunk.start, chunk.length) == (9, 1)


def test_lost_kv_is_computed() -> None:
    """After a failed load the request starts like a new one."""
    simulation = Simulation(20, max_batch_tokens=16)
    loading = simulation.add(10, 3, incoming=Arrived(10))
    simulation.step()
    simulation.end_load(simulation.loads[0], lost=True)
    (chunk,) = simulation.step().chunks
    assert (chunk.start, chunk.length) == (0, 10)
    assert loading.lost == "lost"


def test_only_what_is_not_cached_is_loaded() -> None:
    """The load fills the blocks behind the cached ones, except the last token's own block."""
    simulation = Simulation(20, max_batch_tokens=40)
    head = [1] * 3 * BLOCK
    simulation.add(head, 1, caches=True)
    simulation.step()
    loading = simulation.add(
        [*head, *range(2 * BLOCK), 7], 3, incoming=Arrived(5 * BLOCK + 1, first_block=2), caches=True
    )
    (load,) = simulation.step().loads
    assert (load.first, load.num_tokens) == (3, 5 * BLOCK)
    assert load.block_ids == tuple(loading.block_ids[3:5])


def test_nothing_is_loaded_that_is_cached() -> None:
    """If the cache has the whole prompt, the request runs at once."""
    simulation = Simulation(20, max_batch_tokens=40)
    prompt = [1] * 3 * BLOCK
    simulation.add([*prompt, 2], 1, caches=True)
    simulation.step()
    again = simulation.add([*prompt, 2], 3, incoming=Arrived(3 * BLOCK + 1, first_block=2), caches=True)
    plan = simulation.step()
    assert (plan.loads, [chunk.sequence for chunk in plan.chunks]) == ((), [again])
    assert again.lost is None


def test_kv_behind_evicted_blocks_is_lost() -> None:
    """If blocks that were not sent are evicted, the rest of the KV is lost."""
    simulation = Simulation(20, max_batch_tokens=40)
    late = simulation.add(5 * BLOCK, 3, incoming=Arrived(5 * BLOCK, first_block=2), caches=True)
    plan = simulation.step()
    assert (plan.loads, late.lost, late.incoming) == ((), PREFIX_EVICTED, None)
    assert [(chunk.start, chunk.length) for chunk in plan.chunks] == [(0, 5 * BLOCK)]


def test_choices_of_one_request_load_once() -> None:
    """The second choice stands aside while the first loads, lets others pass, and shares what was loaded."""
    simulation = Simulation(20, max_batch_tokens=40)
    kv = Arrived(4 * BLOCK)
    first, second = (simulation.add(4 * BLOCK, 3, incoming=kv, caches=True) for _ in range(2))
    other = simulation.add(3, 3)
    simulation.step()
    assert states(simulation) == [SequenceState.LOADING, SequenceState.WAITING, SequenceState.RUNNING]
    assert len(other.token_ids) - other.prompt_len == 1
    simulation.end_load(simulation.loads[0])
    (load,) = simulation.step().loads
    assert (load.sequence, load.first, len(load.block_ids)) == (second, 3, 1)
    assert first.block_ids[:3] == second.block_ids[:3]
    assert second.cached_tokens == 3 * BLOCK


def test_a_load_begins_beside_a_full_step() -> None:
    """A request that needs no tokens of the step is admitted although a long prompt takes them all."""
    simulation = Simulation(30, max_batch_tokens=8)
    simulation.add(40, 1)
    simulation.step()
    simulation.add(10, 1, incoming=Arrived(10))
    assert len(simulation.step().loads) == 1


def test_kv_from_elsewhere_does_not_wait_for_prompts() -> None:
    """A prompt that finds no tokens left in the step waits, and lets a request pass that needs none."""
    simulation = Simulation(40, max_batch_tokens=8)
    simulation.add(40, 1)
    simulation.step()
    prompt, loading = simulation.add(10, 1), simulation.add(10, 1, incoming=Arrived(10))
    simulation.step()
    assert (prompt.state, loading.state) == (SequenceState.WAITING, SequenceState.LOADING)


def test_a_prompt_that_waits_for_memory_is_not_passed() -> None:
    """Nor by a request that needs no tokens: it could take the memory again and again."""
    simulation = Simulation(16, max_batch_tokens=8)
    simulation.add(40, 1)
    simulation.step()
    prompt, loading = simulation.add(40, 1), simulation.add(5, 1, incoming=Arrived(5))
    simulation.step()
    assert (prompt.state, loading.state) == (SequenceState.WAITING, SequenceState.WAITING)


class PublishedAtAdmission(Scheduler):
    """A mutant: blocks can be found as soon as they are allocated."""

    def _admit(self, sequence: Sequence) -> Load | None:
        load = super()._admit(sequence)
        computed, sequence.computed = sequence.computed, sequence.prompt_len
        self._publish(sequence)
        sequence.computed = computed
        sequence.published = computed // BLOCK  # so that it does not notice
        return load


def named_by_content_alone(tokens, block: int) -> PrefixHashes:
    """A mutant: a block's hash does not depend on the blocks before it."""
    hashes = tuple(chained(root(), tokens[at : at + block]) for at in range(0, len(tokens) - block + 1, block))
    return PrefixHashes(root(), hashes, lambda _parent, ids: chained(root(), ids))


@pytest.mark.parametrize(
    "mutant", [{"scheduler": PublishedAtAdmission}, {"naming": named_by_content_alone}], ids=["early", "unchained"]
)
def test_a_broken_cache_would_be_seen(mutant) -> None:
    """The simulation notices blocks that are published too early, or under the wrong hash."""

    def serve(**how) -> None:
        simulation = Simulation(40, max_batch_tokens=6, **how)
        for head in (1, 2):
            for _ in range(2):
                simulation.add([head] * BLOCK + [3] * 2 * BLOCK, 2, caches=True)
        while simulation.alive:
            simulation.step()

    serve()
    with pytest.raises(AssertionError, match=r"not its own|others may read"):
        serve(**mutant)


def test_outgoing_gets_all_its_blocks_at_once() -> None:
    """A request that is never preempted never needs another block."""
    simulation = Simulation(10)
    sequence = simulation.add(5, 16, outgoing=True)
    simulation.step()
    assert len(sequence.block_ids) == 6


def test_no_request_overtakes_the_head_of_the_queue() -> None:
    """A small request does not overtake a large one that waits for memory."""
    simulation = Simulation(8, max_batch_tokens=32)
    simulation.add(16, 8)
    simulation.step()
    large, small = simulation.add(20, 1), simulation.add(1, 1)
    simulation.step()
    assert simulation.scheduler.waiting == [large, small]
