"""Half of all requests have one beginning, on four workers of a CPU: no worker gets much more work than the others."""

from dataclasses import replace
from statistics import fmean

import pytest

from kvbelt.pacing.costs import StepCosts
from kvbelt.routing.levels import ServiceLevels
from kvbelt.simulate.load import Lengths, Load
from kvbelt.simulate.model import EngineModel
from kvbelt.simulate.outcome import Outcome
from kvbelt.simulate.profiles import Profile
from kvbelt.simulate.scenario import Deployment, simulate
from kvbelt.simulate.world import Network

#: As four embedded engines on two cores told them, under load.
CPU = Profile(
    EngineModel(
        StepCosts(2.5e-3, 6e-3, 30e-6, 35e-9, 0.6e-3, 0.8e-6, sigma=0.2, samples=1000),
        most_prompt_tokens=512,
        kv_capacity=73_232,
        looks_ahead=False,
    ),
    Network(reach=3e-3, reply=1e-3, proxy=0.5e-3, handover=10e-3),
)
LEVELS = [ServiceLevels(0.5, None, 0.0126), ServiceLevels(0.5, 0.0137)]


def run(load: Load, levels: ServiceLevels = LEVELS[0]) -> Outcome:
    requests, following = load.requests(), load.following()
    return simulate("elastic", Deployment(2, 2, CPU), requests, following=following, levels=levels, seed=load.seed)


@pytest.mark.parametrize("levels", LEVELS, ids=["TPOT", "ITL"])
@pytest.mark.parametrize("rate", [2.0, 4.0, 8.0])
def test_no_worker_is_busy_for_more_than_one_and_a_half_times_the_mean(rate: float, levels: ServiceLevels) -> None:
    loads = [Load(rate, 60.0, lengths=(Lengths(1500, 50),), seed=seed, hot=0.5) for seed in (1, 2, 3)]
    assert fmean(run(load, levels).busiest for load in loads) <= 1.5


def test_most_requests_still_use_the_hot_prefix() -> None:
    """Their first token comes within a third of a whole prompt's time: a copy is made once for each worker."""
    hot, none = (run(Load(4.0, 60.0, lengths=(Lengths(1500, 50),), hot=share)) for share in (1.0, 0.0))
    assert hot.ttft_p50 < none.ttft_p50 / 3


def test_turns_of_conversations_stay_where_the_first_one_was() -> None:
    load = Load(1.0, 60.0, lengths=(Lengths(600, 50),), turns=6, think=2.0, growth=100)
    outcome = run(load)
    assert outcome.ttft_p50 < run(replace(load, turns=1, lengths=(Lengths(900, 50),))).ttft_p50 / 2
