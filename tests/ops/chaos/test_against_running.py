"""A running deployment: a real proxy over stand-in workers, all in this process."""

import asyncio
import io

import pytest

from kvbelt.errors import StartError
from kvbelt.ops.chaos import report
from kvbelt.ops.chaos.config import ChaosConfig
from kvbelt.ops.chaos.run import StoppedError, run
from kvbelt.ops.chaos.verdict import Outcome
from kvbelt.ops.http_client import Address
from kvbelt.ops.terminal import Terminal
from tests.proxy.support import Deployment, async_test, eventually

KEY = "k" * 32


async def chaos(deployment, *, stop=None, **config):
    """A short run against a deployment."""
    small = {"url": Address("127.0.0.1", deployment.proxy.port), "seed": 1, "questions": 8, "longest": 60, "rate": 40.0}
    terminal = Terminal(io.StringIO())
    return await run(ChaosConfig(**small | config), terminal, lambda _: None, stop or asyncio.Event())


async def chaos_until(deployment, answers, **config):
    """A run that is stopped after so many answers, however long they take."""
    stop = asyncio.Event()

    async def stop_under_load():
        await eventually(lambda: deployment.proxy.context.records.ended_count > answers)
        stop.set()

    stopping = asyncio.create_task(stop_under_load())
    result = await chaos(deployment, stop=stop, seconds=600.0, **config)
    await stopping
    return result


@async_test
async def test_a_running_deployment_is_asked_and_thrown_at():
    """Its decode worker gives the reference answers; faults that need processes are left out, with the reason."""
    async with Deployment(prefill=2, decode=2) as deployment:
        result = await chaos(deployment, seconds=8.0, every=0.4)
    assert report.held(result), "\n".join(report.lines(result))
    assert result.outcomes[Outcome.RIGHT] > 50
    assert "decode-0, asked directly" in result.reference
    done = {fault.injection.kind.name for fault in result.injected}
    assert {"full-buffer", "rubbish-http", "clients-leave"} <= done
    assert "not started by this command" in result.impossible["kill-decode"]
    assert "network namespaces" in result.impossible["cut-decode"]


@async_test
async def test_a_proxy_beyond_loopback_is_asked_with_its_key():
    """With its key the proxy shows records, which come with a failure; without the key the run does not start."""
    async with Deployment(host="0.0.0.0", admin_key=KEY) as deployment:
        deployment.prefill[0].script.first_text = "something else"
        for key, why in ((None, "--admin-key-file"), ("w" * 32, "does not take this admin key")):
            with pytest.raises(StartError, match=why):
                await chaos(deployment, admin_key=key, seconds=1.0, kinds=())
        result = await chaos_until(deployment, 40, admin_key=KEY, kinds=())
    assert f'"{result.failures[0].request_id}"' in result.failures[0].record


@async_test
async def test_an_answer_that_is_not_the_reference_s_is_found():
    """A wrong first token is found, and the failure has the proxy's record."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.first_text = "something else"
        result = await chaos_until(deployment, 40, kinds=())
    assert not report.held(result)
    assert result.outcomes[Outcome.WRONG] > 0
    assert f'"{result.failures[0].request_id}"' in result.failures[0].record


@async_test
async def test_a_run_that_is_stopped_early_reports_what_it_found():
    """A stop after the load has begun gives a result; an earlier one raises."""
    async with Deployment() as deployment:
        result = await chaos_until(deployment, 10)
        assert result.interrupted
        assert result.seconds < 300
        stop = asyncio.Event()
        stop.set()
        with pytest.raises(StoppedError):
            await chaos(deployment, stop=stop, seconds=60.0)


@async_test
async def test_an_address_without_a_proxy_is_refused():
    """A worker's address is refused."""
    async with Deployment() as deployment:
        with pytest.raises(StartError, match="no kvbelt proxy"):
            await chaos(deployment, url=Address("127.0.0.1", deployment.decode[0].port))
