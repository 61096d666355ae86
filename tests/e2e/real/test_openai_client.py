"""The official OpenAI client against the proxy's port."""

from collections.abc import Iterator

import openai
import pytest

from kvbelt.ops.deployment import SyncDeployment

pytestmark = pytest.mark.e2e


@pytest.fixture
def openai_client(deployment: SyncDeployment) -> Iterator[openai.OpenAI]:
    """A client as a user would make it."""
    with openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(openai_client: openai.OpenAI) -> str:
    """The served model's name, as the API lists it."""
    return openai_client.models.list().data[0].id


def test_chat(openai_client: openai.OpenAI, model: str) -> None:
    """A chat is answered sensibly, with usage."""
    answer = openai_client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=20,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed(openai_client: openai.OpenAI, model: str) -> None:
    """Streamed chunks begin with the role, end with a finish reason and usage, and make up the whole answer."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 20,
    }
    whole = openai_client.chat.completions.create(**asked)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens_details.cached_tokens


def test_completion(openai_client: openai.OpenAI, model: str) -> None:
    """A completion, whole and streamed."""
    asked = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    whole = openai_client.completions.create(**asked)
    assert "Paris" in whole.choices[0].text
    streamed = "".join(part.choices[0].text for part in openai_client.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].text


def test_an_unknown_model_is_an_error_the_client_understands(openai_client: openai.OpenAI) -> None:
    """The client raises its own NotFoundError, with the model's name in it."""
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        openai_client.completions.create(model="no-such-model", prompt="hello", max_tokens=1)
