"""LangChain's chat model."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.e2e.clients.schemas import Town, Weather

QUESTION = HumanMessage("How is the weather in Paris?")


@tool(args_schema=Town)
def weather(town: str) -> str:
    """Get the weather of a town."""
    return f"clear in {town}"


@pytest.fixture(scope="module")
def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=80, max_retries=0)


def test_streamed_and_whole_are_the_same(chat: ChatOpenAI) -> None:
    """Chunks add up to the message, usage included."""
    whole = chat.invoke([QUESTION], max_tokens=10)
    total = None
    for chunk in chat.stream([QUESTION], max_tokens=10, stream_usage=True):
        total = chunk if total is None else total + chunk
    assert total is not None
    assert total.text == whole.text
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"] == 10


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: str) -> None:
    """Either way the answer is an object of the class."""
    assert isinstance(chat.with_structured_output(Weather, method=method).invoke([QUESTION]), Weather)


def test_a_tool_is_called_and_answered(chat: ChatOpenAI) -> None:
    """The call is run by LangChain's own tool, and its result goes back."""
    asking = chat.bind_tools([weather], tool_choice="required", parallel_tool_calls=False, strict=True)
    message = asking.invoke([QUESTION])
    (call,) = message.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([weather]).invoke([QUESTION, message, result], max_tokens=8)
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]
