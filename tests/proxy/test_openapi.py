"""The OpenAPI document that the proxy publishes."""

import pytest

from kvbelt.wire.fields import CHATS_ONLY, COMPLETIONS_ONLY, FIELDS
from tests.proxy.support import Deployment, async_test


@pytest.mark.parametrize(
    ("shape", "unknown"),
    [("CompletionRequest", CHATS_ONLY | {"messages"}), ("ChatRequest", COMPLETIONS_ONLY | {"prompt"})],
)
@async_test
async def test_it_has_every_field(shape: str, unknown: frozenset[str]) -> None:
    """Of the kind of request."""
    async with Deployment() as deployment:
        document = (await deployment.get("/openapi.json")).json
    assert document["openapi"].startswith("3.1")
    assert set(document["components"]["schemas"][shape]["properties"]) >= FIELDS.keys() - unknown


@async_test
async def test_its_paths_are_there() -> None:
    """Each answers its method."""
    async with Deployment() as deployment:
        document = (await deployment.get("/openapi.json")).json
        for path, methods in document["paths"].items():
            for method in methods:
                reply = await deployment.get(path.replace("{model}", "toy"), method.upper(), body=b"{}")
                assert reply.status in (200, 400), path
