"""Values for these tests."""

import json
from collections import Counter

from kvbelt.ops.chaos.completion import Completion
from kvbelt.ops.chaos.effect import Effect
from kvbelt.ops.chaos.faults import BY_NAME
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.memory import MIB, Growth
from kvbelt.ops.chaos.recovery import Injected, Skipped
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.schedule import Injection
from kvbelt.ops.chaos.verdict import Ending, Observation, Outcome

RIGHT = Completion(("abc",), ((1, 2, 3),), ("length",), (5, 3))


def seen(body=b"", *, status=200, stream=False, ending=Ending.COMPLETE, **more):
    """What a client saw."""
    given = {"request_id": "r1", "question": 0, "deadline": 5.0, "began": 10.0, "ended": 11.0}
    return Observation(stream=stream, ending=ending, status=status, body=body, **given | more)


def whole(ids=(1, 2, 3), text="abc", finish="length", usage=(5, 3)):
    """A whole completion."""
    choice = {"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}
    return json.dumps(
        {"choices": [choice], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    ).encode()


def chunk(text, *ids, finish=None):
    """One event of a stream."""
    choice = {"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'{"error": {"message": "no worker", "type": "unavailable", "code": 503}}'


def injected(kind="stop-decode", target="decode-0", began=10.0, healed=12.0, number=1):
    """A fault that was done."""
    injection = Injection(number, BY_NAME[kind], at=0.0, seconds=healed - began, choice=0.0, seed=0)
    return Injected(injection, target, None if target is None else f"{target}:80", began, healed)


GOOD = Result(
    deployment="2p2d",
    model="tiny",
    seed=7,
    seconds=900.0,
    rate=8.0,
    reference="0p1d of the same model",
    questions=60,
    ambiguous=1,
    impossible={"cut-decode": "network namespaces need root"},
    injected=(injected(), injected(number=2), injected("kill-prefill", "prefill-0", number=3)),
    skipped=(Skipped(injected(number=4).injection, "every worker is stopped"),),
    recovered={1: 0.5, 2: 1.5},
    outcomes=Counter({Outcome.RIGHT: 7000, Outcome.ERROR: 12, Outcome.LEFT: 3}),
    errors=Counter({"503 unavailable": 12}),
    paths=Counter({"first-token": 6000, "local": 1000}),
    not_sent=0,
    failures=(),
    holdings={"decode-0": Holdings("ready")},
    held_seconds=0.3,
    quarantined_most=4096,
    queued=3,
    growths=(Growth("proxy", 1, 900.0, 40 * MIB, 50 * MIB, 51 * MIB),),
    deaths=(),
    idle=(),
    not_back={},
    effect=Effect("decode-1", (0.05, 0.1), (0.05, 0.11)),
    lag=0.02,
    interrupted=False,
)
