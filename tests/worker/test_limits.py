"""What one request may ask of a worker, so that others get what they need meanwhile."""

import asyncio

import pytest
from starlette.testclient import TestClient

from kvbelt.engine.api import SamplingParams
from kvbelt.worker.app import make_app
from kvbelt.worker.generation import Generation
from kvbelt.worker.requests import CompletionRequest

BOTH = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("more", "status"),
    [({"prompt": [[5]] * 8}, 200), ({"prompt": [[5]] * 9}, 400), ({"prompt": ["x"] * 3, "n": 3}, 400)],
)
def test_a_request_has_so_many_sequences_at_most(ready, more, status):
    """Prompts times n, refused before any of them is tokenized or submitted."""
    ready.max_sequences = 8
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
