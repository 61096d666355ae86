"""``/v1/models`` and ``/v1/models/{id}``."""

import pytest

from tests.proxy.support import Deployment, async_test


@async_test
async def test_a_model_is_found_by_its_name():
    """The same card as in the list."""
    async with Deployment() as deployment:
        (card,) = (await deployment.get("/v1/models")).json["data"]
        got = await deployment.get("/v1/models/toy")
        assert (got.status, got.json) == (200, card)
        assert (await deployment.get("/v1/models/toy", "POST")).status == 405


@pytest.mark.parametrize("path", ["org/large%20toy", "org%2Flarge%20toy"])
@async_test
async def test_a_name_may_have_slashes_and_escapes(path):
    async with Deployment() as deployment:
        deployment.decode[0].models = ["toy", "org/large toy"]
        assert (await deployment.get(f"/v1/models/{path}")).json["id"] == "org/large toy"


@async_test
async def test_a_model_that_is_not_there_is_404_by_openais_code():
    async with Deployment() as deployment:
        got = await deployment.get("/v1/models/nope")
        assert (got.status, got.json["error"]["code"]) == (404, "model_not_found")


@async_test
async def test_a_refusal_of_the_worker_is_passed_on():
    """A client without the key that the workers want learns nothing of their models."""
    async with Deployment() as deployment:
        for standin in (*deployment.prefill, *deployment.decode):
            standin.script.api_key = "secret"
        assert (await deployment.get("/v1/models/toy")).status == 401
        bearer = ((b"authorization", b"Bearer secret"),)
        assert (await deployment.get("/v1/models/toy", headers=bearer)).status == 200


@async_test
async def test_without_a_worker_it_is_503():
    async with Deployment() as deployment:
        await deployment.decode[0].stop()
        await deployment.prefill[0].stop()
        got = await deployment.get("/v1/models/toy")
        assert (got.status, got.headers[b"retry-after"]) == (503, b"1")
