"""Step costs learned from steps."""

import random

import pytest

from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from kvbelt.pacing.learner import StepLearner

#: Of an 8B model on an H200, roughly.
H200 = StepCosts(base=4.75e-3, prefill=2.5e-3, token=22e-6, token_context=1e-9, decode=0.02e-3, kv_token=34e-9)


def _run(learner: StepLearner, truth: StepCosts, steps: int, seed: int, slow: float = 1.0) -> None:
    """Steps of a worker that decodes and now and then computes a prompt in chunks; 2 % of noise."""
    rng = random.Random(seed)
    for _ in range(steps):
        prompt = rng.choice([0, 0, 0, 0, 1300, 7500])
        context = 0 if prompt != 1300 else rng.choice([0, 1300, 2600, 5200])
        decodes = rng.randint(0 if prompt else 1, 15)
        kv = decodes * rng.randint(7000, 8000)
        seconds = truth.step_seconds(prompt, context, decodes, kv) * slow * (1 + rng.gauss(0, 0.02))
        learner.observe(seconds, prompt, context, decodes, kv)


#: Work that placement asks about: prompt tokens, context, decodes, tokens of KV.
WORK = [(7500, 0, 0, 0), (1300, 2600, 10, 76_000), (0, 0, 1, 7600), (0, 0, 12, 90_000)]


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_steps_predict_within_a_twentieth(work: tuple[int, int, int, int], seed: int) -> None:
    """After a hundred steps, the seconds of other steps are known within 5 %."""
    learner = StepLearner()
    _run(learner, H200, 100, seed)
    assert learner.costs.step_seconds(*work) == pytest.approx(H200.step_seconds(*work), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_far_from_the_default_is_learned_as_soon(seed: int) -> None:
    """A CPU's steps take fifty times as long as the default says; after a hundred, prompts are known within 15 %."""
    cpu = StepCosts(base=0.2, prefill=0.1, token=1.5e-3, token_context=5e-8, decode=2e-3, kv_token=1e-6)
    learner = StepLearner()
    _run(learner, cpu, 100, seed)
    for prompt in (1300, 7500):
        assert learner.costs.step_seconds(prompt, 0, 0, 0) == pytest.approx(cpu.step_seconds(prompt, 0, 0, 0), rel=0.15)


def test_the_unexplained_part_is_the_noise() -> None:
    """Sigma is the relative noise of the steps."""
    learner = StepLearner()
    _run(learner, H200, 500, seed=1)
    assert 0.01 < learner.costs.sigma < 0.04


def test_without_steps_the_default_stands() -> None:
    """Before the first step, the default holds."""
    costs = StepLearner().costs
    assert (costs.base, costs.token, costs.samples) == (DEFAULT_COSTS.base, DEFAULT_COSTS.token, 0)


def test_costs_that_no_step_shows_keep_their_default() -> None:
    """A worker that only decodes says nothing about prompts."""
    learner = StepLearner()
    for _ in range(200):
        learner.observe(H200.step_seconds(0, 0, 4, 30_000), 0, 0, 4, 30_000)
    assert learner.costs.token == pytest.approx(DEFAULT_COSTS.token, rel=0.01)


def test_a_throttled_worker_is_learned_anew() -> None:
    """After thousands of slower steps, the old costs are forgotten."""
    learner = StepLearner()
    _run(learner, H200, 1000, seed=1)
    _run(learner, H200, 5000, seed=2, slow=1.5)
    assert learner.costs.step_seconds(7500, 0, 0, 0) == pytest.approx(1.5 * H200.step_seconds(7500, 0, 0, 0), rel=0.05)


def test_a_pause_of_the_machine_moves_nothing() -> None:
    """One step of five seconds does not move the costs by 1 %."""
    learner = StepLearner()
    _run(learner, H200, 500, seed=1)
    before = learner.costs.step_seconds(0, 0, 8, 60_000)
    learner.observe(5.0, 0, 0, 8, 60_000)
    assert learner.costs.step_seconds(0, 0, 8, 60_000) == pytest.approx(before, rel=0.01)


def test_a_step_whose_end_was_seen_early_moves_nothing() -> None:
    """Another one seen late hides some of a prompt's time; with equal weights it counted as hundreds of steps."""
    learner = StepLearner()
    _run(learner, H200, 500, seed=1)
    before = learner.costs.step_seconds(7500, 0, 0, 0)
    learner.observe(0.008, 7500, 0, 0, 0)
    assert learner.costs.step_seconds(7500, 0, 0, 0) == pytest.approx(before, rel=0.03)


def test_no_cost_is_negative() -> None:
    """Contradictory steps make no cost negative."""
    learner = StepLearner()
    for seconds, prompt in ((0.02, 0), (0.01, 500), (0.005, 1000)) * 20:
        learner.observe(seconds, prompt, 0, 3, 9000)
    costs = learner.costs
    assert min(costs.base, costs.prefill, costs.token, costs.token_context, costs.decode, costs.kv_token) >= 0
