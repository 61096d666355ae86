"""Simulates workers under a load, with a policy given by its name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode
from kvbelt.simulate.load import Following, Request
from kvbelt.simulate.model import EngineModel
from kvbelt.simulate.outcome import DEFAULT_JUDGED, Judged, Outcome, outcome_of
from kvbelt.simulate.policies import FixedSplit, Placed, Plain
from kvbelt.simulate.profiles import H200_LLAMA_8B, Profile
from kvbelt.simulate.world import Policy, WorkerSpec, World
from kvbelt.wire.health import Role

#: Policies by name, besides those of ``Mode``. A plain one may be followed by ``@`` and the most tokens of a step.
PLAIN = ("round-robin", "least")
FIXED_SPLIT = "fixed-split"

DEFAULT_LEVELS = ServiceLevels()

_PLAIN = re.compile(rf"({'|'.join(PLAIN)})(?:@(\d+))?")


@dataclass(frozen=True, slots=True)
class Deployment:
    prefill: int = 1
    decode: int = 1
    profile: Profile = H200_LLAMA_8B
    slow: float = 0.0  #: share of slower workers in each role
    slower: float = 2.0  #: by this factor
    dies: tuple[tuple[str, float], ...] = ()  #: names such as ``p0``, and when

    def specs(self, most_tokens: int | None = None) -> list[WorkerSpec]:
        model = self.profile.engine
        if most_tokens is not None:
            model = replace(model, most_prompt_tokens=most_tokens)
        deaths, made = dict(self.dies), []
        for role, letter, number in ((Role.PREFILL, "p", self.prefill), (Role.DECODE, "d", self.decode)):
            for index in range(number):
                slow = index < round(self.slow * number)
                name = f"{letter}{index}"
                made.append(WorkerSpec(name, role, slowed(model, self.slower) if slow else model, deaths.get(name)))
        return made


def slowed(model: EngineModel, factor: float) -> EngineModel:
    c = model.costs
    costs = replace(
        c,
        base=c.base * factor,
        prefill=c.prefill * factor,
        token=c.token * factor,
        token_context=c.token_context * factor,
        decode=c.decode * factor,
        kv_token=c.kv_token * factor,
    )
    return replace(model, costs=costs)


def known_policy(name: str) -> bool:
    return name in set(Mode) or name == FIXED_SPLIT or _PLAIN.fullmatch(name) is not None


def simulate(
    name: str,
    deployment: Deployment,
    requests: Sequence[Request],
    *,
    following: Following | None = None,
    levels: ServiceLevels = DEFAULT_LEVELS,
    judged: Judged = DEFAULT_JUDGED,
    seed: int = 1,
) -> Outcome:
    """Send a load to a deployment. The requests cannot be used again.

    ``levels`` is what placement is told, ``judged`` what the result is judged by.
    """
    policy: Policy
    most_tokens = None
    plain = _PLAIN.fullmatch(name)
    if plain is not None:
        policy = Plain(least=plain[1] == "least")
        most_tokens = int(plain[2]) if plain[2] else None
    elif name == FIXED_SPLIT:
        policy = FixedSplit()
    else:
        policy = Placed(Mode(name), levels)
    network = deployment.profile.network
    world = World(deployment.specs(most_tokens), policy, requests, network, following=following, seed=seed)
    world.run()
    return outcome_of(name, world.requests, judged, [worker.engine.busy_seconds for worker in world.workers])
