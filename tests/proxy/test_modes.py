"""Every response mode gives one server's answer, and the calls to workers keep the contract."""

import asyncio
import json

import pytest

from tests.proxy.standin import EOS, MAX_MODEL_LEN, next_token, tokenize
from tests.proxy.support import Deployment, async_test, generated

CHAT = [{"role": "user", "content": 'Hello "世界"\n'}]


def comparable(reply):
    """An answer without what legitimately differs between servers."""
    if reply.headers[b"content-type"].startswith(b"text/event-stream"):
        return [{name: value for name, value in event.items() if name != "created"} for event in reply.events]
    return {name: value for name, value in reply.json.items() if name != "created"}


def prompt_ending_at(step):
    """A prompt after which the toy model's EOS is its ``step``-th token."""
    for number in range(100_000):
        ids = [number % 498 + 1, number // 498 + 1, 5]
        for _ in range(step - 1):
            token = next_token(ids)
            ids.append(token)
            if token == EOS:
                break
        else:
            if next_token(ids) == EOS:
                return ids[:3]
    raise AssertionError("the toy model never ends there")


PROMPTS = {
    "text": 'Hello "quoted" \\ 世界\n',
    "ids": list(range(1, 400)),
    "one text in a list": ["Hello"],
    "ends at once": prompt_ending_at(1),
    "ends second": prompt_ending_at(2),
}


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 1}, {"max_completion_tokens": "x", "tools": 5}])
@async_test
async def test_fields_of_chats_mean_nothing_to_a_completion(fields):
    """As in vLLM: 16 tokens are made, of which the prefill worker makes one."""
    async with Deployment() as deployment:
        got, expected = await deployment.ask({"prompt": "x"} | fields), await deployment.ask_alone({"prompt": "x"})
        assert (got.status, got.text, got.path) == (200, expected.text, "first-token")
        assert got.json["usage"]["completion_tokens"] > 1
        assert [body["max_tokens"] for body in generated(deployment.prefill[0])] == [1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("token_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@async_test
async def test_completions_equal_one_servers(prompt, stream, token_ids):
    """Text, usage, ids, finish reasons and the shape of every event, for a greedy request on the fast path."""
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "return_token_ids": token_ids, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body), await deployment.ask_alone(body)
        assert got.path == "first-token"
        assert comparable(got) == comparable(expected)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True}, {"max_completion_tokens": 7, "max_tokens": None}])
@async_test
async def test_chats_equal_one_servers(stream, extra):
    """The re-wrapped stream has the role first and the same events."""
    body = {"messages": CHAT, "max_tokens": 20, "stream": stream} | extra
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body, chat=True), await deployment.ask_alone(body, chat=True)
        assert got.path == "first-token"
        assert comparable(got) == comparable(expected)
        assert deployment.decode[0].requests[0][0] == "/v1/completions"


@async_test
async def test_every_event_of_an_answer_has_the_same_creation_time_and_id():
    """The two workers' own times are not visible."""
    async with Deployment() as deployment:
        events = (await deployment.ask({"prompt": "x", "max_tokens": 9, "stream": True})).events
    assert {event["created"] for event in events} == {deployment.prefill[0].created}
    assert {event["id"] for event in events} == {"cmpl-r1"}


@async_test
async def test_a_chat_without_a_limit_goes_up_to_the_context():
    """The decode call's limit is the context without the prompt and the first token."""
    body = {"messages": CHAT}
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body, chat=True), await deployment.ask_alone(body, chat=True)
        assert comparable(got) == comparable(expected)
        (leg,) = generated(deployment.decode[0])
        assert leg["max_tokens"] + len(leg["prompt"]) == MAX_MODEL_LEN


@async_test
async def test_completions_without_a_limit_get_sixteen_tokens():
    """Completions without a limit get OpenAI's default."""
    async with Deployment() as deployment:
        got = await deployment.ask({"prompt": "x", "ignore_eos": True})
        assert got.json["usage"]["completion_tokens"] == 16
        assert generated(deployment.decode[0])[0]["max_tokens"] == 15


