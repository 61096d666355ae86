"""Engines under a virtual clock take the time that their costs say."""

import heapq
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.pacing.costs import StepCosts
from kvbelt.simulate.engine import Job, SimulatedEngine
from kvbelt.simulate.load import Request
from kvbelt.simulate.model import EngineModel, learned_costs

COSTS = StepCosts(base=5e-3, prefill=2e-3, token=25e-6, token_context=0.0, decode=0.05e-3, kv_token=0.0)
PLAIN = EngineModel(COSTS, looks_ahead=False)


class Bench:
    """One engine, and what it told, by request number."""

    def __init__(self, model: EngineModel) -> None:
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.turn = count()
        self.first: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.engine = SimulatedEngine(
            model,
            self,
            1,
            lambda job, now: self.first.update({job.request.number: now}),
            lambda job, now: self.ended.update({job.request.number: now}),
        )

    def at(self, moment: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.turn), call))

    def job(self, number: int, at: float, prompt: int, output: int, **more: bool) -> Job:
        job = Job(Request(number, at, prompt, output), prompt, output, 0, generates=more.pop("generates", True), **more)
        self.at(at, lambda now: self.engine.add(job, now))
        return job

    def run(self) -> None:
        while self.events:
            now, _, call = heapq.heappop(self.events)
            call(now)


def test_a_request_alone_takes_its_prefill_and_one_step_a_token() -> None:
    bench = Bench(PLAIN)
    bench.job(0, 0.0, 1000, 11)
    bench.run()
    assert bench.first[0] == pytest.approx(COSTS.step_seconds(1000, 0, 0, 0))
    assert bench.ended[0] == pytest.approx(bench.first[0] + 10 * COSTS.step_seconds(0, 0, 1, 0))


def test_a_long_prompt_takes_several_steps_of_at_most_the_limit() -> None:
    bench = Bench(replace(PLAIN, most_prompt_tokens=400))
    bench.job(0, 0.0, 1000, 2)
    bench.run()
    assert bench.first[0] == pytest.approx(sum(COSTS.step_seconds(tokens, 0, 0, 0) for tokens in (400, 400, 200)))


def test_prompts_beside_decodes_are_cut_to_the_level() -> None:
    bench = Bench(replace(PLAIN, itl=0.02))
    bench.job(0, 0.0, 100, 200)
    bench.job(1, 0.1, 4000, 2)
    bench.run()
    assert max(one.step for one in bench.engine.stretches) <= 0.02
    assert bench.ended.keys() == {0, 1}


def test_an_engine_that_looks_ahead_takes_work_in_the_step_after_the_next() -> None:
    """Work comes in the middle of a step; the next one was fixed before."""
    first = {}
    for ahead in (False, True):
        bench = Bench(replace(PLAIN, looks_ahead=ahead))
        bench.job(0, 0.0, 100, 1000)
        bench.job(1, 1.0, 100, 2)
        bench.run()
        first[ahead] = bench.first[1]
    assert first[True] - first[False] == pytest.approx(COSTS.step_seconds(0, 0, 1, 0))


def test_received_kv_needs_no_prefill_and_passes_prompts_that_wait_for_a_seat() -> None:
    bench = Bench(replace(PLAIN, most_requests=2))
    bench.job(0, 0.0, 100, 50)
    bench.job(1, 0.0, 100, 80)
    bench.job(2, 0.1, 100, 5)
    bench.job(3, 0.1, 7000, 5, received=True)
    bench.run()
    assert 3 not in bench.first
    assert bench.ended[3] < bench.first[2]


def test_a_job_whose_kv_is_sent_ends_with_its_first_token() -> None:
    bench = Bench(PLAIN)
    bench.job(0, 0.0, 100, 50, generates=False)
    bench.run()
    assert (set(bench.first), set(bench.ended)) == ({0}, set())


def test_requests_wait_for_kv_memory() -> None:
    bench = Bench(replace(PLAIN, kv_capacity=300))
    bench.job(0, 0.0, 100, 100)
    bench.job(1, 0.0, 100, 100)
    bench.run()
    assert bench.first[1] > bench.ended[0]


def test_a_dead_engine_gives_back_its_jobs_and_ends_none() -> None:
    bench = Bench(PLAIN)
    jobs = [bench.job(0, 0.0, 100, 50), bench.job(1, 0.1, 100, 50, received=True)]
    lost: list[Job] = []
    bench.at(0.15, lambda now: lost.extend(bench.engine.stop(now)))
    bench.run()
    assert set(lost) == set(jobs)
    assert bench.ended == {}
    assert 0 < bench.engine.decode_steps_of(jobs[0], 9.0) < 50


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 3000), st.integers(2, 60)), min_size=1, max_size=8),
    ahead=st.booleans(),
    seats=st.integers(1, 4),
)
def test_every_job_ends_and_steps_fill_the_time(
    arrivals: list[tuple[float, int, int]], ahead: bool, seats: int
) -> None:
    """Each job gets its tokens; no two steps overlap; tokens and steps are the same number."""
    bench = Bench(replace(PLAIN, looks_ahead=ahead, most_requests=seats))
    jobs = [bench.job(number, *arrival) for number, arrival in enumerate(arrivals)]
    bench.run()
    assert set(bench.ended) == set(bench.first) == set(range(len(arrivals)))
    stretches = bench.engine.stretches
    for before, after in pairwise(stretches):
        assert after.begun >= before.begun + before.step * before.steps - 1e-9
    for job in jobs:
        mine = [one for one in stretches[job.joined - 1 :] if one.begun < bench.ended[job.request.number] - 1e-9]
        assert sum(one.steps for one in mine) == job.output - 1


def test_learned_costs_are_those_of_an_engine_whose_steps_are_sums() -> None:
    costs = learned_costs(EngineModel(COSTS))
    for amounts in ((0, 0, 8, 60_000), (1024, 2048, 8, 60_000), (7500, 0, 0, 0)):
        assert costs.step_seconds(*amounts) == pytest.approx(COSTS.step_seconds(*amounts), rel=0.02)
