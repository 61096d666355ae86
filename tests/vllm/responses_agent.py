"""openai-agents over the Responses API, for an environment that has it: ``python … URL MODEL`` prints two answers."""

import asyncio
import json
import sys

import agents
import openai

#: A random model ends its answer only if a grammar does, and openai-agents takes no answer that is cut.
GRAMMAR = {"structured_outputs": {"choice": ["hello", "welcome"]}}


async def main(url: str, model: str) -> None:
    """Run an agent, whole and streamed, and print what it said."""
    agents.set_tracing_disabled(disabled=True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    responses = agents.OpenAIResponsesModel(model=model, openai_client=client)
    settings = agents.ModelSettings(temperature=0, max_tokens=64, extra_body=GRAMMAR)
    agent = agents.Agent("greeter", instructions="Greet.", model=responses, model_settings=settings)
    whole = await agents.Runner.run(agent, "Hello")
    streamed = agents.Runner.run_streamed(agent, "Hello")
    async for _ in streamed.stream_events():
        pass
    json.dump([whole.final_output, streamed.final_output], sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