@async_test
async def test_the_legs_keep_the_contract():
    """Bodies, headers and handoffs are as docs/architecture.md says."""
    async with Deployment() as deployment:
        await deployment.ask({"prompt": "ab", "max_tokens": 5, "temperature": 0.5, "stream": True, "user": "u"})
        ((_, p_headers, p),) = deployment.prefill[0].requests
        ((_, d_headers, d),) = deployment.decode[0].requests
    assert p_headers[b"x-request-id"] == d_headers[b"x-request-id"] == b"r1"
    transfer_id = p["kv_transfer_params"]["transfer_id"]
    assert p["kv_transfer_params"]["receiver"]["engine_id"] == "d0"
    assert 0 < p["kv_transfer_params"].pop("deadline_seconds") <= 600
    assert {name: p[name] for name in ("prompt", "max_tokens", "n", "stream", "return_token_ids", "temperature")} == {
        "prompt": "ab", "max_tokens": 1, "n": 1, "stream": False, "return_token_ids": True, "temperature": 0.5,
    }  # fmt: skip
    ids = tokenize("ab")
    assert d["prompt"] == [*ids, next_token(ids)]
    assert (d["max_tokens"], d["stream"], d["temperature"]) == (4, True, 0.5)
    assert d["kv_transfer_params"]["transfer_id"] == transfer_id


@async_test
async def test_one_token_is_the_prefill_workers_own_answer():
    """There is no decode call and no transfer, and the answer is one server's."""
    body = {"prompt": "x", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body), await deployment.ask_alone(body)
        assert got.path == "prefill-only"
        assert comparable(got) == comparable(expected)
        assert "kv_transfer_params" not in generated(deployment.prefill[0])[0]
        assert not deployment.decode[0].requests


@async_test
async def test_a_first_token_that_ends_the_answer_calls_no_decode_worker():
    """After EOS there is nothing to decode."""
    async with Deployment() as deployment:
        got = await deployment.ask({"prompt": PROMPTS["ends at once"], "max_tokens": 9})
        assert got.json["choices"][0]["finish_reason"] == "stop"
        assert not deployment.decode[0].requests


@pytest.mark.parametrize("fields", [{"seed": 4}, {"stop": ["\n"]}, {"unheard_of": 1}])
@async_test
async def test_a_rederived_answer_is_the_decode_workers_own(fields):
    """The decode worker gets the client's own body with the transferred KV."""
    body = {"prompt": "x", "max_tokens": 9, "stream": True} | fields
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body), await deployment.ask_alone(body)
        assert got.path.startswith("re-derive; reason=")
        assert comparable(got) == comparable(expected)
        (leg,) = generated(deployment.decode[0])
        handoff = leg.pop("kv_transfer_params")
        assert leg == body
        sent = generated(deployment.prefill[0])[0]["kv_transfer_params"]
        assert handoff["transfer_id"] == sent["transfer_id"]


@pytest.mark.parametrize("asked", [None, True])
@async_test
async def test_special_tokens_that_the_prefill_worker_keeps_are_kept_in_the_rest(asked):
    """Parsers of vLLM ask for them in a chat, and the continuation is a completion."""
    body = {"messages": CHAT, "max_tokens": 9, "stream": True, "skip_special_tokens": asked}
    async with Deployment() as deployment:
        kept = {"transfer_id": "t", "state": "open", "special_tokens": True, "reasoning": "ended"}
        deployment.prefill[0].script.transfer_state = kept
        got = await deployment.ask(body, chat=True)
        assert got.path == "first-token"
        assert generated(deployment.decode[0])[0]["skip_special_tokens"] is bool(asked)


