"""A worker's token counts in its answers, and whose cached tokens a client is told."""

import json

import pytest

from kvbelt.proxy.request.usage import counts_in, with_details_of
from tests.proxy.support import Deployment, async_test

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
DETAILS = {"prompt_tokens_details": {"cached_tokens": 4}}
FAST, REDERIVED = {"temperature": 0}, {"seed": 3}


def answer(usage, **more):
    return json.dumps({"choices": [{"text": 'of "usage": {}'}], "usage": usage, **more}).encode()


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (answer(USAGE), (5, 3, None)),
        (answer(USAGE | DETAILS, kv_transfer_params=None), (5, 3, 4)),
        (answer(USAGE | {"prompt_tokens_details": None}), (5, 3, None)),
        (answer({"prompt_tokens": "many", "completion_tokens": -1}), (None, None, None)),
        (b"data: " + answer(USAGE) + b"\n\ndata: [DONE]\n\n", (5, 3, None)),
        (answer(None), None),
        (answer(USAGE)[:-9], None),
        (b"", None),
    ],
)
def test_counts_are_found_at_the_end_of_an_answer(body, counts):
    assert counts_in(body) == counts


def test_only_the_details_are_replaced():
    before = answer(USAGE | {"prompt_tokens_details": {"cached_tokens": 1}}, more=1)
    assert json.loads(with_details_of(USAGE | DETAILS, before)) == json.loads(answer(USAGE | DETAILS, more=1))
    assert with_details_of(DETAILS, answer(USAGE | DETAILS)) == answer(USAGE | DETAILS)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize(("fields", "path"), [(FAST, "first-token"), (REDERIVED, "re-derive; reason=seed")])
@async_test
async def test_cached_tokens_are_those_of_the_worker_that_computed_the_prompt(fields, path, chat, stream):
    """A decode worker has all of a prompt that was sent to it, which is no prefix cache's merit."""
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    body = (
        prompt | {"max_tokens": 9, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    )
    async with Deployment() as deployment:
        deployment.prefill[0].script.cached_tokens = 3
        deployment.decode[0].script.cached_tokens = 1000
        got = await deployment.ask(body | fields, chat=chat)
        usage = got.events[-1]["usage"] if stream else got.json["usage"]
    assert got.path == path
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


@async_test
async def test_a_prefill_worker_that_does_not_count_cached_tokens_leaves_them_out():
    async with Deployment() as deployment:
        deployment.decode[0].script.cached_tokens = 1000
        for fields in (FAST, REDERIVED):
            usage = (await deployment.ask({"prompt": "hi", "max_tokens": 9} | fields)).json["usage"]
            assert usage.get("prompt_tokens_details") is None


@pytest.mark.parametrize(
    "asked", [{}, {"stream": True, "stream_options": {"include_usage": True}}], ids=["whole", "streamed"]
)
@async_test
async def test_what_a_token_is_of_a_prompt_is_learnt_from_answers(asked):
    """To the stand-ins each byte is a token."""
    body = {"prompt": "x" * 200, "max_tokens": 5, "temperature": 0} | asked
    async with Deployment(min_prompt_tokens=100) as deployment:
        paths = [(await deployment.ask(body)).path for _ in range(4)]
    assert (paths[0], paths[-1]) == ("local; reason=short_prompt", "first-token")
