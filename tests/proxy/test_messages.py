"""What a real proxy says is what its readers decode."""

import msgspec
import pytest

from kvbelt.wire.about import ABOUT
from kvbelt.wire.api_error import API_ERROR
from kvbelt.wire.console import CONSOLE_STATE
from kvbelt.wire.health import PROXY_HEALTH
from kvbelt.wire.request_record import REQUEST_LIST, REQUEST_RECORD, DoneTransfer
from kvbelt.wire.workers import WORKER_LIST, WORKER_ROW
from tests.proxy.support import Deployment, async_test, done
from tests.wire.messages import belt_snapshot


async def said(deployment, contract, path):
    """The answer as its type, which must hold every key that was sent."""
    reply = await deployment.get(path)
    message = contract.parse(reply.body, "the proxy")
    assert msgspec.json.decode(msgspec.json.encode(message)) == msgspec.json.decode(reply.body)
    return message


@async_test
async def test_each_answer_of_a_proxy_is_its_contract():
    """The answers include buffers, a transfer and a refused request."""
    deployment = Deployment()
    deployment.decode[0].more_health = {"belt": msgspec.to_builtins(belt_snapshot(receive_bytes=1000))}
    async with deployment:
        await deployment.ask({"prompt": "x", "max_tokens": 3, "stream": True}, request_id="a")
        attempt = next(iter(deployment.proxy.context.records.newest())).attempts[0]
        deployment.proxy.context.notified(done(transfer_id=attempt.transfer_id))
        await deployment.ask({"prompt": "", "max_tokens": -1}, request_id="b")
        name = deployment.worker(deployment.decode[0]).name
        health = await said(deployment, PROXY_HEALTH, "/health")
        assert [row.worker for row in health.workers if row.buffers is not None] == [name]
        assert (await said(deployment, WORKER_LIST, "/kvbelt/workers")).pairs[0].state == "warm"
        assert (await said(deployment, WORKER_ROW, f"/kvbelt/workers/{name}?role=decode")).role == "decode"
        newest, first = (await said(deployment, REQUEST_LIST, "/kvbelt/requests")).requests
        assert (newest.request_id, newest.status, first.over_belt) == ("b", 400, True)
        record = await said(deployment, REQUEST_RECORD, "/kvbelt/requests/a")
        assert isinstance(record.transfer, DoneTransfer)
        assert record.transfer.transport is None
        assert len((await said(deployment, CONSOLE_STATE, "/kvbelt/console.json")).requests) == 2
        assert (await said(deployment, ABOUT, "/kvbelt/about")).role == "proxy"


@pytest.mark.parametrize("path", ["/nowhere", "/kvbelt/requests/none", "/kvbelt/workers/none", "/console/none"])
@async_test
async def test_each_refusal_of_a_proxy_is_its_contract(path):
    """Every refusal is OpenAI's error object."""
    async with Deployment() as deployment:
        assert (await said(deployment, API_ERROR, path)).error.code == 404
