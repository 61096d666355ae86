"""Which clients see requests."""

import json

import pytest

from kvbelt.errors import SettingsError
from kvbelt.proxy import Address, ProxySettings
from tests.proxy.support import Deployment, async_test

KEY = "k" * 32
BEARER = (b"authorization", b"Bearer " + KEY.encode())
LOOKED_AT = ("/kvbelt/requests", "/kvbelt/requests/r1", "/kvbelt/console.json")


async def statuses(deployment, *headers):
    """The status of each route that shows requests."""
    return {(await deployment.get(path, headers=headers)).status for path in LOOKED_AT}


async def asked(**settings):
    """Start a deployment and send it one request."""
    deployment = Deployment(**settings)
    await deployment.__aenter__()
    await deployment.ask({"prompt": "x", "max_tokens": 3})
    return deployment


@async_test
async def test_on_loopback_no_key_is_needed():
    """Requests are shown under each of loopback's names."""
    deployment = await asked()
    assert await statuses(deployment) == {200}
    for host in (b"localhost:9100", b"[::1]:9100", b"127.0.0.1"):
        deployment.pool._authority = host
        assert await statuses(deployment) == {200}
    await deployment.__aexit__()


@async_test
async def test_a_host_that_is_not_loopback_is_refused():
    """A page whose own name resolves to loopback sends that name, so it sees nothing."""
    deployment = await asked()
    deployment.pool._authority = b"evil.example:9100"
    assert await statuses(deployment) == {403}
    await deployment.__aexit__()


@async_test
async def test_beyond_loopback_the_admin_key_is_asked_for():
    """Without the key the answer is 401; routes without data about requests need no key."""
    deployment = await asked(host="0.0.0.0", admin_key=KEY)
    assert await statuses(deployment) == {401}
    assert await statuses(deployment, (b"authorization", b"Bearer wrong")) == {401}
    assert await statuses(deployment, BEARER) == {200}
    for path in ("/health", "/metrics", "/kvbelt/workers", "/console"):
        assert (await deployment.get(path)).status == 200
    await deployment.__aexit__()


@async_test
async def test_without_a_key_the_refusal_says_how_to_look():
    """The refusal names both flags that open the console."""
    deployment = await asked(host="0.0.0.0")
    got = await deployment.get("/kvbelt/requests")
    assert got.status == 403
    assert "--admin-key-file" in got.json["error"]["message"]
    assert "--open-console" in got.json["error"]["message"]
    await deployment.__aexit__()


@async_test
async def test_an_open_console_needs_no_key():
    deployment = await asked(host="0.0.0.0", open_console=True)
    assert await statuses(deployment) == {200}
    await deployment.__aexit__()


@async_test
async def test_prompts_are_not_kept_unless_asked_for():
    """With ``record_prompts`` the start of the prompt is kept, in whole characters."""
    body = {"messages": [{"role": "user", "content": "日本語" * 100}]}
    for characters, kept in ((0, None), (40, '[{"role": "user", "content": "日本語')):
        async with Deployment(record_prompts=characters) as deployment:
            await deployment.ask(json.dumps(body, ensure_ascii=False).encode(), chat=True)
            prompt = (await deployment.record())["prompt"]
            assert prompt == kept if kept is None else prompt.startswith(kept)
            assert len(prompt or "") == characters


def test_a_prompt_is_never_kept_without_bound():
    """A setting above the limit is refused, and the error states the limit."""
    with pytest.raises(SettingsError, match="at most 10000"):
        ProxySettings(decode=(Address("a", 1),), record_prompts=10_001)


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=1001", "limit="])
@async_test
async def test_a_wrong_limit_is_named(query):
    async with Deployment() as deployment:
        got = await deployment.get(f"/kvbelt/requests?{query}")
        assert (got.status, got.json["error"]["param"]) == (400, "limit")
