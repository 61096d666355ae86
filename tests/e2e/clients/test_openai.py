"""The official OpenAI client."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from tests.e2e.clients.schemas import TOOL, Town, Weather

ASKED = {"messages": [{"role": "user", "content": "How is the weather in Paris?"}], "temperature": 0}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_models(client: openai.OpenAI, model: str) -> None:
    """Listed and retrieved."""
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id).id == model


def test_many_at_once(url: str, model: str) -> None:
    """The async client gets the answers of the sync one, streamed and whole."""

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:

            async def whole() -> str:
                answer = await client.completions.create(model=model, prompt="The sky is", max_tokens=8, temperature=0)
                return answer.choices[0].text

            async def streamed() -> str:
                stream = await client.completions.create(
                    model=model, prompt="The sky is", max_tokens=8, temperature=0, stream=True
                )
                return "".join([part.choices[0].text async for part in stream])

            return await asyncio.gather(*(ask() for ask in (whole, streamed) * 4))

    assert len(set(asyncio.run(ask_all()))) == 1


def test_an_answer_is_parsed(client: openai.OpenAI, model: str) -> None:
    """Into the class whose schema the client sent, streamed and whole."""
    asked = {**ASKED, "model": model, "response_format": Weather, "max_tokens": 60}
    whole = client.chat.completions.parse(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        streamed = stream.get_final_completion()
    assert isinstance(whole.choices[0].message.parsed, Weather)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed
    assert whole.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called(client: openai.OpenAI, model: str, choice: object) -> None:
    """Whole and streamed, with arguments that fit the tool's schema."""
    asked = {**ASKED, "model": model, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    whole = client.chat.completions.create(max_tokens=80, **asked).choices[0].message
    with client.chat.completions.stream(max_tokens=80, **asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (whole, streamed):
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        Town.model_validate_json(call.function.arguments)


def test_parsed_tools(client: openai.OpenAI, model: str) -> None:
    """The client parses the arguments into the class that it made the tool of."""
    tool = openai.pydantic_function_tool(Town, name="weather")
    answer = client.chat.completions.parse(
        model=model, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80, **ASKED
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Town)


def test_a_tool_result_goes_back(client: openai.OpenAI, model: str) -> None:
    """The message that the client was given is taken as history, as it is."""
    first = client.chat.completions.create(
        model=model, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80, **ASKED
    )
    message = first.choices[0].message
    (call,) = message.tool_calls or ()
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"sky": "clear"})}
    answer = client.chat.completions.create(
        model=model, tools=[TOOL], messages=[*ASKED["messages"], message, result], max_tokens=8, temperature=0
    )
    assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_errors_are_the_clients_own(client: openai.OpenAI, model: str) -> None:
    """Its classes, with the code that tells a context too long."""
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="word " * 5000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
