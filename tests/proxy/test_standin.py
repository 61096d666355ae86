"""The stand-in keeps the contract that the proxy is tested against."""

import pytest

from tests.proxy.standin import next_token, text_of, tokenize
from tests.proxy.support import Deployment, async_test


@pytest.mark.parametrize("chat", [False, True])
@async_test
async def test_streamed_equals_whole(chat):
    """Text and usage are equal, and a chat stream begins with the role."""
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    async with Deployment() as deployment:
        whole = await deployment.ask_alone(prompt | {"max_tokens": 9}, chat=chat)
        streamed = await deployment.ask_alone(
            prompt | {"max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}, chat=chat
        )
    assert streamed.text == whole.text
    assert streamed.events[-1]["usage"] == whole.json["usage"]
    if chat:
        assert streamed.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@async_test
async def test_a_continuation_continues():
    """Prompt ids plus the first token give the rest of the same text; other ids give another."""
    ids = tokenize("hello")
    first = next_token(ids)
    async with Deployment() as deployment:
        whole = (await deployment.ask_alone({"prompt": "hello", "max_tokens": 9})).text
        rest = (await deployment.ask_alone({"prompt": [*ids, first], "max_tokens": 8})).text
        wrong = (await deployment.ask_alone({"prompt": [*ids, first + 1], "max_tokens": 8})).text
    assert text_of(first) + rest == whole
    assert wrong != rest


@async_test
async def test_a_prefill_leg_is_answered_as_the_contract_says():
    """One token, both lists of ids, and the transfer's state."""
    handoff = {"transfer_id": "t", "receiver": {}, "deadline_seconds": 1}
    body = {"prompt": "hi", "max_tokens": 1, "return_token_ids": True, "kv_transfer_params": handoff}
    async with Deployment() as deployment:
        answer = (await deployment.ask_alone(body)).json
    assert answer["id"] == "cmpl-r1"
    assert answer["choices"][0]["prompt_token_ids"] == tokenize("hi")
    assert answer["choices"][0]["token_ids"] == [next_token(tokenize("hi"))]
    assert answer["kv_transfer_params"] == {"transfer_id": "t", "state": "open", "reason": None}
