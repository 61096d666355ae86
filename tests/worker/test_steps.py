"""What a worker says about its steps, and the level between tokens that it is asked to keep."""

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs
from starlette.testclient import TestClient

from kvbelt.wire.health import WORKER_HEALTH
from kvbelt.worker.app import make_app
from kvbelt.worker.service import Service
from kvbelt.worker.steps import TELL_SECONDS, steps_of, tell_changes


def test_health_has_the_steps_of_the_engine(ready: Service) -> None:
    """What they cost, learnt from the requests that it served, and what is to be done now."""
    with TestClient(make_app(ready)) as client:
        before = WORKER_HEALTH.parse(client.get("/health").content, "the worker").steps
        assert client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 20}).status_code == 200
        after = WORKER_HEALTH.parse(client.get("/health").content, "the worker").steps
    assert before is not None
    assert after is not None
    assert after.costs.samples > before.costs.samples
    assert (after.prompt_tokens, after.decodes) == (0, 0)
    assert after.most_requests == ready.engine.settings.max_running
    assert after.most_kv_tokens == ready.engine.load().blocks_total * ready.engine.settings.block_size


def test_the_proxy_is_told_of_changes_alone(ready: Service) -> None:
    """At most once every tenth of a second, and not twice the same."""
    idle = steps_of(ready.engine)
    busy = structs.replace(idle, decodes=3)
    seen, told = iter([idle, idle, busy, busy, busy, idle]), []

    async def sleep(seconds: float) -> None:
        assert seconds == TELL_SECONDS

    async def run() -> None:
        with pytest.raises(RuntimeError):  # nothing is left to be seen
            await tell_changes(lambda: next(seen), told.append, sleep)

    asyncio.run(run())
    assert told == [idle, busy, idle]


def test_the_header_is_the_level_of_a_request(ready: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds; without the header the engine's setting counts."""
    levels: list[float | None] = []
    schedule = ready.engine._scheduler.schedule

    def noting(*given):
        plan = schedule(*given)
        levels.extend(sequence.request.itl_seconds for sequence in plan.admitted)
        return plan

    monkeypatch.setattr(ready.engine._scheduler, "schedule", noting)
    monkeypatch.setattr(ready.engine, "settings", replace(ready.engine.settings, itl_seconds=0.2))
    body = {"prompt": [1, 2, 3], "max_tokens": 1}
    with TestClient(make_app(ready)) as client:
        client.post("/v1/completions", json=body, headers={"x-kvbelt-itl-ms": "12.5"})
        client.post("/v1/completions", json=body)
    assert levels == [0.0125, 0.2]


@pytest.mark.parametrize("level", ["soon", "0", "-1", "nan", "inf"])
def test_a_level_that_is_no_time_is_refused(ready: Service, level: str) -> None:
    """The error names the header and the value."""
    with TestClient(make_app(ready)) as client:
        reply = client.post("/v1/completions", json={"prompt": [1]}, headers={"x-kvbelt-itl-ms": level})
    assert reply.status_code == 400
    assert f"x-kvbelt-itl-ms is {level!r}" in reply.json()["error"]["message"]