@async_test
async def test_a_prompt_with_images_reaches_the_decode_worker_as_it_is():
    """Its token ids do not tell which images: without the KV they would be another prompt, or another one's KV."""
    look = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
    ]
    body = {"messages": [{"role": "user", "content": look}], "max_tokens": 9}
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = {"transfer_id": "t", "state": "open", "media": True}
        assert (await deployment.ask(body, chat=True)).path == "re-derive; reason=media"
        (leg,) = generated(deployment.decode[0])
        assert leg["messages"] == body["messages"]


@async_test
async def test_an_adapter_s_first_token_is_shown_once_both_workers_have_proved_to_have_it():
    """Under one name they may have different ones. Until it is known, the decode worker gives the first token."""
    body = {"prompt": "x", "max_tokens": 9}
    async with Deployment() as deployment:
        told = {"transfer_id": "t", "state": "open", "adapter": "abc"}
        deployment.prefill[0].script.transfer_state = told
        assert (await deployment.ask(body)).path == "re-derive; reason=new_adapter"
        assert (await deployment.ask(body)).path == "first-token"
        # Under another name the decode worker may have another adapter.
        assert (await deployment.ask(body | {"model": "x"})).path == "re-derive; reason=new_adapter"
        assert {leg["kv_transfer_params"]["adapter"] for leg in generated(deployment.decode[0])} == {"abc"}
        deployment.decode[0].script.kv = "recomputed; reason=adapter_differs"
        await deployment.ask(body)
        assert (await deployment.ask(body)).path == "local; reason=adapter_differs"
        assert {model for _, model, _ in deployment.proxy.context.same_adapters} == {"x"}


@async_test
async def test_several_prompts_are_the_decode_workers_alone():
    """The KV of several prompts may not fit the buffer together, so none is sent."""
    body = {"prompt": ["a", "b"], "max_tokens": 9}
    async with Deployment() as deployment:
        got, expected = await deployment.ask(body), await deployment.ask_alone(body)
        assert got.path == "local; reason=many_prompts"
        assert comparable(got) == comparable(expected)
        assert not generated(deployment.prefill[0])


@pytest.mark.parametrize("first_text", ["", "\ufffd", "a\ufffd"])
@async_test
async def test_an_incomplete_first_character_is_rederived(first_text):
    """The client never gets an incomplete character."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.first_text = first_text
        got = await deployment.ask({"prompt": "x", "max_tokens": 9, "stream": True})
        assert got.path == "re-derive; reason=incomplete_text"
        assert got.text == (await deployment.ask_alone({"prompt": "x", "max_tokens": 9})).text


@async_test
async def test_a_limit_beyond_the_context_is_the_decode_workers_to_judge():
    """The refusal reaches the client as a status, since no first token was sent."""
    async with Deployment() as deployment:
        body = {"prompt": "x", "max_tokens": MAX_MODEL_LEN, "stream": True}
        got = await deployment.ask(body)
        assert (got.status, got.json["error"]["param"]) == (400, "max_tokens")


@async_test
async def test_without_prefill_workers_everything_is_local():
    """0p1d: the decode worker gets the client's bytes as they are."""
    async with Deployment(prefill=0) as deployment:
        got = await deployment.ask(b'{ "prompt" :"x","max_tokens":4}')
        assert got.path == "local; reason=no_prefill_worker"
        assert got.text == (await deployment.ask_alone({"prompt": "x", "max_tokens": 4})).text


@async_test
async def test_a_decode_worker_without_a_receiver_works_alone():
    """The path names the reason."""
    async with Deployment() as deployment:
        deployment.decode[0].has_receiver = False
        await deployment.worker(deployment.decode[0]).check()
        got = await deployment.ask({"prompt": "x", "max_tokens": 4})
        assert got.path == "local; reason=decode_has_no_receiver"


@async_test
async def test_short_prompts_stay_local_where_a_threshold_is_set():
    """The threshold counts tokens."""
    async with Deployment(min_prompt_tokens=10) as deployment:
        assert (await deployment.ask({"prompt": [5] * 9, "max_tokens": 4})).path == "local; reason=short_prompt"
        assert (await deployment.ask({"prompt": [5] * 10, "max_tokens": 4})).path == "first-token"


