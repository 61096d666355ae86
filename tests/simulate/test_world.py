"""Whole simulations: nothing is lost, and the same seed gives the same figures."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.pacing.costs import StepCosts
from kvbelt.routing.levels import ServiceLevels
from kvbelt.simulate.load import Lengths, Load
from kvbelt.simulate.model import EngineModel
from kvbelt.simulate.outcome import Judged, Outcome
from kvbelt.simulate.profiles import H200_LLAMA_8B, Profile
from kvbelt.simulate.scenario import Deployment, simulate

POLICIES = ("elastic", "split", "whole", "round-robin", "least@2048", "fixed-split")


def run(policy: str, deployment: Deployment, load: Load, levels: ServiceLevels | None = None) -> Outcome:
    return simulate(
        policy,
        deployment,
        load.requests(),
        following=load.following(),
        levels=levels or ServiceLevels(),
        seed=load.seed,
    )


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    deployment=st.builds(Deployment, st.integers(1, 3), st.integers(1, 3), slow=st.sampled_from([0.0, 0.5])),
    load=st.builds(
        Load,
        rate=st.floats(0.5, 12.0),
        seconds=st.just(8.0),
        burstiness=st.sampled_from([0.2, 1.0, 100.0]),
        lengths=st.just((Lengths(spread=0.8),)),
        seed=st.integers(0, 100),
    ),
)
def test_every_request_is_answered_and_the_same_seed_gives_the_same(
    policy: str, deployment: Deployment, load: Load
) -> None:
    """``outcome_of`` raises if a request was not."""
    assert run(policy, deployment, load) == run(policy, deployment, load)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_requests_of_a_worker_that_dies_are_answered_by_others(policy: str, name: str) -> None:
    load = Load(6.0, 20.0)
    assert run(policy, Deployment(2, 2, dies=((name, 9.03),)), load).requests == 120


@pytest.mark.parametrize("policy", ["elastic", "least"])
def test_later_turns_cost_less_prefill_where_the_first_ones_were(policy: str) -> None:
    """With caches the median TTFT of long conversations is a fraction of a whole prompt's."""
    load = Load(0.4, 60.0, lengths=(Lengths(6000, 50),), turns=8, think=3.0, growth=100)
    outcome = run(policy, Deployment(0, 1) if policy == "least" else Deployment(1, 1), load)
    assert outcome.requests == 24 * 8
    assert outcome.ttft_p50 < 120


def test_a_plain_server_with_shorter_steps_has_shorter_gaps() -> None:
    load = Load(4.0, 30.0)
    long, short = (run(f"least@{tokens}", Deployment(), load) for tokens in (8192, 1024))
    assert short.itl_p99 < long.itl_p99 / 3


def test_split_places_every_prompt_on_a_prefill_worker_and_whole_none() -> None:
    load = Load(3.0, 20.0)
    assert run("split", Deployment(), load).actions == {"split": 100.0}
    assert set(run("whole", Deployment(), load).actions) == {"whole prefill", "whole decode"}


def test_slower_workers_make_requests_late() -> None:
    load = Load(4.0, 30.0)
    fast, slow = (run("elastic", Deployment(2, 2, slow=share), load) for share in (0.0, 1.0))
    assert slow.ttft_p50 > 1.8 * fast.ttft_p50


def test_costs_that_workers_report_are_what_placement_predicts_with() -> None:
    """Workers that are ten times as slow as their costs say make no request disappear."""
    profile = Deployment().profile
    wrong = replace(profile, engine=replace(profile.engine, launch=1e-4))
    assert run("elastic", Deployment(1, 2, profile=wrong), Load(2.0, 20.0)).requests == 40


@pytest.mark.parametrize("rate", [4.0, 6.2, 7.5])
def test_decodes_are_spread_where_each_of_them_lengthens_a_step(rate: float) -> None:
    """So it is on a CPU. Plain servers keep at most 4 points more; with all decodes on one worker, 10 to 20."""
    costs = StepCosts(2.5e-3, 0.0, 65e-6, 30e-9, 1.4e-3, 0.9e-6, sigma=0.1, samples=1000)
    engine = EngineModel(costs, most_prompt_tokens=512, most_requests=64, kv_capacity=73_000)
    deployment = Deployment(profile=Profile(engine, H200_LLAMA_8B.network))
    judged = Judged(ttft=0.248, tpot=0.0127)
    levels = ServiceLevels(ttft=judged.ttft, itl=None, tpot=judged.tpot)
    points = 0.0
    for seed in (1, 2):
        load = Load(rate, 60.0, lengths=(Lengths(1000, 50),), seed=seed)
        elastic, least = (
            simulate(policy, deployment, load.requests(), levels=levels, judged=judged, seed=seed).within_a
            for policy in ("elastic", "least")
        )
        points += elastic - least
    assert points / 2 >= -4.0
