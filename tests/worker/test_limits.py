"""What one request may ask of a worker, so that others get what they need meanwhile."""

import asyncio
import threading

import pytest
from starlette.testclient import TestClient

from kvbelt.cli import build_parser
from kvbelt.engine.api import SamplingParams
from kvbelt.errors import RequestError, SettingsError
from kvbelt.limits import Limits, limits_of
from kvbelt.wire.requests import CompletionRequest
from kvbelt.worker.app import make_app
from kvbelt.worker.generation import Generation
from kvbelt.worker.prompts import Prompts
from tests.engine.support import byte_tokenizer

BOTH = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("more", "status"),
    [({"prompt": [[5]] * 8}, 200), ({"prompt": [[5]] * 9}, 400), ({"prompt": ["x"] * 3, "n": 3}, 400)],
)
def test_a_request_has_so_many_sequences_at_most(ready, more, status):
    """Prompts times n, refused before any of them is tokenized or submitted."""
    ready.limits = Limits(sequences=8)
    reply = TestClient(make_app(ready)).post(BOTH[0], json={"max_tokens": 1} | more)
    assert reply.status_code == status
    assert ready.engine.load().waiting == 0


def test_submitting_many_sequences_lets_others_run(ready):
    """The event loop takes a turn after a few of them."""
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def submit():
        prompts = await ready.prompts.of_completion(CompletionRequest(prompt=[[5]] * 64))
        generation = Generation(
            ready.engine, None, request_id="r", prompts=prompts, samplings=[SamplingParams(max_tokens=1)],
            handoff=None, itl_seconds=None,
        )  # fmt: skip
        task = asyncio.create_task(others())
        await generation.start()
        generation.cancel()
        task.cancel()

    asyncio.run(submit())
    assert turns >= 8


class Watched:
    """A real tokenizer, and the length of each text that it was given. A long text waits until it is let go."""

    def __init__(self, held=None):
        self._tokenizer = byte_tokenizer()
        self._tokenizer.add_tokens(["x" * 100])
        self._held = held
        self.lengths = []

    def encode(self, text, **more):
        self.lengths.append(len(text))
        if self._held is not None and len(text) > 1000:
            assert self._held.wait(60)
        return self._tokenizer.encode(text, **more)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


async def encoded(tokenizer, context, text, **more):
    """The token ids of a text."""
    prompts = Prompts(tokenizer, 16, context)
    try:
        (prompt,) = await prompts.of_completion(CompletionRequest(prompt=text, **more))
    finally:
        prompts.close()
    return prompt.token_ids


def test_a_text_that_no_tokenizer_could_fit_is_not_tokenized():
    """A token has 100 characters at most."""
    tokenizer = Watched()
    with pytest.raises(RequestError, match="maximum context length is 8 tokens; the prompt has at least 9") as caught:
        asyncio.run(encoded(tokenizer, 8, "a" * 900))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert not tokenizer.lengths


def test_of_a_long_text_the_beginning_is_tokenized_first():
    """If that has too many tokens, the rest is not."""
    tokenizer = Watched()
    with pytest.raises(RequestError, match="context length is 9000 tokens; the prompt has at least"):
        asyncio.run(encoded(tokenizer, 9000, "a" * 500_000))
    assert tokenizer.lengths == [72_000]


def test_a_long_text_of_few_tokens_is_taken():
    assert len(asyncio.run(encoded(Watched(), 9000, "x" * 800_000))) == 8000


@pytest.mark.parametrize(("side", "kept"), [("left", "yz"), ("right", "ab")])
def test_of_a_text_that_is_truncated_only_the_kept_side_is_tokenized(side, kept):
    tokenizer = Watched()
    text = "ab" + "c" * 5000 + "yz"
    ids = asyncio.run(encoded(tokenizer, 8, text, truncate_prompt_tokens=2, truncation_side=side))
    assert ids == tuple(kept.encode())
    assert tokenizer.lengths == [800]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """They have different threads."""
    held = threading.Event()
    prompts = Prompts(Watched(held), 16, 9000)

    async def both():
        long = asyncio.create_task(prompts.of_completion(CompletionRequest(prompt="x" * 100_000)))
        short = await prompts.of_completion(CompletionRequest(prompt="hello"))
        assert not long.done()
        held.set()
        return short[0].token_ids, len((await long)[0].token_ids)

    assert asyncio.run(both()) == (tuple(b"hello"), 1000)
    prompts.close()


