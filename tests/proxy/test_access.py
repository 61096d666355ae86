"""Who may look at requests, and who may not."""

import json

import pytest

from kvbelt.errors import SettingsError
from kvbelt.proxy import Address, ProxySettings
from tests.proxy.support import Deployment, async_test

KEY = "k" * 32
BEARER = (b"authorization", b"Bearer " + KEY.encode())
LOOKED_AT = ("/kvbelt/requests", "/kvbelt/requests/r1", "/kvbelt/console.json")


async def statuses(deployment, *headers):
    """Of each place that shows requests."""
    return {(await deployment.get(path, headers=headers)).status for path in LOOKED_AT}


async def asked(**settings):
    """A deployment that has answered a request."""
    deployment = Deployment(**settings)
    await deployment.__aenter__()
    await deployment.ask({"prompt": "x", "max_tokens": 3})
    return deployment


@async_test
async def test_on_loopback_everybody_there_may_look():
    """Under any of its names."""
    deployment = await asked()
    assert await statuses(deployment) == {200}
    for host in (b"localhost:9100", b"[::1]:9100", b"127.0.0.1"):
        assert await statuses(deployment, (b"host", host)) == {200}
    await deployment.__aexit__()


@async_test
async def test_a_page_that_has_its_own_name_point_here_sees_nothing():
    """The browser says which name it asked for."""
    deployment = await asked()
    deployment.pool._authority = b"evil.example:9100"
    assert await statuses(deployment) == {403}
    await deployment.__aexit__()


@async_test
async def test_beyond_loopback_the_admin_key_is_asked_for():
    """And told so; what says nothing of requests stays open."""
    deployment = await asked(host="0.0.0.0", admin_key=KEY)
    assert await statuses(deployment) == {401}
    assert await statuses(deployment, (b"authorization", b"Bearer wrong")) == {401}
    assert await statuses(deployment, BEARER) == {200}
    for path in ("/health", "/metrics", "/kvbelt/workers", "/console"):
        assert (await deployment.get(path)).status == 200
    await deployment.__aexit__()


@async_test
async def test_without_a_key_the_refusal_says_how_to_look():
    """Both ways of it."""
    deployment = await asked(host="0.0.0.0")
    got = await deployment.get("/kvbelt/requests")
    assert got.status == 403
    assert "--admin-key-file" in got.json["error"]["message"]
    assert "--open-console" in got.json["error"]["message"]
    await deployment.__aexit__()


@async_test
async def test_an_open_console_shows_everybody():
    """Where that was said."""
    deployment = await asked(host="0.0.0.0", open_console=True)
    assert await statuses(deployment) == {200}
    await deployment.__aexit__()


@async_test
async def test_prompts_are_not_kept_unless_asked_for():
    """Then their beginning is, in whole characters."""
    body = {"messages": [{"role": "user", "content": "日本語" * 100}]}
    for characters, kept in ((0, None), (40, '[{"role": "user", "content": "日本語')):
        async with Deployment(record_prompts=characters) as deployment:
            await deployment.ask(json.dumps(body, ensure_ascii=False).encode(), chat=True)
            prompt = (await deployment.record())["prompt"]
            assert prompt == kept if kept is None else prompt.startswith(kept)
            assert len(prompt or "") == characters


def test_a_prompt_is_never_kept_without_bound():
    """The limit is said."""
    with pytest.raises(SettingsError, match="at most 10000"):
        ProxySettings(decode=(Address("a", 1),), record_prompts=10_001)


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=1001", "limit="])
def test_a_wrong_limit_is_named(query):
    """With its value and its range."""

    @async_test
    async def refused():
        async with Deployment() as deployment:
            got = await deployment.get(f"/kvbelt/requests?{query}")
            assert (got.status, got.json["error"]["param"]) == (400, "limit")

    refused()
