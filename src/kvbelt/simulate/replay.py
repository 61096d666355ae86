"""``python -m kvbelt.simulate.replay``: requests of the past once more, as placement splits them and all whole.

A question on stdin, its answer on stdout (``wire/replay.py``). Both replays have the same model of the workers, so what
the model gets wrong is wrong in both.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import msgspec

from kvbelt.routing.levels import ServiceLevels, kept
from kvbelt.routing.placement import Mode
from kvbelt.simulate.load import Request
from kvbelt.simulate.model import EngineModel
from kvbelt.simulate.policies import Placed
from kvbelt.simulate.profiles import H200_LLAMA_8B
from kvbelt.simulate.world import Network, WorkerSpec, World
from kvbelt.wire.replay import REPLAY_QUESTION, EndedRequest, ReplayAnswer, ReplayQuestion

_NETWORK = H200_LLAMA_8B.network

#: Seconds by which the pause before a split's second token may differ from what was observed.
_CLOSE = 0.02


def replay(question: ReplayQuestion) -> ReplayAnswer:
    asked = question.requests
    split = _run(Mode.ELASTIC, question, _NETWORK)
    pauses = [one.gaps[0][0] for one in split if one.action == "split" and one.gaps]
    if question.pause is not None and pauses and abs(off := question.pause - median(pauses)) > _CLOSE:
        # The simulator does not know this link, but its users have felt it.
        split = _run(Mode.ELASTIC, question, replace(_NETWORK, handover=max(0.0, _NETWORK.handover + off)))
    return ReplayAnswer(_share(asked, split), _share(asked, _run(Mode.WHOLE, question, _NETWORK)))


def _run(mode: Mode, question: ReplayQuestion, network: Network) -> list[Request]:
    specs = []
    for number, worker in enumerate(question.workers):
        steps = worker.steps
        model = EngineModel(steps.costs, steps.most_prompt_tokens, steps.most_requests)
        if steps.most_kv_tokens is not None:
            model = replace(model, kv_capacity=steps.most_kv_tokens)
        specs.append(WorkerSpec(f"w{number}", worker.role, model))
    begin = question.requests[0].at
    requests = [
        Request(
            number,
            one.at - begin,
            one.prompt,
            one.output,
            held=one.held,
            splittable=one.splittable,
            levels=ServiceLevels(one.ttft, one.itl, one.tpot),
        )
        for number, one in enumerate(question.requests)
    ]
    World(specs, Placed(mode, ServiceLevels(itl=question.itl)), requests, network).run()
    return requests


def _share(asked: Sequence[EndedRequest], made: Sequence[Request]) -> float:
    judged = [(one, now) for one, now in zip(asked, made, strict=True) if one.within is not None]
    return sum(_within(*both) for both in judged) / len(judged)


def _within(asked: EndedRequest, now: Request) -> bool:
    assert now.first_token is not None
    mean = (now.last_token - now.first_token) / max(1, now.output - 1)
    pause = max((seconds for seconds, _ in now.gaps), default=0.0)
    mean_level = asked.itl if asked.tpot is None else asked.tpot
    return kept(asked.ttft, mean_level, now.first_token - now.at, mean, pause)


def main() -> None:
    os.nice(10)
    question = REPLAY_QUESTION.parse(sys.stdin.buffer.read(), "the proxy")
    sys.stdout.buffer.write(msgspec.json.encode(replay(question)))


if __name__ == "__main__":
    main()
