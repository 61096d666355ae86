"""What follows from step costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.pacing.costs import AIM, DEFAULT_COSTS, LEAST_PROMPT_TOKENS, StepCosts

COSTS = StepCosts(base=5e-3, prefill=2e-3, token=25e-6, token_context=1e-9, decode=0.05e-3, kv_token=30e-9)


@given(tokens=st.integers(1, 20_000), per_step=st.integers(64, 8192), decodes=st.integers(0, 60))
def test_a_prompt_takes_as_long_as_its_steps(tokens: int, per_step: int, decodes: int) -> None:
    """The closed form equals the sum over the steps."""
    kv, seconds = 5000 * decodes, 0.0
    for done in range(0, tokens, per_step):
        seconds += COSTS.step_seconds(min(per_step, tokens - done), done, decodes, kv)
    assert COSTS.prefill_seconds(tokens, 0, per_step, decodes, kv) == pytest.approx(seconds)


@given(level=st.floats(0.001, 1.0), decodes=st.integers(0, 200), context=st.integers(0, 100_000))
def test_the_chunk_keeps_the_level_or_is_the_least(level: float, decodes: int, context: int) -> None:
    """A chunk keeps the level, or a prompt would not advance."""
    kv = 5000 * decodes
    tokens = COSTS.prompt_tokens_within(level, context, decodes, kv, most=8192)
    assert LEAST_PROMPT_TOKENS <= tokens <= 8192
    assert tokens == LEAST_PROMPT_TOKENS or COSTS.step_seconds(tokens, context, decodes, kv) <= level * AIM + 1e-12


def test_costs_that_are_all_zero_limit_nothing() -> None:
    """A worker whose steps cost nothing takes the most."""
    assert StepCosts(0, 0, 0, 0, 0, 0).prompt_tokens_within(0.05, 0, 10, 10_000, most=2048) == 2048


def test_the_default_is_marked_as_learned_from_nothing() -> None:
    """A default has no samples."""
    assert DEFAULT_COSTS.samples == 0
