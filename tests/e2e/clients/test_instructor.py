"""instructor: objects by each of its ways."""

import instructor
import openai
import pytest

from tests.e2e.clients.schemas import Weather


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_an_object_comes_out(url: str, model: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60), mode=mode)
    found, completion = client.chat.completions.create_with_completion(
        model=model,
        response_model=Weather,
        messages=[{"role": "user", "content": "How is the weather?"}],
        max_tokens=80,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(found, Weather)
    assert completion.usage.completion_tokens <= 80


def test_an_object_grows_while_it_is_streamed(url: str, model: str) -> None:
    """The last of the partial objects is whole."""
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60))
    parts = list(
        client.chat.completions.create_partial(
            model=model,
            response_model=Weather,
            messages=[{"role": "user", "content": "How is the weather?"}],
            max_tokens=80,
            temperature=0,
        )
    )
    Weather.model_validate(parts[-1].model_dump())
