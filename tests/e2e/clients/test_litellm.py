"""LiteLLM, alone and as a router that falls back to a model with a longer context."""

import litellm
import pytest

QUESTION = [{"role": "user", "content": "How is the weather in Paris?"}]
LONG = [{"role": "user", "content": "word " * 5000}]


@pytest.fixture
def params(url: str, model: str) -> dict[str, object]:
    return {"model": f"openai/{model}", "api_base": url, "api_key": "none", "max_retries": 0, "timeout": 60}


def test_streamed_and_whole_are_the_same(params: dict[str, object]) -> None:
    """LiteLLM's own rebuilt answer is the whole one."""
    asked = {**params, "messages": QUESTION, "temperature": 0, "max_tokens": 10}
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.usage.completion_tokens == whole.usage.completion_tokens == 10


def test_too_long_a_prompt_has_its_own_error(params: dict[str, object]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**params, messages=LONG, max_tokens=1)


def test_the_router_falls_back_where_the_context_is_too_short(params: dict[str, object]) -> None:
    """The prompt that the deployment refuses is answered by the fallback."""
    longer = {"model": "openai/longer", "api_key": "none", "mock_response": "from the longer one"}
    router = litellm.Router(
        model_list=[
            {"model_name": "short", "litellm_params": params},
            {"model_name": "long", "litellm_params": longer},
        ],
        context_window_fallbacks=[{"short": ["long"]}],
        num_retries=0,
    )
    assert router.completion("short", messages=LONG).choices[0].message.content == "from the longer one"
    answer = router.completion("short", messages=QUESTION, max_tokens=4)
    assert answer.usage.completion_tokens == 4