def test_too_many_token_ids_are_refused_before_they_are_hashed(ready):
    reply = TestClient(make_app(ready)).post(BOTH[0], json={"prompt": [[5], [5] * 33]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_of_a_long_list_the_ids_are_counted_before_they_are_read(ready):
    """One of them is no number."""
    ready.limits = Limits(json_parts=100)
    reply = TestClient(make_app(ready)).post(BOTH[0], content=b'{"prompt":[' + b"5," * 100 + b"five]}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("last", ["7", "7.0"])
def test_a_long_list_of_ids_is_read_as_a_short_one(ready, last):
    """Numbers without a fraction are integers in either."""
    ready.limits = Limits(json_parts=100)
    body = '{"prompt":[' + "5," * 100 + last + '],"truncate_prompt_tokens":3,"max_tokens":1,"return_token_ids":true}'
    reply = TestClient(make_app(ready)).post(BOTH[0], content=body)
    assert (reply.status_code, reply.json()["choices"][0]["prompt_token_ids"]) == (200, [5, 5, 7])


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def chat(ready):
    """Asks for a chat; returns status and answer."""
    ready.engine.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 1 // divisor|default(1) }}"
    )

    def asked(more, prompts=None):
        ready._prompts = prompts or ready._prompts
        reply = TestClient(make_app(ready)).post(BOTH[1], json=CHAT | more)
        return reply.status_code, reply.json()

    return asked


@pytest.mark.parametrize("more", [{"chat_template": LOOP}, {"chat_template_kwargs": {"chat_template": LOOP}}])
def test_a_template_of_a_client_is_refused(chat, more):
    """It is a program, and would run for as long as it likes."""
    status, answer = chat(more)
    assert (status, answer["error"]["param"]) == (400, next(iter(more)))
    assert "--trust-request-chat-template" in answer["error"]["message"]


@pytest.mark.parametrize(
    "more", [{"chat_template": "{{ 42 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 42 }}"}}]
)
def test_an_operator_may_trust_clients_with_templates(chat, ready, more):
    trusting = Prompts(ready.engine.tokenizer, 16, 32, trusts_templates=True)
    status, answer = chat(more | {"return_token_ids": True}, trusting)
    trusting.close()
    assert (status, bytes(answer["prompt_token_ids"])) == (200, b"42")


@pytest.mark.parametrize("word", ["tokenize", "return_dict", "max_length", "conversation"])
def test_a_word_that_is_no_variable_of_templates_is_refused(chat, word):
    """It would change what the renderer returns."""
    status, answer = chat({"chat_template_kwargs": {word: True}})
    assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")
    assert word in answer["error"]["message"]


def test_what_fields_decide_is_not_decided_by_words(chat):
    """As in vLLM."""
    assert chat({"chat_template_kwargs": {"add_generation_prompt": False, "tools": 5}})[0] == 200


def test_a_template_that_fails_is_the_requests_fault(chat):
    """Whichever way it fails."""
    status, answer = chat({"chat_template_kwargs": {"divisor": 0}})
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "division" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [{"role": "user", "content": "x"}] * 3), ("tools", [{}] * 3), ("stop", ["a", "b", "c"]),
        ("stop_token_ids", [1, 2, 3]), ("logit_bias", {"1": 1, "2": 1, "3": 1}), ("allowed_token_ids", [1, 2, 3]),
        ("bad_words", ["a", "b", "c"]), ("documents", [{}] * 3), ("chat_template_kwargs", {"a": 1, "b": 1, "c": 1}),
    ],
)  # fmt: skip
def test_a_field_of_too_many_entries_is_refused(ready, field, value):
    """Each has a limit of its own, which the error names."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | {field: value}
    ready.limits = Limits(**{field: 2})
    reply = TestClient(make_app(ready)).post(BOTH[1], json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert f"2 are allowed; send fewer, or raise --limit {field}=N" in error["message"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": ["a", {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 2},
    ],
)
def test_parts_and_tool_calls_of_all_messages_are_limited_together(ready, message):
    ready.limits = Limits(message_parts=3)
    reply = TestClient(make_app(ready)).post(BOTH[1], json={"messages": [message] * 2, "max_tokens": 1})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "messages")
    assert "4 parts and tool calls, and 3 are allowed; send fewer, or raise --limit message_parts=N" in error["message"]


def test_too_large_a_body_is_413(ready):
    """In the proxy's words."""
    ready.limits = Limits(body_bytes=100)
    reply = TestClient(make_app(ready)).post(BOTH[0], json={"prompt": "x" * 200})
    assert (reply.status_code, "larger than the limit of 100 bytes" in reply.json()["error"]["message"]) == (413, True)


def test_a_model_of_a_long_name_is_refused(ready):
    """Errors name the model."""
    reply = TestClient(make_app(ready)).post(BOTH[0], json={"prompt": [5], "model": "m" * 1025})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert len(reply.content) < 300


@pytest.mark.parametrize("path", BOTH)
def test_a_body_of_too_many_fields_is_refused(ready, path):
    ready.limits = Limits(fields=9)
    reply = TestClient(make_app(ready)).post(path, json={f"a{i}": 1 for i in range(10)})
    assert (reply.status_code, "10 fields, and 9 are allowed" in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_texts_of_a_list_are_limited_together(ready, field):
    """Each is compared with every new token, or tokenized."""
    ready.limits = Limits(stop_characters=10, bad_words_characters=10)
    client = TestClient(make_app(ready))
    for texts, status in ((["x" * 11], 400), (["x" * 6, "y" * 5], 400), (["x" * 5, "y" * 5], 200)):
        assert client.post(BOTH[0], json={"prompt": [5], "max_tokens": 1, field: texts}).status_code == status


@pytest.mark.parametrize("messages", [[("user", "x")] * 33, [("user", "x" * 3000)]])
def test_messages_that_cannot_fit_are_not_rendered(ready, messages):
    """Each is a token at least, and a token has so many characters at most."""
    ready.engine.tokenizer.chat_template = "{{ 1 // 0 }}"
    sent = [{"role": role, "content": content} for role, content in messages]
    reply = TestClient(make_app(ready)).post(BOTH[1], json={"messages": sent, "max_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_limits_are_settings():
    """Of the proxy and of workers alike."""
    for command in (["proxy"], ["worker", "--role", "both", "--model", "m"], ["up", "1p1d"]):
        args = build_parser().parse_args([*command, "--limit", "stop=8", "--limit", "sequences=2"])
        assert limits_of(args.limit) == Limits(stop=8, sequences=2)


@pytest.mark.parametrize(
    ("text", "said"), [("spots=1", "no limit 'spots'"), ("stop=no", "'no' is not"), ("stop", "''")]
)
def test_a_wrong_limit_is_named(text, said):
    with pytest.raises(SettingsError, match=said):
        limits_of([text])