@async_test
async def test_workers_take_turns():
    """Prefill and decode workers take turns independently."""
    async with Deployment(prefill=3, decode=2) as deployment:
        for _ in range(6):
            await deployment.ask({"prompt": "x", "max_tokens": 4})
        assert [len(s.requests) for s in deployment.prefill] == [2, 2, 2]
        assert [len(s.requests) for s in deployment.decode] == [3, 3]


@async_test
async def test_the_first_event_leaves_before_the_decode_worker_answers():
    """The transfer is not in the time to first token."""
    async with Deployment() as deployment:
        deployment.decode[0].script.kv_arrives = asyncio.Event()
        body = json.dumps({"prompt": "x", "max_tokens": 4, "stream": True}).encode()
        response = await deployment.pool.request("POST", "/v1/completions", (), body)
        first = await response.chunk()
        assert first.count(b"data: ") == 1
        deployment.decode[0].script.kv_arrives.set()
        assert (await response.read(1 << 20)).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "chat", "reason"),
    [
        ({"prompt": "x", "max_tokens": 0, "echo": True}, False, "no_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}, True, "no_tokens"),
        ({"prompt": "x", "prompt_logprobs": 0}, False, "prompt_logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, False, "prompt_logprobs"),
        ({"prompt_embeds": "AAAA"}, False, "no_prompt"),
        *(
            ({"prompt": "x", "max_tokens": 4} | wrong, False, "may_be_refused")
            for wrong in (
                {"n": 0}, {"n": 129}, {"n": 2, "temperature": 0}, {"best_of": 3}, {"best_of": [None]},
                {"logprobs": 21}, {"logprobs": -1}, {"logprobs": True}, {"min_tokens": -1}, {"min_tokens": 9},
                {"max_tokens": MAX_MODEL_LEN}, {"use_beam_search": True}, {"seed": 1 << 63}, {"seed": -(1 << 63) - 1},
            )
        ),
        *(
            ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 4} | wrong, True, "may_be_refused")
            for wrong in ({"logprobs": 3}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"n": -5})
        ),
        ({"prompt": None, "prompt_embeds": "AAAA"}, False, "no_prompt"),
    ],
)  # fmt: skip
@async_test
async def test_what_only_the_worker_can_judge_is_left_to_it(body, chat, reason):
    """Some servers answer such requests, and others refuse them in their own words, before any prefill."""
    async with Deployment() as deployment:
        for standin in (*deployment.prefill, *deployment.decode):
            standin.script.status = 418
        got = await deployment.ask(body, chat=chat)
        assert (got.status, got.path) == (418, f"local; reason={reason}")
        assert got.body == deployment.decode[0].script.body
        assert generated(deployment.decode[0]) == [body]
        assert not deployment.prefill[0].requests


@async_test
async def test_an_answer_that_tells_its_experts_is_one_worker_s():
    """Two workers have each seen a part of the tokens."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.extra_message = {"routed_experts": "AAAA"}
        body = {"prompt": "x", "max_tokens": 5, "temperature": 0}
        got = await deployment.ask(body)
        assert got.path == "local; reason=routed_experts"
        assert got.json["choices"] == (await deployment.ask_alone(body)).json["choices"]


@pytest.mark.parametrize("fields", [{}, {"seed": 4}], ids=["first-token", "re-derive"])
@async_test
async def test_the_decode_worker_hears_how_many_ranks_send(fields):
    """It waits for KV from as many ranks as the prefill worker says that it has."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.transfer_state = {"transfer_id": "t", "state": "open", "tp_size": 2}
        await deployment.ask({"prompt": "x", "max_tokens": 9} | fields)
        assert generated(deployment.decode[0])[0]["kv_transfer_params"]["tp_size"] == 2
