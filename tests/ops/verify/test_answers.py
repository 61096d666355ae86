"""Replies as they are compared."""

import json
from typing import Any

from kvbelt.ops.verify.answers import Answer, read
from kvbelt.ops.verify.compare import differences


def whole(body: Any, model: str = "m") -> Answer:
    return read(200, "", json.dumps(body).encode(), model=model)


def stream(*events: Any, end: str = "data: [DONE]\n\n") -> Answer:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end
    return read(200, "local", text.encode(), model="m")


def delta(at: str, **more: Any) -> dict[str, Any]:
    return {"id": at, "choices": [{"index": 0, "delta": more, "token_ids": [len(at)]}]}


def test_what_differs_between_any_two_answers_is_left_out() -> None:
    """Ids, times, ids of calls, and the name under which a server has the model."""
    call = {"id": "call_7", "function": {"name": "id", "arguments": "{}"}}
    one = {"id": "1", "created": 3, "model": "m", "choices": [{"message": {"tool_calls": [call]}}]}
    other = {"id": "2", "created": 4, "model": "n", "choices": [{"message": {"tool_calls": [{**call, "id": "x"}]}}]}
    assert whole(one, "m") == whole(other, "n")
    assert whole(one, "m") != whole(other, "m")


def test_a_stream_is_the_same_however_it_is_cut() -> None:
    """Texts, ids and arguments of calls are put together."""
    cut = stream(delta("a", content="Hel"), delta("b", content="lo"))
    assert cut.said["choices"] == [{"index": 0, "delta": {"content": "Hello"}, "token_ids": [1, 1]}]
    joined = {"choices": [{"index": 0, "delta": {"content": "Hello"}, "token_ids": [1, 1]}]}
    assert not differences(cut, stream(joined | {"id": "c"}))
    calls = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"a"', ": 1}")]
    found = stream(*(delta("a", **call) for call in calls)).said["choices"][0]["delta"]["tool_calls"]
    assert found == {0: {"index": 0, "function": {"arguments": '{"a": 1}'}}}


def test_a_stream_tells_its_road_and_its_end() -> None:
    """A comment may correct the header, and a stream that is cut off is another one."""
    told = read(200, "first-token", b': x-kvbelt-path local; reason=x\n\ndata: {"choices": []}\n\n', model="m")
    assert told.path == "local; reason=x"
    assert not told.said["done"]
    assert [one.field for one in differences(stream(delta("a"), end=""), stream(delta("a")))] == ["done"]


def test_a_stream_that_only_refuses_is_a_refusal() -> None:
    """Its status is in the event, as vLLM sends it."""
    refusal = {"error": {"message": "no", "code": 400}}
    assert stream(refusal) == Answer(400, "local", refusal)


def test_an_error_in_a_stream_is_seen() -> None:
    """It is a part of what the stream said."""
    broken = stream(delta("a", content="x"), {"error": {"message": "gone"}})
    assert broken.said["error"] == {"message": "gone"}
