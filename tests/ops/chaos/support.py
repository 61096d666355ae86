"""Values that these tests are made of."""

import json

from kvbelt.ops.chaos.faults import BY_NAME
from kvbelt.ops.chaos.reading import Answer
from kvbelt.ops.chaos.recovery import Injected
from kvbelt.ops.chaos.schedule import Injection
from kvbelt.ops.chaos.verdict import Ending, Seen

RIGHT = Answer(("abc",), ((1, 2, 3),), ("length",), (5, 3))


def seen(body=b"", *, status=200, stream=False, ending=Ending.COMPLETE, **more):
    """What a client saw."""
    given = {"request_id": "r1", "question": 0, "deadline": 5.0, "began": 10.0, "ended": 11.0}
    return Seen(stream=stream, ending=ending, status=status, body=body, **given | more)


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
