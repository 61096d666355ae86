"""What an engine says about its steps."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.engine.api import SamplingParams
from kvbelt.engine.pace import Pace, work_of
from kvbelt.engine.scheduler import Chunk
from kvbelt.engine.settings import EngineSettings
from kvbelt.pacing.costs import StepCosts
from tests.engine.simulation import BLOCK, Arrived, Simulation
from tests.engine.support import Client, engine_of

ATTENTION = StepCosts(base=0, prefill=0, token=0, token_context=1, decode=0, kv_token=0)


def chunk(start: int, length: int) -> Chunk:
    """Of any request."""
    return Chunk(SimpleNamespace(), start, length)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(2, 600)), min_size=1, max_size=6))
def test_several_prompts_cost_what_each_costs(prompts: list[tuple[int, int]]) -> None:
    """Their attention adds up, but for the rounding of a context to whole tokens."""
    each = sum(ATTENTION.step_seconds(length, start, 0, 0) for start, length in prompts)
    tokens, context, *_ = work_of(chunk(start, length) for start, length in prompts)
    assert ATTENTION.step_seconds(tokens, context, 0, 0) == pytest.approx(each, abs=tokens)


def test_single_tokens_are_decodes() -> None:
    """They read the KV before them and their own."""
    assert work_of([chunk(99, 1), chunk(9, 1), chunk(200, 50)]) == (50, 200, 2, 110)


def test_what_is_to_do_is_counted_once() -> None:
    """Of prompts what is neither computed, cached nor loaded; of decodes the KV that their next step reads."""
    simulation = Simulation(60, max_batch_tokens=8, max_running=3)
    pace = Pace(EngineSettings(Path(), block_size=BLOCK, max_batch_tokens=8, max_running=3), simulation.allocator)

    def now() -> tuple[int, int, int]:
        steps = pace.now(simulation.alive)
        return steps.prompt_tokens, steps.decodes, steps.kv_tokens

    simulation.add(6, 20, caches=True)  # its first block will be cached
    simulation.step()
    assert now() == (0, 1, 7)
    simulation.add(20, 2)
    simulation.step()
    assert now() == (20 - 7, 1, 8)
    simulation.add(10, 2, incoming=Arrived(10))
    assert now() == (20 - 7, 1, 8), "what comes from elsewhere is not computed here"
    simulation.step()
    assert now() == (20 - 14, 1, 9)
    simulation.add(9, 2, caches=True)
    assert now() == (20 - 14 + 9 - BLOCK, 1, 9)


def test_an_engine_learns_what_its_steps_cost(tiny_llama: Path) -> None:
    """Each step is a sample, and its clock gives the seconds: here a tenth passes with each look at it."""
    tenths = iter(range(100_000))
    with engine_of(tiny_llama, clock=lambda: next(tenths) / 10) as engine:
        assert engine.steps().costs.samples == 0
        Client(engine, list(b"a prompt"), SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)).wait()
        Client(engine, list(b"another"), SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)).wait()
        steps = engine.steps()
    assert steps.costs.samples >= 9
    assert steps.costs.step_seconds(0, 0, 1, 10) == pytest.approx(0.1, rel=0.2)
    assert (steps.prompt_tokens, steps.decodes, steps.kv_tokens) == (0, 0, 0)
