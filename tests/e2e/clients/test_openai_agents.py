"""openai-agents over chat completions: a loop of tool calls."""

import asyncio

import agents
import openai
import pytest

from tests.e2e.clients.schemas import Weather


@pytest.fixture
def chat(url: str, model: str) -> agents.OpenAIChatCompletionsModel:
    agents.set_tracing_disabled(disabled=True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    return agents.OpenAIChatCompletionsModel(model=model, openai_client=client)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_calls_its_tool_and_ends(chat: agents.OpenAIChatCompletionsModel, streamed: bool) -> None:
    """First the demanded tool, then, with its result in the history, an answer of the wanted class."""
    asked = []

    # Once it has been called it is offered no more: the small model would go on calling it.
    @agents.function_tool(is_enabled=lambda *_: not asked)
    def weather() -> str:
        """Get the weather."""
        asked.append("weather")
        return "clear and calm"

    settings = agents.ModelSettings(tool_choice="required", temperature=0, max_tokens=80, parallel_tool_calls=False)
    agent = agents.Agent(name="reporter", model=chat, tools=[weather], output_type=Weather, model_settings=settings)
    question = "How is the weather?"
    result = asyncio.run(_streamed(agent, question)) if streamed else agents.Runner.run_sync(agent, question)
    assert asked == ["weather"]
    assert isinstance(result.final_output, Weather)


async def _streamed(agent: agents.Agent, question: str) -> agents.RunResultStreaming:
    result = agents.Runner.run_streamed(agent, question)
    async for _ in result.stream_events():
        pass
    return result
